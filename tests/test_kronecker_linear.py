"""Maps that are sums of Kronecker products: equal to the sum of torch.kron, and started like a dense map."""

import pytest
import torch
from helpers import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kru_hf import KRUConfig, KRUModel
from kru_hf.maps import KroneckerLinear

EXAMPLES = 60
FLOAT64 = 1e-12
START = 0.1  # relative deviation of a standard deviation over thousands of entries


def filled(in_features: int, out_features: int, terms: int, seed: int = 0) -> KroneckerLinear:
    generator = torch.Generator().manual_seed(seed)
    module = KroneckerLinear(in_features, out_features, terms).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (1,), (2, 3)]))
def test_equals_the_sum_of_kronecker_products(terms, inner, outer, lead):
    module = filled(terms * inner, terms * outer, terms)
    dense = sum(torch.kron(a, b) for a, b in zip(module.mixing, module.blocks, strict=True))  # (out, in)
    x = torch.randn(*lead, terms * inner, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_near(module.weight, dense, FLOAT64)
    assert_near(module(x), F.linear(x, dense), FLOAT64)
    found = torch.autograd.grad(module(x).square().sum(), [*module.parameters()])
    expected = torch.autograd.grad(F.linear(x, dense).square().sum(), [*module.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, FLOAT64)


def test_full_rank_for_a_fraction_of_the_parameters():
    module = filled(32, 64, 8)
    assert sum(p.numel() for p in module.parameters()) == 64 * 32 // 8 + 8**3
    assert torch.linalg.matrix_rank(module.weight) == 32


@pytest.mark.parametrize("cell_type", ["kru", "kru_lstm"])
def test_starts_with_the_spread_of_a_dense_map(cell_type):
    sizes = {"vocab_size": 11, "state_size": 256, "hidden_size": 96, "intermediate_size": 192, "cell_type": cell_type}
    maps = ("in_proj", "out_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj")
    torch.manual_seed(0)
    dense, terms = (KRUModel(KRUConfig(**sizes, kronecker_terms=n)).layers[0] for n in (None, 8))
    for name in maps:
        expected, found = dense.get_submodule(name).weight, terms.get_submodule(name).weight
        assert found.shape == expected.shape
        assert found.std().item() == pytest.approx(expected.std().item(), rel=START)
