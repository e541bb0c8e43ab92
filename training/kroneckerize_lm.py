"""Shrink a trained language model: `python -m training.kroneckerize_lm --model LSTM_RUN --output_dir FOLDER`.

The recurrent matrices of an `--architecture lstm` (gru, rnn) run become Kronecker products at several ratios; each is
scored as it is and after a short fine-tune with the run's own loop, data and batches. The dense model gets the same
fine-tune, as the control. Prints a table and writes `kroneckerize.json`; every fine-tuned model is a run's folder.
"""

import json
import math
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kru_hf import kroneckerize
from kru_hf.kronecker import factorings

from .common import processes
from .common.errors import Interrupted, UserError
from .common.lock import locked
from .common.machine import shown_command
from .common.run_folder import holds_run, is_within
from .common.saving import write_json
from .common.stopping import StopRequest
from .evaluate import EvaluateOptions, load_task, recorded
from .loop.arguments import Arguments
from .loop.run import build_accelerator, check_place, open_folder
from .loop.run import run as fine_tune
from .loop.scoring import evaluate
from .models.baselines import TORCH_CELLS
from .models.build import load_model
from .options.data import DataOptions
from .options.fields import AT_LEAST_0, REQUIRED, Options, option, require
from .options.model import ModelOptions
from .options.parser import parse_words
from .options.run import RunOptions
from .records.results_page import table
from .records.run_record import RECIPE, read_record
from .records.runs import factors

RESULT = "kroneckerize.json"


