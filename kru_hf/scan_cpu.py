"""The native CPU engine: a C library (``native/kru.c``) that runs whole sequences of any cell, forward and backward.

The library is an optional part of the install. Without it this module imports and says so; a copy of this file that
was pushed with a model's weights uses the library of an installed ``kru_hf`` of the same ABI, if there is one.
Letters as in ``scan.py``; K planes of the inputs and the factors, S planes of the state.
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
from .scan_call import Engine, ScanCall

__all__ = ["backward", "forward", "is_available", "obstacle", "saved_shape", "unavailable_reason"]

ABI = 4  # KRU_ABI in native/kru.c
MAX_FACTORS = 64  # in native/plan.h
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


class _Args(ctypes.Structure):
    """kru_args of native/kru.c. Owns all that it points to: a thread can outlast a call that a signal ends."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "chunks")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("packed", "inputs", "bias", "initial_state", "mask", "starts", "states", "final_state", "saved"),
            *("d_states", "d_final", "d_inputs", "d_initial", "chunk_grads", "progress"),
        )
    ]

    def point(self, **tensors: Tensor | None) -> None:
        """Set pointers to the tensors, or to copies of those that are laid out in another way."""
        owned = vars(self).setdefault("owned", [])
        for name, tensor in tensors.items():
            if tensor is not None:
                owned.append(_dense(tensor))
                setattr(self, name, owned[-1].data_ptr())


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
            ("kru_cell_facts", ctypes.c_int, [count, pointer]),
            ("kru_plan_new", pointer, [count, count, count, pointer, pointer, count]),
            ("kru_plan_free", None, [pointer]),
            ("kru_plan_sizes", ctypes.c_double, [pointer, pointer]),
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


def is_available() -> bool:
    """Whether the native library is loaded."""
    return _reason is None


def unavailable_reason(cell: Cell | None = None) -> str | None:
    """Why the engine cannot run (the cell, if one is given) in this process, or None."""
    if _reason is None and cell is not None and cell.native is None:
        return f"the native engine has no template for the cell {cell.name!r}"
    return _reason


def obstacle(inputs: Tensor, factors: Sequence[Tensor], cell: Cell) -> str | None:
    """None if the engine takes inputs (B, T, K, N) and factors (R, K, P_f, Q_f) of the cell, else why not."""
    if (reason := unavailable_reason(cell)) is not None:
        return reason
    if inputs.device.type != "cpu":
        return f"inputs are on {inputs.device}, the native engine runs on the CPU"
    if inputs.dtype != torch.float32:
        return f"inputs are {inputs.dtype}, the native engine computes in float32"
    if len(factors) > MAX_FACTORS:
        return f"{len(factors)} factors, the native engine takes at most {MAX_FACTORS}"
    return None


class _Plan:
    """Merged stages, their order and kernels, for a cell, R terms and factors of given shapes; owns the C object."""

    def __init__(self, native: int, terms: int, shapes: tuple[tuple[int, int], ...], lanes: int) -> None:
        sizes = ctypes.c_int64 * len(shapes)
        rows, columns = zip(*shapes, strict=True)
        self.handle = _library.kru_plan_new(native, terms, len(shapes), sizes(*rows), sizes(*columns), lanes)
        if not self.handle:
            raise MemoryError(f"no plan for {len(shapes)} factors (at most {MAX_FACTORS}) with {lanes} lanes")
        weakref.finalize(self, _library.kru_plan_free, self.handle).atexit = False
        values = (ctypes.c_int64 * 3)()
        self.work = _library.kru_plan_sizes(self.handle, values)  # of one step of a group
        self.packed, self.gradients, self.group = values  # floats, floats of a chunk, samples in lockstep
        self.pointers = ctypes.c_void_p * len(shapes)


@functools.lru_cache(maxsize=256)
def _plan_for(native: int, terms: int, shapes: tuple[tuple[int, int], ...], lanes: int | None) -> _Plan:
    return _Plan(native, terms, shapes, _library.kru_lanes() if lanes is None else lanes)


def facts(cell: Cell) -> tuple[int, ...]:
    """What the library has for the cell: planes of the inputs, rows of the bias, planes of the state and of h."""
    values = (ctypes.c_int64 * 4)()
    return tuple(values) if _library.kru_cell_facts(cell.native, values) else ()


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


def _run(function: Callable[[int, object], int], plan: _Plan, args: _Args, work: float) -> None:
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


