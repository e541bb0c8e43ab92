"""What stands between code and numbers: ``torch.func``, forward mode, tracers, tensors without numbers.

Of the engines, only the definition has forward-mode and higher derivatives.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("auto", "reference", "portable", "cpu", "triton")  # engines of the recurrence; "auto" chooses one


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
