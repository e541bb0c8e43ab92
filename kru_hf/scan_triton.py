"""The GPU engine: one Triton kernel for a whole sequence forward and one backward, a program a sample, state on chip.

Neighbouring factors are merged into two dense complex groups, W = A ⊗ C with A (P, P) and C (R, R), P·R = N, so that
with the state as a matrix H (P, R) the product is W h = A H C^T: dense tiles, padded with zeros to powers of two ≥ 16.
Both kernels hold only what a step needs from the step before it. Backward carries the gradient of the state,
dH = A^H dZ conj(C), with |z| of each unit saved by forward; dA and dC are sums over all steps, which a third kernel or
torch computes afterwards. No atomics: results repeat to the last bit.

Precision: fp32 storage and sums. Products are as exact as fp32's: computed in fp32 for tiles up to 512 units and as
six bf16 products each (bf16x6) for larger ones, whose operands do not fit the registers in fp32. No global flag
switches the kernels; dA and dC of the larger tiles are torch's products: torch.set_float32_matmul_precision.

A sum of terms, W = Σ_e A_e ⊗ C_e, reads the groups of a term anew in every step.

Letters: B samples, T steps, N units, E terms, P and R the sizes of the two groups. The complex cell alone: the gated
ones have no kernels here yet.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import Cell
from .kronecker import factor_gradients, kron_product, to_complex, to_planes
from .scan_portable import group_gradients
from .scan_reference import Engine, ScanCall, dense

try:
    import triton

    from .triton_kernels import backward_kernel, forward_kernel, gradient_kernel
except ImportError as error:
    triton = None
    _import_error = f"triton cannot be imported: {error}"

# Shared memory allowed for a program over the bytes of its tiles A, C and H. Compiled for sm_90 it takes 1.0 to 1.54;
# the larger tiles that this keeps out lose their registers to memory and have not been run on a GPU.
_SHARED_RATIO = 3.5
SHARED_BYTES = 232448  # an H100's; a GPU in use is asked for its own
MIN_TILE = 16  # tl.dot takes no less
_IEEE_TILE = 512  # units up to which the operands of fp32 products fit the registers
_CHUNK = 32  # steps whose share of dA and dC one program adds up
_SLICES = 256  # matrix products that torch runs side by side for dA and dC, at most
_GRADIENT_ELEMENTS = 1 << 26  # of the states whose share torch computes at once: bounds its temporaries


# Whether TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on the CPU, slowly. Asked once,
# outside of compiled code: torch.compile cannot tell the type of a kernel.
_INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.runtime.JITFunction)


def is_interpreted() -> bool:
    """Whether the kernels run on the CPU, in Triton's interpreter."""
    return _INTERPRETED


# Of the products of tiles up to _IEEE_TILE and of larger ones. The interpreter computes in fp32 and knows no other.
_PRECISIONS = ("ieee", "ieee" if is_interpreted() else "bf16x6")


