"""Train a model: `accelerate launch -m training.train [RECIPE.yaml] [--option value …]`, or with `python -m`.

Without arguments: a character language model on the embedded text `python_docs`.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from huggingface_hub import HfApi

import kru_hf

from . import checkpoint as ckpt
from .arguments import Arguments, parse_arguments
from .errors import Interrupted, UserError
from .evaluation import evaluate
from .loop import TrainingLoop
from .models import build_model, load_model
from .publish import check_token, publish_folder
from .publish import report as publish_report
from .reporting import Progress, results, write_results
from .stopping import StopRequest
from .tasks import Task, get_task


def prepare_task(arguments: Arguments) -> tuple[Task, Any]:
    """The task with its data, and the model: new, or a trained one to go on from."""
    task = get_task(arguments.run.task)(arguments.task, arguments.data, arguments.run.seed)
    if arguments.model.model is None:
        task.load()
        torch.manual_seed(arguments.run.seed)  # the same start on every rank
        return task, build_model(task.head, arguments.model, **task.model_kwargs())
    model, tokenizer = load_model(arguments.model.model, task.head)
    task.load(tokenizer)
    task.check_vocabulary()
    return task, model.float()


def check_launcher() -> None:
    """Newer launchers of accelerate start one process for `--cpu --num_processes 2`, without a word."""
    several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if several and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise UserError(
            "accelerate launch --cpu started one process although it was asked for several; for several processes on a "
            "CPU use: torchrun --nproc_per_node 2 -m training.train … --use_cpu true"
        )


def build_accelerator(arguments: Arguments) -> Accelerator:
    """Device, precision and trackers."""
    check_launcher()
    run = arguments.run
    tracker = None if run.report_to == "none" else run.report_to
    project = ProjectConfiguration(str(arguments.output_dir), logging_dir=str(arguments.output_dir / "tensorboard"))
    try:
        return Accelerator(
            cpu=run.use_cpu, mixed_precision=run.mixed_precision, log_with=tracker, project_config=project
        )
    except ValueError as error:
        raise UserError(f"report_to={run.report_to!r}, mixed_precision={run.mixed_precision!r}: {error}") from error


def check_folder(arguments: Arguments) -> Path | None:
    """The checkpoint to go on from, if any; an error if the output folder holds a run that would be overwritten."""
    run, folder = arguments.run, arguments.output_dir
    if run.resume_from_checkpoint is not None:
        ckpt.clean(folder)
        found = ckpt.find_checkpoint(run.resume_from_checkpoint, folder)
        if found is None and ckpt.holds_run(folder) and (folder / "all_results.json").exists():
            raise UserError(
                f"output_dir={str(folder)!r} holds a finished run without checkpoints: nothing to go on from"
            )
        return found
    if ckpt.holds_run(folder) and not run.overwrite_output_dir:
        raise UserError(
            f"output_dir={str(folder)!r} already holds a run; pass --resume_from_checkpoint last to go on with it, "
            "--overwrite_output_dir true to delete it, or another --output_dir"
        )
    return None


def start_folder(arguments: Arguments, task: Task) -> None:
    """Clear the output folder if that was asked for, and record options and data in it."""
    folder, run = arguments.output_dir, arguments.run
    if run.overwrite_output_dir and run.resume_from_checkpoint is None:
        ckpt.delete_run(folder)
    ckpt.clean(folder)
    options = {
        k: v for k, v in arguments.flat().items() if k not in ("output_dir", "dataset", "resume_from_checkpoint")
    }
    if options["model"] is not None:
        options["model"] = Path(options["model"]).name if Path(options["model"]).exists() else options["model"]
    versions = {"kru_hf": kru_hf.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    ckpt.write_json(
        folder / "training.json", {"options": options, "dataset": task.dataset_record(), "versions": versions}
    )


def share_cores(num_threads: int) -> None:
    """Use `num_threads` CPU threads, or this process's share of the cores if 0: launchers leave it one unasked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(num_threads or max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))


