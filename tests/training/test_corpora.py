"""Corpora and streams of text."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.common.errors import UserError
from training.data.corpora import load_corpus, python_docs
from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.models.optimization import parameter_groups
from training.options.data import DataOptions
from training.options.model import ModelOptions
from training.tasks import Layout, get_task
from training.tasks.char_lm import IGNORED, CharLM, CharOptions
from training.train import main

SETTINGS = settings(max_examples=30, deadline=None)


def task_on(path, **options) -> CharLM:
    task = CharLM(CharOptions(**options), DataOptions(dataset=str(path)), seed=0)
    task.load()
    return task


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words = random.Random(0).choices(["one ", "two\r\n", "three, ", "<unk> ", "<pad>\n", "é"], k=1500)
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_bytes("".join(words).encode())
    return path


def test_embedded_corpus_is_the_interpreters_own_in_name_order():
    from pydoc_data.topics import topics

    corpus = load_corpus(DataOptions(dataset="python_docs"))
    text = "".join(corpus.splits.values())
    assert text == python_docs() == "".join(topics[name] for name in sorted(topics))
    assert corpus.record()["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert abs(len(corpus.splits["train"]) / len(text) - 0.9) < 1e-4
    assert len(corpus.splits["validation"]) == len(corpus.splits["test"])


def test_file_keeps_every_character_and_special_tokens_never_match(text_file):
    task = task_on(text_file)
    raw = text_file.read_bytes()
    assert "".join(task.dataset.splits.values()).encode() == raw
    assert task.dataset_record()["sha256"] == hashlib.sha256(raw).hexdigest()
    assert task.dataset_record()["name"] == "corpus.txt"
    for split, text in task.dataset.splits.items():
        assert task.tokenizer.decode(task.ids[split]) == text
        assert task.ids[split].tolist() == task.tokenizer(text)["input_ids"]
        assert len(task.ids[split]) == len(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 characters"),
        (b"a", "1 characters"),
        (b"ab" * 19, "38 characters; to hold out 5% twice takes 40"),
        (b"a" * 500, "single character, 'a'"),
        (b"abc\xff\xfe" * 50, "not UTF-8 text: byte 0xff at offset 3"),
    ],
)
def test_bad_corpus(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        task_on(tmp_path / "bad.txt")


def test_a_byte_order_mark_is_no_letter(tmp_path, text_file):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + Path(text_file).read_bytes())
    marked, plain = (task_on(path).dataset for path in (tmp_path / "marked.txt", text_file))
    assert marked.splits == plain.splits


def test_missing_file_and_short_text(tmp_path, text_file):
    with pytest.raises(UserError, match="does not exist; pass --dataset"):
        load_corpus(DataOptions(dataset=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="too short for 64 streams of one window of 512"):
        task_on(text_file, sequence_length=512).num_batches(Layout(64))


@SETTINGS
@given(rows=st.sampled_from([1, 2, 4, 6]), window=st.integers(1, 40), parts=st.sampled_from([1, 2]))
def test_streams_are_contiguous_and_independent_of_the_slots(text_file, rows, window, parts):
    task = task_on(text_file, sequence_length=window)
    whole, cut = Layout(rows * 2, 1), Layout(rows * 2, 2 * parts if rows % parts == 0 else 2)
    per_epoch = task.num_batches(whole)
    assert per_epoch == task.num_batches(cut)
    previous = None
    for index in range(min(per_epoch, 4)):
        batch = task.train_batch(index, 0, whole)
        x, y = batch.inputs["input_ids"], batch.inputs["labels"]
        assert x.shape == y.shape == (rows * 2, window)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert batch.reset_state == (index == 0)
        if previous is not None:
            assert torch.equal(previous[:, -1], x[:, 0])
        previous = y
        slots = [task.train_batch(index, slot, cut).inputs["input_ids"] for slot in range(cut.num_slots)]
        assert torch.equal(torch.cat(slots), x)
    again = task.train_batch(per_epoch, 0, whole)
    assert again.reset_state


@SETTINGS
@given(streams=st.integers(1, 40), slots=st.integers(1, 5), carry=st.booleans())
def test_evaluation_counts_every_character_once(text_file, streams, slots, carry):
    task = task_on(text_file, eval_streams=streams, carry_state=carry)
    targets: dict[int, list[int]] = {}
    count = 0
    for slot in range(slots):
        for batch in task.eval_batches("test", slot, slots):
            kept = batch.inputs["labels"][batch.inputs["labels"] != IGNORED]
            count += len(kept)
            for token in kept.tolist():
                targets.setdefault(token, []).append(token)
    expected = task.ids["test"][1:]
    assert count == len(expected)
    assert sorted(t for group in targets.values() for t in group) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("block", "source"), [("plain", "embed_tokens.weight"), ("residual", "layers.0.in_proj.weight")]
)
def test_angles_of_selective_transitions_have_no_decay(block, source):
    options = {"cell_type": "kru_linear", "factor_shapes": "2x2", "block_type": block}
    for transition, group in (("selective", 1), ("fixed", 0)):
        model = build_model("causal_lm", ModelOptions(**options, transition=transition), vocab_size=10)
        weight = model.model.get_parameter(source)
        groups = parameter_groups(model, parse_arguments(["--weight_decay", "0.1"]).run)
        assert any(weight is p for p in groups[group]["params"])


@pytest.mark.parametrize("task", ["pixel_mnist", "piano_roll", "phonemes"])
def test_hub_options_are_refused_for_built_in_data(tmp_path, capsys, task):
    assert main(["--task", task, "--dataset_revision", "x", "--output_dir", str(tmp_path / "run")]) == 1
    assert "dataset_revision='x' is for a data set of the Hub, but dataset='" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "columns"), [("pixel_mnist", "label and pixels"), ("piano_roll", "notes")])
def test_a_column_of_texts_is_refused_for_pieces_and_pictures_of_the_hub(tmp_path, capsys, task, columns):
    words = ["--task", task, "--dataset", "me/set", "--text_column", "x", "--output_dir", str(tmp_path / "run")]
    assert main(words) == 1
    problem = capsys.readouterr().err
    assert "text_column='x' is for texts, but dataset='me/set' is read from its column" in problem
    assert columns in problem


@pytest.mark.parametrize("task", ["adding", "copy_memory"])
def test_hub_options_are_refused_for_generated_data(task):
    made = get_task(task)(get_task(task).Options(train_samples=1), DataOptions(dataset_revision="x"))
    with pytest.raises(UserError, match="dataset_revision='x' is for a data set of the Hub"):
        made.load()
