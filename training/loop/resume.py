"""What a run goes on from: a checkpoint that is read whole, and held against the run before any of it is taken over."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kru_hf import KRURecurrence

from ..common import checkpoint as ckpt
from ..common.checkpoint import CARRIED, OPTIMIZER, RANDOM, STATE, TrainerState, check_tensor
from ..common.errors import UserError
from ..common.files import one_line, read_json, read_tensors, read_torch
from ..models.optimization import MOMENTS
from .driver import Driver

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class OtherRun(UserError):
    """A checkpoint that may be whole, but is of another configuration."""


@dataclass
class Loaded:
    """A checkpoint in memory: all of it fits the run."""

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]  # torch's state dict
    scaler: dict[str, Any] | None  # of the losses of fp16
    carried: list[Tensor]  # a layer's states (rows of the global batch, S, N)
    random: dict[str, Tensor]  # device -> states of the generators (ranks, bytes)


def resume(run: Driver, path: Path) -> None:
    """Go on from a checkpoint: weights, optimizer, state of the streams, random generators, history.

    Raises:
        UserError: it is damaged, of another configuration, or the best weights of its run are.
    """
    loaded = load(run, path)
    if run.accelerator.is_main_process and loaded.state.best_step:
        check_best(run, path, loaded.state.best_step)
    run.bare_model.load_state_dict(loaded.weights, strict=False)
    run.optimizer.load_state_dict(loaded.optimizer)
    if loaded.scaler and run.scaler:
        run.scaler.load_state_dict(loaded.scaler)
    run.state = loaded.state
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    if loaded.random["cpu"].shape[0] == ranks:  # otherwise dropout starts anew: there is nothing to go on from
        torch.set_rng_state(loaded.random["cpu"][rank].clone())  # see read_random
        if "cuda" in loaded.random and run.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(loaded.random["cuda"][rank].clone(), run.accelerator.device)
    for part in range(run.accumulation if loaded.carried else 0):
        rows = run.layout.rows(rank * run.accumulation + part)
        own = [layer[rows.start : rows.stop].to(run.accelerator.device) for layer in loaded.carried]
        run.carried[part] = run.task.state_from_tensors(own)


def load(run: Driver, path: Path) -> Loaded:
    """Read a checkpoint of `run`.

    Raises:
        UserError: it is not a checkpoint or of another configuration (naming what differs), or one of its files is
            damaged or says what cannot be; then the newest checkpoint that is whole is named too.
    """
    try:
        return read(run, path)
    except OtherRun:
        raise
    except UserError as error:
        raise UserError(f"{error}; {other_than(run, path)}") from error


def other_than(run: Driver, path: Path) -> str:
    """What to go on from instead of a damaged checkpoint."""
    for other in reversed(ckpt.checkpoints(run.folder)):
        if other.resolve() != path.resolve():
            try:
                read(run, other)
            except UserError:
                continue
            return f"the newest whole checkpoint is {str(other)!r}: pass it to --resume_from_checkpoint"
    return f"{str(run.folder)!r} has no checkpoint that is whole"


def read(run: Driver, path: Path) -> Loaded:
    """A checkpoint, without advice where it is damaged."""
    if not (path / STATE).is_file():
        raise UserError(f"resume_from_checkpoint={str(path)!r} is not a checkpoint folder: it has no {STATE}")
    values: dict[str, Any] = read_json(path / STATE)
    check_signature(run, path, values.pop("signature", None))
    state = read_state(run, path / STATE, values)
    weights = ckpt.read_weights(run.bare_model, path)
    optimizer, scaler = read_optimizer(run, path / OPTIMIZER, state)
    return Loaded(state, weights, optimizer, scaler, read_carried(run, path / CARRIED), read_random(run, path / RANDOM))


def check_best(run: Driver, path: Path, step: int) -> None:
    """`UserError` unless the best weights so far, of this step, are at the top of the run's folder and whole."""
    try:
        ckpt.read_weights(run.bare_model, run.folder)
    except UserError as error:
        copy = run.folder / f"checkpoint-{step}" / ckpt.WEIGHTS
        advice = f"start from the checkpoint's: --model {str(path)!r} and another --output_dir"
        advice = f"copy {str(copy)!r} there" if copy.is_file() else advice
        raise UserError(f"{error}; it holds the best weights so far, of step {step}: {advice}") from error


def hold(right: bool, path: Path, name: str, value: object, allowed: str) -> None:
    """`UserError` naming file, field and value unless it is right."""
    if not right:
        raise UserError(f"{str(path)!r} is damaged: {name} is {reprlib.repr(value)}, not {allowed}")


def check_signature(run: Driver, path: Path, saved: Any) -> None:
    """`OtherRun` naming what differs between the run that wrote a checkpoint and this one."""
    hold(isinstance(saved, dict), path / STATE, "signature", saved, "an object")
    now = json.loads(json.dumps(run.signature()))
    different = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
    if different:
        differences = "; ".join(f"{key} was {saved.get(key)!r}, now {now.get(key)!r}" for key in different)
        if "global_batch_size" in different:
            differences += " (per_device_train_batch_size × processes × gradient_accumulation_steps: keep the product)"
        raise OtherRun(
            f"the checkpoint {str(path)!r} is of another configuration: {differences}. Repeat the options that the run "
            f"began with, or start from its weights: --model {str(path.parent)!r} and another --output_dir"
        )


