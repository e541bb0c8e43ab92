"""The GPU engine: one Triton kernel for a whole sequence forward and one backward, a program a sample, state on chip.

Neighbouring factors are merged into two dense complex groups, W = A ⊗ C with A (P, P) and C (R, R), P·R = N, so that
with the state as a matrix H (P, R) the product is W h = A H C^T: dense tiles, padded with zeros to powers of two ≥ 16.
Backward recomputes z = W h_{t-1} + u_t from the saved states and keeps dA, dC and db on chip over time; every program
writes its own partial sums, which torch adds up: no atomics, so results repeat to the last bit.

Precision: fp32 storage, and fp32 products and sums (``precision="ieee"``) unless the caller asks for ``"tf32"``, which
rounds the operands of the products to 10 bits of mantissa. Nothing else, no global flag, switches it.

Letters: B samples, T steps, N units, P and R the sizes of the two groups.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    _import_error = f"triton cannot be imported: {error}"

PRECISIONS = ("ieee", "tf32")
# Shared memory of a program that backward compiled for sm_90 takes, over the bytes of the tiles A, C and H: 2.4 to 3.3.
_SHARED_RATIO = 3.5
SHARED_BYTES = 232448  # an H100's; a GPU in use is asked for its own
MIN_TILE = 16  # tl.dot takes no less
_WIDE_TILE = 1024  # units from which a program gets 8 warps in place of 4

if triton is not None:

    @triton.jit
    def _load(pointer, offsets, inside, plane):
        """Both planes of one tile; zeros outside."""
        return tl.load(pointer + offsets, mask=inside, other=0.0), tl.load(
            pointer + offsets + plane, mask=inside, other=0.0
        )

    @triton.jit
    def _store(pointer, offsets, inside, plane, real, imag):
        tl.store(pointer + offsets, real, mask=inside)
        tl.store(pointer + offsets + plane, imag, mask=inside)

    @triton.jit
    def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
        """Complex matrix product as four real ones, accumulated in fp32."""
        real = tl.dot(ar, br, input_precision=PRECISION) - tl.dot(ai, bi, input_precision=PRECISION)
        imag = tl.dot(ar, bi, input_precision=PRECISION) + tl.dot(ai, br, input_precision=PRECISION)
        return real, imag

    @triton.jit
    def _forward_kernel(
        inputs, group_a, group_c, bias, initial, mask, states, final, length,
        P: tl.constexpr, R: tl.constexpr, TILE_P: tl.constexpr, TILE_R: tl.constexpr,
        MODRELU: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        N: tl.constexpr = P * R
        sample = tl.program_id(0).to(tl.int64)
        p, r = tl.arange(0, TILE_P), tl.arange(0, TILE_R)
        tile, inside = p[:, None] * R + r[None, :], (p[:, None] < P) & (r[None, :] < R)  # (P, R)
        ar, ai = _load(group_a, p[:, None] * P + p[None, :], (p[:, None] < P) & (p[None, :] < P), P * P)  # (P, P)
        # Read with its indices exchanged: this is C^T.
        cr, ci = _load(group_c, r[None, :] * R + r[:, None], (r[:, None] < R) & (r[None, :] < R), R * R)  # (R, R)
        b = tl.load(bias + tile, mask=inside, other=0.0)  # (P, R)
        hr, hi = _load(initial + sample * 2 * N, tile, inside, N)  # (P, R)
        u_at = inputs + sample * length * 2 * N
        h_at = states + sample * length * 2 * N
        mask_at = mask + sample * length
        ur, ui = _load(u_at, tile, inside, N)  # (P, R)
        for t in range(length):
            # The next input is asked for before this step's products, which hide the way to memory.
            u_at += tl.where(t + 1 < length, 2 * N, 0)
            next_r, next_i = _load(u_at, tile, inside, N)  # (P, R)
            xr, xi = _product(hr, hi, cr, ci, PRECISION)  # (P, R) = H C^T
            zr, zi = _product(ar, ai, xr, xi, PRECISION)  # (P, R) = A H C^T
            zr += ur
            zi += ui
            if MODRELU:
                squared = zr * zr + zi * zi  # (P, R)
                modulus = tl.sqrt(tl.where(squared > 0, squared, 1.0))  # (P, R)
                # z multiplies the scale even where that is zero, so that a NaN stays a NaN.
                scale = tl.where((squared > 0) & (modulus + b > 0), 1.0 + b / modulus, 0.0)  # (P, R)
                zr *= scale
                zi *= scale
            if MASKED:
                keep = tl.load(mask_at) != 0
                mask_at += 1
                zr = tl.where(keep, zr, hr)  # (P, R)
                zi = tl.where(keep, zi, hi)  # (P, R)
            hr, hi = zr, zi  # (P, R)
            _store(h_at, tile, inside, N, hr, hi)
            h_at += 2 * N
            ur, ui = next_r, next_i  # (P, R)
        _store(final + sample * 2 * N, tile, inside, N, hr, hi)

    @triton.jit
    def _backward_kernel(
        d_states, d_final, inputs, group_a, group_c, bias, initial, mask, states,
        d_inputs, d_a, d_c, d_bias, d_initial, length,
        P: tl.constexpr, R: tl.constexpr, TILE_P: tl.constexpr, TILE_R: tl.constexpr,
        MODRELU: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        N: tl.constexpr = P * R
        sample = tl.program_id(0).to(tl.int64)
        p, r = tl.arange(0, TILE_P), tl.arange(0, TILE_R)
        tile, inside = p[:, None] * R + r[None, :], (p[:, None] < P) & (r[None, :] < R)  # (P, R)
        a_tile, a_inside = p[:, None] * P + p[None, :], (p[:, None] < P) & (p[None, :] < P)  # (P, P)
        c_tile, c_inside = r[:, None] * R + r[None, :], (r[:, None] < R) & (r[None, :] < R)  # (R, R)
        ar, ai = _load(group_a, a_tile, a_inside, P * P)  # (P, P)
        cr, ci = _load(group_c, c_tile, c_inside, R * R)  # (R, R)
        b = tl.load(bias + tile, mask=inside, other=0.0)  # (P, R)
        da_r = tl.zeros((TILE_P, TILE_P), tl.float32)
        da_i = tl.zeros((TILE_P, TILE_P), tl.float32)
        dc_r = tl.zeros((TILE_R, TILE_R), tl.float32)
        dc_i = tl.zeros((TILE_R, TILE_R), tl.float32)
        db = tl.zeros((TILE_P, TILE_R), tl.float32)
        gr, gi = _load(d_final + sample * 2 * N, tile, inside, N)  # (P, R): gradient of h_t, from the future
        first = initial + sample * 2 * N
        at = (sample * length + length - 1) * 2 * N  # 64 bits wide, as sample is
        for back in range(length):
            t = length - 1 - back
            ur, ui = _load(inputs + at, tile, inside, N)  # (P, R)
            before = tl.where(t > 0, states + at - 2 * N, first)
            hr, hi = _load(before, tile, inside, N)  # (P, R): h_{t-1}
            er, ei = _load(d_states + at, tile, inside, N)  # (P, R)
            gr += er
            gi += ei
            xr, xi = _product(hr, hi, tl.trans(cr), tl.trans(ci), PRECISION)  # (P, R) = H C^T
            if MODRELU:
                zr, zi = _product(ar, ai, xr, xi, PRECISION)  # (P, R) = A H C^T
                zr += ur
                zi += ui
                squared = zr * zr + zi * zi  # (P, R)
                inverse = 1.0 / tl.sqrt(tl.where(squared > 0, squared, 1.0))  # (P, R)
                active = (squared > 0) & (squared * inverse + b > 0)  # (P, R)
                # h = z + b·z/|z|: the radial part of the gradient passes as it is, the tangential one times 1 + b/|z|.
                nr, ni = zr * inverse, zi * inverse  # (P, R): z/|z|
                radial = nr * gr + ni * gi  # (P, R)
                ratio = b * inverse  # (P, R)
                # A NaN is not active: 0 · NaN carries it into the gradients.
                dr = tl.where(active, gr + ratio * (gr - nr * radial), 0.0 * nr)  # (P, R)
                di = tl.where(active, gi + ratio * (gi - ni * radial), 0.0 * ni)  # (P, R)
                radial = tl.where(active, radial, 0.0)  # (P, R)
            else:
                dr, di, radial = gr, gi, tl.zeros((TILE_P, TILE_R), tl.float32)  # (P, R)
            if MASKED:
                keep = tl.load(mask + sample * length + t) != 0
                dr = tl.where(keep, dr, 0.0)  # (P, R)
                di = tl.where(keep, di, 0.0)  # (P, R)
                radial = tl.where(keep, radial, 0.0)  # (P, R)
            db += radial
            _store(d_inputs + at, tile, inside, N, dr, di)
            wr, wi = _product(dr, di, tl.trans(xr), -tl.trans(xi), PRECISION)  # (P, P) = dZ X^H
            da_r += wr
            da_i += wi
            yr, yi = _product(tl.trans(ar), -tl.trans(ai), dr, di, PRECISION)  # (P, R) = dX = A^H dZ
            wr, wi = _product(tl.trans(yr), tl.trans(yi), hr, -hi, PRECISION)  # (R, R) = dX^T conj(H)
            dc_r += wr
            dc_i += wi
            yr, yi = _product(yr, yi, cr, -ci, PRECISION)  # (P, R) = dH = dX conj(C)
            if MASKED:
                yr = tl.where(keep, yr, gr)  # (P, R)
                yi = tl.where(keep, yi, gi)  # (P, R)
            gr, gi = yr, yi  # (P, R)
            at -= 2 * N
        _store(d_initial + sample * 2 * N, tile, inside, N, gr, gi)
        _store(d_a + sample * 2 * P * P, a_tile, a_inside, P * P, da_r, da_i)
        _store(d_c + sample * 2 * R * R, c_tile, c_inside, R * R, dc_r, dc_i)
        tl.store(d_bias + sample * N + tile, db, mask=inside)


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on the CPU, slowly."""
    return triton is not None and not isinstance(_forward_kernel, triton.runtime.JITFunction)


