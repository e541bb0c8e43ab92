"""Checkpoints that are damaged: one line that names the file, and the newest checkpoint that is whole."""

import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import PROGRAMS, STEPS, options, same_end

from training.common.errors import UserError
from training.common.run_folder import STATE, WEIGHTS, checkpoints, prune
from training.common.stopping import StopRequest
from training.loop.accelerate_loop import TrainingLoop
from training.loop.arguments import parse_arguments
from training.loop.checkpoint import SUMS, TENSORS, load, resume
from training.loop.run import build_accelerator, prepare_task
from training.train import main

LAST = f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert main(options(text_file, folder)) == 0
    return folder


@pytest.fixture
def run(finished, text_file, tmp_path):
    """The run of a copy of that folder, before it resumes."""
    folder = shutil.copytree(finished, tmp_path / "run")
    arguments = parse_arguments(options(text_file, folder))
    return TrainingLoop(arguments, *prepare_task(arguments), build_accelerator(arguments), StopRequest())


def refused(run, path, what="is .*"):
    """The last checkpoint is refused on one line that names this file of it, and the one before it."""
    with pytest.raises(UserError) as error:
        resume(run, run.folder / LAST)
    advice = f"; the newest whole checkpoint is '{run.folder / 'checkpoint-15'}': pass it to --resume_from_checkpoint"
    assert re.fullmatch(f"'{re.escape(str(path))}' {what}{re.escape(advice)}", str(error.value)), str(error.value)


@pytest.mark.parametrize("name", [WEIGHTS, TENSORS, STATE, SUMS])
def test_whatever_has_changed_is_named(run, name):
    """A single bit, too: another number in a tensor is a number still."""
    path = run.folder / LAST / name
    whole, chance = path.read_bytes(), random.Random(name)
    flipped = bytearray(whole)
    flipped[chance.randrange(len(whole) - 64 if name != SUMS else 64)] ^= 1
    for content in (b"", whole[: len(whole) // 2], chance.randbytes(99), b"\0" * 99, whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        if name == SUMS and content != whole[:-1]:  # its own damage shows in the files that it names, or does not name
            with pytest.raises(UserError, match=f"^'{run.folder / LAST}/[^\n]*; the newest whole checkpoint is "):
                resume(run, run.folder / LAST)
        elif name != SUMS:
            refused(run, path, f"is damaged: its SHA-256 is not that of {SUMS}")
    path.unlink()
    if name == STATE:
        with pytest.raises(UserError, match=f"has no {STATE}; the newest whole checkpoint is .*checkpoint-15'"):
            resume(run, run.folder / LAST)
    else:
        refused(run, path, "is missing")
    path.mkdir()
    with pytest.raises(UserError, match="the newest whole checkpoint is .*checkpoint-15'"):
        resume(run, run.folder / LAST)


def test_what_is_whole_is_loaded(run):
    state, tensors = load(run, run.folder / LAST)
    assert state.step == STEPS and state.history and state.best_step
    assert [tuple(layer.shape) for layer in tensors["carried"]] == [(4, 2, 24)]
    resume(run, run.folder / LAST)
    for name, value in load_file(run.folder / LAST / WEIGHTS).items():
        assert torch.equal(run.model.state_dict()[name], value)


def test_best_weights_that_are_gone(run):
    """They would be missed at the end, after all steps."""
    path = run.folder / WEIGHTS
    whole = load_file(path)
    name = next(iter(whole))
    changes = [
        (None, "missing"),
        (b"", "damaged: .*"),
        (path.read_bytes()[:-1], "damaged: .*"),
        ({**whole, name: whole[name][..., :-1].contiguous()}, "of another model: .*"),
        ({key: value for key, value in whole.items() if key != name}, f"damaged or of another model: missing {name}.*"),
        ({**whole, name: whole[name] * torch.nan}, f"damaged: not finite: {name}"),
    ]
    for content, what in changes:
        path.unlink(missing_ok=True)
        if isinstance(content, dict):
            save_file(content, path)
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            resume(run, run.folder / LAST)
        said = rf"'{re.escape(str(path))}' is {what}; it holds the best weights so far, of step [0-9]+: [^\n]*"
        assert re.fullmatch(said, str(error.value)), str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_lost_by_resuming_before_a_damaged_checkpoint(finished, text_file, tmp_path, capsys, program):
    """The command in the message works; what is saved then is not pruned as older than the damaged one."""
    folder, run = shutil.copytree(finished, tmp_path / "run"), PROGRAMS[program]
    (folder / LAST / TENSORS).write_bytes(b"")
    assert run(options(text_file, folder, resume_from_checkpoint="last")) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: '{folder / LAST / TENSORS}' is damaged: ")
    (named,) = re.findall("newest whole checkpoint is '([^']*)': pass it to --resume_from_checkpoint$", said)
    short = {"save_steps": 2, "save_total_limit": 1}
    assert run(options(text_file, folder, **short, resume_from_checkpoint=named)) == 0
    assert [path.name for path in checkpoints(folder)] == [LAST]
    same_end(finished, folder)


def test_pruning_leaves_what_is_newer_alone(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, 1, tmp_path / "checkpoint-10")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15", "checkpoint-20"]


def test_checkpoint_of_another_folder(finished, text_file, tmp_path, capsys):
    """Its best weights are not here: whatever lies at the top of this folder would pass for them."""
    words = options(text_file, tmp_path / "other", resume_from_checkpoint=str(finished / LAST))
    assert main(words) == 1
    assert f"pass --output_dir {str(finished)!r}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"data": {}, "machines": 5}'])
def test_damaged_record_of_a_run(finished, text_file, tmp_path, capsys, text):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "run.json").write_text(text)
    assert main(options(text_file, folder, resume_from_checkpoint="last")) == 1
    said = capsys.readouterr().err
    assert "run.json" in said and said.startswith("error: ") and said.count("\n") == 1
    words = ["--model", str(folder), "--dataset", str(text_file), "--max_steps=1", "--report_to=none"]
    assert main([*words, f"--output_dir={tmp_path / 'new'}"]) == 1
    assert "run.json" in capsys.readouterr().err