def _fresh(*size: int) -> Tensor:
    """An uninitialised float32 tensor, on huge pages if it is large and the system has them."""
    tensor = torch.empty(size, dtype=torch.float32, device="cpu")  # whatever the default device is
    if (count := tensor.nbytes) >= HUGE_FROM:
        _library.kru_advise(tensor.data_ptr(), count)
    return tensor


def _prepare(factors: Sequence[Tensor], cell: Cell, activation: str) -> tuple[_Plan, list[Tensor], Any, Tensor]:
    """Plan, contiguous factors, their addresses and the weights packed for the kernels."""
    shapes = tuple([(factor.shape[2], factor.shape[3]) for factor in factors])
    plan = _plan_for(cell.native + (activation == "identity"), factors[0].shape[0], shapes, _lanes)
    kept = [_dense(factor) for factor in factors]  # (R, K, P, Q) each
    pointers = plan.pointers(*[factor.data_ptr() for factor in kept])
    packed = _fresh(plan.packed)
    if _library.kru_pack(plan.handle, pointers, packed.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return plan, kept, pointers, packed


def saved_shape(inputs_shape: Sequence[int], cell: Cell) -> tuple[int, ...]:
    """Of the tensor that :func:`forward` keeps for :func:`backward`: the state beside h (c of an LSTM)."""
    batch, length, _, units = inputs_shape
    return (batch * length * units * cell.kept,)


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """states, final_state (B, S, N) and what the backward wants to have kept; the same bits for any number of threads.

    Raises:
        MemoryError: no memory for the workspace.
    """
    cell, (batch, length, _, units) = call.cell, call.inputs.shape
    plan, _, _, packed = _prepare(call.factors, cell, call.activation)
    states = _fresh(*cell.states_shape(call.inputs.shape))
    final_state = _fresh(batch, len(cell.states), units)  # (B, S, N)
    saved = _fresh(*saved_shape(call.inputs.shape, cell)) if save else _fresh(0)
    groups = -(-batch // plan.group)
    args = _Args(batch, length, min(groups, 4 * MAX_CHUNKS))
    args.point(packed=packed, inputs=call.inputs, bias=call.bias, initial_state=call.initial_state)
    args.point(mask=call.mask, starts=call.starts)
    args.point(states=states, final_state=final_state, saved=saved if saved.numel() else None)
    _run(_library.kru_forward, plan, args, plan.work * groups * length)
    return states, final_state, saved


def backward(
    call: ScanCall, states: Tensor, saved: Tensor, d_states: Tensor | None, d_final: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """d_inputs (B, T, K, N), d_factors (R, K, P_f, Q_f) each, d_bias and d_initial (B, S, N).

    Products and gates are computed again, from the states.
    """
    cell, (batch, length, _, units) = call.cell, call.inputs.shape
    plan, kept, pointers, packed = _prepare(call.factors, cell, call.activation)
    groups = -(-batch // plan.group)
    # Gradient buffers of at most a quarter of the states' bytes.
    chunks = min(groups, MAX_CHUNKS, max(states.numel() // (4 * plan.gradients), 4))
    chunk_grads = _fresh(chunks, plan.gradients)
    d_inputs = _fresh(*call.inputs.shape)  # (B, T, K, N)
    d_initial = _fresh(batch, len(cell.states), units)  # (B, S, N)
    d_factors = [_fresh(*factor.shape) for factor in kept]  # (R, K, P, Q) each
    d_bias = _fresh(*call.bias.shape)
    args = _Args(batch, length, chunks)
    args.point(packed=packed, inputs=call.inputs, bias=call.bias, initial_state=call.initial_state)
    args.point(mask=call.mask, starts=call.starts)
    args.point(states=states, saved=saved if saved.numel() else None, d_states=d_states, d_final=d_final)
    args.point(d_inputs=d_inputs, d_initial=d_initial, chunk_grads=chunk_grads)
    _run(_library.kru_backward, plan, args, 4 * plan.work * groups * length)
    places = plan.pointers(*[piece.data_ptr() for piece in d_factors])
    if _library.kru_reduce(plan.handle, pointers, chunks, chunk_grads.data_ptr(), places, d_bias.data_ptr()):
        raise MemoryError("the native engine could not allocate its workspace")
    return d_inputs, d_factors, d_bias, d_initial


ENGINE = Engine(unavailable_reason, obstacle, saved_shape, forward, backward)
