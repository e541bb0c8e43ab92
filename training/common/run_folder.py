"""The folder of a run: the names of its files, its checkpoints, and what of it may be deleted."""

import os
import re
import shutil
from pathlib import Path

from .saving import OLD, TEMPORARY

WEIGHTS, STATE = "model.safetensors", "trainer_state.json"
RECORD = ("recipe.yaml", "run.json", "all_results.json", "history.csv")  # see records/run_record.py
# What `training.compose` may have put beside them.
COMPANIONS = tuple(f"composition.{ending}" for ending in ("mid", "png", "json", "wav", "mxl"))
# What describes a model, and its tokenizer if it has one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
RUN_FILES = ("config.json", WEIGHTS, *RECORD[1:])
PRESENTED = ("README.md", "learning_curve.png", RECORD[0])  # a folder that holds one of these alone is somebody's own


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
    for name in (*RUN_FILES, *PRESENTED, *MODEL_FILES, *COMPANIONS):
        (folder / name).unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a half-removed one is never taken for a whole one."""
    doomed = path.parent / f"{TEMPORARY}{path.name}"
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(folder: Path, limit: int, newest: Path) -> None:
    """Keep `newest` and the checkpoints before it, `limit` in all; 0 keeps all.

    Later ones are of a run that was resumed from an earlier checkpoint, and would push the new ones out.
    """
    found = checkpoints(folder)
    for path in found[: found.index(newest) + 1][:-limit] if limit else []:
        remove_checkpoint(path)


def find_checkpoint(option: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None if it is "last" and none has been written yet."""
    if option == "last":
        found = checkpoints(folder)
        return found[-1] if found else None
    return Path(option)
