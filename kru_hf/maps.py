"""The maps around the recurrence: dense, or sums of Kronecker products; the normalised readout, the feed-forward."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scan import is_transformed


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias whose output starts with ``scale`` times the standard deviation of its input.

    The standard deviation of the weights is left on the module for ``_init_weights``, which sees leaf modules only.
    """
    module = nn.Linear(in_features, out_features, bias=False)
    module.init_std = scale * in_features**-0.5
    return module


class KroneckerLinear(nn.Module):
    """y = W x with W = Σ_{i < n} A_i ⊗ B_i; ``mixing`` holds A (n, n, n), ``blocks`` holds B (n, out/n, in/n).

    The parameterized hypercomplex multiplication (PHM) layer of Zhang et al., ICLR 2021: out·in/n + n³ parameters in
    place of out·in, and of full rank all the same. n must divide both widths.
    """

    def __init__(self, in_features: int, out_features: int, terms: int, scale: float = 1.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.terms = in_features, out_features, terms
        self.mixing = nn.Parameter(torch.empty(terms, terms, terms))
        self.blocks = nn.Parameter(torch.empty(terms, out_features // terms, in_features // terms))
        # An entry of W is a sum of n products: with both at these values its variance is that of ``linear``.
        self.mixing_std, self.blocks_std = terms**-0.5, scale * in_features**-0.5

    @property
    def weight(self) -> Tensor:
        """W (out, in), built from its terms: what a dense map of the same function would hold."""
        n = self.terms
        products = self.mixing.flatten(1).mT @ self.blocks.flatten(1)  # (n², out/n · in/n): one product, unlike einsum
        weight = products.unflatten(1, self.blocks.shape[1:]).unflatten(0, (n, n)).transpose(1, 2)
        return weight.reshape(self.out_features, self.in_features)  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) to (…, out)."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, terms={self.terms}"


def structured_linear(
    in_features: int, out_features: int, terms: int | None, scale: float = 1.0
) -> nn.Linear | KroneckerLinear:
    """A map without bias: dense, or of that many Kronecker terms. Its output starts with ``scale`` times the input's
    standard deviation."""
    if terms is None:
        return linear(in_features, out_features, scale)
    return KroneckerLinear(in_features, out_features, terms, scale)


class KRUFeedForward(nn.Module):
    """Pre-norm SwiGLU (Shazeer 2020): W_down (silu(W_gate x) ⊙ W_up x), of width I (``intermediate_size``).

    The recurrence mixes steps, this block mixes the features of one step: it has no state.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, epsilon: float, terms: int | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=epsilon)
        self.gate_up_proj = structured_linear(hidden_size, 2 * intermediate_size, terms)
        self.down_proj = structured_linear(intermediate_size, hidden_size, terms)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) to the branch that is added to them (B, T, D)."""
        gate, up = self.gate_up_proj(self.norm(hidden_states)).chunk(2, -1)  # (B, T, I) each
        return self.down_proj(F.silu(gate) * up)  # (B, T, D)


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """(mean x² + ε)^{-1/2} of each row of x (M, in): (M, 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()  # (M, 1)
    return torch.rsqrt(squares / x.shape[-1] + epsilon).to(x.dtype)


class _NormedLinear(torch.autograd.Function):
    """y = s · (x Aᵀ) with s = (mean x² + ε)^{-1/2} per position: x is read, never copied."""

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
    nn.Embedding: _as_installed(nn.Embedding.forward, nn.modules.sparse),
    nn.RMSNorm: _as_installed(nn.RMSNorm.forward, nn.modules.normalization),
    KroneckerLinear: KroneckerLinear.forward,
}
_CALLS = tuple(_as_installed(function, nn.modules.module) for function in (nn.Module.__call__, nn.Module._call_impl))


def is_bare(module: nn.Module) -> bool:
    """Whether a call of a map, a norm or an embedding is what torch makes of its plain weight and nothing else.

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

    The norm has no parameters. A bare map is not called: norm and scale are applied to the product as one number
    per position, and x, the widest tensor of the model, is neither copied nor saved a second time. ``epsilon`` None: no
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
