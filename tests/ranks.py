"""Processes forked from one that has loaded the libraries: saves seconds. Several of them train together."""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets  # noqa: F401  (loaded once, before the fork, like what follows)
import matplotlib.figure  # noqa: F401
import pytest

import training.train  # noqa: F401

TESTS = Path(__file__).parent
HANG = 300.0  # seconds after which a process is taken to hang: a launcher on a busy machine needs one or two minutes


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_rank(program: str, rank: int, ranks: int, port: int, words: list[str], log: Path) -> None:
    """Body of one process, in the environment that a launcher gives it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # without it accelerate warns in each process
    with open(f"{log}-{rank}", "w") as file:
        sys.stdout = sys.stderr = file
        code = importlib.import_module(program).main(words)
    sys.exit(code)


def fork(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that calls this function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks", "tiny_run"])
    child = context.Process(target=function, args=arguments)
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it loads there, not in sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        child.start()
    return child


def start(words: list[list[str]], log: Path, program: str = "training.train") -> list[BaseProcess]:
    """One process for each list of options."""
    port = free_port()
    return [fork(one_rank, program, rank, len(words), port, own, log) for rank, own in enumerate(words)]


def finish(children: list[BaseProcess], log: Path) -> list[tuple[int | None, str]]:
    """Exit code (None: it did not end in time) and output of each process."""
    for child in children:
        child.join(HANG)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return [(code, Path(f"{log}-{rank}").read_text()) for rank, code in enumerate(codes)]
