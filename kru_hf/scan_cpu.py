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
import mmap
import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .cells import ACTIVATIONS, Cell
from .scan_reference import Engine, ScanCall, dense

ABI = 6  # KRU_ABI in native/kru.c
MAX_FACTORS = 64  # in native/plan.h
MOST_LANES = 16  # samples from which on a plan is the same for any number
# Chunks of the batch that threads share out and whose weight gradients are summed in order. Depends on shapes alone, so
# results do not depend on the number of threads.
MAX_CHUNKS = 32
# Estimated vector operations (about 0.4 ns each) below which waking other threads costs more than it saves.
THREADS_FROM = 250_000
# The same from which the caller only waits: it answers a signal while it waits, and not while it computes.
WAIT_FROM = 50_000_000
HUGE_FROM, HUGE_PAGE = 8 << 20, 1 << 21  # bytes of an output from which huge pages are asked for, and of a page
_lanes: int | None = None  # vector lanes a plan uses; None: the processor's widest


class _Args(ctypes.Structure):
    """kru_args of native/kru.c. Owns all that it points to: a thread can outlast a call that a signal ends."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "chunks")),
        *((name, ctypes.c_void_p) for name in ("packed", "inputs", "bias", "initial_state", "mask", "starts")),
        *((name, ctypes.c_void_p) for name in ("states", "saved", "final_state", "d_states", "d_final")),
        *((name, ctypes.c_void_p) for name in ("d_inputs", "d_initial", "chunk_grads")),
        *((name, ctypes.c_int64) for name in ("next", "stop")),
    ]
    owned: Any


def _load() -> tuple[Any, str | None]:
    """The library, which lies beside this file or in the installed package, or None and the reason."""
    reason = "the compiled library kru_hf/_native is not there: the install found no working C compiler"
    folders = [pathlib.Path(__file__).parent]
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("kru_hf")
        folders += map(pathlib.Path, spec.submodule_search_locations or ()) if spec else ()
    for path in (path for folder in folders for path in sorted(folder.glob("_native*.so"))):
        try:
            library = ctypes.CDLL(str(path))
            abi = library.kru_abi()
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be loaded: {error}"
            continue
        if abi != ABI:
            reason = f"{path.name} has ABI {abi}, this file needs {ABI}: install the kru_hf that belongs to it"
            continue
        pointer, count, status = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures: dict[str, tuple[Any, ...]] = {
            "kru_lanes": (count,),
            "kru_cells": (ctypes.c_char_p,),
            "kru_plan_new": (pointer, *[count] * 7, pointer, pointer, count, pointer),
            "kru_plan_free": (None, pointer),
            "kru_pack": (status, pointer, pointer, pointer),
            "kru_forward": (status, pointer, pointer),
            "kru_backward": (status, pointer, pointer),
            "kru_project": (status, pointer, pointer, pointer, pointer),
        }
        for name, (result, *arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library, None
    return None, reason


_library, _reason = _load()
_cells = _library.kru_cells().decode().split() if _library else []
# The system's call for huge pages, where it has them.
_advise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def _template(cell: Cell, activation: str) -> str:
    """The name of a cell's functions in native/cells.inc: the complex cell has a pair for each activation."""
    return activation if cell.complex else cell.name


def obstacle(cell: Cell | None = None, inputs: Tensor | None = None, factors: Sequence[Tensor] = ()) -> str | None:
    """Why the engine cannot run here, the cell, inputs (B, T, K, N) or factors, as far as they are given, or None."""
    if _reason is None and cell is not None and _template(cell, ACTIVATIONS[0]) not in _cells:
        return f"the native engine has no template for the cell {cell.name!r}"
    if _reason is not None or inputs is None:
        return _reason
    if inputs.device.type != "cpu":
        return f"inputs are on {inputs.device}, the native engine runs on the CPU"
    if inputs.dtype != torch.float32:
        return f"inputs are {inputs.dtype}, the native engine computes in float32"
    if len(factors) > MAX_FACTORS:
        return f"{len(factors)} factors, the native engine takes at most {MAX_FACTORS}"
    return None


class _Plan:
    """Merged stages, their order and kernels, for a cell, samples and the factors' shapes; owns the C object."""

    def __init__(
        self, cell: Cell, activation: str, batch: int, shapes: tuple[torch.Size, ...], lanes: int | None
    ) -> None:
        array = ctypes.c_int64 * len(shapes)
        facts = (_cells.index(_template(cell, activation)), cell.planes, cell.bias_rows or 1, len(cell.states), batch)
        terms = shapes[0][0] if len(shapes[0]) == 4 else 1
        rows, columns = array(*[shape[-2] for shape in shapes]), array(*[shape[-1] for shape in shapes])
        sizes = (ctypes.c_int64 * 4)()
        self.handle = _library.kru_plan_new(*facts, terms, len(shapes), rows, columns, lanes or 0, sizes)
        if not self.handle:
            raise MemoryError(f"no plan for {len(shapes)} factors (at most {MAX_FACTORS}) with {lanes} lanes")
        weakref.finalize(self, _library.kru_plan_free, self.handle).atexit = False
        # Floats of the weights and of a chunk's gradients, samples in lockstep, work of a step of so many.
        self.packed, self.gradients, self.group, self.work = sizes
        self.pointers = ctypes.c_void_p * len(shapes)


