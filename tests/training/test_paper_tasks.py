"""The paper's tasks: their data and figures against independent computations, and their recipes from end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from paper_data import make

from kru_hf import KRUConfig
from training.common.errors import UserError
from training.common.files import fingerprint
from training.data.pixels import fixed_permutation
from training.data.splits import SPLITS
from training.loop.arguments import parse_arguments
from training.loop.run import prepare_task
from training.models.build import build_model
from training.options.recipe import RECIPES
from training.tasks import Layout
from training.tasks.copy_memory import memoryless_loss
from training.tasks.sequences import IGNORED, classification_sums
from training.train import main

EXACT = 1e-9  # figures computed twice in double precision
SINGLE = 1e-5  # figures computed in single precision, relative
DIGITS_SPLITS = {"train": 1257, "validation": 270, "test": 270}
PERMUTATION_784 = "416b006111197028be9779145b7832930ae87fa6418c9b2990002f2620a43aa7"
PERMUTATION_64 = "d0e4cbc9e10974bc8fceb164e2df3931e56b7a5b355d0788a91f9bb50eda1824"


def small(name: str, **options):
    return make(name, **({"train_samples": 40, "validation_samples": 10, "test_samples": 11} | options))


# ---- generated data -------------------------------------------------------------------------------------------------


def test_copy_sequences_are_as_described():
    task = small("copy_memory", sequence_length=7)
    batch = task.batch("train", np.arange(40))
    rows = (batch.inputs["input_ids"].tolist(), batch.inputs["labels"].tolist(), task.symbols["train"].tolist())
    for tokens, targets, symbols in zip(*rows, strict=True):
        assert tokens == symbols + [8] * 6 + [9] + [8] * 10
        assert targets == [8] * 17 + symbols
        assert max(symbols) < 8 and len(symbols) == 10
    every = np.concatenate([task.symbols[split] for split in SPLITS])
    assert len(np.unique(every, axis=0)) == 61  # no sequence twice
    assert abs(every.mean() - 3.5) < 0.3


def test_memoryless_copy_has_the_published_cross_entropy():
    length = 23
    task = small("copy_memory", sequence_length=length)
    batch = task.batch("test", np.arange(11))
    logits = torch.full((11, length + 20, 9), -1e9)
    logits[:, : length + 10, 8] = 0  # blanks for sure, then any symbol
    logits[:, length + 10 :, :8] = 0
    sums = {name: float(value) for name, value in task.sums(logits, batch).items()}
    figures = task.metrics(sums)
    assert figures["loss"] == pytest.approx(10 * math.log(8) / (length + 20), rel=SINGLE)
    assert memoryless_loss(length) == pytest.approx(10 * math.log(8) / (length + 20), rel=EXACT)
    logits[torch.arange(11)[:, None], torch.arange(length + 20), batch.inputs["labels"]] = 1e9
    perfect = {name: float(value) for name, value in task.sums(logits, batch).items()}
    assert task.metrics(perfect) == {"loss": 0.0, "accuracy": 1.0}


def test_adding_sequences_and_the_constant_predictor():
    task = small("adding", sequence_length=21, train_samples=3000)
    inputs = task.batch("train", np.arange(3000)).inputs
    frames, sums = inputs["input_values"].numpy(), inputs["labels"].numpy()
    marks = frames[..., 1]
    assert set(np.unique(marks)) == {0, 1}
    assert (marks[:, :10].sum(1) == 1).all() and (marks[:, 10:].sum(1) == 1).all()
    assert set(marks.argmax(1)) == set(range(10)) and set(marks[:, 10:].argmax(1)) == set(range(11))
    for row in range(50):
        first, second = np.flatnonzero(marks[row])
        assert sums[row] == pytest.approx(frames[row, first, 0] + frames[row, second, 0], rel=SINGLE)
    out = task.sums(torch.ones(3000, 1), task.batch("train", np.arange(3000)))
    spread = np.square(sums.astype(float) - 1).std() / 3000**0.5
    assert abs(float(task.metrics(out)["mse"]) - 1 / 6) < 4 * spread


@pytest.mark.parametrize("name", ["copy_memory", "adding"])
def test_generated_data_are_fixed_by_their_seed_alone(name):
    one, same, other = (small(name, sequence_length=20, data_seed=seed) for seed in (0, 0, 1))
    assert one.dataset_record() == same.dataset_record()
    assert one.dataset_record()["sha256"] != other.dataset_record()["sha256"]
    key = "input_ids" if name == "copy_memory" else "input_values"
    rows = [one.batch(split, np.arange(10)).inputs[key] for split in SPLITS]
    assert torch.equal(rows[0], same.batch("train", np.arange(10)).inputs[key])
    assert torch.equal(rows[0][3:4], one.batch("train", np.array([3])).inputs[key])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    reordered = make(name, seed=5, sequence_length=20, train_samples=40, validation_samples=10, test_samples=11)
    assert reordered.dataset_record() == one.dataset_record()


def test_batches_cover_a_pass_once_and_do_not_depend_on_the_slots():
    task = small("copy_memory", sequence_length=5)
    whole, halves = Layout(8, 1), Layout(8, 2)
    assert task.num_batches(whole) == 5
    seen = np.concatenate([task.train_indices(index, whole) for index in range(5, 10)])
    assert sorted(seen) == list(range(40))
    assert not np.array_equal(seen, np.concatenate([task.train_indices(index, whole) for index in range(5)]))
    for index in (0, 7):
        parts = [task.train_batch(index, slot, halves).inputs["input_ids"] for slot in (0, 1)]
        assert torch.equal(torch.cat(parts), task.train_batch(index, 0, whole).inputs["input_ids"])
    rows = [batch.inputs["labels"] for slot in range(3) for batch in task.eval_batches("test", slot, 3)]
    assert len(torch.cat(rows).unique(dim=0)) == 11
    with pytest.raises(UserError, match="too few for a batch of 41"):
        task.num_batches(Layout(41))


def test_bad_options_of_generated_tasks():
    with pytest.raises(UserError, match="sequence_length=1 is not valid: it must be at most 1000000, and 2 or more"):
        small("adding", sequence_length=1)
    with pytest.raises(UserError, match="dataset='mnist' is not valid"):
        make("adding", {"dataset": "mnist"})
    with pytest.raises(UserError, match="train_samples .* is not valid"):
        small("copy_memory", train_samples=20_000_000)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_the_permutation_is_one_and_stays_what_it_is():
    for size, digest in ((784, PERMUTATION_784), (64, PERMUTATION_64)):
        order = fixed_permutation(size)
        assert sorted(order) == list(range(size))
        assert fingerprint(order.astype(np.int64)) == digest


def test_digits_split_and_scale():
    plain, permuted = make("pixel_mnist"), make("pixel_mnist", permuted=True)
    assert {split: plain.samples(split) for split in SPLITS} == DIGITS_SPLITS
    every = np.concatenate([plain.dataset.pixels[split] for split in SPLITS])
    from sklearn.datasets import load_digits

    assert sorted(map(bytes, every)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))
    x, y = (task.batch("test", np.arange(5)).inputs["input_values"] for task in (plain, permuted))
    assert x.shape == (5, 64, 1) and x.min() == 0 and x.max() == 1
    assert torch.equal(x[:, torch.from_numpy(permuted.permutation)], y)
    assert permuted.dataset_record()["permutation_sha256"] == PERMUTATION_64
    assert plain.model_kwargs()["num_labels"] == 10


# ---- models and runs ------------------------------------------------------------------------------------------------

# Recipe, its model's real parameters as PAPER.md counts them, and tiny data.
GENERATED = {"train_samples": 12, "validation_samples": 4, "test_samples": 4, "sequence_length": 12}
GENERATED |= {"eval_batch_size": 3}
COUNTS = {
    "copy_memory": 2 * 10 * 128 + 128 + 9 * 257 + 56,
    "adding_published": 2 * 2 * 512 + 512 + 1025 + 72,
    "pixel_mnist": 2 * 512 + 512 + 10 * 1025 + 72,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name, pictures_folder):
    data = ["--dataset", str(pictures_folder)] if name == "pixel_mnist" else ["--train_samples", "20"]
    _, model = prepare_task(parse_arguments([name, *data]))
    assert model.num_parameters() == COUNTS[name]
    assert model.num_recurrent_parameters() == (56 if name == "copy_memory" else 72)
    assert isinstance(model.config, KRUConfig) and model.config.block_type == "plain"


RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def data(pictures_folder, timit_folder, tmp_path_factory):
    """Small data for each task that reads some."""
    text = tmp_path_factory.mktemp("text") / "corpus.txt"
    text.write_text("The state of a unit is what it has read.\n" * 60)
    music = tmp_path_factory.mktemp("music")
    notes = [[[50 + i, 64], [67], []] * 5 for i in range(10)]
    Dataset.from_dict({"notes": notes}).to_parquet(music / "train.parquet")
    return {"pixel_mnist": pictures_folder, "phonemes": timit_folder, "char_lm": text, "piano_roll": music}


def run_words(recipe: str, folder: Path, data: dict[str, Path]) -> list[str]:
    """The recipe in small."""
    task = parse_arguments([recipe]).run.task
    values = {"output_dir": folder, "max_steps": 2, "eval_steps": 1, "save_steps": 2, "report_to": "none"}
    values |= {"per_device_train_batch_size": 2, "use_cpu": "true", "num_threads": 1, "sample_length": 5}
    values |= {"dataset": data[task]} if task in data else GENERATED
    return [recipe, *(f"--{name}={value}" for name, value in values.items())]


def check_run(folder: Path, mse: bool) -> dict:
    results = json.loads((folder / "all_results.json").read_text())
    for split in ("validation", "test"):
        assert math.isfinite(results[f"{split}_loss"])
        if mse:
            assert results[f"{split}_mse"] == results[f"{split}_loss"]
        elif f"{split}_bpc" in results:
            assert results[f"{split}_bpc"] == pytest.approx(results[f"{split}_loss"] / math.log(2), rel=SINGLE)
        else:
            assert 0 <= results[f"{split}_accuracy"] <= 1
    return results


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_each_recipe_runs(recipe, tmp_path, data):
    assert main(run_words(recipe, tmp_path / "run", data)) == 0
    check_run(tmp_path / "run", mse="adding" in recipe)


@pytest.mark.parametrize(
    "recipe,architecture",
    [("copy_memory", "lstm"), ("adding", "gru"), ("pixel_mnist", "rnn"), ("phonemes", "lstm"), ("adding", "unitary")],
)
def test_each_task_takes_the_baselines(recipe, architecture, tmp_path, data, capsys):
    words = run_words(recipe, tmp_path / "run", data)
    assert main([*words, f"--architecture={architecture}", "--state_size=16"]) == 0
    results = check_run(tmp_path / "run", mse=recipe == "adding")
    from training.evaluate import main as evaluate

    capsys.readouterr()
    words = ["--dataset", words[-1].split("=", 1)[1]] if recipe in ("pixel_mnist", "phonemes") else []
    assert evaluate(["--model", str(tmp_path / "run"), "--use_cpu=true", *words]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["loss"] == pytest.approx(results["test_loss"], rel=SINGLE)


def test_the_published_lstm_counts():
    options = parse_arguments(["adding_published", "--architecture", "lstm", "--state_size", "128"]).model
    kwargs = {"vocab_size": 1, "input_size": 2, "num_labels": 1, "problem_type": "regression"}
    assert build_model("sequence_classification", options, **kwargs).num_parameters() == 4 * 128 * (2 + 128 + 2) + 129


def test_classification_sums():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, IGNORED], [IGNORED, 3, 2]])
    sums = classification_sums(logits, labels)
    chances = logits.double().softmax(-1)
    places = [(0, 0, 0), (0, 1, 1), (1, 1, 3), (1, 2, 2)]
    assert float(sums["loss"]) == pytest.approx(-sum(math.log(chances[p]) for p in places), rel=SINGLE)
    assert float(sums["count"]) == 4
    assert float(sums["right"]) == sum(int(logits[a, b].argmax()) == c for a, b, c in places)


def test_copy_with_frozen_factors_is_learned(tmp_path):
    """60 blanks, 200 steps: well below the level without memory."""
    values = {"sequence_length": 60, "num_threads": 1, "max_steps": 200, "eval_steps": 100, "save_steps": 200}
    values |= {"train_samples": 4000, "validation_samples": 50, "test_samples": 100, "state_size": 64}
    values |= {"output_dir": tmp_path / "run", "report_to": "none", "use_cpu": "true"}
    assert main(["copy_memory", *(f"--{name}={value}" for name, value in values.items())]) == 0
    results = check_run(tmp_path / "run", mse=False)
    assert results["test_loss"] < memoryless_loss(60) / 4 and results["test_accuracy"] > 0.8