def run(arguments: Arguments, stop: StopRequest) -> dict[str, Any]:
    """Train, evaluate and write the folder; returns the figures of `all_results.json`."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())  # costs nothing on a CPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    share_cores(arguments.run.num_threads)
    accelerator = build_accelerator(arguments)
    if arguments.run.push_to_hub and accelerator.is_main_process:
        check_token(HfApi())  # before hours of work, not after
    with accelerator.main_process_first():
        found = check_folder(arguments)
        task, model = prepare_task(arguments)
    loop = TrainingLoop(arguments, task, model, accelerator, stop)
    if found is not None:
        loop.resume(found)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        start_folder(arguments, task)
        describe(arguments, task, model, loop, found)
    accelerator.wait_for_everyone()
    if arguments.run.report_to != "none":
        paths = ("output_dir", "dataset", "model", "resume_from_checkpoint")
        config = {k: v for k, v in arguments.flat().items() if isinstance(v, (int, float, str)) and k not in paths}
        accelerator.init_trackers("kru", config=config)
    progress = Progress(task, accelerator, loop.total_steps, loop.state.step)
    try:
        loop.run(progress)
    finally:
        progress.close()
    figures = finish(arguments, task, loop)
    accelerator.end_training()
    return figures


def finish(arguments: Arguments, task: Task, loop: TrainingLoop) -> dict[str, Any]:
    """Evaluate the best weights and write the results."""
    accelerator, folder, model = loop.accelerator, arguments.output_dir, loop.bare_model
    accelerator.wait_for_everyone()
    ckpt.load_weights(model, folder)
    model.eval()
    splits = ("validation", "test") if arguments.run.evaluate_test else ("validation",)
    metrics = {split: evaluate(task, model, split, accelerator) for split in splits}
    figures = results(task, model, loop.state, metrics)
    if accelerator.is_main_process:
        write_results(folder, task, model, loop.state, figures)
        for split, values in metrics.items():
            print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        sample = task.sample(model, arguments.run.sample_length, arguments.run.seed)
        if sample:
            print(f"sample:\n{sample}")
        print(f"folder: {folder}")
        if arguments.run.push_to_hub and arguments.run.hub_model_id is not None:
            published = publish_folder(
                folder,
                arguments.run.hub_model_id,
                private=arguments.run.hub_private_repo,
                data_license=arguments.run.data_license,
            )
            print(publish_report(published))
    accelerator.wait_for_everyone()
    return figures


def describe(arguments: Arguments, task: Task, model: Any, loop: TrainingLoop, found: Path | None) -> None:
    """Say what is going to happen."""
    record = task.dataset_record()
    print(
        f"data: {record['name']}, SHA-256 {record['sha256'][:12]}…; one pass is {task.num_batches(loop.layout)} steps"
    )
    print(
        f"model: {type(model).__name__} ({arguments.model.architecture}), {model.num_parameters():,} parameters, "
        f"{model.num_recurrent_parameters():,} of them recurrent"
    )
    start = f"from {found}" if found else "from the beginning"
    rows = loop.layout.global_batch_size
    print(f"training: {start}, {loop.total_steps} steps of {rows} rows on {loop.accelerator.device}")
    if arguments.run.resume_from_checkpoint == "last" and found is None:
        print("no checkpoint had been written yet")


def how_to_go_on(argv: list[str]) -> str:
    """The command that goes on with this run."""
    words = [word for word in argv if not word.startswith("--overwrite_output_dir=")]
    if "--overwrite_output_dir" in words:
        at = words.index("--overwrite_output_dir")
        follows_value = at + 1 < len(words) and not words[at + 1].startswith("-")
        del words[at : at + 1 + follows_value]
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', os.environ['WORLD_SIZE'])}"
    if not any(word.startswith("--resume_from_checkpoint") for word in words):
        words += ["--resume_from_checkpoint", "last"]
    return f"{launcher} -m training.train {shlex.join(words)}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 1 for errors, 130/143 after Ctrl-C/SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.disable_progress_bar()  # bars for single files would break the training's own
    speak = os.environ.get("RANK", "0") == "0"
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with StopRequest() as stop:
            run(parse_arguments(argv), stop)
    except UserError as error:
        if speak:
            print(f"error: {error}", file=sys.stderr)
        if speak and isinstance(error, Interrupted):
            print(f"go on with: {how_to_go_on(argv)}", file=sys.stderr)
        return error.exit_code
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return 0


if __name__ == "__main__":
    sys.exit(main())