_plan_for = functools.lru_cache(maxsize=256)(_Plan)


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


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the native engine could not allocate its workspace")


def _run(function: Callable[[int, object], int], plan: _Plan, work: float, sizes: Any, tensors: Any) -> None:
    """Run ``function`` on as many threads as the work deserves; they share the chunks out among themselves.

    ``sizes`` and ``tensors`` are the fields of :class:`_Args` in their order. An exception, as that of a signal's
    handler, does not wait for the other threads: they own what they work on, and end at their next time step.
    """
    owned = [None if tensor is None else dense(tensor) for tensor in tensors]
    args = _Args(*sizes, *_addresses(owned))
    args.owned = plan, owned
    threads = min(torch.get_num_threads(), args.chunks) if work > THREADS_FROM else 1
    others = threads if work > WAIT_FROM else threads - 1
    call = (plan.handle, ctypes.byref(args))
    if not others or sys.is_finalizing():  # while the interpreter is taken down, no other thread comes to its turn
        _check(function(*call))
        return
    done: SimpleQueue[int] = SimpleQueue()
    try:
        helpers = _submit(others, function, *call, done)
        failed = function(*call) if helpers < threads else 0
        for _ in range(helpers):
            failed |= done.get()
    except BaseException:
        args.stop = 1
        raise
    _check(failed)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]


def _fresh(like: Tensor, *size: int) -> Tensor:
    """An uninitialised tensor, on huge pages if it is large and the system has them.

    The first write to small pages, a fault each, takes longer than the recurrence itself.
    """
    tensor = like.new_empty(size)
    if tensor.nbytes >= HUGE_FROM and _advise:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        _advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)
    return tensor


def _prepare(call: ScanCall) -> tuple[_Plan, list[Tensor], Any, Tensor]:
    """Plan, contiguous factors, their addresses and the weights packed for the kernels."""
    shapes, batch = tuple([factor.shape for factor in call.factors]), min(call.inputs.shape[0], MOST_LANES)
    plan = _plan_for(call.cell, call.activation, batch, shapes, _lanes)
    kept = [dense(factor) for factor in call.factors]
    pointers = plan.pointers(*_addresses(kept))
    packed = _fresh(kept[0], plan.packed)
    _check(_library.kru_pack(plan.handle, pointers, packed.data_ptr()))
    return plan, kept, pointers, packed


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """states, final_state (B, S, N) and what ``states`` lacks of the state; the same bits for any number of threads.

    Raises:
        MemoryError: no memory for the workspace.
    """
    batch, length, *_ = call.inputs.shape
    plan, _, _, packed = _prepare(call)
    states = _fresh(call.inputs, *call.cell.states_shape(call.inputs.shape))
    final_state = call.state_like()  # (B, S, N)
    saved = _fresh(call.inputs, *(call.saved_shape() if save else (0,)))
    groups = -(-batch // plan.group)
    read = (packed, call.inputs, call.bias, call.initial_state, call.mask, call.starts)
    sizes = (batch, length, min(groups, 4 * MAX_CHUNKS))
    _run(_library.kru_forward, plan, plan.work * groups * length, sizes, (*read, states, saved, final_state))
    return states, final_state, saved


def backward(
    call: ScanCall, states: Tensor, saved: Tensor, d_states: Tensor | None, d_final: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """d_inputs (B, T, K, N), d_factors shaped as the factors, d_bias and d_initial (B, S, N).

    Products and gates are computed again, from the states.
    """
    batch, length, *_ = call.inputs.shape
    plan, kept, pointers, packed = _prepare(call)
    groups = -(-batch // plan.group)
    # Gradient buffers of at most a quarter of the states' bytes.
    chunks = min(groups, MAX_CHUNKS, max(states.numel() // (4 * plan.gradients), 4))
    chunk_grads = _fresh(states, chunks, plan.gradients)
    d_inputs, d_initial = _fresh(states, *call.inputs.shape), call.state_like()
    d_factors = [_fresh(states, *factor.shape) for factor in kept]
    read = (packed, call.inputs, call.bias, call.initial_state, call.mask, call.starts, states, saved, None)
    written = (d_inputs, d_initial, chunk_grads)
    work = 4 * plan.work * groups * length
    _run(_library.kru_backward, plan, work, (batch, length, chunks), (*read, d_states, d_final, *written))
    grads = chunk_grads.sum(0)  # of the stages, then of the bias
    places = plan.pointers(*_addresses(d_factors))
    _check(_library.kru_project(plan.handle, pointers, grads.data_ptr(), places))
    return d_inputs, d_factors, grads[-call.bias.numel() :].clone().view(call.bias.shape), d_initial


ENGINE = Engine(forward, backward, obstacle)
