"""The maps around the recurrence: dense, or sums of Kronecker products for a fraction of the parameters."""

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
        weight = torch.einsum("iab,icd->acbd", self.mixing, self.blocks)  # (n, out/n, n, in/n)
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
