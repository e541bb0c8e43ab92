"""What a run tells: progress bar, trackers, history and results."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..common import processes
from ..common.errors import UserError
from ..common.files import one_line
from ..common.saving import write_files, write_json, write_text
from ..models.costs import int8_bytes, multiply_adds
from ..records.cards import render_card
from ..records.plots import learning_curve
from ..records.run_record import HISTORY, RESULTS, RUN, history_text, read_fields
from ..tasks import Task
from .checkpoint import TrainerState


@contextmanager
def trackers(accelerator: Accelerator, name: str, config: dict[str, Any]) -> Iterator[None]:
    """The trackers of `--report_to` while a run trains; one that fails later gets no more figures, which ends no run.

    Raises:
        UserError: the tracker cannot be started.
    """

    def start() -> None:
        try:
            accelerator.init_trackers("kru", config=config)
        except Exception as error:  # each tracker has its own kinds
            accelerator.trackers = []
            raise UserError(
                f"report_to={name!r} cannot be started: {one_line(error)}; if the disk is full make room, or pass "
                "--report_to none; resume with --resume_from_checkpoint last"
            ) from error

    def hook(args: Any) -> None:
        if getattr(args.thread, "exception", None) is not args.exc_value:  # TensorBoard's keeps it, to raise it again
            former(args)

    former, threading.excepthook = threading.excepthook, hook
    try:
        if name != "none":
            processes.together(accelerator, lambda: start() if accelerator.is_main_process else None)
        yield
    finally:
        threading.excepthook = former


class Progress:
    """Progress bar with loss, speed and time left; history and trackers."""

    def __init__(self, task: Task, accelerator: Accelerator, total_steps: int, initial: int) -> None:
        self.task, self.accelerator = task, accelerator
        self.bar = tqdm(
            total=total_steps,
            initial=initial,
            disable=not accelerator.is_local_main_process,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
            unit="step",
            delay=1e-9,  # it would be shown while it is built, and that fails once the terminal is gone
        )
        with processes.unheard():
            self.bar.refresh()
        self.shown: dict[str, str] = {}
        self.validation = ""

    def update(self, state: TrainerState) -> None:
        """Move the bar to `state.step`."""
        nats, targets = state.window
        speed = state.train_elements / max(state.train_seconds, 1e-9)
        shown = self.shown  # the training figures of the last step that had any: logging has begun a new window
        shown |= self.task.progress(nats / targets) if targets else {}
        shown[f"{self.task.unit}/s"] = f"{speed:,.0f}"
        if self.validation:
            shown["validation"] = self.validation
        with processes.unheard():
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(state.step - self.bar.n)

    def log(self, state: TrainerState, figures: dict[str, float]) -> None:
        """Add figures to the history and send them to the trackers."""
        if state.history and state.history[-1]["step"] == state.step:
            state.history[-1].update(figures)
        else:
            state.history.append({"step": state.step, "seconds": round(state.train_seconds, 2), **figures})
        with self.tracking():
            self.accelerator.log(figures, step=state.step)
        name = f"validation_{self.task.metric}"
        if name in figures:
            self.validation = f"{figures[name]:.3f}"

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """If a tracker fails, say so and continue without trackers."""
        try:
            yield
        except Exception as error:
            self.accelerator.trackers = []
            told = f"the tracker has failed and gets no more figures ({one_line(error)}); history.csv will hold them"
            with processes.unheard():
                self.bar.write(f"note: {told}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is, and have the trackers write what they still hold."""
        with processes.unheard():
            self.bar.close()
        with self.tracking():
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers = []


def results(task: Task, model: Any, state: TrainerState, metrics: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The flat figures of `all_results.json`."""
    figures = {f"{split}_{name}": value for split, values in metrics.items() for name, value in values.items()}
    return {
        **figures,
        "num_parameters": model.num_parameters(),
        "num_recurrent_parameters": model.num_recurrent_parameters(),
        "int8_bytes": int8_bytes(model),
        **({} if multiply_adds(model) is None else {"multiply_adds": multiply_adds(model)}),
        "train_tokens_per_second": round(state.train_elements / max(state.train_seconds, 1e-9), 1),
        "train_runtime": round(state.train_seconds, 2),
        "processor_seconds": round(state.processor_seconds, 2),
        "steps": state.step,
        "best_step": state.best_step,
    }


def write_results(folder: Path, task: Task, state: TrainerState, figures: dict[str, Any]) -> None:
    """The end of a run's record, `learning_curve.png` and the card, each complete or absent."""
    write_text(folder / HISTORY, history_text(state.history))
    write_files(folder, lambda t: learning_curve(state.history, task.metric, t / "learning_curve.png"))
    times = {"wall_seconds": figures["train_runtime"], "processor_seconds": figures["processor_seconds"]}
    write_json(folder / RUN, {**read_fields(folder / RUN), **times})
    write_json(folder / RESULTS, figures)
    write_text(folder / "README.md", render_card(folder))
