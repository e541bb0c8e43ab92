"""The GPU engine: one Triton kernel for a whole sequence forward and one backward, a program a sample, state on chip.

Neighbouring factors are merged into two dense complex groups, W = A ⊗ C with A (P, P) and C (R, R), P·R = N, so that
with the state as a matrix H (P, R) the product is W h = A H C^T: dense tiles, padded with zeros to powers of two ≥ 16.
Both kernels hold only what a step needs from the step before it. Backward carries the gradient of the state,
dH = A^H dZ conj(C), with |z| of each unit saved by forward; dA and dC are sums over all steps, which a third kernel or
torch computes afterwards. No atomics: results repeat to the last bit.

Precision: fp32 storage and sums. Products are as exact as fp32's: computed in fp32 for tiles up to 512 units and as
six bf16 products each (bf16x6) for larger ones, whose operands do not fit the registers in fp32. ``precision`` asks for
another: "tf32" rounds the operands to 10 bits of mantissa. No global flag switches the kernels; dA and dC of the larger
tiles are torch's matrix products and follow torch.set_float32_matmul_precision.

Letters: B samples, T steps, N units, P and R the sizes of the two groups.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kronecker import kron_dense
from .scan_checks import Named, check_scan
from .transforms import differentiable_once, refuse_derivative

try:
    import triton

    from .triton_kernels import backward_kernel, forward_kernel, gradient_kernel
except ImportError as error:
    triton = None
    _import_error = f"triton cannot be imported: {error}"

PRECISIONS = ("fp32", "tf32")
# Shared memory allowed for a program over the bytes of its tiles A, C and H. Compiled for sm_90 it takes 1.0 to 1.54;
# the larger tiles that this keeps out lose their registers to memory and have not been run on a GPU.
_SHARED_RATIO = 3.5
SHARED_BYTES = 232448  # an H100's; a GPU in use is asked for its own
MIN_TILE = 16  # tl.dot takes no less
_IEEE_TILE = 512  # units up to which the operands of fp32 products fit the registers
_CHUNK = 32  # steps whose share of dA and dC one program adds up
_SLICES = 256  # matrix products that torch runs side by side for dA and dC, at most
_GRADIENT_ELEMENTS = 1 << 26  # of the states whose share torch computes at once: bounds its temporaries


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on the CPU, slowly."""
    return triton is not None and not isinstance(forward_kernel, triton.runtime.JITFunction)


def unavailable_reason() -> str | None:
    """Why the engine cannot run in this process, or None."""
    if triton is None:
        return _import_error
    if not is_interpreted() and not torch.cuda.is_available():
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
    device = "cpu" if is_interpreted() else "cuda"
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


