"""Files that are complete or absent: everything is written to a temporary folder, synced and renamed."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError
from .files import read_tensors

TEMPORARY, OLD = ".tmp-", ".old-"
WEIGHTS, OPTIMIZER, CARRIED, RANDOM, STATE = (
    "model.safetensors",
    "optimizer.pt",
    "carried_state.safetensors",
    "random_state.safetensors",
    "trainer_state.json",
)
RECORD = ("recipe.yaml", "run.json", "all_results.json", "history.csv")  # see records/run_record.py
# What `training.compose` may have put beside them.
COMPANIONS = ("composition.mid", "composition.png", "composition.json")
RUN_FILES = ("config.json", WEIGHTS, *RECORD[1:])
PRESENTED = ("README.md", "learning_curve.png", RECORD[0])  # a folder that holds one of these alone is somebody's own


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


def sync(path: Path) -> None:
    """Have the system write a file or the entries of a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync every file below `folder`, then the folders."""
    paths = [folder, *folder.rglob("*")]
    for path in [p for p in paths if p.is_file()] + [p for p in paths if p.is_dir()]:
        sync(path)


def fill_temporary(folder: Path, name: str, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write into a fresh temporary folder of `folder`; nothing stays behind if it fails."""
    temporary = folder / f"{TEMPORARY}{name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for path in temporary.rglob("*"):  # safetensors writes files that only their owner may read
            if path.is_file():
                path.chmod(temporary.stat().st_mode & 0o666)
        sync_tree(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not save {str(folder / name)!r} ({error}); nothing half-written was left and earlier files are "
            "untouched. Is the disk full? Make room; a training goes on with --resume_from_checkpoint last"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def write_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder `target` appear at once with what `fill` writes, replacing an older one."""
    temporary = fill_temporary(target.parent, target.name, fill)
    old = target.parent / f"{OLD}{target.name}"
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_files(folder: Path, fill: Callable[[Path], object]) -> None:
    """Replace single files of `folder` by those that `fill` writes; each is whole at any moment."""
    temporary = fill_temporary(folder, "files", fill)
    target = folder
    try:
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        sync(folder)
    except OSError as error:  # there is a folder of that name
        raise UserError(
            f"could not save {str(target)!r} ({error.strerror or error}); move what is there away"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    write_files(path.parent, lambda folder: (folder / path.name).write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir() and is_checkpoint(path))
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def checkpoint_around(folder: Path) -> Path | None:
    """The checkpoint that a folder is or lies in; also where it has but the name of one, which `prune` goes by."""
    named = re.fullmatch(rf"checkpoint-\d+|({re.escape(TEMPORARY)}|{re.escape(OLD)}).*", folder.name)
    return folder if named else next((path for path in (folder, *folder.parents) if (path / STATE).is_file()), None)


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the parameters with a NaN or an infinity among their numbers."""
    return [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]


def is_within(model: str | None, folder: Path) -> bool:
    """Whether a model is a folder, no Hub id, that is this one or lies in it, to be deleted with the run."""
    return model is not None and Path(model).exists() and Path(model).resolve().is_relative_to(folder.resolve())


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left something in `folder`."""
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in RUN_FILES)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written; put back a checkpoint that was about to be replaced."""
    for path in folder.glob(f"{OLD}checkpoint-*"):
        target = folder / path.name.removeprefix(OLD)
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, target)
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def foreign_files(folder: Path) -> list[str]:
    """Files of the user that a run in `folder` would replace: those of a folder in which there never was a run."""
    return [] if holds_run(folder) else [name for name in PRESENTED if (folder / name).exists()]


def delete_run(folder: Path) -> None:
    """Remove an earlier run's files and checkpoints from `folder`, if it holds one, and nothing else."""
    if not holds_run(folder):
        return
    for path in checkpoints(folder):
        remove_checkpoint(path)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    for name in (*RUN_FILES, *PRESENTED, *tokenizer, *COMPANIONS):
        (folder / name).unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a half-removed one is never taken for a whole one."""
    doomed = path.parent / f"{TEMPORARY}{path.name}"
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(folder: Path, limit: int, newest: Path) -> None:
    """Keep `newest` and the checkpoints before it, `limit` in all; 0 keeps all.

    Later ones are of a run that was taken up again further back, and would push the new ones out.
    """
    found = checkpoints(folder)
    for path in found[: found.index(newest) + 1][:-limit] if limit else []:
        remove_checkpoint(path)


def save_checkpoint(
    target: Path,
    *,
    model: Any,
    optimizer: dict[str, Any],
    carried: dict[str, Tensor],
    random: dict[str, Tensor],
    state: TrainerState,
    signature: dict[str, Any],
) -> None:
    """Write everything that a run needs to go on bit by bit.

    Args:
        model: the unwrapped model. optimizer: its and the gradient scaler's state dicts.
        carried: recurrent states of all rows of the global batch, in their order.
        random: random generator states, rank first.
        signature: the configuration that a resumed run must have.
    """

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        torch.save(optimizer, folder / OPTIMIZER)
        save_file({key: value.contiguous() for key, value in carried.items()}, folder / CARRIED)
        save_file(random, folder / RANDOM)
        text = json.dumps({**asdict(state), "signature": signature}, indent=2, ensure_ascii=False)
        (folder / STATE).write_text(text, encoding="utf-8")

    write_folder(target, fill)


def read_weights(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """`folder`'s model.safetensors, which fit `model` and are finite.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    path = folder / WEIGHTS
    weights, own = read_tensors(path), model.state_dict()
    tied = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name in own if name not in weights and own[name].data_ptr() not in tied]
    unknown = [name for name in weights if name not in own]
    if missing or unknown:
        lists = f"missing {', '.join(missing) or 'none'}; unknown {', '.join(unknown) or 'none'}"
        raise UserError(f"{str(path)!r} is damaged or of another model: {lists}")
    for name, value in weights.items():
        check_tensor(path, name, value, tuple(own[name].shape), (own[name].dtype,))
    return weights


def check_tensor(path: Path, name: str, value: Any, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> None:
    """`UserError` naming the file unless `value` is a finite tensor of this shape and one of these types."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    plain = plain and value.device.type == "cpu" and not (0 in value.stride() and value.numel() > 1)
    if not plain or tuple(value.shape) != shape or value.dtype not in dtypes:
        found = f"{tuple(value.shape)} of {value.dtype}" if plain else reprlib.repr(value)
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise UserError(f"{str(path)!r} is damaged or of another model: {name} is {found}, not {shape} of {allowed}")
    if not bool(value.isfinite().all()):
        raise UserError(f"{str(path)!r} is damaged: not all numbers in {name} are finite")


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put `folder`'s model.safetensors into `model`, exactly. Raises `UserError` as `read_weights` does."""
    # Not safetensors' load_model: it refuses the weights of an nn.LSTM on a GPU, which cuDNN keeps in one storage.
    model.load_state_dict(read_weights(model, folder), strict=False)


def find_checkpoint(option: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None if it is "last" and none has been written yet."""
    if option == "last":
        found = checkpoints(folder)
        return found[-1] if found else None
    return Path(option)