# ---- trainer_state.json ----


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and 0 <= value < 2**63


def is_finite(value: object) -> bool:
    """Whether a value is a number, no NaN and no infinity."""
    return is_count(value) or (isinstance(value, float) and math.isfinite(value))


def is_window(value: Any) -> bool:
    """Whether a value is the nats of some targets, and how many these are; before any it is [0, 0]."""
    numbers = isinstance(value, list) and [*map(is_finite, value)] == [True] * 2
    return numbers and (value == [0, 0] or (value[0] >= 0 and value[1] > 0))


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (is_count, "a whole number"),
    "best_metric": (lambda value: value is None or is_finite(value), "a finite number"),
    "best_step": (is_count, "a whole number"),
    "stalled": (is_count, "a whole number"),
    "plateau_scale": (lambda value: is_finite(value) and 0 <= value <= 1, "a number from 0 to 1"),
    **dict.fromkeys(
        ("train_seconds", "processor_seconds"),
        (lambda value: is_finite(value) and 0 <= value < 1e9, "0 or more, and less than 30 years"),
    ),
    "train_elements": (is_count, "a whole number"),
    "window": (lambda value: is_window(value), "nats, and the targets that they are of"),
    "history": (lambda value: isinstance(value, list), "a list"),
}


def read_state(run: Driver, path: Path, values: dict[str, Any]) -> TrainerState:
    """The fields of trainer_state.json: each of its kind, and together what the run can have come to."""
    known = {field.name for field in dataclasses.fields(TrainerState)}
    hold(values.keys() == known, path, "the list of fields", sorted(values), ", ".join(sorted(known)))
    for name, (right, allowed) in FIELDS.items():
        hold(right(values[name]), path, name, values[name], allowed)
    state = TrainerState(**values)
    hold(1 <= state.step <= run.total_steps, path, "step", state.step, f"one of the run's steps 1 to {run.total_steps}")
    name = path.parent.name
    if name.startswith("checkpoint-"):
        hold(name == f"checkpoint-{state.step}", path, "step", state.step, f"that of {name}")
    check_history(path, state)
    judged = TrainerState()
    metric = f"validation_{run.task.metric}"
    for entry in state.history:
        if metric in entry:
            hold(is_finite(entry[metric]), path, f"{metric} of step {entry['step']}", entry[metric], "a finite number")
            judged.step = entry["step"]
            run.weigh(judged, entry[metric])
    for name in ("best_metric", "best_step", "stalled", "plateau_scale"):
        now, then = getattr(state, name), getattr(judged, name)
        hold(now == then, path, name, now, f"{then!r}, which follows from the history")
    return state


def check_history(path: Path, state: TrainerState) -> None:
    """`UserError` unless the history is a list of figures by step, in order, up to the state's own."""
    before = 0
    for number, entry in enumerate(state.history):
        hold(isinstance(entry, dict), path, f"history[{number}]", entry, "figures by name")
        for name, value in entry.items():
            finite = is_finite(value) or (type(value) is int and -(2**63) < value < 0)
            hold(finite, path, f"history[{number}].{one_line(name, 40)}", value, "a finite number")
        step: Any = entry.get("step")
        hold(is_count(step), path, f"history[{number}].step", step, "a whole number")
        hold(before < step <= state.step, path, f"history[{number}].step", step, f"within {before + 1}..{state.step}")
        before = step


# ---- optimizer.pt ----


def read_optimizer(run: Driver, path: Path, state: TrainerState) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The optimizer's state dict, with the run's own groups, and the scaler's."""
    saved = read_torch(path)
    hold(isinstance(saved, dict) and {"optimizer", "scaler"} <= saved.keys(), path, "it", saved, "optimizer and scaler")
    optimizer, scaler = saved["optimizer"], saved["scaler"]
    own = run.optimizer.state_dict()
    whole = isinstance(optimizer, dict) and {"state", "param_groups"} <= optimizer.keys()
    hold(whole and isinstance(optimizer["state"], dict), path, "optimizer", optimizer, "state and param_groups")
    check_groups(path, optimizer["param_groups"], own["param_groups"])
    check_scaler(run, path, scaler)
    check_moments(run, path, optimizer["state"], state.step, exact=not scaler)
    return {"state": optimizer["state"], "param_groups": own["param_groups"]}, scaler or None


def check_groups(path: Path, saved: Any, own: list[dict[str, Any]]) -> None:
    """`UserError` unless the groups hold the run's parameters and settings; the rate is set anew in each step."""
    right = isinstance(saved, list) and all(isinstance(group, dict) for group in saved) and len(saved) == len(own)
    hold(right, path, "param_groups", saved, f"a list of {len(own)} groups")
    for number, (group, ours) in enumerate(zip(saved, own, strict=True)):
        for name in sorted(ours.keys() - {"lr"}):
            value = group.get(name, ours[name])  # what a newer torch has added is missing in files of an older one
            hold(same(value, ours[name]), path, f"{name} of group {number}", value, f"{ours[name]!r}")


