"""Word problems and regular languages: their data against plain computations, and recipes from end to end."""

import json

import numpy as np
import pytest
from paper_data import make

from training.common.errors import UserError
from training.options.recipe import RECIPES
from training.tasks import Layout
from training.tasks.regular_languages import LANGUAGES, MODULUS
from training.tasks.sequences import IGNORED
from training.tasks.word_problem import group_table
from training.train import main

GROUPS = {"Z60": 60, "S3": 6, "A4": 12, "S4": 24, "A5": 60, "A5xS3": 360, "Z6xS3xZ2": 72, "Z60xS3": 360}


@pytest.mark.parametrize(("name", "order"), GROUPS.items())
def test_groups_are_groups_of_their_generators(name, order):
    table, generators = group_table(name)
    everything = np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == everything).all() and (table[:, 0] == everything).all()
    assert (np.sort(table, 0) == everything[:, None]).all() and (np.sort(table, 1) == everything).all()
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 200))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == (set(name) <= set("Zx0123456789"))
    found = {0}
    while not found >= (reached := {int(table[g, x]) for g in generators for x in found}):
        found |= reached
    assert len(found) == order


@pytest.mark.parametrize("name", ["D4", "", "A5xx", "S9", "Z1", "S99999"])
def test_groups_that_are_not_known_are_named(name):
    with pytest.raises(UserError, match=f"group='{name}'"):
        group_table(name)


@pytest.mark.parametrize("elements", ["all", "generators"])
def test_labels_are_products(elements):
    task = make("word_problem", group="S4", elements=elements, curriculum_batches=0, sequence_length=9)
    table, generators = group_table("S4")
    batch = task.train_batch(3, 0, Layout(5)).inputs
    assert batch["input_ids"].shape == (5, 9)
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        product = 0
        for token, label in zip(tokens, labels, strict=True):
            product = table[generators[token] if elements == "generators" else token, product]
            assert product == label


def values(language, tokens):
    """The labels of a row of tokens, by the language's definition."""
    if language == "modular_arithmetic":
        text = "".join(str(t) if t < MODULUS else "+-*"[t - MODULUS] for t in tokens)
        return [IGNORED if t % 2 else eval(text[: t + 1]) % MODULUS for t in range(len(tokens))]
    prefixes = [tokens[: t + 1] for t in range(len(tokens))]
    if language == "parity":
        return [sum(p) % 2 for p in prefixes]
    if language == "even_pairs":
        return [sum(a != b for a, b in zip(p, p[1:], strict=False)) % 2 for p in prefixes]
    return [sum({0: 0, 1: 1, 2: -1}[t] for t in p) % MODULUS for p in prefixes]


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_are_as_described(language):
    task = make("regular_languages", language=language, test_lengths="10,20", test_samples=3)
    for batch in task.eval_batches("test", 0, 1):
        for tokens, labels in zip(batch.inputs["input_ids"].tolist(), batch.inputs["labels"].tolist(), strict=True):
            assert labels == values(language, tokens)


def test_lengths_grow_and_slots_share_a_batch():
    task = make("word_problem", start_length=4, sequence_length=64, curriculum_batches=100)
    assert [task.length(index) for index in (0, 50, 100, 1000)] == [4, 16, 64, 64]
    whole = task.train_batch(7, 0, Layout(6)).inputs["input_ids"]
    halves = [task.train_batch(7, slot, Layout(6, 2)).inputs["input_ids"] for slot in (0, 1)]
    assert whole.tolist() == [row for half in halves for row in half.tolist()]
    assert whole.tolist() != task.train_batch(8, 0, Layout(6)).inputs["input_ids"].tolist()


def test_accuracy_counts_positions_beyond_half_the_length():
    task = make("word_problem", group="Z3", test_lengths="4", test_samples=2)
    (batch,) = task.eval_batches("test", 0, 1)
    labels = batch.inputs["labels"]
    logits = np.eye(3)[labels]
    logits[:, :2] = 0
    logits[0, 3] = -logits[0, 3]
    sums = {name: float(value) for name, value in task.sums(labels.new_tensor(logits).float(), batch).items()}
    assert task.metrics(sums)["accuracy_4"] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_lengths": "64,1"}, "test_lengths='64,1' must hold numbers, each"),
        ({"test_lengths": "64,x"}, "test_lengths='64,x' must hold numbers"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"start_length": 99}, "start_length=99 must be at most sequence_length=64"),
        ({"elements": "some"}, "elements"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make("word_problem", **options)


ARCHITECTURES = {
    "linear": {},
    "lstm": {"architecture": "lstm", "state_size": 4},
    "kron-lstm": {"cell_type": "kru_lstm"},
    "kru": {"cell_type": "kru"},
    "diagonal": {"factor_shapes": "1x1", "num_heads": 5},
    "products": {"factor_shapes": "2x2,3x3"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("task", ["word_problem", "regular_languages"])
def test_recipes_with_every_architecture(task, name, tmp_path):
    short = {"max_steps": 2, "eval_steps": 2, "test_lengths": "6,12", "validation_length": 8, "test_samples": 3}
    options = {**short, "sequence_length": 5, "per_device_train_batch_size": 4, **ARCHITECTURES[name]}
    recipe = [f"--{key}={value}" for key, value in options.items()]
    main([str(RECIPES / f"{task}.yaml"), f"--output_dir={tmp_path}", "--num_threads=1", *recipe])
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"test_accuracy_6", "test_accuracy_12", "validation_accuracy_8"} <= results.keys()
