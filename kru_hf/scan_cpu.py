"""The native CPU engine: a C kernel (``native/kru_scan.c``) that runs whole sequences, forward and backward.

The library is an optional part of the install. Without it this module imports and says so; a copy of this file that
was pushed with a model's weights uses the library of an installed ``kru_hf`` of the same ABI, if there is one.
"""

import _thread
import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .cells import Cell

ABI = 3  # KRU_ABI in native/kru_scan.c
MAX_FACTORS = 64  # KRU_MAX_FACTORS in native/kru_plan.h
# Chunks of the batch that threads share out and whose weight gradients are summed in order. Depends on shapes alone, so
# results do not depend on the number of threads.
MAX_CHUNKS = 32
# Estimated vector operations (about 0.4 ns each) below which waking other threads costs more than it saves.
THREADS_FROM = 250_000
# The same from which the caller only waits: it answers a signal while it waits, and not while it computes.
WAIT_FROM = 50_000_000
HUGE_FROM = 8 << 20  # bytes of an output from which huge pages are asked for
_lanes: int | None = None  # vector lanes a plan uses; None: the processor's widest


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its numbers in memory in the order of the indices, signs included."""
    return tensor.resolve_neg().contiguous()


class _Arguments(ctypes.Structure):
    """What a C call reads and writes. Owns all that it points to: a thread can outlast a call that a signal ends."""

    def point(self, **tensors: Tensor | None) -> None:
        """Set pointers to the tensors, or to copies of those that are laid out in another way."""
        owned = vars(self).setdefault("owned", [])
        for name, tensor in tensors.items():
            if tensor is not None:
                owned.append(_dense(tensor))
                setattr(self, name, owned[-1].data_ptr())


class _Args(_Arguments):
    """kru_args of native/kru_scan.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "modrelu", "chunks")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("packed", "inputs", "bias", "initial_state", "mask", "states", "final_state"),
            *("d_states", "d_final", "d_inputs", "d_initial", "chunk_grads", "progress"),
        )
    ]


def _folders() -> list[pathlib.Path]:
    """Where the library may lie: beside this file, or in the installed package."""
    folders = [pathlib.Path(__file__).parent]
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("kru_hf")
        folders += [pathlib.Path(place) for place in (spec.submodule_search_locations or []) if spec] if spec else []
    return folders


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason."""
    reason = "the compiled library kru_hf/_native is not there: the install found no working C compiler"
    for path in (path for folder in _folders() for path in sorted(folder.glob("_native*.so"))):
        try:
            library = ctypes.CDLL(str(path))
            library.kru_abi.restype = ctypes.c_int64
            abi = library.kru_abi()
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be loaded: {error}"
            continue
        if abi != ABI:
            reason = f"{path.name} has ABI {abi}, this file needs {ABI}: install the kru_hf that belongs to it"
            continue
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("kru_lanes", count, []),
            ("kru_plan_new", pointer, [count, pointer, pointer, count]),
            ("kru_plan_free", None, [pointer]),
            ("kru_plan_packed_floats", count, [pointer]),
            ("kru_plan_dense_floats", count, [pointer]),
            ("kru_plan_group", count, [pointer]),
            ("kru_plan_work", ctypes.c_double, [pointer]),
            ("kru_plan_stage", count, [pointer, count, pointer]),
            ("kru_pack", ctypes.c_int, [pointer, pointer, pointer]),
            ("kru_forward", ctypes.c_int, [pointer, pointer]),
            ("kru_backward", ctypes.c_int, [pointer, pointer]),
            ("kru_advise", None, [pointer, count]),
            ("kru_reduce", ctypes.c_int, [pointer, pointer, count, pointer, pointer, pointer]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library, None
    return None, reason


_library, _reason = _load()


def _declare(library: ctypes.CDLL | None) -> str | None:
    """Give the functions of the gated cells their types; None, or why the library cannot run them."""
    if library is None:
        return _reason
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


if _reason is None:
    _reason = _declare(_library)


def is_available() -> bool:
    """Whether the native library is loaded."""
    return _reason is None


def unavailable_reason() -> str | None:
    """Why :func:`is_available` is False, or None."""
    return _reason


def obstacle(inputs: Tensor, factors: Sequence[Tensor], cell: Cell) -> str | None:
    """None if the engine takes inputs (B, T, K, N) and factors (1, K, P_f, Q_f), else the reason why not."""
    if _reason is not None:
        return _reason
    if inputs.device.type != "cpu":
        return f"inputs are on {inputs.device}, the native engine runs on the CPU"
    if inputs.dtype != torch.float32:
        return f"inputs are {inputs.dtype}, the native engine computes in float32"
    if len(factors) > MAX_FACTORS:
        return f"{len(factors)} factors, the native engine takes at most {MAX_FACTORS}"
    if len(factors[0]) > 1:
        return f"a sum of {len(factors[0])} terms"
    return None


def saved_shape(inputs_shape: Sequence[int], cell: Cell) -> tuple[int, ...]:
    """Of what forward keeps for backward beside the states: an LSTM's c_t."""
    batch, length, _, units = inputs_shape
    return (batch * length * units * cell.kept,)


