"""A run from its options to its results: folder, data, model, training, and what is said and written."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list

import kru_hf

from ..common import processes
from ..common import run_folder as runs
from ..common.errors import UserError
from ..common.lock import locked
from ..common.machine import keep_freed_memory, machines_record
from ..common.saving import write_json, write_text
from ..common.stopping import StopRequest
from ..models.build import build_model, check_fit, freeze_factors, load_model, using_backend
from ..options.model import ModelOptions
from ..records.publishing import check_before_training, publish_command, publish_folder, said
from ..records.run_record import RECIPE, RUN, read_fields, read_record, recipe_text
from ..tasks import Task, get_task
from .accelerate_loop import TrainingLoop
from .arguments import Arguments, resolved
from .checkpoint import load_weights, resume
from .driver import Driver
from .progress import results, trackers, write_results
from .scoring import evaluate


def inherit(options: ModelOptions) -> None:
    """What the record of the model's own run says and its config does not: the kind of network, the bound on W."""
    try:
        earlier = read_record(str(options.model)).options
    except UserError:
        if (Path(str(options.model)) / RECIPE).exists():
            raise  # it is damaged
        return  # made by another program
    options.architecture = earlier.get("architecture", options.architecture)
    if options.max_recurrent_norm is None:
        options.max_recurrent_norm = earlier.get("max_recurrent_norm")


def prepare_task(arguments: Arguments) -> tuple[Task, Any]:
    """The task with its data, and the model: new, or a trained one to start from."""
    task = get_task(arguments.run.task)(arguments.task, arguments.data, arguments.run.seed)
    if arguments.model.model is None:
        task.load()
        torch.manual_seed(arguments.run.seed)  # the same start on every rank
        model = build_model(task.head, arguments.model, **task.model_kwargs())
    else:
        model, tokenizer = load_model(arguments.model.model, task.head)
        arguments.model.check_turned_off(model.config)
        task.load(tokenizer)
        task.check_vocabulary()
        check_fit(arguments.model.model, model, task.name, task.model_kwargs())
        model = model.float()
    if arguments.run.freeze_factors:
        freeze_factors(model)
    return task, model


def build_accelerator(arguments: Arguments) -> Accelerator:
    """Device, precision and trackers."""
    processes.check_launcher()
    run = arguments.run
    tracker = None if run.report_to == "none" else run.report_to
    project = ProjectConfiguration(str(arguments.output_dir), logging_dir=str(arguments.output_dir / "tensorboard"))
    cpu = processes.on_cpu(run.use_cpu)
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=run.mixed_precision, log_with=tracker, project_config=project
        )
    except ValueError as error:
        raise UserError(f"report_to={run.report_to!r}, mixed_precision={run.mixed_precision!r}: {error}") from error
    if tracker is not None and not accelerator.log_with:
        raise UserError(f"report_to={run.report_to!r} is not installed: install its package, or pass --report_to none")
    processes.check_world(accelerator)
    return accelerator