def _check(
    inputs: Tensor, group_a: Tensor, group_c: Tensor, bias: Tensor, initial_state: Tensor, mask: Tensor | None,
    others: Sequence[Named] = (),
) -> None:  # fmt: skip
    """Raise unless the kernels can be given these tensors."""
    check_scan("kru", inputs, [group_a, group_c], bias, initial_state, mask, others)
    if (obstacle := unavailable_reason() or supports(inputs, [group_a, group_c])) is not None:
        raise RuntimeError(f"the triton engine cannot run: {obstacle}")
    for name, group in (("group_a", group_a), ("group_c", group_c)):
        if group.shape[1] != group.shape[2]:
            raise ValueError(f"{name} must have the shape (2, P, P), got {tuple(group.shape)}")


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its numbers in memory in the order of the indices, signs included."""
    return tensor.resolve_neg().contiguous()


def _inner(left: Tensor, right: Tensor, slices: int) -> Tensor:
    """left^T right of (K, M) and (K, L), cut into ``slices`` along K: M and L alone are too small for a GPU."""
    pieces = [tensor.unflatten(0, (slices, -1)) for tensor in (left, right)]  # (slices, K / slices, M or L)
    return (pieces[0].mT @ pieces[1]).sum(0)  # (M, L)


def group_gradients(
    d_inputs: Tensor, states: Tensor, initial_state: Tensor, group_a: Tensor, group_c: Tensor
) -> tuple[Tensor, Tensor]:
    """dA (2, P, P) and dC (2, R, R) from dZ (B, T, 2, N) and the states, as products over all steps at once.

    dA = Σ dZ conj(C) H^H and dC = Σ dZ^T conj(A H), with H = h_{t-1}.
    """
    (ar, ai), (cr, ci) = group_a, group_c  # (P, P), (R, R)
    units = (ar.shape[0], cr.shape[0])
    steps = d_inputs.shape[0] * d_inputs.shape[1]
    slices = next(count for count in range(min(steps, _SLICES), 0, -1) if steps % count == 0)
    by_row = (2, 3, 0, 1, 4)  # (B, T, 2, P, R) -> (2, P, B, T, R)
    d = d_inputs.unflatten(3, units).permute(by_row).contiguous()  # (2, P, B, T, R)
    h = torch.empty_like(d)
    h[:, :, :, :1] = initial_state[:, None].unflatten(3, units).permute(by_row)  # (2, P, B, 1, R)
    h[:, :, :, 1:] = states[:, :-1].unflatten(3, units).permute(by_row)  # (2, P, B, T - 1, R)
    d, h = d.view(2, -1, units[1]), h.view(2 * units[0], -1)  # (2, P·B·T, R), (2P, B·T·R)
    form = torch.cat((torch.cat((ar, -ai), 1), torch.cat((ai, ar), 1)))  # (2P, 2P): A on both planes
    y = (form @ h).view(d.shape)  # (2, P·B·T, R) = A H
    cross = _inner(d[1], y[0], slices) - _inner(d[0], y[1], slices)  # (R, R)
    d_c = torch.stack((_inner(d.flatten(0, 1), y.flatten(0, 1), slices), cross))  # (2, R, R)
    dy = torch.stack(((d[0] @ cr).addmm_(d[1], ci), (d[1] @ cr).addmm_(d[0], ci, alpha=-1)))  # (2, P·B·T, R)
    rows = [tensor.view(2 * units[0], slices, -1).transpose(0, 1) for tensor in (dy, h)]  # (slices, 2P, B·T·R / slices)
    blocks = (rows[0] @ rows[1].mT).sum(0).view(2, units[0], 2, units[0])  # (2, P, 2, P)
    d_a = torch.stack((blocks[0, :, 0] + blocks[1, :, 1], blocks[1, :, 0] - blocks[0, :, 1]))  # (2, P, P)
    return d_a, d_c


def _launch(
    kernel, inputs: Tensor, tensors: Sequence[Tensor], sizes: tuple[int, int], warps: int, flags: dict, chunks: int = 1
) -> None:
    rows, columns = sizes
    device = torch.cuda.device(inputs.device) if inputs.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(inputs.shape[0], chunks)](
            *tensors,
            inputs.shape[1],
            P=rows,
            R=columns,
            TILE_P=_tile(rows),
            TILE_R=_tile(columns),
            num_warps=warps,
            **flags,
        )


def _flags(sizes: tuple[int, int], modrelu: bool, mask: Tensor | None, precision: str) -> dict:
    """The kernels' options; "fp32" is what computes products as exact as fp32's fastest for these tiles."""
    if precision == "fp32":
        # Triton's interpreter computes in fp32 and does not know the other name.
        small = is_interpreted() or _tile(sizes[0]) * _tile(sizes[1]) <= _IEEE_TILE
        precision = "ieee" if small else "bf16x6"
    return {"MODRELU": modrelu, "MASKED": mask is not None, "PRECISION": precision}


def _mask_bytes(mask: Tensor | None, inputs: Tensor) -> Tensor:
    """The mask as bytes (B, T); any tensor where there is none and the kernel reads none."""
    return inputs if mask is None else mask.contiguous().view(torch.uint8)


def _forward(
    inputs: Tensor, group_a: Tensor, group_c: Tensor, bias: Tensor, initial_state: Tensor, mask: Tensor | None,
    modrelu: bool, save: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """States (B, T, 2, N), final state (B, 2, N) and what backward needs with ``save``: |z| (B, T, N), else empty."""
    _check(inputs, group_a, group_c, bias, initial_state, mask)
    batch, length, _, units = inputs.shape
    inputs, sizes = _dense(inputs), (group_a.shape[1], group_c.shape[1])
    states, final = torch.empty_like(inputs), inputs.new_empty(batch, 2, units)  # (B, T, 2, N), (B, 2, N)
    moduli = inputs.new_empty((batch, length, units) if save and modrelu else (0,))  # (B, T, N)
    right = group_c.mT  # (2, R, R): C^T
    read = [_dense(tensor) for tensor in (group_a, right, bias, initial_state)]
    flags = _flags(sizes, modrelu, mask, precision) | {"SAVE": save}
    tile = _tile(sizes[0]) * _tile(sizes[1])
    tensors = [inputs, *read, _mask_bytes(mask, inputs), states, final, moduli]
    _launch(forward_kernel, inputs, tensors, sizes, 4 if tile <= 2 * _IEEE_TILE else 8, flags)
    return states, final, moduli


def _group_gradients(
    d_inputs: Tensor, states: Tensor, initial_state: Tensor, group_a: Tensor, group_c: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """dA (2, P, P) and dC (2, R, R), by a kernel where its sums fit the registers, else by torch, in parts."""
    sizes = (group_a.shape[1], group_c.shape[1])
    batch, length = d_inputs.shape[:2]
    if _tile(sizes[0]) * _tile(sizes[1]) <= _IEEE_TILE:
        chunks = -(-length // _CHUNK)
        d_a = d_inputs.new_empty(batch, chunks, *group_a.shape)  # (B, chunks, 2, P, P)
        d_c = d_inputs.new_empty(batch, chunks, *group_c.shape)  # (B, chunks, 2, R, R)
        read = [_dense(tensor) for tensor in (d_inputs, group_a, group_c, initial_state, states)]
        flags = {"CHUNK": _CHUNK, "PRECISION": precision}
        _launch(gradient_kernel, d_inputs, [*read, d_a, d_c], sizes, 4, flags, chunks)
        return d_a.sum((0, 1)), d_c.sum((0, 1))
    d_a, d_c = torch.zeros_like(group_a), torch.zeros_like(group_c)  # (2, P, P), (2, R, R)
    samples = max(1, _GRADIENT_ELEMENTS // states[0].numel())
    for start in range(0, batch, samples):
        some = slice(start, start + samples)
        share_a, share_c = group_gradients(d_inputs[some], states[some], initial_state[some], group_a, group_c)
        d_a += share_a
        d_c += share_c
    return d_a, d_c


def _conjugate(group: Tensor) -> Tensor:
    """conj(A) of a complex matrix A (2, P, Q)."""
    return torch.stack((group[0], -group[1]))


def _backward(
    d_states: Tensor, d_final: Tensor, group_a: Tensor, group_c: Tensor, bias: Tensor, initial_state: Tensor,
    mask: Tensor | None, states: Tensor, moduli: Tensor, modrelu: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of inputs (B, T, 2, N), A (2, P, P), C (2, R, R), bias (N,) and initial_state (B, 2, N)."""
    full, end = tuple(states.shape), tuple(initial_state.shape)
    others: list[Named] = [("d_states", d_states, full), ("d_final", d_final, end)]
    others.append(("moduli", moduli, (*full[:2], full[3]) if modrelu else (0,)))
    _check(states, group_a, group_c, bias, initial_state, mask, others)
    states, sizes = _dense(states), (group_a.shape[1], group_c.shape[1])
    left, right = _conjugate(group_a).mT, _conjugate(group_c)  # (2, P, P): A^H, (2, R, R): conj(C)
    read = [_dense(tensor) for tensor in (d_states, d_final, left, right, bias)]
    d_inputs, d_initial = torch.empty_like(states), states.new_empty(initial_state.shape)  # (B, T, 2, N), (B, 2, N)
    d_bias = states.new_empty(states.shape[0], *bias.shape)  # (B, N)
    tensors = [*read, _mask_bytes(mask, states), states, moduli, d_inputs, d_bias, d_initial]
    flags = _flags(sizes, modrelu, mask, precision)
    tile = _tile(sizes[0]) * _tile(sizes[1])
    _launch(backward_kernel, states, tensors, sizes, 4 if tile <= _IEEE_TILE else 8, flags)
    d_a, d_c = _group_gradients(d_inputs, states, initial_state, group_a, group_c, flags["PRECISION"])
    return d_inputs, d_a, d_c, d_bias.sum(0), d_initial


