"""Checkpoints: all that a run needs to resume bit by bit, in a folder that is whole or refused.

`trainer_state.json` has the figures and what the run was (`signature`), `training_state.pt` the tensors besides the
weights, and `SHA256SUMS` the SHA-256 of every file, as `sha256sum --check` reads it: whatever has changed since it was
written is noticed, and what has not changed needs no further check. `run` is a `Driver`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UserError
from ..common.files import not_finite, one_line, read, read_json, read_tensors, read_torch
from ..common.run_folder import STATE, WEIGHTS, checkpoints, prune
from ..common.saving import write_folder

TENSORS, SUMS = "training_state.pt", "SHA256SUMS"
# Options that change neither the weights nor which ones are the best: a resumed run may change them.
FREE_OPTIONS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "save_steps", "save_total_limit",
    "logging_steps", "sample_length", "use_cpu", "num_threads", "backend", "evaluate_test", "push_to_hub",
    "hub_model_id", "hub_private_repo", "data_license", "dataset", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_time",
}  # fmt: skip
FREE_CONFIG = {"transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"}


@dataclass
class TrainerState:
    """All that a run knows besides tensors; `step` is the position in the data as well."""

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    stalled: int = 0  # evaluations since the best one
    plateau_scale: float = 1.0
    train_seconds: float = 0.0
    processor_seconds: float = 0.0  # of all processes in the same steps
    train_elements: int = 0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])  # nats and targets since the last log entry
    history: list[dict[str, Any]] = field(default_factory=list)

    def update_best(self, value: float, greater_is_better: bool) -> bool:
        """Whether a validation figure of this step is the best so far."""
        best = self.best_metric
        if best is None or (value > best if greater_is_better else value < best):
            self.best_metric, self.best_step, self.stalled = value, self.step, 0
            return True
        self.stalled += 1
        return False


class OtherRun(UserError):
    """A checkpoint that is whole, but of another configuration."""


def signature(run: Any) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it, as JSON has it."""
    config = run.model.config.to_dict()
    values = {
        **{f"config.{key}": value for key, value in config.items() if key not in FREE_CONFIG},
        **{key: value for key, value in run.arguments.flat().items() if key not in FREE_OPTIONS},
        "data": run.task.dataset_record(),
        "global_batch_size": run.slots.layout.global_batch_size,
        "total_steps": run.total_steps,
    }
    return json.loads(json.dumps(values))


def parts(run: Any) -> dict[str, Any]:
    """What has a state of its own besides the model."""
    found = {name: getattr(run, name) for name in ("optimizer", "scaler", "average", "rounding")}
    return {name: part for name, part in found.items() if part is not None}


# ---- writing ----


def save(run: Any) -> None:
    """Write the checkpoint of this step; every rank takes part, rank 0 writes."""
    accelerator = run.accelerator
    random = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    tensors = {
        **{name: part.state_dict() for name, part in parts(run).items()},
        "carried": run.slots.gather(accelerator.gather),
        "random": {name: accelerator.gather(v.to(accelerator.device)[None]).cpu() for name, v in random.items()},
    }

    def fill(folder: Path) -> None:
        run.model.save_pretrained(folder)
        torch.save(tensors, folder / TENSORS)
        text = json.dumps({**asdict(run.state), "signature": signature(run)}, indent=2, ensure_ascii=False)
        (folder / STATE).write_text(text, encoding="utf-8")
        sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))

    if accelerator.is_main_process:
        target = run.folder / f"checkpoint-{run.state.step}"
        write_folder(target, fill)
        prune(run.folder, run.options.save_total_limit, target)
    accelerator.wait_for_everyone()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- resuming ----


