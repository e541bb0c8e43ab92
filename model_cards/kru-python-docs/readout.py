"""Linear maps: their start, and one of RMS-normalised features without a normalised copy of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias whose output starts with ``scale`` times the standard deviation of its input.

    The standard deviation of the weights is left on the module for ``_init_weights``, which sees leaf modules only.
    """
    module = nn.Linear(in_features, out_features, bias=False)
    module.init_std = scale * in_features**-0.5
    return module


class _NormedLinear(torch.autograd.Function):
    """y = s · (x Aᵀ) with s = (mean x² + ε)^{-1/2} a position: x is read, never copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()  # (M, 1)
        scale = torch.rsqrt(squares / x.shape[-1] + epsilon).to(x.dtype)  # (M, 1)
        y = (x @ weight.mT) * scale  # (M, out)
        ctx.save_for_backward(x, weight, scale, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale, y = ctx.saved_tensors
        scaled = grad * scale  # (M, out)
        # ds/dx = -s³ x / width, and ⟨grad, x Aᵀ⟩ s³ = ⟨grad, y⟩ s²
        radial = (grad * y).sum(-1, keepdim=True) * scale.square() / x.shape[-1]  # (M, 1)
        grad_x = (scaled @ weight).addcmul_(x, radial, value=-1)  # (M, in)
        return grad_x, scaled.mT @ x, None


def normed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float | None, dropped: float = 0.0
) -> Tensor:
    """``rms_norm(x) @ weight.T + bias`` for x (…, in), weight (out, in), bias (out,): (…, out).

    The norm has no parameters and is applied to the product as one scale a position: x, the widest tensor of the model,
    is neither copied nor saved a second time. ``epsilon`` None: no norm, an ordinary linear map. ``dropped`` is the
    probability p with which dropout has zeroed entries of x: that made the norm (1 - p)^(-1/2) times as large, and the
    product is scaled back by as much, or evaluation would be surer of itself than training was.
    """
    if epsilon is None:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    y = _NormedLinear.apply(x.reshape(-1, x.shape[-1]), weight, epsilon)  # (M, out)
    y = y * (1 - dropped) ** -0.5 if dropped else y  # (M, out)
    y = y if bias is None else y + bias  # (M, out)
    return y.reshape(*x.shape[:-1], weight.shape[0])