def same(one: object, other: object) -> bool:
    """Whether two settings of an optimizer are equal; a tensor in a damaged file equals none."""
    if is_finite(one) and is_finite(other):
        return one == other
    return type(one) is type(other) and not isinstance(one, Tensor) and repr(one) == repr(other)


def check_moments(run: Driver, path: Path, saved: dict[Any, Any], step: int, exact: bool) -> None:
    """`UserError` unless each trained parameter has its moments and has been updated `step` times.

    Args:
        exact: whether every step was an update; those of fp16 that overflow are not.
    """
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    numbers = set(range(len(parameters)))
    right = numbers == saved.keys() if exact else saved.keys() <= numbers
    hold(right, path, "the list of parameters", list(saved), f"0 to {len(parameters) - 1}")
    names = MOMENTS[run.options.optimizer]
    for number, values in saved.items():
        found = sorted(map(str, values)) if isinstance(values, dict) else values
        hold(
            found == sorted(("step", *names)), path, f"state of parameter {number}", found, f"step, {', '.join(names)}"
        )
        check_tensor(path, f"step of parameter {number}", values["step"], (), (torch.float32,))
        updates = values["step"].item()
        hold(
            updates == step or (not exact and 1 <= updates <= step),
            path,
            f"step of parameter {number}",
            updates,
            f"{step}",
        )
        for name, squared in names.items():
            label, parameter = f"{name} of parameter {number}", parameters[number]
            check_tensor(path, label, values[name], tuple(parameter.shape), (parameter.dtype,))
            hold(not squared or bool((values[name] >= 0).all()), path, label, "negative in part", "a mean of squares")


def check_scaler(run: Driver, path: Path, saved: Any) -> None:
    """`UserError` unless it is None, or the state of a scaler that this run's takes."""
    right = saved is None or (
        isinstance(saved, dict) and all(is_finite(value) and value >= 0 for value in saved.values())
    )
    hold(right, path, "scaler", saved, "None or a scaler's numbers")
    if saved and run.scaler:
        hold(saved.keys() == run.scaler.state_dict().keys(), path, "scaler", saved, ", ".join(run.scaler.state_dict()))
        hold(saved["scale"] > 0, path, "scale of the scaler", saved["scale"], "positive")


# ---- carried_state.safetensors, random_state.safetensors ----


def state_shapes(model: Any) -> list[tuple[int, int]]:
    """The shape (S, N) of each layer's state of one row."""
    cells = [module for module in model.modules() if isinstance(module, KRURecurrence)]
    planes = 2 if getattr(model.config, "cell", None) == "lstm" else 1
    return [(cell.state_planes, cell.state_size) for cell in cells] or [
        (planes, model.config.state_size)
    ] * model.config.num_hidden_layers


def read_carried(run: Driver, path: Path) -> list[Tensor]:
    """The carried states, a layer each (rows of the global batch, S, N); none where the task carries none."""
    saved = read_tensors(path)
    shapes = state_shapes(run.bare_model) if run.task.carries_state else []
    wanted = {str(layer) for layer in range(len(shapes))}
    hold(saved.keys() == wanted, path, "the list of layers", sorted(saved), f"{sorted(wanted)}")
    dtypes = FLOATS if run.accelerator.mixed_precision in ("fp16", "bf16") else FLOATS[:1]
    for layer, shape in enumerate(shapes):
        check_tensor(path, f"layer {layer}", saved[str(layer)], (run.layout.global_batch_size, *shape), dtypes)
    return [saved[str(layer)] for layer in range(len(shapes))]


def read_random(run: Driver, path: Path) -> dict[str, Tensor]:
    """The states of the random generators (ranks, bytes) by device."""
    saved = read_tensors(path)
    hold(
        "cpu" in saved and saved.keys() <= {"cpu", "cuda"},
        path,
        "the list of devices",
        sorted(saved),
        "cpu, or cpu and cuda",
    )
    sizes = {"cpu": torch.get_rng_state().numel()}
    if run.accelerator.device.type == "cuda":
        sizes["cuda"] = torch.cuda.get_rng_state(run.accelerator.device).numel()
    ranks = max(saved["cpu"].shape[0], 1) if saved["cpu"].ndim else 1
    for name, states in saved.items():
        size = sizes.get(name, states.shape[-1] if states.ndim else 0)
        check_tensor(path, name, states, (ranks, size), (torch.uint8,))
        for state in states if name in sizes else ():
            try:
                torch.Generator(name).set_state(state.clone())  # torch 2.13 reads a row of a tensor from elsewhere
            except RuntimeError as error:
                raise UserError(f"{str(path)!r} is damaged: {name} holds no state of a generator") from error
    return saved