class _Plan:
    """Merged stages, their order and kernels, for factors of given shapes; owns the C object."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], lanes: int) -> None:
        sizes = ctypes.c_int64 * len(shapes)
        rows, columns = zip(*shapes, strict=True)
        self.handle = _library.kru_plan_new(len(shapes), sizes(*rows), sizes(*columns), lanes)
        if not self.handle:
            raise MemoryError(f"no plan for {len(shapes)} factors (at most {MAX_FACTORS}) with {lanes} lanes")
        weakref.finalize(self, _library.kru_plan_free, self.handle).atexit = False
        self.packed = _library.kru_plan_packed_floats(self.handle)
        self.dense = _library.kru_plan_dense_floats(self.handle)
        self.group = _library.kru_plan_group(self.handle)
        self.work = _library.kru_plan_work(self.handle)
        self.pointers = ctypes.c_void_p * len(shapes)

    def stages(self) -> list[tuple[int, ...]]:
        """(P, Q, left, right, lanes over p, merged factors) of each stage in the order of application."""
        values = (ctypes.c_int64 * 6)()
        count = _library.kru_plan_stage(self.handle, -1, values)
        return [(_library.kru_plan_stage(self.handle, s, values), tuple(values))[1] for s in range(count)]


@functools.lru_cache(maxsize=256)
def _plan_for(shapes: tuple[tuple[int, int], ...], lanes: int | None) -> _Plan:
    return _Plan(shapes, _library.kru_lanes() if lanes is None else lanes)


# Threads and queues of C alone: the exception of a signal inside a lock of Python code, as a future has, leaves it
# locked for good, and its other side waiting.
_jobs: SimpleQueue[Any] = SimpleQueue()
_workers: list[int] = []


def _forget_workers() -> None:
    """A forked child has none of its parent's threads."""
    global _jobs
    _jobs = SimpleQueue()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _work(jobs: SimpleQueue) -> None:
    """A thread's life: calls, of which it holds what they work on, and nothing of them afterwards."""
    while True:
        function, handle, args, done = jobs.get()
        status = function(handle, args)
        function = handle = args = None
        done.put(status)
        done = None


def _submit(count: int, *job: Any) -> int:
    """Hand the job to ``count`` other threads, or to as many as there can be; returns how many. Each answers once."""
    with contextlib.suppress(RuntimeError):  # no more threads for this process
        while len(_workers) < count:
            _workers.append(_thread.start_new_thread(_work, (_jobs,)))
    count = min(count, len(_workers))
    for _ in range(count):
        _jobs.put(job)
    return count


