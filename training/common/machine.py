"""The machine of a run: what its record says about it, and how memory is kept."""

import ctypes
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .errors import printable

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
RESUMING = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run was resumed, not what it was


def machine_record(accelerator: Accelerator) -> dict[str, Any]:
    """Device, processor, cores, threads and processes: flat, JSON, without names that people gave."""
    gpu = accelerator.device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": torch.cuda.get_device_name(accelerator.device) if gpu else accelerator.device.type,
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def machines_record(accelerator: Accelerator, earlier: list[dict[str, Any]], trains: bool) -> list[dict[str, Any]]:
    """The machines that a run was made on, in their order.

    Args:
        earlier: of the run that is resumed; empty for a new one.
        trains: whether steps are left; a finished run that is only scored keeps its machines.
    """
    here = machine_record(accelerator)
    return [*earlier, here] if not earlier or (trains and earlier[-1] != here) else earlier


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: a step of `ptb_char_120k` frees 3,000 pages and faults them in
    again, a tenth of its time. Other C libraries are left as they are."""
    if platform.libc_ver()[0] == "glibc":
        c_library = ctypes.CDLL(None)
        c_library.mallopt(_M_MMAP_MAX, 0)
        c_library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def processor() -> str:
    """The processor's name: Linux keeps it where Python's own function does not look."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def first_words(argv: list[str]) -> list[str]:
    """The words of a command without the options, in either spelling, that say how its run is resumed."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].replace("-", "_") in RESUMING
        if not dropping:
            kept.append(word)
    return kept


def shown_command(argv: list[str], program: str = "training.train") -> str:
    """The command of a run, to make it again: of paths outside of the checkout only the last part.

    Args:
        argv: what follows the program's name.
    """
    words: list[str] = []
    for word in first_words(argv):
        name, equals, value = word.partition("=")
        words.append(f"{name}={shown_path(value)}" if equals and name.startswith("-") else shown_path(word))
    launcher = "accelerate launch" if program == "training.train" else "python"
    return f"{launcher} -m {program} {shlex.join(words)}".rstrip()


def shown_path(text: str) -> str:
    """`text` in UTF-8, or the last part of it where it is a path that leaves the current folder."""
    if Path(text).is_absolute() or text.startswith((".." + os.sep, "~")):
        text = Path(text).name
    return printable(text)