if __name__.startswith("kru_hf."):
    # Only the installed package registers operators: a second registration of a name replaces the first, so two
    # revisions of pushed code would run each other's kernel.
    _scan_op = torch.library.custom_op("kru_hf::scan_triton", _forward, mutates_args=())
    _scan_backward_op = torch.library.custom_op("kru_hf::scan_triton_backward", _backward, mutates_args=())

    @_scan_op.register_fake
    def _(inputs, group_a, group_c, bias, initial_state, mask, modrelu, save, precision):
        check_scan("kru", inputs, [group_a, group_c], bias, initial_state, mask)
        batch, length, _, units = inputs.shape
        moduli = inputs.new_empty((batch, length, units) if save and modrelu else (0,))
        return inputs.new_empty(batch, length, 2, units), inputs.new_empty(batch, 2, units), moduli

    @_scan_backward_op.register_fake
    def _(d_states, d_final, group_a, group_c, bias, initial_state, mask, states, moduli, modrelu, precision):
        read = (states, group_a, group_c, bias, initial_state)
        return tuple(tensor.new_empty(tensor.shape) for tensor in read)

    def _setup(ctx, inputs, output) -> None:
        _, *tensors, modrelu, _, precision = inputs
        ctx.flags = modrelu, precision
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[0], output[2])

    def _op_gradient(ctx, d_states, d_final, _):
        gradients = _scan_backward_op(d_states, d_final, *ctx.saved_tensors, *ctx.flags)
        return *gradients, None, None, None, None

    _scan_op.register_autograd(_op_gradient, setup_context=_setup)
    _scan_backward_op.register_autograd(refuse_derivative)
    _differentiable: Callable[..., tuple[Tensor, Tensor, Tensor]] = _scan_op