def _run(function: Callable[[int, object], int], plan: Any, args: _Arguments, work: float) -> None:
    """Run ``function`` on as many threads as the work deserves; they share the chunks out among themselves.

    An exception, as that of a signal's handler, does not wait for the other threads: they own what they work on, and
    end at their next time step.
    """
    threads = min(torch.get_num_threads(), args.chunks) if work > THREADS_FROM else 1
    # While the interpreter is taken down, no other thread comes to its turn.
    others = 0 if sys.is_finalizing() else threads if work > WAIT_FROM else threads - 1
    progress = (ctypes.c_int64 * 2)()
    args.progress = ctypes.addressof(progress)
    args.owned += [plan, progress]
    done: SimpleQueue[int] = SimpleQueue()
    call = (plan.handle, ctypes.byref(args))
    try:
        helpers = _submit(others, function, *call, done)
        failed = function(*call) if helpers < threads else 0
        for _ in range(helpers):
            failed |= done.get()
    except BaseException:
        progress[1] = 1
        raise
    if failed:
        raise MemoryError("the native engine could not allocate its workspace")


def _chunks(plan: _Plan, batch: int, length: int, units: int) -> int:
    """Chunks of the batch: whole lockstep groups, and gradient buffers of at most a quarter of the states' bytes."""
    chunks = min(-(-batch // plan.group), MAX_CHUNKS)
    affordable = batch * length * 2 * units // (4 * (plan.dense + units))
    return max(min(chunks, affordable), min(chunks, 4))


def _fresh(*size: int) -> Tensor:
    """An uninitialised float32 tensor, on huge pages if it is large and the system has them."""
    tensor = torch.empty(size, dtype=torch.float32, device="cpu")  # whatever the default device is
    if (count := tensor.nbytes) >= HUGE_FROM:
        _library.kru_advise(tensor.data_ptr(), count)
    return tensor


def _prepare(factors: Sequence[Tensor]) -> tuple[_Plan, list[Tensor], ctypes.Array, Tensor]:
    """Plan, contiguous factors, their addresses and the weights packed for the kernels."""
    plan = _plan_for(tuple([(factor.shape[1], factor.shape[2]) for factor in factors]), _lanes)
    kept = [_dense(factor) for factor in factors]  # (2, P, Q) each
    pointers = plan.pointers(*[factor.data_ptr() for factor in kept])
    packed = _fresh(plan.packed)
    if _library.kru_pack(plan.handle, pointers, packed.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return plan, kept, pointers, packed


def _forward(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    modrelu: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, _, units = inputs.shape
    plan, _, _, packed = _prepare(factors)
    states = _fresh(batch, length, 2, units)  # (B, T, 2, N)
    final_state = _fresh(batch, 2, units)  # (B, 2, N)
    chunks = min(-(-batch // plan.group), 4 * MAX_CHUNKS)
    args = _Args(batch, length, modrelu, chunks)
    args.point(packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask)
    args.point(states=states, final_state=final_state)
    _run(_library.kru_forward, plan, args, plan.work * batch * length)
    return states, final_state


def _backward(
    d_states: Tensor | None,
    d_final: Tensor | None,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    modrelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_inputs (B, T, 2, N), the factors' gradients in one row, d_bias (N,), d_initial (B, 2, N).

    z is recomputed from the states, never recovered from |h|: right for b > 0 too, and no digits are lost.
    """
    batch, length, _, units = inputs.shape
    plan, kept, pointers, packed = _prepare(factors)
    chunks = _chunks(plan, batch, length, units)
    chunk_grads = _fresh(chunks, plan.dense + units)
    d_inputs = _fresh(batch, length, 2, units)  # (B, T, 2, N)
    d_initial = _fresh(batch, 2, units)  # (B, 2, N)
    d_factors = _fresh(sum(factor.numel() for factor in kept))
    d_bias = _fresh(units)  # (N,)
    args = _Args(batch, length, modrelu, chunks)
    args.point(packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask, states=states)
    args.point(d_states=d_states, d_final=d_final, d_inputs=d_inputs, d_initial=d_initial, chunk_grads=chunk_grads)
    _run(_library.kru_backward, plan, args, 4 * plan.work * batch * length)
    places = plan.pointers(*[piece.data_ptr() for piece in _split(d_factors, kept)])
    if _library.kru_reduce(plan.handle, pointers, chunks, chunk_grads.data_ptr(), places, d_bias.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return d_inputs, d_factors, d_bias, d_initial


def _split(row: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    pieces = row.split([factor.numel() for factor in factors])
    return [piece.view(factor.shape) for piece, factor in zip(pieces, factors, strict=True)]


class _GatedArgs(ctypes.Structure):
    """gated_args of native/kru_scan.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "lstm", "chunks")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("packed", "inputs", "bias", "initial_state", "mask", "states", "final_state", "cells"),
            *("d_states", "d_final", "d_inputs", "d_initial", "chunk_grads", "counter"),
        )
    ]


class _GatedPlan:
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
def _gated_plan_for(gates: int, shapes: tuple[tuple[int, int], ...], lanes: int | None) -> _GatedPlan:
    return _GatedPlan(gates, shapes, _library.kru_lanes() if lanes is None else lanes)


def _gated_prepare(factors: Sequence[Tensor]) -> tuple[_GatedPlan, list[Tensor], ctypes.Array, Tensor]:
    """Plan, contiguous factors, their addresses and the weights packed for the kernels."""
    shapes = tuple([(factor.shape[1], factor.shape[2]) for factor in factors])
    plan = _gated_plan_for(factors[0].shape[0], shapes, _lanes)
    kept = [factor.contiguous() for factor in factors]  # (G, P, Q) each
    pointers = plan.pointers(*[factor.data_ptr() for factor in kept])
    packed = _fresh(plan.packed)
    if _library.kru_gated_pack(plan.handle, pointers, packed.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return plan, kept, pointers, packed


def _gated_forward(
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
    plan, _, _, packed = _gated_prepare(factors)
    inputs, bias, initial_state, mask = inputs.contiguous(), _dense(bias), _dense(initial_state), _dense(mask)
    states = _fresh(batch, length, units)  # (B, T, N)
    final_state = _fresh(batch, 2 if lstm else 1, units)  # (B, S, N)
    cells = _fresh(batch * length * units if lstm and keep_cells else 0)
    groups = -(-batch // plan.lanes)
    args = _GatedArgs(batch, length, lstm, min(groups, 4 * MAX_CHUNKS))
    _point(args, packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask)
    _point(args, states=states, final_state=final_state, cells=cells if cells.numel() else None)
    _run(_library.kru_gated_forward, plan.handle, args, plan.work * groups * length)
    return states, final_state, cells


def _gated_backward(
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
    plan, kept, pointers, packed = _gated_prepare(factors)
    d_states, d_final, states = _dense(d_states), _dense(d_final), states.contiguous()
    inputs, bias, initial_state, mask = inputs.contiguous(), _dense(bias), _dense(initial_state), _dense(mask)
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
    args = _GatedArgs(batch, length, lstm, chunks)
    _point(args, packed=packed, inputs=inputs, bias=bias, initial_state=initial_state, mask=mask, states=states)
    _point(args, d_states=d_states, d_final=d_final, d_inputs=d_inputs, d_initial=d_initial, chunk_grads=chunk_grads)
    _point(args, cells=cells if lstm else None)
    _run(_library.kru_gated_backward, plan.handle, args, 4 * plan.work * groups * length)
    places = plan.pointers(*[piece.data_ptr() for piece in _split(d_factors, kept)])
    if _library.kru_gated_reduce(plan.handle, pointers, chunks, chunk_grads.data_ptr(), places, d_bias.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return d_inputs, d_factors, d_bias, d_initial


def forward(inputs, factors, bias, initial_state, mask, starts, cell, activation, save):
    """A stand-in until the native engine has terms and starts of its own."""
    factors = [factor[0] for factor in factors]
    if cell.complex:
        return *_forward(inputs, factors, bias, initial_state, mask, activation == "modrelu"), inputs.new_empty(0)
    return _gated_forward(inputs, factors, bias, initial_state, mask, save)


def backward(d_states, d_final, inputs, factors, bias, initial_state, mask, starts, states, saved, cell, activation):
    """See forward."""
    factors = [factor[0] for factor in factors]
    read = (d_states, d_final, inputs, factors, bias, initial_state, mask, states)
    found = _backward(*read, activation == "modrelu") if cell.complex else _gated_backward(*read, saved)
    d_inputs, row, d_bias, d_initial = found
    return d_inputs, [piece.unsqueeze(0).clone() for piece in _split(row, factors)], d_bias, d_initial
