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


def _as_installed(function: Any, module: Any) -> Any:
    """The function, or None if it is not the one that ``module`` defines: another library has replaced it already."""
    return function if getattr(function, "__code__", None) and function.__globals__ is vars(module) else None


_FORWARDS = {
    nn.Linear: _as_installed(nn.Linear.forward, nn.modules.linear),
    KroneckerLinear: KroneckerLinear.forward,
}
_CALLS = tuple(_as_installed(function, nn.modules.module) for function in (nn.Module.__call__, nn.Module._call_impl))


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is a product with its plain weight and nothing else.

    Not with an adapter, a quantized layer or offloading in its place, a hook of its own or of all modules, a weight of
    another type than torch's own, or where ``forward``, ``F.linear`` or calls as such are replaced or watched.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or nn.modules.module._has_any_global_hook():
        return False
    if type(module) not in _FORWARDS or "forward" in vars(module) or not all(map(_is_plain, module.parameters())):
        return False
    replaced = type(module).forward is not _FORWARDS[type(module)] or F.linear is not torch._C._nn.linear
    called = (nn.Module.__call__, nn.Module._call_impl) == _CALLS
    return called and not replaced and torch._C._len_torch_function_stack() == 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether operators mean for the tensor what they mean for torch's own."""
    return type(tensor) in (Tensor, nn.Parameter)


def map_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a map takes its input in: that of its parameters, of x where they are codes of 8 bits or fewer."""
    wide = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(wide, x.dtype)


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
    own, device = map_dtype(module, x), x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else own
    if epsilon is None:
        return module(x.to(own))
    # float16 ends at 65,504: there, the norm comes before the product and before the cast.
    called = not (is_bare(module) and _is_plain(x)) or is_transformed((x, *module.parameters()))
    if called or dtype == torch.float16:
        return module((F.rms_norm(x, x.shape[-1:], eps=epsilon) * scale).to(own))
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))  # (out, in), (out,)
    x, weight = x.to(dtype), weight.to(dtype)  # (…, in), (out, in)
    y = _NormedLinear.apply(x.reshape(-1, x.shape[-1]), weight, epsilon)  # (M, out)
    y = y if scale == 1 else y * scale  # (M, out)
    y = y if bias is None else y + bias  # (M, out)
    return y.reshape(*x.shape[:-1], weight.shape[0])
