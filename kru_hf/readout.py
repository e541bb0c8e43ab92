"""A linear map of RMS-normalised features, without a normalised copy of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kronecker_linear import KroneckerLinear
from .transforms import is_transformed


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """(mean x² + ε)^{-1/2} of each row of x (M, in): (M, 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()  # (M, 1)
    return torch.rsqrt(squares / x.shape[-1] + epsilon).to(x.dtype)


class _NormedLinear(torch.autograd.Function):
    """y = s · (x Aᵀ) with s = (mean x² + ε)^{-1/2} a position: x is read, never copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _inverse_rms(x, epsilon)  # (M, 1)
        y = (x @ weight.mT) * scale  # (M, out)
        ctx.save_for_backward(x, weight, scale, y)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: what was saved of a step in between has no derivative
            scale = _inverse_rms(x, ctx.epsilon)  # (M, 1)
        scaled = grad * scale  # (M, out)
        # ds/dx = -s³ x / width, and ⟨grad, x Aᵀ⟩ s³ = ⟨grad, y⟩ s²
        radial = (grad * y).sum(-1, keepdim=True) * scale.square() / x.shape[-1]  # (M, 1)
        grad_x = (scaled @ weight).addcmul_(x, radial, value=-1)  # (M, in)
        return grad_x, scaled.mT @ x, None


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its map and nothing else: no adapter, quantized layer, hook or offloading."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in (nn.Linear, KroneckerLinear) and "forward" not in vars(module) and not any(hooks)


def undropped(dropout: float, training: bool) -> float:
    """By how much the RMS norm of features makes up too little where dropout has zeroed a share of them.

    Dropout makes the norm (1 - p)^(-1/2) times as large: evaluation would be surer of itself than training was.
    """
    return (1 - dropout) ** -0.5 if training else 1.0


def normed_linear(x: Tensor, module: nn.Module, epsilon: float | None, scale: float = 1.0) -> Tensor:
    """``module(scale * rms_norm(x))`` for a linear map and x (…, in), which is cast to the dtype of the map: (…, out).

    The norm has no parameters. A bare map is not called: norm and scale are applied to the product as one number a
    position, and x, the widest tensor of the model, is neither copied nor saved a second time. ``epsilon`` None: no
    norm and no scale, ``module(x)``.
    """
    parameter = next(module.parameters(), None)
    own = parameter.dtype if parameter is not None and parameter.is_floating_point() else x.dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else own
    if epsilon is None:
        return module(x.to(own))
    # float16 ends at 65,504: there, the norm comes before the product and before the cast.
    if not is_bare(module) or is_transformed((x, *module.parameters())) or dtype == torch.float16:
        return module((F.rms_norm(x, x.shape[-1:], eps=epsilon) * scale).to(own))
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))  # (out, in), (out,)
    x, weight = x.to(dtype), weight.to(dtype)  # (…, in), (out, in)
    y = _NormedLinear.apply(x.reshape(-1, x.shape[-1]), weight, epsilon)  # (M, out)
    y = y if scale == 1 else y * scale  # (M, out)
    y = y if bias is None else y + bias  # (M, out)
    return y.reshape(*x.shape[:-1], weight.shape[0])
