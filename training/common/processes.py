"""Several processes: how they are started, how they agree on errors, and what is said when one of them is gone."""

import contextlib
import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import nn
from transformers.utils.logging import disable_progress_bar

from .errors import UserError
from .machine import first_words
from .stopping import launched

PARENT = os.getppid()
Result = TypeVar("Result")
CONFIGS = "training/accelerate"
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def check_launcher() -> None:
    """Refuse what a launcher asks for and this training does not do, before any of it is lost.

    Raises:
        UserError: sharding, or one process where several were asked for: newer launchers of accelerate start one for
            `--cpu --num_processes 2`, silently.
    """
    for name, kind in SHARDED.items():
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"{kind} is not supported: every process holds the whole model (DDP), which is small beside its "
                f"states; {CONFIGS}/README.md has the figures. Launch with --config_file {CONFIGS}/one_machine.yaml"
            )
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    script = os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_NUM_TASKS" not in os.environ  # sbatch starts one
    if "SLURM_PROCID" in os.environ and "WORLD_SIZE" not in os.environ and tasks != "1" and not script:
        raise UserError(
            f"srun started {tasks} processes that know nothing of each other; start one launcher a machine: srun "
            "--ntasks-per-node 1 torchrun --nproc_per_node …, or a single process: srun --ntasks 1"
        )
    # accelerate sets an address for several processes alone; whoever starts a rank sets WORLD_SIZE.
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if several and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise UserError(
            "accelerate launch started one process although it was asked for several; for several processes on a CPU "
            f"use: accelerate launch --config_file {CONFIGS}/two_cpu_processes.yaml --num_processes 2 "
            f"-m training.train …, on GPUs {CONFIGS}/one_machine.yaml"
        )


def on_cpu(asked: bool) -> bool:
    """Whether to run on the CPU: asked for, or all there is. Only when told so does accelerate join processes there."""
    return asked or not torch.accelerator.is_available()


def check_world(accelerator: Accelerator) -> None:
    """An error if the processes that were started do not form one group: each would train alone in one folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but accelerate joins {accelerator.num_processes} on "
            f"{accelerator.device.type!r}; pass --use_cpu true, or start one process"
        )


def share_cores(num_threads: int) -> None:
    """Use `num_threads` CPU threads, or this process's share of the cores if 0: launchers leave it one unasked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(num_threads or max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do the same work on every rank, rank 0 first: it fills the caches of data that the others then read.

    Raises:
        UserError: on every rank, if the work failed on one of them; nobody is left waiting for it.
    """
    result: Any = None
    for turn in (True, False):
        failed: list[tuple[int, str]] = []
        cause: UserError | None = None
        if accelerator.is_main_process == turn:
            try:
                result = work()
            except UserError as error:
                failed, cause = [(accelerator.process_index, str(error))], error
        failed = gather_object(failed)
        if failed:
            number, message = failed[0]
            raise UserError(message if number == 0 else f"rank {number}: {message}", shared=True) from cause
    return result


def from_main(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every rank rank 0's weights: on other machines the output folder may be missing."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                value.copy_(broadcast(value.detach().contiguous()))


def run_command(run: Callable[[list[str]], Any], argv: list[str] | None) -> int:
    """The exit code of a command that runs with these words, by default those of the command line.

    A `UserError` is one line on standard error.
    """
    disable_progress_bar()  # of transformers: bars for single files would break the command's own
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        say(error)
        return error.exit_code
    return 0


def say(error: UserError, advice: str = "") -> None:
    """Print an error and, on the next line, what can be done: on rank 0, or on the only rank that has the error.

    Under a launcher it is said again after the launcher's own report, to be the last that a person sees.
    """
    if rank() == 0:
        message = f"error: {error}" + (f"\n{advice}" if advice else "")
    elif torch.distributed.is_initialized() and not error.shared:
        message = f"error: rank {rank()}: {error}"
    else:
        return
    with unheard():
        print(message, file=sys.stderr, flush=True)
    if launched() and os.getppid() == PARENT:
        say_after(PARENT, message)


AFTERWORD = """
import os, select, sys
if select.select([int(sys.argv[1])], [], [], 120)[0]:
    os.write(2, os.fsencode(sys.argv[2]) + b"\\n")
"""


def say_after(launcher: int, message: str) -> None:
    """Have a process of its own wait for the launcher's end and say `message` then; Linux alone can wait for it."""
    with contextlib.suppress(OSError, AttributeError):
        ends = os.pidfd_open(launcher)  # type: ignore[attr-defined,unused-ignore]
        words = [sys.executable, "-ISc", AFTERWORD, str(ends), message]
        nothing = subprocess.DEVNULL
        subprocess.Popen(words, pass_fds=[ends], stdin=nothing, stdout=nothing, start_new_session=True)
        os.close(ends)


@contextmanager
def unheard() -> Iterator[None]:
    """What is said to a terminal that was closed, or to a pipe whose reader has ended, is dropped from then on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def lost_others(error: BaseException) -> bool:
    """Whether an exception is what is seen of the end of another process."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def what_was_lost(error: BaseException) -> str:
    """What to say then."""
    reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". This is typically", 1)[0]
    return f'another process has ended ({reason}); its own message, or the launcher\'s "Root Cause", says why'


def how_to_resume(argv: list[str], program: str) -> str:
    """The command that resumes this run of `program`."""
    return f"{launcher()} -m {program} {shlex.join([*first_words(argv), '--resume_from_checkpoint', 'last'])}"


def launcher() -> str:
    """The words before `-m` that start as many processes as there are now."""
    accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return "accelerate launch" if accelerate else "python"
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return "on every machine, with the launcher's options as before: " + (
            "accelerate launch …" if accelerate else "torchrun …"
        )
    number = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if not accelerate:
        return f"torchrun --nproc_per_node {number}"
    config = "one_machine" if torch.accelerator.is_available() else "two_cpu_processes"
    return f"accelerate launch --config_file {CONFIGS}/{config}.yaml --num_processes {number}"