def check_place(folder: Path) -> None:
    """`UserError` unless a run can have the output folder for itself."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        checkpoint = runs.checkpoint_around(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, links in a circle, a zero byte
        raise UserError(f"output_dir={str(folder)!r} cannot be a folder: {error}") from error
    if not nearest.is_dir():
        raise UserError(f"output_dir={str(folder)!r} cannot be a folder: {str(nearest)!r} is a file")
    if checkpoint is not None:
        raise UserError(
            f"output_dir={str(folder)!r} belongs to a checkpoint, which goes when there are newer ones; pass "
            f"--output_dir {str(checkpoint.parent)!r} for the checkpoint's run, or another folder"
        )


def open_folder(arguments: Arguments, held: ExitStack) -> Path | None:
    """Lock the output folder for as long as `held` is open; what `check_folder` returns."""
    check_place(arguments.output_dir)
    held.enter_context(locked(arguments.output_dir))
    return check_folder(arguments)


def check_folder(arguments: Arguments) -> Path | None:
    """The checkpoint to resume from, if any; an error if the output folder holds a run that would be overwritten."""
    run, folder = arguments.run, arguments.output_dir
    foreign = runs.foreign_files(folder)
    if foreign:
        raise UserError(
            f"output_dir={str(folder)!r} is not the folder of a run and holds {' and '.join(foreign)}, which the run "
            "would replace; pass another --output_dir"
        )
    if run.resume_from_checkpoint is not None:
        runs.clean(folder)
        found = runs.find_checkpoint(run.resume_from_checkpoint, folder)
        if found is not None and not os.path.isdir(found):  # no error for a name that none can have
            there = ", ".join(str(path) for path in runs.checkpoints(folder)) or "none"
            raise UserError(
                f"resume_from_checkpoint={run.resume_from_checkpoint!r} must be last or a checkpoint's folder; "
                f"output_dir={str(folder)!r} holds: {there}"
            )
        if found is not None and found.resolve().parent != folder.resolve():
            raise UserError(
                f"resume_from_checkpoint={str(found)!r} is not in output_dir={str(folder)!r}, but with the best "
                f"weights of its run; pass --output_dir {str(found.parent)!r}"
            )
        if found is None and runs.holds_run(folder) and (folder / "all_results.json").exists():
            raise UserError(
                f"output_dir={str(folder)!r} holds a finished run without checkpoints: nothing to resume from"
            )
        return found
    if run.overwrite_output_dir and runs.is_within(arguments.model.model, folder):
        raise UserError(
            f"overwrite_output_dir=True would delete model={arguments.model.model!r}, which the run starts from; "
            "pass another --output_dir"
        )
    if runs.holds_run(folder) and not run.overwrite_output_dir:
        raise UserError(
            f"output_dir={str(folder)!r} already holds a run; pass --resume_from_checkpoint last to resume it, "
            "--overwrite_output_dir true to delete it, or another --output_dir"
        )
    return None


def start_folder(loop: Driver) -> None:
    """Clear the output folder if that was asked for, and record options, data, command and machine in it."""
    folder, run = loop.folder, loop.options
    earlier = read_fields(folder / RUN) if loop.state.step > 0 else {}
    if run.overwrite_output_dir and run.resume_from_checkpoint is None:
        runs.delete_run(folder)
    runs.clean(folder)
    versions = {"kru_hf": kru_hf.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    trains = loop.state.step < loop.total_steps
    record = {
        "data": loop.task.dataset_record(),
        "versions": {**versions, **loop.libraries},
        "machines": machines_record(loop.accelerator, earlier.get("machines", []), trains),
        "command": loop.arguments.command,
    }
    options = resolved(loop.arguments, loop.model.config, loop.accelerator.mixed_precision)
    write_json(folder / RUN, {**earlier, **record})
    write_text(folder / RECIPE, recipe_text(options))


def run(
    arguments: Arguments,
    stop: StopRequest,
    driver: type[Driver] = TrainingLoop,
    prepare: Callable[[Arguments], tuple[Task, Any]] = prepare_task,
) -> dict[str, Any]:
    """Train, evaluate and write the folder; returns the figures of `all_results.json`.

    Args:
        prepare: makes task and model.
    """
    processes.share_cores(arguments.run.num_threads)
    keep_freed_memory()
    if arguments.model.model is not None:
        inherit(arguments.model)  # first of all: the usual output_dir is named after the architecture
    accelerator = build_accelerator(arguments)
    is_main = accelerator.is_main_process
    with ExitStack() as held:
        held.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(not torch.cuda.is_available())  # costs nothing on a CPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        found = processes.together(accelerator, lambda: open_folder(arguments, held) if is_main else None)
        (found,) = broadcast_object_list([found])
        task, model = processes.together(accelerator, lambda: prepare(arguments))
        engine = using_backend(arguments.run.backend, model, accelerator.device)
        processes.together(accelerator, lambda: held.enter_context(engine))
        processes.together(accelerator, lambda: check_publishing(arguments, task, model) if is_main else None)
        figures = train(driver(arguments, task, model, accelerator, stop), found)
        if is_main and arguments.run.push_to_hub:
            publish(arguments)  # the other processes have ended: none waits for the upload
    return figures


def train(loop: Driver, found: Path | None) -> dict[str, Any]:
    """A run in a folder that is locked, from the checkpoint `found` or from the beginning."""
    accelerator = loop.accelerator
    if found is not None:
        processes.together(accelerator, lambda: resume(loop, found))
    accelerator.wait_for_everyone()
    paths = ("output_dir", "dataset", "model", "resume_from_checkpoint")
    values = loop.arguments.flat().items()
    config = {k: v for k, v in values if isinstance(v, (int, float, str)) and k not in paths}
    with loop.stop.deferred():  # from the moment at which there is a folder to resume in
        if accelerator.is_main_process:
            start_folder(loop)
            with processes.unheard():
                describe(loop, found)
        accelerator.wait_for_everyone()
        with trackers(accelerator, loop.options.report_to, config):
            loop.run()
    figures = finish(loop)
    loop.close()
    accelerator.end_training()
    return figures


def finish(loop: Driver) -> dict[str, Any]:
    """Evaluate the best weights and write the results."""
    task, accelerator, model, options = loop.task, loop.accelerator, loop.model, loop.options
    if accelerator.is_main_process:
        load_weights(model, loop.folder)
    processes.from_main(accelerator, model)
    model.eval()
    splits = ("validation", "test") if options.evaluate_test else ("validation",)
    if accelerator.is_main_process:
        with processes.unheard():
            print(f"scoring the best weights on {' and '.join(splits)}", flush=True)
    metrics = {split: evaluate(task, model, split, accelerator) for split in splits}
    figures = results(task, model, loop.state, metrics)
    if accelerator.is_main_process:
        write_results(loop.folder, task, loop.state, figures)
        said = [f"{split}: {', '.join(f'{n} {v:.4f}' for n, v in values.items())}" for split, values in metrics.items()]
        sample = task.sample(model, options.sample_length, options.seed, loop.folder)
        said += [f"sample:\n{sample}"] if sample else []
        with processes.unheard():
            print("\n".join([*said, f"folder: {loop.folder}"]), flush=True)
    accelerator.wait_for_everyone()
    return figures


def check_publishing(arguments: Arguments, task: Task, model: Any) -> None:
    """What would make `--push_to_hub` fail at the end is an error before hours of work, not after."""
    run = arguments.run
    if run.push_to_hub and run.hub_model_id is not None:
        name, kind = task.dataset_record()["name"], model.config.model_type
        check_before_training(run.hub_model_id, run.hub_private_repo, kind, name, run.data_license)


def publish(arguments: Arguments) -> None:
    """Publish the finished folder; it stays whole whatever happens, and can be published by itself."""
    folder, run = arguments.output_dir, arguments.run
    where = (str(run.hub_model_id), run.hub_private_repo, run.data_license)
    try:
        done = publish_folder(folder, where[0], private=where[1], data_license=where[2])
    except UserError as error:
        raise UserError(
            f"the run is complete in {str(folder)!r}, but it has not been published: {error}\n"
            f"publish it with: {publish_command(folder, *where)}"
        ) from error
    print(said(done))


def describe(loop: Driver, found: Path | None) -> None:
    """Say what is going to happen."""
    arguments, task, model = loop.arguments, loop.task, loop.model
    record, steps = task.dataset_record(), task.num_batches(loop.slots.layout)
    print(f"data: {record['name']}, SHA-256 {record['sha256'][:12]}…; one pass is {steps} steps")
    splits = ("train", "validation", *(["test"] if arguments.run.evaluate_test else []))
    for note in task.notes(splits):
        print(f"note: {note}")
    print(
        f"model: {type(model).__name__} ({arguments.model.architecture}), {model.num_parameters():,} parameters, "
        f"{model.num_recurrent_parameters():,} of them recurrent"
    )
    start = f"from {found}" if found else "from the beginning"
    rows = loop.slots.layout.global_batch_size
    limit = f" or {arguments.run.max_time:g} minutes" if arguments.run.max_time else ""
    print(f"training: {start}, {loop.total_steps} steps{limit} of {rows} rows on {loop.accelerator.device}")
    if arguments.run.resume_from_checkpoint == "last" and found is None:
        print("no checkpoint had been written yet")