def unavailable_reason() -> str | None:
    """Why the engine cannot run in this process, or None."""
    if triton is None:
        return _import_error
    if not _interpreted() and not torch.cuda.is_available():
        return "no GPU (TRITON_INTERPRET=1, set before the import, runs it on the CPU, for tests)"
    return None


def is_available() -> bool:
    """Whether the engine can run in this process."""
    return unavailable_reason() is None


def _tile(size: int) -> int:
    return max(MIN_TILE, 1 << (size - 1).bit_length())


def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on ``device``."""
    if device.type != "cuda":
        return SHARED_BYTES
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)


def plan_groups(shapes: Sequence[tuple[int, int]], shared: int = SHARED_BYTES) -> tuple[int, int, int] | None:
    """(cut, P, R): factors before ``cut`` merge into A (P, P), the others into C (R, R); the cheapest that fits.

    Only cuts that leave both groups square count; all factors in one group always are. None: no cut has a backward
    that fits ``shared`` bytes of shared memory.
    """
    units = math.prod(rows for rows, _ in shapes)
    best = None
    for cut in range(len(shapes)):
        rows, columns = math.prod(p for p, _ in shapes[:cut]), math.prod(q for _, q in shapes[:cut])
        tile_p, tile_r = _tile(rows), _tile(units // rows)
        tiles = 2 * 4 * (tile_p * tile_p + tile_r * tile_r + tile_p * tile_r)  # bytes of A, C and H
        if rows == columns and _SHARED_RATIO * tiles <= shared:
            cost = tile_p * tile_r * (tile_p + tile_r)
            best = min(best or (cost, cut, rows), (cost, cut, rows))
    return None if best is None else (best[1], best[2], units // best[2])


def supports(inputs: Tensor, factors: Sequence[Tensor]) -> str | None:
    """None if the engine can run ``inputs`` (B, T, 2, N) with ``factors`` (2, P_f, Q_f), else the reason."""
    if inputs.dtype != torch.float32:
        return f"the triton engine computes in float32, got {inputs.dtype}"
    device = "cpu" if _interpreted() else "cuda"
    if inputs.device.type != device:
        return f"the triton engine runs on {device} tensors here, got {inputs.device}"
    shapes = [(factor.shape[1], factor.shape[2]) for factor in factors]
    if plan_groups(shapes, _shared_limit(inputs.device)) is None:
        listed = " ".join(f"{rows}x{columns}" for rows, columns in shapes)
        return (
            f"N = {inputs.shape[-1]} with factors {listed} has no split into two square groups that fit "
            f"{_shared_limit(inputs.device)} bytes of shared memory"
        )
    return None


def merge(factors: Sequence[Tensor]) -> Tensor:
    """Kronecker product (2, ∏ P_f, ∏ Q_f) of complex factors (2, P_f, Q_f), in real arithmetic, differentiable."""
    group = factors[0]  # (2, P, Q)
    for factor in factors[1:]:
        parts = group[:, None, :, None, :, None] * factor[None, :, None, :, None, :]  # (2, 2, P, P_f, Q, Q_f)
        group = torch.stack((parts[0, 0] - parts[1, 1], parts[0, 1] + parts[1, 0])).flatten(1, 2).flatten(2, 3)
    return group


def _launch(kernel, inputs: Tensor, tensors: Sequence[Tensor], sizes: tuple[int, int], flags: dict) -> None:
    rows, columns = sizes
    device = torch.cuda.device(inputs.device) if inputs.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(inputs.shape[0],)](
            *tensors,
            inputs.shape[1],
            P=rows,
            R=columns,
            TILE_P=_tile(rows),
            TILE_R=_tile(columns),
            num_warps=8 if _tile(rows) * _tile(columns) > _WIDE_TILE else 4,
            **flags,
        )


def _mask_bytes(mask: Tensor | None, inputs: Tensor) -> Tensor:
    """The mask as bytes (B, T); any tensor where there is none and the kernel reads none."""
    return inputs if mask is None else mask.contiguous().view(torch.uint8)


def _forward(
    inputs: Tensor, group_a: Tensor, group_c: Tensor, bias: Tensor, initial_state: Tensor, mask: Tensor | None,
    modrelu: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = inputs.contiguous()
    states, final = torch.empty_like(inputs), inputs.new_empty(initial_state.shape)  # (B, T, 2, N), (B, 2, N)
    read = [tensor.contiguous() for tensor in (group_a, group_c, bias, initial_state)]
    flags = {"MODRELU": modrelu, "MASKED": mask is not None, "PRECISION": precision}
    tensors = [inputs, *read, _mask_bytes(mask, inputs), states, final]
    _launch(_forward_kernel, inputs, tensors, (group_a.shape[1], group_c.shape[1]), flags)
    return states, final


def _backward(
    d_states: Tensor, d_final: Tensor, inputs: Tensor, group_a: Tensor, group_c: Tensor, bias: Tensor,
    initial_state: Tensor, mask: Tensor | None, states: Tensor, modrelu: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of inputs (B, T, 2, N), A (2, P, P), C (2, R, R), bias (N,) and initial_state (B, 2, N)."""
    batch = inputs.shape[0]
    read = [tensor.contiguous() for tensor in (d_states, d_final, inputs, group_a, group_c, bias, initial_state)]
    inputs = read[2]
    d_inputs, d_initial = torch.empty_like(inputs), inputs.new_empty(initial_state.shape)
    d_a = inputs.new_empty(batch, *group_a.shape)  # (B, 2, P, P)
    d_c = inputs.new_empty(batch, *group_c.shape)  # (B, 2, R, R)
    d_bias = inputs.new_empty(batch, *bias.shape)  # (B, N)
    flags = {"MODRELU": modrelu, "MASKED": mask is not None, "PRECISION": precision}
    written = [d_inputs, d_a, d_c, d_bias, d_initial]
    tensors = [*read, _mask_bytes(mask, inputs), states.contiguous(), *written]
    _launch(_backward_kernel, inputs, tensors, (group_a.shape[1], group_c.shape[1]), flags)
    return d_inputs, d_a.sum(0), d_c.sum(0), d_bias.sum(0), d_initial


