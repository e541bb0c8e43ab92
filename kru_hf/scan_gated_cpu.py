"""The gated cells in the native CPU engine: whole sequences of a gated cell in one C call.

The library is the one that ``scan_cpu`` loads, and so are the threads. Letters as in ``scan_gated``: G gates (4: LSTM,
3: GRU, 2: JANET), S planes of the state (2: h and c, or 1: h).
"""

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kronecker import check_choice
from .scan_checks import GATED_CELLS, Named, check_scan, gated_cell
from .scan_cpu import MAX_CHUNKS, MAX_FACTORS, _Arguments, _dense, _fresh, _library, _run, _split, no_operator
from .scan_cpu import unavailable_reason as library_reason
from .transforms import differentiable_once, is_concrete, refuse_derivative

__all__ = ["is_available", "kru_gated_scan_cpu", "supports", "unavailable_reason"]

ABI = 3  # KRU_GATED_ABI in native/kru_gated.h
_lanes: int | None = None  # samples that advance together; None: the processor's widest vector


class _Args(_Arguments):
    """gated_args of native/kru_scan.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "lstm", "chunks")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("packed", "inputs", "bias", "initial_state", "mask", "states", "final_state", "cells"),
            *("d_states", "d_final", "d_inputs", "d_initial", "chunk_grads", "progress"),
        )
    ]


def _declare(library: ctypes.CDLL | None) -> str | None:
    """Give the functions of the gated cells their types; None, or why the library cannot run them."""
    if library is None:
        return library_reason()
    try:
        library.kru_gated_abi.restype = ctypes.c_int64
        abi = library.kru_gated_abi()
    except AttributeError:
        return "the compiled library kru_hf/_native is older than the gated engine: install kru_hf again"
    if abi != ABI:
        return f"the compiled library kru_hf/_native has gated ABI {abi}, this file needs {ABI}: install its own kru_hf"
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("kru_gated_plan_new", pointer, [count, count, pointer, pointer, count]),
        ("kru_gated_plan_packed_floats", count, [pointer]),
        ("kru_gated_plan_dense_floats", count, [pointer]),
        ("kru_gated_plan_work", ctypes.c_double, [pointer]),
        ("kru_gated_pack", ctypes.c_int, [pointer, pointer, pointer]),
        ("kru_gated_forward", ctypes.c_int, [pointer, pointer]),
        ("kru_gated_backward", ctypes.c_int, [pointer, pointer]),
        ("kru_gated_reduce", ctypes.c_int, [pointer, pointer, count, pointer, pointer, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return None


_reason = _declare(_library)


def is_available() -> bool:
    """Whether the native library is loaded and runs gated cells."""
    return _reason is None


def unavailable_reason() -> str | None:
    """Why :func:`is_available` is False, or None."""
    return _reason


def supports(inputs: Tensor, factors: Sequence[Tensor]) -> str | None:
    """None if the engine takes inputs (B, T, G, N) and factors (G, P_f, Q_f), else the reason why not."""
    if inputs.device.type != "cpu":
        return f"inputs are on {inputs.device}, the native engine runs on the CPU"
    if inputs.dtype != torch.float32:
        return f"inputs are {inputs.dtype}, the native engine computes in float32"
    if len(factors) > MAX_FACTORS:
        return f"{len(factors)} factors, the native engine takes at most {MAX_FACTORS}"
    return no_operator(inputs, factors)


def _check(
    cell: str,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    others: Sequence[Named] = (),
) -> None:
    """Raise unless C can be given these tensors."""
    check_scan(cell, inputs, factors, bias, initial_state, mask, others)
    if (obstacle := _reason or supports(inputs, factors)) is not None:
        raise RuntimeError(f"the native CPU engine cannot run: {obstacle}")


class _Plan:
    """Merged stages and their order for G gates with factors of given shapes; owns the C object."""

    def __init__(self, gates: int, shapes: tuple[tuple[int, int], ...], lanes: int) -> None:
        sizes = ctypes.c_int64 * len(shapes)
        rows, columns = zip(*shapes, strict=True)
        self.handle = _library.kru_gated_plan_new(gates, len(shapes), sizes(*rows), sizes(*columns), lanes)
        if not self.handle:
            raise MemoryError(f"no plan for {len(shapes)} factors (at most {MAX_FACTORS}) with {lanes} lanes")
        weakref.finalize(self, _library.kru_plan_free, self.handle).atexit = False
        self.packed = _library.kru_gated_plan_packed_floats(self.handle)
        self.dense = _library.kru_gated_plan_dense_floats(self.handle)
        self.work = _library.kru_gated_plan_work(self.handle)
        self.lanes = lanes
        self.pointers = ctypes.c_void_p * len(shapes)


@functools.lru_cache(maxsize=256)
def _plan_for(gates: int, shapes: tuple[tuple[int, int], ...], lanes: int | None) -> _Plan:
    return _Plan(gates, shapes, _library.kru_lanes() if lanes is None else lanes)


def _prepare(factors: Sequence[Tensor]) -> tuple[_Plan, list[Tensor], ctypes.Array, Tensor]:
    """Plan, contiguous factors, their addresses and the weights packed for the kernels."""
    shapes = tuple([(factor.shape[1], factor.shape[2]) for factor in factors])
    plan = _plan_for(factors[0].shape[0], shapes, _lanes)
    kept = [_dense(factor) for factor in factors]  # (G, P, Q) each
    pointers = plan.pointers(*[factor.data_ptr() for factor in kept])
    packed = _fresh(plan.packed)
    if _library.kru_gated_pack(plan.handle, pointers, packed.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return plan, kept, pointers, packed


def _forward(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    keep_cells: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """states (B, T, N), final state (B, S, N), and the LSTM's cells for the backward, B·T·N numbers or none."""
    batch, length, gates, units = inputs.shape
    lstm = gates == 4
    plan, _, _, packed = _prepare(factors)
    states = _fresh(batch, length, units)  # (B, T, N)
    final_state = _fresh(batch, 2 if lstm else 1, units)  # (B, S, N)
    cells = _fresh(batch * length * units if lstm and keep_cells else 0)
    groups = -(-batch // plan.lanes)
    args = _Args(batch, length, lstm, min(groups, 4 * MAX_CHUNKS))
    args.point(packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask)
    args.point(states=states, final_state=final_state, cells=cells if cells.numel() else None)
    _run(_library.kru_gated_forward, plan, args, plan.work * groups * length)
    return states, final_state, cells


def _backward(
    d_states: Tensor | None,
    d_final: Tensor | None,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_inputs (B, T, G, N), the factors' gradients in one row, d_bias (4 or 2, N), d_initial (B, S, N)."""
    batch, length, gates, units = inputs.shape
    lstm = gates == 4
    plan, kept, pointers, packed = _prepare(factors)
    groups = -(-batch // plan.lanes)
    # Gradient buffers of at most a quarter of the states' bytes.
    rows = bias.shape[0]
    affordable = batch * length * units // (4 * (plan.dense + rows * units))
    chunks = min(groups, MAX_CHUNKS, max(affordable, 4))
    chunk_grads = _fresh(chunks, plan.dense + rows * units)
    d_inputs = _fresh(batch, length, gates, units)  # (B, T, G, N)
    d_initial = _fresh(batch, 2 if lstm else 1, units)  # (B, S, N)
    d_factors = _fresh(sum(factor.numel() for factor in kept))
    d_bias = _fresh(rows, units)  # (4 or 2, N)
    args = _Args(batch, length, lstm, chunks)
    args.point(packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask, states=states)
    args.point(d_states=d_states, d_final=d_final, d_inputs=d_inputs, d_initial=d_initial, chunk_grads=chunk_grads)
    args.point(cells=cells if lstm else None)
    _run(_library.kru_gated_backward, plan, args, 4 * plan.work * groups * length)
    places = plan.pointers(*[piece.data_ptr() for piece in _split(d_factors, kept)])
    if _library.kru_gated_reduce(plan.handle, pointers, chunks, chunk_grads.data_ptr(), places, d_bias.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return d_inputs, d_factors, d_bias, d_initial


if __name__.startswith("kru_hf."):
    # Only the installed package registers operators: see scan_cpu.
    @torch.library.custom_op("kru_hf::gated_scan_cpu", mutates_args=())
    def _scan_op(
        inputs: Tensor, factors: Sequence[Tensor], bias: Tensor, initial_state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check(gated_cell(inputs), inputs, factors, bias, initial_state, mask)
        return _forward(inputs, factors, bias, initial_state, mask, True)

    @_scan_op.register_fake
    def _(inputs, factors, bias, initial_state, mask):
        check_scan(gated_cell(inputs), inputs, factors, bias, initial_state, mask)
        batch, length, gates, units = inputs.shape
        return (
            inputs.new_empty(batch, length, units),
            inputs.new_empty(batch, 2 if gates == 4 else 1, units),
            inputs.new_empty(batch * length * units if gates == 4 else 0),
        )

    @torch.library.custom_op("kru_hf::gated_scan_cpu_backward", mutates_args=())
    def _scan_backward_op(
        d_states: Tensor | None,
        d_final: Tensor | None,
        inputs: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor,
        initial_state: Tensor | None,
        mask: Tensor | None,
        states: Tensor,
        cells: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cell = gated_cell(inputs)
        batch, length, gates, units = inputs.shape
        full, end = (batch, length, units), (batch, GATED_CELLS[cell][2], units)
        kept = (batch * length * units if gates == 4 else 0,)
        others: list[Named] = [("d_states", d_states, full), ("d_final", d_final, end)]
        others += [("states", states, full), ("cells", cells, kept)]
        _check(cell, inputs, factors, bias, initial_state, mask, others)
        return _backward(d_states, d_final, inputs, factors, bias, initial_state, mask, states, cells)

    @_scan_backward_op.register_fake
    def _(d_states, d_final, inputs, factors, bias, initial_state, mask, states, cells):
        batch, length, gates, units = inputs.shape
        return (
            inputs.new_empty(batch, length, gates, units),
            inputs.new_empty(sum(factor.numel() for factor in factors)),
            inputs.new_empty(bias.shape[0], units),
            inputs.new_empty(batch, 2 if gates == 4 else 1, units),
        )

    def _setup(ctx, inputs, output) -> None:
        u, factors, bias, initial_state, mask = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(u, bias, initial_state, mask, output[0], output[2], *factors)

    def _op_gradient(ctx, d_states, d_final, _):
        inputs, bias, initial_state, mask, states, cells, *factors = ctx.saved_tensors
        if d_states is None and d_final is None:
            return None, [None] * len(factors), None, None, None
        d_inputs, row, d_bias, d_initial = _scan_backward_op(
            d_states, d_final, inputs, factors, bias, initial_state, mask, states, cells
        )
        return d_inputs, _split(row, factors), d_bias, None if initial_state is None else d_initial, None

    _scan_op.register_autograd(_op_gradient, setup_context=_setup)
    _scan_backward_op.register_autograd(refuse_derivative)
    _differentiable: Callable[..., tuple[Tensor, Tensor, Tensor]] = _scan_op
else:

    class _Scan(torch.autograd.Function):
        """The same for code that was loaded from a model's repository."""

        @staticmethod
        def forward(ctx, inputs, bias, initial_state, mask, *factors):
            states, final_state, cells = _forward(inputs, factors, bias, initial_state, mask, True)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(cells)
            ctx.save_for_backward(inputs, bias, initial_state, mask, states, cells, *factors)
            return states, final_state, cells

        @staticmethod
        @differentiable_once
        def backward(ctx, d_states, d_final, _):
            inputs, bias, initial_state, mask, states, cells, *factors = ctx.saved_tensors
            if d_states is None and d_final is None:
                return (None,) * (4 + len(factors))
            d_inputs, row, d_bias, d_initial = _backward(
                d_states, d_final, inputs, factors, bias, initial_state, mask, states, cells
            )
            d_initial = None if initial_state is None else d_initial
            return d_inputs, d_bias, d_initial, None, *_split(row, factors)

    def _differentiable(inputs, factors, bias, initial_state, mask):
        return _Scan.apply(inputs, bias, initial_state, mask, *factors)


def kru_gated_scan_cpu(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """A gated cell by the native kernel, float32 on the CPU. See ``kru_gated_scan`` for the contract.

    Args:
        inputs: U x_t (B, T, G, N). factors: F real tensors (G, P_f, Q_f) with ∏ P_f = ∏ Q_f = N. bias: (4, N),
            or (2, N) of "janet".
        initial_state: (B, S, N); zeros if None. mask: (B, T) bool; False holds the state.
        cell: "lstm" (G = 4, S = 2), "gru" (G = 3, S = 1) or "janet" (G = 2, S = 1).

    Returns:
        states (B, T, N) and final_state (B, S, N), a copy. The same to the last bit for any number of threads.

    Raises:
        ValueError, TypeError: an argument that does not fit. RuntimeError: the engine cannot run here, or not these.
        MemoryError: no memory for the workspace.
    """
    check_choice("cell", cell, list(GATED_CELLS))
    _check(cell, inputs, factors, bias, initial_state, mask)
    return run_gated_scan(inputs, factors, bias, initial_state, mask, cell=cell)


def run_gated_scan(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    *,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """:func:`kru_gated_scan_cpu` of arguments that are checked already: the gates of the inputs tell the cell."""
    leaves = [inputs, bias, *factors] if initial_state is None else [inputs, bias, initial_state, *factors]
    plain = not torch.compiler.is_compiling() and is_concrete(leaves if mask is None else [*leaves, mask])
    if plain and not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        return _forward(inputs, factors, bias, initial_state, mask, False)[:2]  # generation: no dispatcher in the way
    return _differentiable(inputs, list(factors), bias, initial_state, mask)[:2]
