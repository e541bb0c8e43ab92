"""Maps around the recurrence: sums of Kronecker products, the feed-forward block, normed maps in float16."""

from unittest import mock

import pytest
import torch
from helpers import BLOCKS, GATED, RELATIVE, assert_near, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kru_hf import KRUConfig, KRUForTokenClassification, KRUModel
from kru_hf.maps import KroneckerLinear, KRUFeedForward, normed_linear

EXAMPLES = 60
FLOAT64 = 1e-12
HALF = 2e-3  # of the largest entry: two units in the last place of float16, whose numbers end at 65,504
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


def test_feed_forward_is_swiglu():
    block = KRUFeedForward(6, 4, epsilon=1e-6)
    x = torch.randn(2, 3, 6)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
    gate, up = block.gate_up_proj.weight.chunk(2)
    expected = (torch.sigmoid(normed @ gate.mT) * (normed @ gate.mT) * (normed @ up.mT)) @ block.down_proj.weight.mT
    assert_near(block(x), expected, RELATIVE[torch.float32])


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 3000.0])
def test_a_normed_map_is_that_of_float32(size):
    torch.manual_seed(0)
    module = nn.Linear(64, 5).half()
    x = (size * torch.randn(7, 64)).half().requires_grad_()
    normed_linear(x, module, 1e-6).float().square().sum().backward()
    wide = x.detach().float().requires_grad_()
    expected = F.linear(F.rms_norm(wide, (64,), eps=1e-6), module.weight.float(), module.bias.float())
    expected.square().sum().backward()
    found = normed_linear(x, module, 1e-6).float()
    assert (found - expected).abs().max() <= HALF * expected.abs().max()
    assert (x.grad.float() - wide.grad).abs().max() <= 5 * HALF * wide.grad.abs().max()


# Not residual blocks of gated cells: all is zero there until the first pixel, and the gradient of one norm after
# another at zero, 10^6 with this epsilon, is no number of float16 either way.
@pytest.mark.parametrize("options", [*BLOCKS, GATED[1]], ids=str)
def test_gradients_are_finite_where_the_input_begins_with_silence(options):
    torch.manual_seed(0)
    model = KRUForTokenClassification(tiny_config(input_size=1, num_labels=4, **options)).train()
    values = torch.cat([torch.zeros(2, 10, 1), torch.rand(2, 10, 1)], 1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_values=values, labels=torch.ones(2, 20, dtype=torch.long)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


RESIDUAL = [*(b for b in BLOCKS if b["block_type"] == "residual"), GATED[0], {"cell_type": "kru_linear"}]
MANY = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))  # more steps than the 11 tokens


@pytest.mark.parametrize("options", RESIDUAL, ids=str)
def test_first_maps_of_a_token_are_those_of_its_steps(options):
    """Fewer tokens than steps: U x is made once for each token, with the values and gradients of one for each step."""
    model = tiny_model(**options).train().double()
    assert model.model._first_inputs(MANY) is not None and model.model._first_inputs(MANY[:, :3]) is None
    results = []
    for known in (model.model._first_inputs, lambda ids: None):
        with mock.patch.object(model.model, "_first_inputs", known):
            loss = model(MANY, labels=MANY).loss  # token 0 pads: its embedding has no gradient, the maps behind it have
        results.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, FLOAT64)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.norm", "layers.0.in_proj"])
def test_a_hook_of_the_first_maps_sees_every_step(name):
    model, seen = tiny_model(), []
    model.get_submodule(f"model.{name}").register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    model(MANY)
    assert seen == [MANY.shape]
