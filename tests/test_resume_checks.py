"""Checkpoints that are damaged or say what cannot be: one line that names the file, and the newest whole one."""

import json
import math
import random
import re
import shutil

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from tiny_run import STEPS, options, same_end

from training.common import checkpoint as ckpt
from training.common.errors import UserError
from training.common.stopping import StopRequest
from training.loop import resume
from training.loop.accelerate_loop import TrainingLoop
from training.loop.arguments import parse_arguments
from training.loop.run import build_accelerator, prepare_task
from training.train import main
from training.train_lightning import main as lightning_main

LAST = f"checkpoint-{STEPS}"
PLATEAU = {"lr_scheduler_type": "plateau"}


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert main(options(text_file, folder, **PLATEAU)) == 0
    return folder


@pytest.fixture
def run(finished, text_file, tmp_path):
    """The run of a copy of that folder, before it goes on."""
    folder = shutil.copytree(finished, tmp_path / "run")
    arguments = parse_arguments(options(text_file, folder, **PLATEAU))
    return TrainingLoop(arguments, *prepare_task(arguments), build_accelerator(arguments), StopRequest())


def refused(run, path):
    """The last checkpoint is refused on one line that names this file of it, and the one before it."""
    with pytest.raises(UserError) as error:
        resume.load(run, run.folder / LAST)
    whole = re.escape(repr(str(run.folder / "checkpoint-15")))
    name = re.escape(repr(str(path)))
    pattern = rf"[^\n]*{name} is [^\n]*; the newest whole checkpoint is {whole}: pass it to [^\n]*"
    assert re.fullmatch(pattern, str(error.value)), str(error.value)


def entry(**values):
    """A change of the last entry of the history, which has a validation figure."""
    return lambda state: {"history": [*state["history"][:-1], {**state["history"][-1], **values}]}


STATES = [
    {"step": value} for value in (10**9, STEPS + 1, 19, 0, -1, "x", None, True, 20.0, 10**400, [20], math.nan)
] + [
    {"best_metric": value} for value in (math.nan, math.inf, -math.inf, "x", None, True, 0.0, -5, [1.0], {})
] + [
    {"best_step": 10**9}, {"best_step": -4}, {"best_step": 1}, {"best_step": "x"}, {"stalled": -1}, {"stalled": 7},
    {"stalled": None}, {"plateau_scale": math.nan}, {"plateau_scale": -1.0}, {"plateau_scale": 0.5},
    {"plateau_scale": "x"}, {"train_seconds": -1.0}, {"train_seconds": math.nan}, {"train_seconds": "x"},
    {"train_elements": -1}, {"train_elements": 1.5}, {"train_elements": None}, {"window": None}, {"window": [1.0]},
    {"window": [1.0, math.nan]}, {"window": [1.0, 0]}, {"window": [1.0, -4]}, {"train_seconds": 1e308},
    {"window": ["x", 1]}, {"window": {}}, {"history": None}, {"history": {}},
    {"history": "x"}, {"history": [1]}, {"history": []}, {"history": [{}]}, {"history": [{"step": 99}]},
    {"history": [{"step": 3, "loss": "x"}]}, {"history": [{"step": 3}, {"step": 3}]}, {"signature": None},
    {"signature": []}, {"more": 1},
    entry(validation_bpc=math.nan), entry(validation_bpc=None), entry(validation_bpc=0.0), entry(step=STEPS + 5),
    entry(step="x"), entry(train_loss=math.nan), entry(train_loss=10**400),
]  # fmt: skip


def test_states_that_cannot_be(run):
    path = run.folder / LAST / ckpt.STATE
    whole = json.loads(path.read_text())
    for change in STATES:
        changed = change(whole) if callable(change) else change
        path.write_text(json.dumps({**whole, **changed}))
        refused(run, path)
    for name in whole:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        refused(run, path)
    for text in ("", "{", "[]", "null", "3", '"x"', "[" * 100_000):
        path.write_text(text)
        refused(run, path)
    path.write_text(json.dumps(whole))
    resume.load(run, run.folder / LAST)


