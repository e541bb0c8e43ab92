"""Files that are complete or absent: everything is written to a temporary folder, synced and renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError

TEMPORARY, OLD = ".tmp-", ".old-"


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
            "untouched. Is the disk full? Make room; a training resumes with --resume_from_checkpoint last"
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