def resume(run: Any, path: Path) -> None:
    """Resume from a checkpoint: weights, optimizer, carried states, random generators, history.

    Raises:
        UserError: it is damaged (then the newest whole checkpoint is named) or of another configuration (what differs
            is named), or the best weights of its run are damaged.
    """
    try:
        state, tensors = load(run, path)
    except OtherRun:
        raise
    except UserError as error:
        raise UserError(f"{error}; {instead_of(path, run.folder)}") from error
    if run.accelerator.is_main_process and state.best_step:
        check_best(run, path, state.best_step)
    load_weights(run.model, path)
    for name, part in parts(run).items():
        if tensors.get(name):
            part.load_state_dict(tensors[name])
    run.state = state
    run.slots.scatter(tensors["carried"], run.accelerator.device)
    rank, random = run.accelerator.process_index, tensors["random"]
    if len(random["cpu"]) == run.accelerator.num_processes:  # else dropout starts anew: there are no states for it
        torch.set_rng_state(random["cpu"][rank].clone())  # torch 2.13 reads a row of a tensor from elsewhere
        if "cuda" in random and run.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"][rank].clone(), run.accelerator.device)


def load(run: Any, path: Path) -> tuple[TrainerState, dict[str, Any]]:
    """State and tensors of a whole checkpoint of this run.

    Raises:
        UserError: it is no checkpoint or damaged; `OtherRun` if it is of another configuration.
    """
    if not (path / STATE).is_file():
        raise UserError(f"resume_from_checkpoint={str(path)!r} is not a checkpoint folder: it has no {STATE}")
    check_sums(path)
    values = read_json(path / STATE)
    saved, now = values.pop("signature"), signature(run)
    different = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
    if different:
        differences = "; ".join(f"{key} was {saved.get(key)!r}, now {now.get(key)!r}" for key in different)
        if "global_batch_size" in different:
            differences += " (per_device_train_batch_size × processes × gradient_accumulation_steps: keep the product)"
        raise OtherRun(
            f"the checkpoint {str(path)!r} is of another configuration: {differences}. Repeat the options that the run "
            f"began with, or start from its weights: --model {str(path.parent)!r} and another --output_dir"
        )
    return TrainerState(**values), read_torch(path / TENSORS)


def check_sums(path: Path) -> None:
    """`UserError` naming a file of a checkpoint that is missing, cannot be read, or is not what was written."""
    lines = read(path / SUMS, lambda file: [line.split("  ", 1) for line in file.read_text().splitlines()])
    if {WEIGHTS, TENSORS, STATE} - {line[-1] for line in lines}:
        raise UserError(f"{str(path / SUMS)!r} is damaged: it does not name every file")
    for digest, name in lines:
        if read(path / name, sha256) != digest:
            raise UserError(f"{str(path / name)!r} is damaged: its SHA-256 is not that of {SUMS}")


def instead_of(path: Path, folder: Path) -> str:
    """What to resume from instead of a damaged checkpoint."""
    for other in reversed(checkpoints(folder)):
        if other.resolve() != path.resolve():
            try:
                check_sums(other)
            except UserError:
                continue
            return f"the newest whole checkpoint is {str(other)!r}: pass it to --resume_from_checkpoint"
    return f"{str(folder)!r} has no checkpoint that is whole"


def check_best(run: Any, path: Path, step: int) -> None:
    """`UserError` unless the best weights so far, of this step, are at the top of the run's folder and whole."""
    try:
        load_weights(run.model, run.folder)
    except UserError as error:
        copy = run.folder / f"checkpoint-{step}" / WEIGHTS
        advice = f"start from the checkpoint's: --model {str(path)!r} and another --output_dir"
        advice = f"copy {str(copy)!r} there" if copy.is_file() else advice
        raise UserError(f"{error}; it holds the best weights so far, of step {step}: {advice}") from error


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put `folder`'s model.safetensors into `model`, exactly.

    Raises:
        UserError: the file is missing, damaged, of another model, or not finite.
    """
    # Not safetensors' load_model: it refuses the weights of an nn.LSTM on a GPU, which cuDNN keeps in one storage.
    path = folder / WEIGHTS
    weights = read_tensors(path)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} is of another model: {one_line(error, 400)}") from error
    own = model.state_dict()
    tied = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in tied]
    if missing or unknown:
        lists = f"missing {', '.join(missing) or 'none'}; unknown {', '.join(unknown) or 'none'}"
        raise UserError(f"{str(path)!r} is damaged or of another model: {lists}")
    if broken := not_finite(model):
        raise UserError(f"{str(path)!r} is damaged: not finite: {', '.join(broken[:5])}")