@pytest.mark.parametrize("name", [ckpt.WEIGHTS, ckpt.OPTIMIZER, ckpt.CARRIED, ckpt.RANDOM, ckpt.STATE])
def test_damaged_bytes(run, name):
    path = run.folder / LAST / name
    whole, chance = path.read_bytes(), random.Random(name)
    for content in (b"", whole[: len(whole) // 2], whole[:-1], chance.randbytes(99), b"\0" * 99):
        path.write_bytes(content)
        refused(run, path)
    for _ in range(40):
        changed = bytearray(whole)
        for _ in range(3):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            resume.load(run, run.folder / LAST)  # other numbers in a tensor are numbers still
        except resume.OtherRun as error:
            assert "is of another configuration: " in str(error)
        except UserError as error:
            assert repr(str(path)) in str(error) and "\n" not in str(error)
    path.unlink()
    if name == ckpt.STATE:
        with pytest.raises(UserError, match=f"has no {ckpt.STATE}; the newest whole checkpoint is .*checkpoint-15'"):
            resume.load(run, run.folder / LAST)
    else:
        refused(run, path)
    path.mkdir()
    with pytest.raises(UserError, match="the newest whole checkpoint is .*checkpoint-15'"):
        resume.load(run, run.folder / LAST)


@pytest.mark.parametrize("name", [ckpt.WEIGHTS, ckpt.CARRIED, ckpt.RANDOM])
def test_tensors_that_do_not_fit(run, name):
    path = run.folder / LAST / name
    whole = load_file(path)
    for key, value in whole.items():
        changes = {
            "shape": value[..., :-1].contiguous(),
            "rows": torch.cat([value, value]) if name == ckpt.CARRIED else value[None],
            "type": value.to(torch.int64 if value.dtype == torch.float32 else torch.float32),
            "double": value.double(),
        }
        if name == ckpt.RANDOM:
            changes["no state"] = torch.full_like(value, 255)
        else:
            changes |= {"NaN": value * math.nan, "infinite": value + math.inf}
        for changed in changes.values():
            save_file({**whole, key: changed}, path)
            refused(run, path)
    for changed in ({}, {**whole, "one_more": torch.zeros(1)}):
        save_file(changed, path)
        refused(run, path)


def optimizers(saved):
    """Optimizer files that cannot be of this run."""
    inner = saved["optimizer"]
    groups, states = inner["param_groups"], inner["state"]
    yield from (None, [], {}, {"optimizer": inner}, {**saved, "optimizer": None}, {**saved, "optimizer": {}})
    for change in (None, [], groups[:1], [None] * len(groups), [{**groups[0], "params": [7]}, *groups[1:]]):
        yield {**saved, "optimizer": {**inner, "param_groups": change}}
    for name, value in {"weight_decay": 7.0, "betas": (0.1, 0.1), "eps": "x", "scale": math.nan}.items():
        yield {**saved, "optimizer": {**inner, "param_groups": [{**groups[0], name: value}, *groups[1:]]}}
    for change in (None, [], {}, {**states, 99: states[0]}, {k: v for k, v in states.items() if k}):
        yield {**saved, "optimizer": {**inner, "state": change}}
    moment = states[0]["exp_avg_sq"]
    for name, value in (
        ("exp_avg_sq", moment[..., :-1]), ("exp_avg_sq", moment.double()), ("exp_avg_sq", moment * math.nan),
        ("exp_avg_sq", -moment - 1), ("exp_avg_sq", 0.5), ("exp_avg_sq", None), ("step", torch.tensor(7.0)),
        ("step", torch.tensor(math.nan)), ("step", torch.zeros(2)), ("step", "x"), ("one_more", moment),
        ("exp_avg_sq", moment.to_sparse()), ("exp_avg_sq", moment.to("meta")),
        ("exp_avg_sq", torch.ones(()).expand(moment.shape)), ("step", torch.tensor(float(STEPS)).to_sparse()),
    ):  # fmt: skip
        yield {**saved, "optimizer": {**inner, "state": {**states, 0: {**states[0], name: value}}}}
    for change in ("x", [1], {"scale": math.nan}, {"scale": "x"}, {"scale": -1.0}):
        yield {**saved, "scaler": change}


def test_optimizers_that_do_not_fit(run):
    path = run.folder / LAST / ckpt.OPTIMIZER
    for changed in optimizers(torch.load(path)):
        torch.save(changed, path)
        refused(run, path)


def test_best_weights_that_are_gone(run):
    """They would be missed at the end, after all steps."""
    for content in (None, b"", (run.folder / LAST / ckpt.WEIGHTS).read_bytes()[:-1]):
        path = run.folder / ckpt.WEIGHTS
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError) as error:
            resume.resume(run, run.folder / LAST)
        said = rf"'{re.escape(str(path))}' is (missing|damaged: .*); it holds the best weights so far, of .*"
        assert re.fullmatch(said, str(error.value))


@pytest.mark.parametrize("driver", [main, lightning_main], ids=["accelerate", "lightning"])
def test_nothing_is_lost_by_going_on_before_a_damaged_checkpoint(finished, text_file, tmp_path, capsys, driver):
    """The command in the message works; what is saved then is not pruned as older than the damaged one."""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / LAST / ckpt.OPTIMIZER).write_bytes(b"")
    words = options(text_file, folder, **PLATEAU)
    assert driver([*words, "--resume_from_checkpoint=last"]) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: '{folder / LAST / ckpt.OPTIMIZER}' is damaged: ")
    (named,) = re.findall("newest whole checkpoint is '([^']*)': pass it to --resume_from_checkpoint$", said)
    short = {"save_steps": 2, "save_total_limit": 1}
    assert driver([*options(text_file, folder, **PLATEAU, **short), f"--resume_from_checkpoint={named}"]) == 0
    assert [path.name for path in ckpt.checkpoints(folder)] == [LAST]
    same_end(finished, folder)


def test_pruning_leaves_what_is_newer_alone(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    ckpt.prune(tmp_path, 1, tmp_path / "checkpoint-10")
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15", "checkpoint-20"]


def test_two_processes_go_on_exactly(text_file, tmp_path):
    """Each with its own random state, which decides its dropout."""
    words = [*options(text_file, tmp_path / "run", logging_steps=1), "--per_device_train_batch_size=2"]
    done = ranks.finish(ranks.start([words, words], tmp_path / "first"), tmp_path / "first")
    assert [code for code, _ in done] == [0, 0], done
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    ckpt.remove_checkpoint(tmp_path / "run" / LAST)
    again = [*words, "--resume_from_checkpoint=last"]
    done = ranks.finish(ranks.start([again, again], tmp_path / "second"), tmp_path / "second")
    assert [code for code, _ in done] == [0, 0], done
    same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "{", '{"data": {}, "machines": 5}'])
def test_damaged_record_of_a_run(finished, text_file, tmp_path, capsys, text):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "run.json").write_text(text)
    assert main(options(text_file, folder, **PLATEAU, resume_from_checkpoint="last")) == 1
    said = capsys.readouterr().err
    assert "run.json" in said and said.startswith("error: ") and said.count("\n") == 1
    words = ["--model", str(folder), "--dataset", str(text_file), "--max_steps=1", "--report_to=none"]
    assert main([*words, f"--output_dir={tmp_path / 'new'}"]) == 1
    assert "run.json" in capsys.readouterr().err
