"""Corpora, streams and options of training."""

import dataclasses
import hashlib
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf import KRUConfig
from training.common.errors import UserError
from training.data.corpora import load_corpus, python_docs
from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.models.optimization import learning_rate, parameter_groups
from training.options.data import DataOptions
from training.options.model import ModelOptions, parse_factor_shapes
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


def test_every_config_field_is_an_option():
    fixed = {"vocab_size", "input_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
    own = {name for name in KRUConfig.__annotations__ if name not in ("model_type", "keys_to_ignore_at_inference")}
    assert own - fixed <= {f.name for f in dataclasses.fields(ModelOptions)}


def test_every_option_has_a_help_sentence():
    arguments = parse_arguments([])
    for part in (arguments.run, arguments.model, arguments.data, arguments.task):
        for field in dataclasses.fields(part):
            assert field.metadata["help"].endswith("."), field.name


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 1e-2\nstate_size: 36\nfactor_shapes: [[6, 6], [6, 6]]\nreadout_norm: false\n")
    arguments = parse_arguments([str(recipe), "--learning_rate", "0.5"])
    assert arguments.run.learning_rate == 0.5
    assert arguments.model.config_values() == {
        "state_size": 36,
        "factor_shapes": [[6, 6], [6, 6]],
        "readout_norm": False,
    }
    assert parse_arguments([str(recipe)]).run.learning_rate == 1e-2
    assert parse_arguments([str(recipe), "--architecture", "lstm"]).model.config_values() == {"state_size": 36}
    recipe.write_text("sequnce_length: 3\n")
    with pytest.raises(UserError, match="unknown key 'sequnce_length' .did you mean 'sequence_length'"):
        parse_arguments([str(recipe)])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("mixed_precision: null", "mixed_precision", None),
        ("mixed_precision:", "mixed_precision", None),
        ("use_cpu: no", "use_cpu", False),
        ("use_cpu: NO", "use_cpu", False),
        ("use_cpu: Yes", "use_cpu", True),
        ("use_cpu: on", "use_cpu", True),
        ("readout_norm: OFF", "readout_norm", False),
        ("data_license: no", "data_license", "no"),
        ("data_license: on", "data_license", "on"),
        ("data_license: 2020-01-01", "data_license", "2020-01-01"),
        ("data_license: 1:30", "data_license", "1:30"),
        ("data_license: 1_0", "data_license", "1_0"),
        ("data_license: 'null'", "data_license", "null"),
        ("max_steps: 010", "max_steps", 10),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("output_dir: 0x10", "output_dir", "0x10"),
        ("factor_shapes: 2x3,4x5", "factor_shapes", "2x3,4x5"),
    ],
)
def test_a_recipe_says_what_the_command_line_would(tmp_path, line, name, value):
    (tmp_path / "r.yaml").write_text(f"\ufeff{line}\n", encoding="utf-8")
    assert parse_arguments([str(tmp_path / "r.yaml")]).flat()[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 5\nseed: 1\nmax_steps: 5\n", "'max_steps' is given twice, in lines 1 and 3"),
        ("seed: 1\n'seed': 2\n", "'seed' is given twice, in lines 1 and 2"),
        ("factor_shapes: [[2, 03]]", "factor_shapes=.*03.* is not valid"),
        ("max_steps: 0x10\n", "max_steps.*invalid int value: '0x10'"),
        ("max_steps: {a: 1}\n", "line 1: max_steps must be a value or a list of pairs"),
        ("max_steps: !!python/name:os.system\n", "line 1: max_steps has the tag"),
        ("seed: 1\n? [a]\n: 2\n", "line 2: a key must be the name of an option"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML: expected a single document"),
        ("- seed\n", "must be a mapping of option names to values"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse_arguments([str(tmp_path / "r.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown option '--lerning_rate' .did you mean 'learning_rate'"),
        (["--state_siz=3"], "did you mean 'state_size'"),
        (["--learning_rate", "fast"], "learning_rate.*invalid float value"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 is not valid"),
        (["--adam_beta1", "1"], "adam_beta1=1.0 is not valid"),
        (["--adam_beta2", "1"], "adam_beta2=1.0 is not valid"),
        (["--unitary_loss_coef", "-1"], "unitary_loss_coef=-1.0 is not valid"),
        (["--architecture", "transformer"], "architecture='transformer' is not valid"),
        (["--task", "chess"], "task='chess'"),
        (["--sequence_length", "0"], "sequence_length=0"),
        (["--max_steps", "0"], "max_steps=0"),
        (["nowhere.yaml"], "recipe 'nowhere.yaml' does not exist"),
        (["--factor_shapes", "7x"], "factor_shapes='7x'"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


def test_factor_shapes_are_read_in_both_notations():
    assert parse_factor_shapes("2x3,4X4") == parse_factor_shapes("[[2, 3], [4, 4]]") == [[2, 3], [4, 4]]


def test_learning_rate_schedule():
    run = parse_arguments(["--learning_rate", "1", "--warmup_steps", "10", "--lr_scheduler_type", "cosine"]).run
    rates = [learning_rate(step, 200, run) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(200, 200, run) == pytest.approx(0.02)
    run.lr_scheduler_type = "plateau"
    assert learning_rate(150, 200, run, plateau_scale=0.3) == pytest.approx(0.3)


def test_factors_have_their_own_rate_and_no_decay():
    model = build_model("causal_lm", ModelOptions(state_size=24, block_type="plain"), vocab_size=10)
    run = parse_arguments(["--weight_decay", "0.1", "--factor_learning_rate_scale", "0.2"]).run
    groups = parameter_groups(model, run)
    factors = {id(p) for _, p in model.recurrent_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[-1]["params"]} == factors
    assert (groups[-1]["scale"], groups[-1]["weight_decay"]) == (0.2, 0.0)
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert groups[1]["weight_decay"] == 0.0
    assert groups[0]["weight_decay"] == 0.1
    gated = build_model(
        "causal_lm", ModelOptions(cell_type="kru_lstm", state_size=24, block_type="plain"), vocab_size=10
    )
    bias = gated.model.layers[0].recurrence.bias
    assert bias.ndim == 2 and any(bias is p for p in parameter_groups(gated, run)[1]["params"])


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
