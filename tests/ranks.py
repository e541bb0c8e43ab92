"""A training program in several processes, forked from one that has loaded the libraries: saves seconds."""

import importlib
import multiprocessing
import os
import socket
import sys
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


def start(words: list[list[str]], log: Path, program: str = "training.train") -> list[BaseProcess]:
    """One process for each list of options."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    port = free_port()
    children = [
        context.Process(target=one_rank, args=(program, rank, len(words), port, own, log))
        for rank, own in enumerate(words)
    ]
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it loads there, not in sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        for child in children:
            child.start()
    return list(children)


def finish(children: list[BaseProcess], log: Path) -> list[tuple[int | None, str]]:
    """Exit code (None: it did not end in time) and output of each process."""
    for child in children:
        child.join(HANG)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return [(code, Path(f"{log}-{rank}").read_text()) for rank, code in enumerate(codes)]