else:

    class _Scan(torch.autograd.Function):
        """The same for code that was loaded from a model's repository."""

        @staticmethod
        def forward(ctx, *arguments):
            _, *tensors, modrelu, _, precision = arguments
            states, final, moduli = _forward(*arguments)
            ctx.flags = modrelu, precision
            ctx.mark_non_differentiable(moduli)
            ctx.save_for_backward(*tensors, states, moduli)
            return states, final, moduli

        @staticmethod
        @differentiable_once
        def backward(ctx, d_states, d_final, _):
            return *_backward(d_states, d_final, *ctx.saved_tensors, *ctx.flags), None, None, None, None

    _differentiable = _Scan.apply


def kru_scan_triton(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "modrelu",
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """The recurrence h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t) in one GPU kernel, float32.

    Args:
        inputs: U x_t (B, T, 2, N).
        factors: F tensors W_f (2, P_f, Q_f) with ∏ P_f = ∏ Q_f = N.
        bias: b of modReLU (N,). Not used by the "identity" activation.
        initial_state: h_0 (B, 2, N); zeros if None.
        mask: (B, T) bool; False holds the state.
        activation: "modrelu" or "identity".
        precision: "fp32", or "tf32" (the operands of the kernels' products rounded to 10 bits of mantissa, fp32 sums).

    Returns:
        states (B, T, 2, N) and final_state (B, 2, N), a copy. The same to the last bit from run to run.

    Raises:
        RuntimeError: no triton, no GPU, or tensors that :func:`supports` refuses. ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_scan("kru", inputs, factors, bias, initial_state, mask)
    shapes = [(factor.shape[1], factor.shape[2]) for factor in factors]
    obstacle = unavailable_reason() or supports(inputs, factors)
    plan = None if obstacle else plan_groups(shapes, _shared_limit(inputs.device))
    if obstacle is not None or plan is None:
        raise RuntimeError(f"the triton engine cannot run: {obstacle}")
    cut = plan[0]
    one = torch.tensor([[[1.0]], [[0.0]]], device=inputs.device)  # (2, 1, 1): what A is where C holds all factors
    # In complex arithmetic: with real planes the launches for nine small factors took longer than the recurrence.
    group_a, group_c = kron_dense(factors[:cut] or [one]), kron_dense(factors[cut:])  # (2, P, P), (2, R, R)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], 2, inputs.shape[3])  # (B, 2, N)
    read = (inputs, group_a, group_c, bias, initial_state)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)
    states, final, _ = _differentiable(*read, mask, activation == "modrelu", save, precision)
    return states, final