if __name__.startswith("kru_hf."):
    # Only the installed package registers operators: a second registration of a name replaces the first, so two
    # revisions of pushed code would run each other's kernel.
    _scan_op = torch.library.custom_op("kru_hf::scan_triton", _forward, mutates_args=())
    _scan_backward_op = torch.library.custom_op("kru_hf::scan_triton_backward", _backward, mutates_args=())

    @_scan_op.register_fake
    def _(inputs, group_a, group_c, bias, initial_state, mask, modrelu, precision):
        batch, length, _, units = inputs.shape
        return inputs.new_empty(batch, length, 2, units), inputs.new_empty(batch, 2, units)

    @_scan_backward_op.register_fake
    def _(d_states, d_final, inputs, group_a, group_c, bias, initial_state, mask, states, modrelu, precision):
        batch, length, _, units = inputs.shape
        return (
            inputs.new_empty(batch, length, 2, units),
            group_a.new_empty(group_a.shape),
            group_c.new_empty(group_c.shape),
            bias.new_empty(bias.shape),
            inputs.new_empty(batch, 2, units),
        )

    def _setup(ctx, inputs, output) -> None:
        *tensors, modrelu, precision = inputs
        ctx.flags = modrelu, precision
        ctx.save_for_backward(*tensors, output[0])

    def _op_gradient(ctx, d_states, d_final):
        d_inputs, d_a, d_c, d_bias, d_initial = _scan_backward_op(d_states, d_final, *ctx.saved_tensors, *ctx.flags)
        return d_inputs, d_a, d_c, d_bias, d_initial, None, None, None

    _scan_op.register_autograd(_op_gradient, setup_context=_setup)
    _differentiable: Callable[..., tuple[Tensor, Tensor]] = _scan_op
