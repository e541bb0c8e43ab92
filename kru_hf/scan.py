"""``kron_scan``: the recurrence of every cell with one signature and several engines, and which of them runs.

Before it, what stands between code and numbers: ``torch.func``, forward mode, tracers, tensors without numbers. Only
the definition has forward-mode and higher derivatives.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .cells import ACTIVATIONS, CELLS, Cell
from .kronecker import check_choice, merge_terms
from .scan_cpu import ENGINE as CPU
from .scan_portable import ENGINE as PORTABLE
from .scan_reference import Engine, ScanCall, check_scan, scan_reference
from .scan_triton import ENGINE as TRITON

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "portable", "cpu", "triton")  # engines of the recurrence; "auto" chooses one
ENGINES: dict[str, Engine] = {"cpu": CPU, "triton": TRITON, "portable": PORTABLE}
# Engine -> its operator for compiled and traced code, with the arguments of forward and the cell's name for the cell.
# The installed package fills it in; code that was loaded from a model's repository registers nothing with torch.
COMPILED: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}
_choice = "auto"
_told: set[str] = set()


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor carries a tangent, or stands inside ``torch.func.grad``, ``jvp``, ``vmap`` and their like."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None:
        return False  # nothing of the kind is going on
    given = [t for t in tensors if t is not None]
    return any(torch.func.debug_unwrap(t) is not t or forward_ad.unpack_dual(t).tangent is not None for t in given)


def is_concrete(tensors: Iterable[Tensor]) -> bool:
    """Whether these are plain tensors with numbers in memory, in calls that nothing records.

    False on the meta device, for fake tensors and other subclasses, under ``torch.jit.trace`` and under modes that see
    every operator (``FakeTensorMode``, ``make_fx``, counters). Not to be asked of code that is compiled.
    """
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(tensor) in (Tensor, Parameter) and not tensor.is_meta for tensor in tensors)


def can_look_at(values: Tensor) -> bool:
    """Whether code may depend on values: not in compiled or traced code, without numbers, or in ``torch.func``."""
    return not torch.compiler.is_compiling() and is_concrete([values]) and not is_transformed([values])


def transformed_backend(backend: str) -> str:
    """The engine for transformed tensors: "reference".

    Raises:
        NotImplementedError: another engine is named. Its kernels would drop a tangent silently.
    """
    if backend not in ("auto", "reference"):
        raise NotImplementedError(
            f"backend {backend!r} has no forward-mode derivatives and no torch.func: it must be 'auto' or 'reference'"
        )
    return "reference"


def refuse_derivative(*_: Any) -> None:
    """The derivative of an engine's gradients: `NotImplementedError`."""
    raise NotImplementedError(
        "this engine of the recurrence has first derivatives only: take backend='reference', or for a model "
        "kru_hf.use_backend('reference')"
    )


class _Constant(torch.autograd.Function):
    """Gradients as they are, with a derivative that is an error."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse_derivative(ctx)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's backward: its gradients cannot be differentiated, and say so to who tries.

    torch's ``once_differentiable`` says so only if the gradient that comes in is differentiated as well: that of a
    sum is a constant, and a penalty on its gradients would silently be trained with wrong derivatives.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        found = [result.detach().requires_grad_() for result in results if result is not None]
        marked = iter(_Constant.apply(*found))
        return tuple(None if result is None else next(marked) for result in results)

    return guarded


class EngineScan(torch.autograd.Function):
    """(states, final_state) by an engine, with its analytic backward."""

    @staticmethod
    def forward(ctx: Any, engine: str, cell: Cell, activation: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        states, final, saved = ENGINES[engine].forward(ScanCall.of(cell, activation, tensors), True)
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.cell, ctx.activation = engine, cell, activation
        ctx.save_for_backward(states, saved, *tensors)
        return states, final

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_states: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        states, saved, *tensors = ctx.saved_tensors
        if d_states is None and d_final is None:
            return (None,) * (3 + len(tensors))
        call = ScanCall.of(ctx.cell, ctx.activation, tensors)
        d_inputs, d_factors, d_bias, d_initial = ENGINES[ctx.engine].backward(call, states, saved, d_states, d_final)
        d_state = None if call.initial_state is None else d_initial
        return None, None, None, d_inputs, d_bias, d_state, None, None, *d_factors


def use_backend(name: str) -> None:
    """The engine of every call that names none: "auto" (the default), "reference", "portable", "cpu" or "triton"."""
    global _choice
    check_choice("backend", name, BACKENDS)
    _choice = name


def unavailable_reason(name: str, cell: Cell | None = None) -> str | None:
    """Why the engine of that name cannot run (the cell, if one is given) here, or None."""
    return ENGINES[name].obstacle(cell) if name in ENGINES else None


def backend_report() -> str:
    """Lines that say which engines can run here, and why the others cannot."""
    lines = []
    for name in ("cpu", "triton"):
        reason = unavailable_reason(name)
        lines.append(f"{name}: available" if reason is None else f"{name}: not available ({reason})")
    lines += ["portable: available", "reference: available (slow: the definition)"]
    on_cpu, on_gpu = ("portable" if unavailable_reason(name) else name for name in ("cpu", "triton"))
    lines.append(f"auto: {on_cpu} for float32 on the CPU, {on_gpu} on a GPU, portable where those do not fit")
    lines.append("gated cells on a GPU: portable")
    return "\n".join(lines)


def choose_backend(inputs: Tensor, factors: Sequence[Tensor], cell: Cell) -> tuple[str, str]:
    """The engine that "auto" takes, and why: the device's own if it can, else "portable"."""
    native = "triton" if inputs.is_cuda else "cpu"
    obstacle = ENGINES[native].obstacle(cell, inputs, factors)
    return (native, "it is the device's") if obstacle is None else ("portable", f"{native} cannot run: {obstacle}")


