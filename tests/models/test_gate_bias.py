"""Where gates start: torch's layers and the Kronecker cells alike, by construction and by transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kru_hf import KRUGRU, KRUJANET, KRULSTM, KRUConfig, KRUForCausalLM
from kru_hf.cells import CELLS, gate_bias
from training.models.baselines import BaselineConfig, BaselineForCausalLM

KEEPS = {"lstm": 1, "gru": 1, "janet": 0}  # the gate that keeps the state
EDGE = 1e-5  # of log u at the ends of its interval, fp32


@given(st.sampled_from(list(KEEPS)), st.integers(1, 40), st.integers(3, 10_000), st.integers(0, 100))
def test_kept_lengths_lie_between_two_steps_and_the_longest(cell, size, longest, seed):
    torch.manual_seed(seed)
    bias = gate_bias(CELLS[cell], size, longest)
    kept = 1 / (1 - bias[KEEPS[cell]].double().sigmoid())  # (N,): steps in which a gate forgets a share of 1 - 1/e
    assert kept.min() >= 2 * (1 - EDGE) and kept.max() <= longest * (1 + EDGE)
    assert_others(cell, bias)


def assert_others(cell, bias):
    """What the gates beside the one that keeps start with, by chrono initialisation."""
    if cell == "lstm":
        assert torch.equal(bias[0], -bias[1])
    assert not bias[[row for row in range(len(bias)) if row != KEEPS[cell] and (cell, row) != ("lstm", 0)]].any()


def test_lengths_are_uniform():
    torch.manual_seed(0)
    kept = 1 + gate_bias(CELLS["gru"], 20_000, 101)[1].exp()  # (N,) ~ U[2, 101]
    quartiles = torch.quantile(kept, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([26.75, 51.5, 76.25]), atol=1.5, rtol=0)


def chrono_models(longest: int | None):
    """(cell, its bias by rows) of every class that takes the option."""
    for cell, layer in (("lstm", KRULSTM), ("gru", KRUGRU), ("janet", KRUJANET)):
        yield cell, layer(3, 64, chrono_max_length=longest).recurrences[0].bias
        config = KRUConfig(vocab_size=9, state_size=64, cell_type=f"kru_{cell}", chrono_max_length=longest)
        yield cell, KRUForCausalLM(config).model.layers[1].recurrence.bias
        if cell == "janet":
            continue  # torch has none
        baseline = BaselineForCausalLM(BaselineConfig(cell=cell, state_size=64, chrono_max_length=longest))
        yield cell, baseline.model.recurrent.bias_ih_l0.view(-1, 64)
        assert not baseline.model.recurrent.bias_hh_l0.any()


def test_every_gated_network_starts_so():
    torch.manual_seed(0)
    for cell, bias in chrono_models(1000):
        assert bias[KEEPS[cell]].exp().std() > 150  # of U[1, 999]: 288
        assert_others(cell, bias)
    for cell, bias in chrono_models(None):
        assert (bias[KEEPS[cell]] == (0 if cell == "gru" else 1)).all()
        assert bias.count_nonzero() == (0 if cell == "gru" else 64)


def test_a_layer_says_what_is_allowed():
    with pytest.raises(ValueError, match="chrono_max_length must be None or at least 3 steps, got 0"):
        KRULSTM(3, 8, chrono_max_length=0)
    with pytest.raises(ValueError, match="chrono_max_length must be None without a bias, got 50"):
        KRUGRU(3, 8, bias=False, chrono_max_length=50)
