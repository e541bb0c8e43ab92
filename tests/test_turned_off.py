"""Options that 0 turns off: a recipe's own can be taken back, also by the command that makes an older run again."""

import re

import pytest

from training.arguments import MAX_SEED, ModelOptions, parse_arguments
from training.compose import ComposeOptions
from training.errors import UserError
from training.models import build_model

TEXT = {"vocab_size": 52, "pad_token_id": 0}
OFF = ("io_rank", "kronecker_terms", "intermediate_size", "chrono_max_length")


@pytest.fixture
def recipe(tmp_path):
    """A recipe with terms and a feed-forward block."""
    path = tmp_path / "recipe.yaml"
    path.write_text("state_size: 16\nhidden_size: 8\nkronecker_terms: 2\nintermediate_size: 4\n")
    return str(path)


@pytest.fixture
def ranked(tmp_path):
    """A recipe with a rank."""
    path = tmp_path / "ranked.yaml"
    path.write_text("state_size: 16\nhidden_size: 8\nio_rank: 3\n")
    return str(path)


def values(*words: str) -> dict:
    """The config fields of a command line."""
    return parse_arguments(list(words)).model.config_values()


def test_zero_takes_a_recipes_own_back(recipe, ranked):
    sizes = {"state_size": 16, "hidden_size": 8}
    assert values(recipe, "--kronecker_terms", "0") == {**sizes, "intermediate_size": 4}
    assert values(recipe, "--intermediate_size=0") == {**sizes, "kronecker_terms": 2}
    assert values(ranked, "--io_rank", "0") == sizes
    config = build_model(
        "causal_lm", parse_arguments([recipe, "--kronecker_terms=0", "--intermediate_size=0"]).model, **TEXT
    ).config
    assert (config.io_rank, config.kronecker_terms, config.intermediate_size) == (None, None, None)


def test_turning_one_map_off_leaves_the_other(recipe, ranked):
    assert values(recipe, "--io_rank", "0")["kronecker_terms"] == 2
    assert values(ranked, "--kronecker_terms", "0")["io_rank"] == 3


@pytest.mark.parametrize("name", OFF)
def test_zero_in_a_recipe_and_for_a_baseline(name, tmp_path):
    path = tmp_path / "zero.yaml"
    path.write_text(f"state_size: 16\n{name}: 0\n")
    assert values(str(path)) == {"state_size": 16}
    assert build_model("causal_lm", ModelOptions("lstm", state_size=8, **{name: 0}), **TEXT).config.state_size == 8


@pytest.mark.parametrize("name", OFF)
def test_below_zero_is_an_error(name):
    with pytest.raises(UserError, match=f"^{name}=-1 is not valid: it must be positive, or 0 to turn it off$"):
        parse_arguments([f"--{name}", "-1"])


@pytest.mark.parametrize("name", OFF)
def test_a_trained_model_keeps_what_it_has(name):
    with pytest.raises(UserError, match=f"brings its own configuration; remove {name}$"):
        parse_arguments(["--model", "somewhere", f"--{name}", "0"])


def test_a_budget_does_not_choose_a_rank_that_was_turned_off():
    sized = {"parameter_budget": 60_000, "wiring": "plain", "io_rank": 0}
    model = build_model("causal_lm", ModelOptions(**sized), **TEXT)
    assert model.config.io_rank is None
    with pytest.raises(UserError, match="nothing is left to choose, state_size, io_rank are given"):
        build_model("causal_lm", ModelOptions(**sized, state_size=504), **TEXT)
    lstm = build_model("causal_lm", ModelOptions("lstm", parameter_budget=60_000, io_rank=0), **TEXT)
    assert "io_rank" not in lstm.config.to_dict()


def test_seeds_that_torch_takes():
    assert parse_arguments(["--seed", str(MAX_SEED)]).run.seed == MAX_SEED
    for seed in (-1, MAX_SEED + 1, 2**70):
        message = re.escape(f"seed={seed} is not valid: it must be between 0 and {MAX_SEED}")
        with pytest.raises(UserError, match=message):
            parse_arguments(["--seed", str(seed)])
        with pytest.raises(UserError, match=message):
            ComposeOptions(model="x", output="a.mid", seed=seed)