@dataclass
class KroneckerizeOptions(Options):
    """What is shrunk, how far, and how it is trained afterwards."""

    model: str = option(REQUIRED, "Trained folder or Hub id of a language model with torch's RNN, LSTM or GRU.")
    output_dir: str = option(REQUIRED, "Folder for the table and a run's folder for each ratio.")
    overwrite_output_dir: bool = option(False, "Delete earlier runs in the output folder.")
    ratios: str = option("5,20,100", "How many times fewer recurrent parameters, separated by commas.")
    max_steps: int = option(300, "Steps of the fine-tune; 0 leaves it out.", allowed=AT_LEAST_0)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of the fine-tune; default: that of the run.",
        allowed=("positive and finite", lambda value: 0 < value < math.inf),
    )
    use_cpu: bool = option(False, "Train on the CPU even if there is an accelerator.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted()

    def wanted(self) -> list[float]:
        """The ratios as numbers."""
        try:
            ratios = [float(word) for word in self.ratios.split(",")]
        except ValueError:
            ratios = []
        good = bool(ratios) and all(1 < ratio < math.inf for ratio in ratios)
        require(good, "ratios", self.ratios, "numbers above 1, separated by commas, such as 5,20,100")
        return ratios


def nearest_shapes(state_size: int, ratio: float) -> list[list[int]]:
    """Square factors of N = `state_size` whose compression N² / Σ P_f² is nearest to `ratio`, the fewer at a tie.

    Raises:
        UserError: N is prime.
    """
    choices = [sizes for sizes in factorings(state_size) if len(sizes) > 1]
    if not choices:
        raise UserError(f"state_size={state_size} of the model is prime: it has no Kronecker factors")

    def distance(sizes: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.log(state_size**2 / sum(n * n for n in sizes) / ratio)), len(sizes)

    return [[n, n] for n in min(choices, key=distance)]


class Shrinker:
    """One trained model, and the rows of the table that are made of it."""

    def __init__(self, options: KroneckerizeOptions, data: DataOptions, command: str, stop: StopRequest) -> None:
        self.options, self.data, self.command, self.stop = options, data, command, stop
        self.record = read_record(options.model)
        processes.share_cores(self.record.options.get("num_threads", 0))
        model, tokenizer = self.fresh()
        self.state_size = model.config.state_size
        self.dense = model.num_recurrent_parameters()
        self.task = load_task(EvaluateOptions(model=options.model), data, tokenizer, self.record)
        self.accelerator = build_accelerator(self.arguments("dense"))

    def fresh(self) -> tuple[Any, Any]:
        """Model and tokenizer as they were trained."""
        model, tokenizer = load_model(self.options.model, "causal_lm")
        cell = getattr(model.config, "cell", model.config.model_type)
        if cell not in TORCH_CELLS or model.config.recurrent_factor_shapes is not None:
            raise UserError(
                f"model={self.options.model!r} is not a dense {', '.join(TORCH_CELLS)}: its recurrent matrices cannot "
                f"be kroneckerized (cell {cell!r}, factors {getattr(model.config, 'recurrent_factor_shapes', None)})"
            )
        return model, tokenizer

    def plan(self) -> dict[str, list[list[int]] | None]:
        """Shapes of each row by its name, the dense model first; two ratios that give the same shapes are one row."""
        rows: dict[str, list[list[int]] | None] = {"dense": None}
        for ratio in self.options.wanted():
            shapes = nearest_shapes(self.state_size, ratio)
            if shapes in rows.values():
                print(f"note: {ratio:g}x is left out: state_size {self.state_size} has nothing nearer than {shapes}")
            else:
                rows[f"{ratio:g}x"] = shapes
        return rows

    def row(self, name: str, shapes: list[list[int]] | None) -> dict[str, Any]:
        """Shrink, score, fine-tune, score."""
        model = self.fresh()[0].to(self.accelerator.device)
        error = 0.0
        if shapes is not None:
            _, fit = kroneckerize(model.model.recurrent, shapes)
            model.config.recurrent_factor_shapes = shapes  # so that the saved folder loads again
            error = sum(gate.relative_error for gate in fit.gates) / len(fit.gates)
        splits = ("validation", "test")
        row: dict[str, Any] = {
            "name": name,
            "factor_shapes": shapes,
            "num_parameters": model.num_parameters(),
            "num_recurrent_parameters": model.num_recurrent_parameters(),
            "compression": round(self.dense / model.num_recurrent_parameters(), 2),
            "mean_relative_error": round(error, 4),
            **{f"{s}_bpc_before": evaluate(self.task, model, s, self.accelerator)["bpc"] for s in splits},
        }
        if self.options.max_steps:
            figures = fine_tune(self.arguments(name), self.stop, prepare=lambda _: (self.task, model))
            row |= {f"{split}_bpc_after": figures[f"{split}_bpc"] for split in splits}
            row |= {name: figures[name] for name in ("steps", "train_runtime")}
        return row

    def arguments(self, name: str) -> Arguments:
        """Options of a fine-tune: those of the run, but its length, rate and folder."""
        steps = self.options.max_steps
        run = recorded(
            RunOptions,
            RECIPE,
            self.record.options,
            output_dir=str(Path(self.options.output_dir) / name),
            overwrite_output_dir=self.options.overwrite_output_dir,
            max_steps=steps or -1,
            **({"learning_rate": self.options.learning_rate} if self.options.learning_rate else {}),
            lr_scheduler_type="cosine",
            eval_steps=max(1, steps // 6),
            save_steps=max(1, steps),
            early_stopping_patience=0,
            report_to="none",
            sample_length=0,
            evaluate_test=True,
            use_cpu=self.options.use_cpu,
        )
        model = ModelOptions(architecture=self.record.options.get("architecture", "lstm"))
        return Arguments(run, model, self.data, self.task.options, self.command)

    def check_folder(self, name: str) -> None:
        """Before the first row, `UserError` if a fine-tune's folder would replace the model, or an earlier fine-tune,
        or is in use."""
        arguments = self.arguments(name)
        if is_within(self.options.model, arguments.output_dir):
            raise UserError(f"output_dir={self.options.output_dir!r} would replace model={self.options.model!r}")
        if holds_run(arguments.output_dir) and not arguments.run.overwrite_output_dir:
            raise UserError(
                f"output_dir={self.options.output_dir!r} holds the fine-tune {name!r}, and rows are made from the "
                "beginning: pass --overwrite_output_dir true to delete it, or another --output_dir"
            )
        with ExitStack() as held:
            open_folder(arguments, held)


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ("recurrent matrix", "fewer", "recurrent", "parameters", "relative error", "BPC before", "BPC after")
    lines = []
    for row in rows:
        shapes = factors(row["factor_shapes"]) if row["factor_shapes"] else "dense"
        after = f"{row['test_bpc_after']:.3f}" if "test_bpc_after" in row else ""
        counts = [f"{row['num_recurrent_parameters']:,}", f"{row['num_parameters']:,}"]
        error = f"{row['mean_relative_error']:.2f}" if row["factor_shapes"] else ""
        lines.append([shapes, f"{row['compression']:.1f}x", *counts, error, f"{row['test_bpc_before']:.3f}", after])
    return table(head, lines)


def run(argv: list[str]) -> list[dict[str, Any]]:
    """All rows; the table is written after each, so that an interrupted one is not lost."""
    options, data = parse_words([KroneckerizeOptions, DataOptions], argv, "training.kroneckerize_lm")
    folder = Path(options.output_dir)
    rows: list[dict[str, Any]] = []
    check_place(folder)
    with StopRequest() as stop, locked(folder):
        command = shown_command(argv, "training.kroneckerize_lm")
        shrinker = Shrinker(options, data, command, stop)
        plan = shrinker.plan()
        for name in plan if options.max_steps else ():
            shrinker.check_folder(name)
        for name, shapes in plan.items():
            rows.append(shrinker.row(name, shapes))
            record = {"model": Path(options.model).name, "dataset": shrinker.task.dataset_record(), "rows": rows}
            write_json(folder / RESULT, {**record, "command": command})
    print(f"test BPC before and after {options.max_steps} steps:\n{render(rows)}")
    print(f"folder: {folder}")
    print(json.dumps(rows))
    return rows


def run_or_stop(argv: list[str]) -> None:
    """`run`, or in a word what a signal leaves of it."""
    try:
        run(argv)
    except (Interrupted, KeyboardInterrupt) as stopped:
        number = stopped.exit_code - 128 if isinstance(stopped, Interrupted) else (*stopped.args, signal.SIGINT)[0]
        raise Interrupted("stopped; the rows so far are saved", number) from stopped


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return processes.run_command(run_or_stop, argv)


if __name__ == "__main__":
    sys.exit(main())