else:

    class _Scan(torch.autograd.Function):
        """The same for code that was loaded from a model's repository."""

        @staticmethod
        def forward(ctx, *arguments):
            *tensors, modrelu, precision = arguments
            states, final = _forward(*arguments)
            ctx.flags = modrelu, precision
            ctx.save_for_backward(*tensors, states)
            return states, final

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, d_states, d_final):
            return *_backward(d_states, d_final, *ctx.saved_tensors, *ctx.flags), None, None, None

    _differentiable = _Scan.apply


def kru_scan_triton(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "modrelu",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """The recurrence h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t) in one GPU kernel, float32.

    Args:
        inputs: U x_t (B, T, 2, N).
        factors: F tensors W_f (2, P_f, Q_f) with ∏ P_f = ∏ Q_f = N.
        bias: b of modReLU (N,). Not used by the "identity" activation.
        initial_state: h_0 (B, 2, N); zeros if None.
        mask: (B, T) bool; False holds the state.
        activation: "modrelu" or "identity".
        precision: "ieee" (fp32 products), or "tf32" (operands rounded to 10 bits of mantissa, fp32 sums).

    Returns:
        states (B, T, 2, N) and final_state (B, 2, N), a copy. The same to the last bit from run to run.

    Raises:
        RuntimeError: no triton, no GPU, or tensors that :func:`supports` refuses. ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    shapes = [(factor.shape[1], factor.shape[2]) for factor in factors]
    obstacle = unavailable_reason() or supports(inputs, factors)
    plan = None if obstacle else plan_groups(shapes, _shared_limit(inputs.device))
    if obstacle is not None or plan is None:
        raise RuntimeError(f"the triton engine cannot run: {obstacle}")
    cut = plan[0]
    one = inputs.new_tensor([[[1.0]], [[0.0]]])  # (2, 1, 1): what A is where C holds all factors
    group_a, group_c = merge(factors[:cut] or [one]), merge(factors[cut:])  # (2, P, P), (2, R, R)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], 2, inputs.shape[3])  # (B, 2, N)
    return _differentiable(inputs, group_a, group_c, bias, initial_state, mask, activation == "modrelu", precision)
