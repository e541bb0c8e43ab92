"""Evaluate a trained model: `python -m training.evaluate --model PATH_OR_ID [--dataset …] --split test`.

Prints a table, then one line of JSON with the figures.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from accelerate import Accelerator

from .common import processes
from .common.errors import UserError
from .common.files import check_fields
from .loop.scoring import evaluate
from .models.build import check_fit, load_model
from .models.runtime import through_runtime
from .options.data import DataOptions
from .options.fields import REQUIRED, option
from .options.parser import parse_words
from .records.run_record import RECIPE, RUN, RunRecord, read_record
from .tasks import Task, get_task


@dataclass
class EvaluateOptions:
    """What is evaluated."""

    model: str = option(REQUIRED, "Trained folder or Hub id.")
    split: Literal["validation", "test"] = option("test", "Part of the data.")
    use_cpu: bool = option(False, "Evaluate on the CPU even if there is an accelerator.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of matrix products; not given: that of the training, in which its figures were scored too."
    )
    dtype: Literal["fp32", "int8", "int4"] | None = option(
        None, "Score what the C runtime computes with weights of this precision; not given: the model in PyTorch."
    )
    allow_other_dataset: bool = option(False, "Accept data that differ from what the model was trained on.")

    def __post_init__(self) -> None:
        if self.dtype is not None and self.mixed_precision is not None:
            raise UserError(f"mixed_precision={self.mixed_precision!r} does nothing beside dtype={self.dtype!r}")


def recorded(options: type[Any], source: str, values: dict[str, Any], **changes: Any) -> Any:
    """Options as a file of a record has them, of those that it has; an error that names one that is not allowed."""
    kinds = {name: kind for name, kind in get_type_hints(options).items() if name in values}
    check_fields(source, values, kinds)
    try:
        return options(**{**{name: values[name] for name in kinds}, **changes})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def choose_data(data: DataOptions, record: RunRecord) -> DataOptions:
    """The data that were asked for, or those of the training run, found by their path or name."""
    if data.dataset is not None:
        return data
    path = record.options.get("dataset")
    return recorded(
        DataOptions, RUN, record.data, dataset=path if path and Path(path).exists() else record.data["name"]
    )


def load_task(options: EvaluateOptions, data: DataOptions, tokenizer: Any, record: RunRecord) -> Task:
    """The task with the data; an error if they are not those of the training run where they should be."""
    task_class = get_task(record.options["task"])
    task_options = recorded(task_class.Options, RECIPE, record.options)
    task = task_class(task_options, choose_data(data, record), record.options["seed"])
    trained_on = record.data
    try:
        task.load(tokenizer)
    except UserError as error:
        if data.dataset is not None:
            raise
        raise UserError(
            f"the data that the model was trained on, {trained_on['name']!r}, cannot be found here; "
            f"pass --dataset PATH_OR_ID of data with SHA-256 {trained_on['sha256']} ({error})"
        ) from error
    now = task.dataset_record()
    if now["sha256"] != trained_on["sha256"] and not options.allow_other_dataset:
        if now["name"] == trained_on["name"]:
            raise UserError(
                f"dataset={now['name']!r} differs from what the model was trained on: SHA-256 {now['sha256']} instead "
                f"of {trained_on['sha256']}; pass the original with --dataset, or --allow_other_dataset true"
            )
        print(f"note: the model was trained on {trained_on['name']!r}; this is other data", file=sys.stderr)
    return task


def run(argv: list[str]) -> dict[str, float]:
    """Evaluate as the options say; returns the figures."""
    options, data = parse_words([EvaluateOptions, DataOptions], argv, "training.evaluate")
    record = read_record(options.model)
    task_class = get_task(record.options["task"])
    model, tokenizer = load_model(options.model, task_class.head)
    task = load_task(options, data, tokenizer, record)
    check_fit(options.model, model, task.name, task.model_kwargs())
    processes.check_launcher()
    precision = options.mixed_precision or record.options.get("mixed_precision")
    if options.dtype is not None:
        model, precision = through_runtime(model, options.dtype), "no"
    try:
        cpu = processes.on_cpu(options.use_cpu or options.dtype is not None)
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"mixed_precision={precision!r} of {options.model!r}: {error}; pass another") from error
    processes.check_world(accelerator)
    figures = evaluate(task, model.to(accelerator.device), options.split, accelerator)
    if accelerator.is_main_process:
        print_table(options, task, model, figures)
        for note in task.notes((options.split,)):
            print(f"note: {note}")
        print(json.dumps(figures))
    return figures


def print_table(options: EvaluateOptions, task: Task, model: Any, figures: dict[str, float]) -> None:
    """The figures for people."""
    rows = [
        ("model", options.model),
        ("parameters", f"{model.num_parameters():,} ({model.num_recurrent_parameters():,} recurrent)"),
        *([("computed by", f"the C runtime, {options.dtype}")] if options.dtype else []),
        ("data", f"{task.dataset_record()['name']}, {options.split}"),
        *((name, f"{value:.4f}") for name, value in figures.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return processes.run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
