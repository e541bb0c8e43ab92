"""Options and recipes that ask for too much: one line that names the field, the value and the limit."""

from itertools import pairwise

import pytest

from training.common.errors import UserError
from training.compose import ComposeOptions
from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.options.model import ModelOptions
from training.options.parser import parse_words
from training.options.recipe import read_recipe
from training.tasks import get_task

LAUGHS = "a: &a [lol, lol]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "has the alias *a"),
        ("factor_shapes: &s [[7, 7]]\nseed: *s\n", "has the alias *s"),
        ("<<: &x {seed: 1}\nb: {<<: *x}\n", "has the alias *x"),
        ("factor_shapes: " + "[" * 50_000, "nested deeper than a list of lists"),
        ("factor_shapes: " + "[" * 4 + "7" + "]" * 4, "nested deeper than a list of lists"),
        ("#" * (1 << 20) + "\n", "1,048,577 bytes; it may have 1,048,576"),
    ],
)
def test_recipes_are_small_and_flat(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "a.yaml")
    assert message in str(caught.value) and "a.yaml" in str(caught.value)


NAMES = (
    "max_steps",
    "state_size",
    "parameter_budget",
    "sequence_length",
    "sample_length",
    "save_steps",
    "eval_streams",
)


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_have_at_most_31_bits(name, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{name}: {2**31}\n")
    for words in ([str(tmp_path / "a.yaml")], [f"--{name}={2**31}"], [f"--{name}={10**300}"]):
        with pytest.raises(UserError, match=rf"{name}=\d+ is not valid: it must be at most 2147483647"):
            parse_arguments(words)
    assert parse_arguments([f"--{name}=2147483647"]).flat()[name] == 2**31 - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs=1e300"], "num_train_epochs=1e+300 is not valid: it must be positive"),
        (["--num_threads=1025"], "num_threads=1025 is not valid: it must be at most 1024"),
        (["--task=adding", "--sequence_length=1000001"], "sequence_length=1000001 is not valid: it must be at most"),
        (["--task=copy_memory", "--test_samples=100000001"], "test_samples=100000001 is not valid"),
        (["--task=piano_roll", "--frames_per_quarter=481"], "frames_per_quarter=481 is not valid: it must be at most"),
    ],
)
def test_what_a_run_may_ask_for(words, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_frames", 100_001, "num_frames=100001 is not valid: it must be at most 100000"),
        ("num_frames", 10**12, "num_frames=1000000000000 is not valid: it must be at most 2147483647"),
        ("frames_per_quarter", 481, "frames_per_quarter=481 is not valid: it must be at most 480"),
    ],
)
def test_what_may_be_composed(name, value, message):
    with pytest.raises(UserError) as caught:
        parse_words([ComposeOptions], ["--model=x", "--output=a.mid", f"--{name}={value}"], "training.compose")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("kru", {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers must be at most 4,096, got 2,000,000,000"),
        ("lstm", {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers must be at most 4,096, got 2,000,000,000"),
        ("kru", {"state_size": 2 * 10**9}, "state_size must be at most 16,777,216, got 2,000,000,000"),
        ("gru", {"state_size": 2 * 10**9}, "state_size must be at most 16,777,216, got 2,000,000,000"),
        ("lstm", {"state_size": 10**7}, "state_size=10000000: the model has 80"),
        ("orthogonal", {"state_size": 10**7}, "do not fit into this machine's memory"),
    ],
)
def test_models_that_are_too_large_are_not_built(architecture, options, message):
    with pytest.raises(UserError) as caught:
        build_model("causal_lm", ModelOptions(architecture=architecture, **options), vocab_size=100)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_task_has_whole_numbers_that_can_be_bounded():
    """A task's own options go the same way as those of a run."""
    for task in ("char_lm", "adding", "piano_roll", "pixel_mnist"):
        options = get_task(task).Options
        with pytest.raises(UserError, match="at most 2147483647"):
            name = next(f for f in ("sequence_length", "eval_batch_size") if hasattr(options, f))
            parse_words([options], [f"--{name}={2**31}"], "training.train")
