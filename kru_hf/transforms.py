"""Forward-mode derivatives and ``torch.func``: only the definition of a recurrence can be transformed by them."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor carries a tangent, or stands inside ``torch.func.grad``, ``jvp``, ``vmap`` and their like."""
    if torch.compiler.is_compiling():
        return False
    return any(
        t is not None and (torch.func.debug_unwrap(t) is not t or unpack_dual(t).tangent is not None) for t in tensors
    )


def transformed_backend(backend: str) -> str:
    """The engine for transformed tensors: "reference".

    Raises:
        NotImplementedError: another engine is named. Its kernels would drop a tangent without a word.
    """
    if backend not in ("auto", "reference"):
        raise NotImplementedError(
            f"backend {backend!r} has no forward-mode derivatives and no torch.func: it must be 'auto' or 'reference'"
        )
    return "reference"