def obstacle(cell: Cell | None = None, inputs: Tensor | None = None, factors: Sequence[Tensor] = ()) -> str | None:
    """Why the engine cannot run here, the cell or the tensors, as far as they are given, or None."""
    if cell is not None and not cell.complex:
        return f"the triton engine has no kernel for the cell {cell.name!r}"
    if triton is None:
        return _import_error
    if not is_interpreted() and not torch.cuda.is_available():
        return "no GPU (TRITON_INTERPRET=1, set before the import, runs it on the CPU, for tests)"
    if inputs is None:
        return None
    if inputs.dtype != torch.float32:
        return f"the triton engine computes in float32, got {inputs.dtype}"
    device = "cpu" if is_interpreted() else "cuda"
    if inputs.device.type != device:
        return f"the triton engine runs on {device} tensors here, got {inputs.device}"
    shapes = [(factor.shape[-2], factor.shape[-1]) for factor in factors]
    if plan_groups(shapes, _shared_limit(inputs.device)) is None:
        listed = " ".join(f"{rows}x{columns}" for rows, columns in shapes)
        return (
            f"N = {inputs.shape[-1]} with factors {listed} has no split into two square groups that fit "
            f"{_shared_limit(inputs.device)} bytes of shared memory"
        )
    return None


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
    units = math.prod([rows for rows, _ in shapes])
    best = None
    for cut in range(len(shapes)):
        rows, columns = math.prod([p for p, _ in shapes[:cut]]), math.prod([q for _, q in shapes[:cut]])
        tile_p, tile_r = _tile(rows), _tile(units // rows)
        tiles = 2 * 4 * (tile_p * tile_p + tile_r * tile_r + tile_p * tile_r)  # bytes of A, C and H
        if rows == columns and _SHARED_RATIO * tiles <= shared:
            cost = tile_p * tile_r * (tile_p + tile_r)
            best = min(best or (cost, cut, rows), (cost, cut, rows))
    return None if best is None else (best[1], best[2], units // best[2])


def _launch(
    kernel, inputs: Tensor, tensors: Sequence[Tensor], groups: Sequence[Tensor], warps: int, flags: dict, *grid: int
) -> None:
    """One program a sample, times ``grid``; ``groups`` (E, 2, P, P) and (E, 2, R, R) say the sizes."""
    rows, columns = groups[0].shape[2], groups[1].shape[2]
    small = _tile(rows) * _tile(columns) <= _IEEE_TILE
    device = torch.cuda.device(inputs.device) if inputs.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(inputs.shape[0], *grid)](
            *tensors,
            inputs.shape[1],
            TERMS=len(groups[0]),
            P=rows,
            R=columns,
            TILE_P=_tile(rows),
            TILE_R=_tile(columns),
            PRECISION=_PRECISIONS[not small],
            num_warps=warps,
            **flags,
        )


def _bytes(times: Tensor | None, inputs: Tensor) -> Tensor:
    """A mask (B, T) as bytes; any tensor where there is none and the kernel reads none."""
    return inputs if times is None else times.contiguous().view(torch.uint8)


def _options(call: ScanCall, any_tensor: Tensor) -> tuple[list[Tensor], dict[str, bool]]:
    """Mask and starts as the kernels read them, and what of the step there is."""
    flags = {
        "MODRELU": call.activation == "modrelu",
        "MASKED": call.mask is not None,
        "STARTS": call.starts is not None,
    }
    return [_bytes(times, any_tensor) for times in (call.mask, call.starts)], flags


def _groups(factors: Sequence[Tensor], device: torch.device) -> tuple[int, list[Tensor], list[Tensor]]:
    """The cut, complex factors (E, P_f, Q_f), and A (E, 2, P, P) and C (E, 2, R, R), whose product is theirs."""
    plan = plan_groups([(factor.shape[2], factor.shape[3]) for factor in factors], _shared_limit(device))
    assert plan is not None, "obstacle() has refused these factors"
    matrices = [to_complex(factor, 1) for factor in factors]
    one = matrices[0].new_ones(len(matrices[0]), 1, 1)  # what A is where C holds all factors
    # In complex arithmetic: with real planes the launches for nine small factors took longer than the recurrence.
    groups = [kron_product(matrices[: plan[0]] or [one]), kron_product(matrices[plan[0] :])]
    return plan[0], matrices, [to_planes(group, 1) for group in groups]


def _warps(groups: Sequence[Tensor], units: int) -> int:
    return 4 if _tile(groups[0].shape[2]) * _tile(groups[1].shape[2]) <= units else 8


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """states, final_state and, with ``save``, |z| (B, T, 1, N). See ``kron_scan`` for the contract."""
    inputs = dense(call.inputs)
    _, _, groups = _groups(call.terms(), inputs.device)
    states, final = torch.empty_like(inputs), call.state_like()  # (B, T, 2, N), (B, 2, N)
    moduli = inputs.new_zeros(call.saved_shape(1) if save else (0,))  # only modReLU's are stored
    read = [dense(tensor) for tensor in (groups[0], groups[1].mT, call.bias, call.first_state())]  # A, C^T
    times, flags = _options(call, inputs)
    tensors = [inputs, *read, *times, states, final, moduli]
    _launch(forward_kernel, inputs, tensors, groups, _warps(groups, 2 * _IEEE_TILE), flags | {"SAVE": save})
    return states, final, moduli


def _group_gradients(
    d_inputs: Tensor, states: Tensor, initial_state: Tensor, starts: Tensor | None, groups: Sequence[Tensor]
) -> list[Tensor]:
    """dA (E, 2, P, P) and dC (E, 2, R, R), by a kernel where its sums fit the registers, else by torch, in parts."""
    batch, length = d_inputs.shape[:2]
    if _tile(groups[0].shape[2]) * _tile(groups[1].shape[2]) <= _IEEE_TILE:
        chunks = -(-length // _CHUNK)
        parts = [d_inputs.new_empty(batch, chunks, *group.shape) for group in groups]  # (B, chunks, E, 2, ·, ·)
        read = [dense(tensor) for tensor in (d_inputs, *groups, initial_state, states)]
        flags = {"CHUNK": _CHUNK, "STARTS": starts is not None}
        tensors = [*read, _bytes(starts, states), *parts]
        _launch(gradient_kernel, d_inputs, tensors, groups, 4, flags, chunks, len(groups[0]))
        return [part.sum((0, 1)) for part in parts]
    terms = [to_complex(group, 1) for group in groups]  # (E, P, P), (E, R, R)
    samples = max(1, _GRADIENT_ELEMENTS // states[0].numel())
    totals = [torch.zeros_like(group) for group in terms]
    for start in range(0, batch, samples):
        some = slice(start, start + samples)
        before = torch.cat((initial_state[some, None], states[some, :-1]), 1)  # (·, T, 2, N)
        if starts is not None:
            before = before.where(~starts[some, :, None, None], 0)
        # Cut along the steps into slices side by side: P and R alone are too small for a GPU.
        steps = len(before) * length
        slices = next(count for count in range(min(steps, _SLICES), 0, -1) if steps % count == 0)
        h, d = (to_complex(x, 2).reshape(slices, steps // slices, -1) for x in (before, d_inputs[some]))
        for term, total in enumerate(zip(*totals, strict=True)):
            parts = group_gradients([group[term].expand(slices, -1, -1) for group in terms], h, d)
            for whole, part in zip(total, parts, strict=True):
                whole += part.sum(0)
    return [to_planes(total, 1) for total in totals]


def backward(
    call: ScanCall, states: Tensor, saved: Tensor, d_states: Tensor | None, d_final: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of inputs (B, T, 2, N), factors, bias (N,) and initial state (B, 2, N)."""
    states = dense(states)
    cut, matrices, groups = _groups(call.terms(), states.device)
    initial_state = call.first_state()
    d_states = torch.zeros_like(states) if d_states is None else d_states
    d_final = torch.zeros_like(initial_state) if d_final is None else d_final
    left, right = (torch.stack((group[:, 0], -group[:, 1]), 1) for group in groups)  # conj(A), conj(C)
    read = [dense(tensor) for tensor in (d_states, d_final, left.mT, right, call.bias)]
    d_inputs, d_initial = torch.empty_like(states), call.state_like()  # (B, T, 2, N), (B, 2, N)
    d_bias = states.new_empty(states.shape[0], *call.bias.shape)  # (B, N)
    times, flags = _options(call, states)
    tensors = [*read, *times, states, saved, d_inputs, d_bias, d_initial]
    _launch(backward_kernel, states, tensors, groups, _warps(groups, _IEEE_TILE), flags)
    d_groups = [to_complex(grad, 1) for grad in _group_gradients(d_inputs, states, initial_state, call.starts, groups)]
    runs = [(count, grad) for count, grad in zip((cut, len(matrices) - cut), d_groups, strict=True) if count]
    d_factors = factor_gradients(matrices, [grad for _, grad in runs], [count for count, _ in runs])
    d_factors = [to_planes(grad, 1).view(given.shape) for grad, given in zip(d_factors, call.factors, strict=True)]
    return d_inputs, d_factors, d_bias.sum(0), d_initial


ENGINE = Engine(forward, backward, obstacle, beside=1)