def _tell(message: str) -> None:
    """Log a message once."""
    if not torch.compiler.is_compiling() and message not in _told:
        _told.add(message)
        logger.info(message)


def kron_scan(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cell: str = "kru",
    starts: Tensor | None = None,
    activation: str = "modrelu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = cell(W h_{t-1}, U x_t, b, h_{t-1}) over a whole sequence, W = Σ_r ⊗_f W_f^(r). See ``scan_reference``.

    Args:
        inputs: U x_t (B, T, K, N), float32 or float64: K = 2 planes (real, imaginary) for "kru", else the cell's gates,
            i f g o of "lstm" and "peephole", r z n of "gru", f g of "janet".
        factors: F tensors W_f (K, P_f, Q_f) with ∏ P_f = ∏ Q_f = N, or (R, K, P_f, Q_f) for a sum of R terms; factor 0
            is the slowest index of the state. Terms are merged into a dense W where that is cheaper.
        bias: b of modReLU (N,), not used by the "identity" activation; (4, N) of "lstm", of "gru" (r, z, n and the
            candidate's recurrent one, which the reset gate multiplies), (2, N) of "janet", (7, N) of "peephole" (the
            gates' and p). None: zeros.
        initial_state: h_0 (B, S, N): 2 planes for "kru", h and c for "lstm" and "peephole", else h; zeros if None.
        mask: (B, T) bool; False holds the state at that step, whatever the input.
        cell: "kru", "lstm", "gru", "janet" or "peephole", a name of ``cells.CELLS``.
        starts: (B, T) bool; True begins a new document: the state before that step is zero, and no gradient passes.
            Then the mask decides whether the step is taken.
        activation: of "kru": "modrelu", or "identity" for the linear network.
        backend: an engine that cannot run is an error; None takes the choice of :func:`use_backend`.

    Returns:
        states h_t (B, T, 2, N) for "kru", (B, T, N) for the others, and final_state (B, S, N), a copy. Differentiable
        once in inputs, factors, bias and initial_state; more often, by forward mode and by torch.func's transforms with
        "reference", which "auto" takes for the last two.

    Raises:
        ValueError: a shape or an option that does not fit. TypeError: a dtype or device that does not.
        RuntimeError: the named backend cannot run here. NotImplementedError: it cannot be differentiated that way.
    """
    backend = _choice if backend is None else backend
    check_choice("backend", backend, BACKENDS)
    check_choice("cell", cell, tuple(CELLS))
    check_choice("activation", activation, ACTIVATIONS)
    entry = CELLS[cell]
    if activation != ACTIVATIONS[0] and not entry.complex:
        raise ValueError(f"activation of the cell {cell!r} must stay {ACTIVATIONS[0]!r}, got {activation!r}")
    factors = list(factors)
    if bias is None:
        bias = inputs.new_zeros(entry.bias_shape(math.prod(inputs.shape[-1:])))
    call = ScanCall(inputs, factors, bias, initial_state, mask, starts, entry, activation)
    check_scan(call)
    if factors[0].dim() == 4 and len(merged := merge_terms(factors, entry.complex)) < len(factors):
        _tell(f"kron_scan merges {len(factors[0])} terms of {len(factors)} factors: a dense product is cheaper")
        call = call._replace(factors=merged)
    tensors = call.tensors()
    if is_transformed(tensors):
        backend = transformed_backend(backend)
    elif inputs.is_meta and backend != "reference":
        backend = "portable"  # nothing to compute: the shapes of any engine
    elif backend == "auto":
        backend, reason = choose_backend(inputs, call.factors, entry)
        _tell(f"kron_scan uses the engine {backend}: {reason}")
    elif backend != "reference" and (obstacle := ENGINES[backend].obstacle(entry, inputs, call.factors)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {obstacle}")
    if backend == "reference":
        return scan_reference(call)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if backend in COMPILED and (torch.compiler.is_compiling() or not is_concrete([inputs, *call.factors])):
        return COMPILED[backend](*call[:6], cell, activation, save)[:2]
    if not save:  # generation: no autograd in the way
        return ENGINES[backend].forward(call, False)[:2]
    return EngineScan.apply(backend, entry, activation, *tensors)
