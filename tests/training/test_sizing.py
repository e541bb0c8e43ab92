"""Models of a parameter budget: as large as it allows, for every architecture, and a clear end where there is none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf import KRUConfig, KRUForCausalLM, plan_factor_shapes
from training.common.errors import UserError
from training.models.build import build_model
from training.models.sizing import UNUSED, fit_to_budget, kronecker_sizes
from training.options.model import ARCHITECTURES, ModelOptions

TEXT = {"vocab_size": 52, "pad_token_id": 0}
ROLL = {"vocab_size": 1, "input_size": 88}


def sized(budget: int, head: str = "causal_lm", architecture: str = "kru", fixed=TEXT, **options):
    if architecture in ("kru", "unitary"):
        options = {"block_type": "plain", **options}
    return build_model(head, ModelOptions(architecture=architecture, parameter_budget=budget, **options), **fixed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head", "fixed"), [("causal_lm", TEXT), ("piano_roll", ROLL)])
def test_every_architecture_uses_its_budget(architecture, head, fixed, capsys):
    budget = 60_000
    model = sized(budget, head, architecture, fixed)
    assert (1 - UNUSED) * budget <= model.num_parameters() <= budget
    said = capsys.readouterr().out
    assert f"sized: {architecture} with state_size {model.config.state_size}" in said
    assert f"{model.num_parameters():,} parameters" in said


@pytest.mark.parametrize("fixed", [{}, {"state_size": 448}])
def test_widths_are_multiples_of_the_kronecker_terms(fixed):
    model = sized(100_000, block_type="residual", kronecker_terms=8, intermediate_size=128, **fixed)
    assert (1 - UNUSED) * 100_000 <= model.num_parameters() <= 100_000
    assert model.config.state_size % 8 == model.config.hidden_size % 8 == 0


def test_the_next_size_would_be_too_large():
    model = sized(60_000, architecture="lstm")
    larger = build_model(
        "causal_lm", ModelOptions(architecture="lstm", state_size=model.config.state_size + 1, hidden_size=26), **TEXT
    )
    assert model.config.hidden_size == 26  # half of the vocabulary
    assert larger.num_parameters() > 60_000


def test_factors_of_seven_to_eleven_unless_asked():
    shapes = sized(120_000).config.factor_shapes
    assert all(7 <= p == q <= 11 for p, q in shapes)
    assert all(p <= 3 for p, _ in sized(121_000, factor_size=2).config.factor_shapes)
    assert len(sized(120_000, factor_size=200).config.factor_shapes) == 1


def test_the_free_dimension_is_the_first_that_is_not_given():
    assert sized(60_000, architecture="lstm", state_size=100).config.hidden_size not in (None, 100)
    assert sized(60_000, architecture="low_rank", state_size=300).config.recurrent_rank > 1
    residual = sized(200_000, block_type="residual", state_size=512).config
    assert (residual.state_size, residual.num_hidden_layers) == (512, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 300}, r"parameter_budget=300 is too small for kru: state_size=\d+ has [\d,]+"),
        ({"budget": 100, "architecture": "gru"}, "too small for gru: state_size=1 has 1"),
        ({"budget": 9000, "state_size": 504}, "nothing is left to choose, state_size are given"),
        ({"budget": 9000, "head": "piano_roll", "fixed": ROLL, "architecture": "lstm", "state_size": 3}, "nothing is"),
        ({"budget": 10**6, "architecture": "low_rank", "state_size": 20}, "no recurrent_rank of low_rank comes near"),
    ],
)
def test_budgets_that_cannot_be_met(options, message):
    with pytest.raises(UserError, match=message):
        sized(**options)


def test_sizing_leaves_the_random_start_alone():
    torch.manual_seed(3)
    chosen = sized(20_000)
    torch.manual_seed(3)
    again = build_model("causal_lm", ModelOptions(block_type="plain", state_size=chosen.config.state_size), **TEXT)
    for ours, theirs in zip(chosen.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@given(st.integers(2, 12), st.integers(10, 3000))
@settings(max_examples=30, deadline=None)
def test_kronecker_sizes_are_all_that_the_plan_gives(factor_size, limit):
    sizes = range(factor_size, 2 * factor_size)
    found = kronecker_sizes(factor_size, sizes, limit)
    expected = [n for n in range(2, limit + 1) if all(p in sizes for p, _ in plan_factor_shapes(n, factor_size))]
    assert found == expected


@given(st.integers(1_000, 10**7), st.integers(1, 500))
@settings(max_examples=50, deadline=None)
def test_chosen_size_is_the_largest_of_a_formula(budget, width):
    """Against a formula instead of models: H² + width·H."""
    best = max((h for h in range(1, 4000) if h * h + width * h <= budget), default=None)
    values = {"input_size": 3}
    if best is None or best * best + width * best < (1 - UNUSED) * budget:
        with pytest.raises(UserError):
            fit_to_budget(budget, "rnn", values, lambda v: v["state_size"] ** 2 + width * v["state_size"])
        return
    found = fit_to_budget(budget, "rnn", values, lambda v: v["state_size"] ** 2 + width * v["state_size"])
    assert found["state_size"] == best


def test_counts_are_those_of_real_models():
    model = sized(120_000)
    config = KRUConfig(block_type="plain", state_size=model.config.state_size, **TEXT)
    assert KRUForCausalLM(config).num_parameters() == model.num_parameters()
