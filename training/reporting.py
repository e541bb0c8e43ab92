"""What a run tells: progress bar, trackers, history, learning curve and results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from . import checkpoint as ckpt
from .cards import render_card
from .tasks import Task


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
        )
        self.shown: dict[str, str] = {}
        self.validation = ""

    def update(self, state: ckpt.TrainerState) -> None:
        """Move the bar to `state.step`."""
        nats, targets = state.window
        speed = state.train_elements / max(state.train_seconds, 1e-9)
        shown = self.shown  # the training figures of the last step that had any: logging has begun a new window
        shown |= self.task.progress(nats / targets) if targets else {}
        shown[f"{self.task.unit}/s"] = f"{speed:,.0f}"
        if self.validation:
            shown["validation"] = self.validation
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(state.step - self.bar.n)

    def log(self, state: ckpt.TrainerState, figures: dict[str, float]) -> None:
        """Add figures to the history and send them to the trackers."""
        if state.history and state.history[-1]["step"] == state.step:
            state.history[-1].update(figures)
        else:
            state.history.append({"step": state.step, **figures})
        self.accelerator.log(figures, step=state.step)
        name = f"validation_{self.task.metric}"
        if name in figures:
            self.validation = f"{figures[name]:.3f}"

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def learning_curve(history: list[dict[str, Any]], metric: str, path: Path) -> None:
    """A picture of training loss and validation figure over the steps."""
    from matplotlib.figure import Figure  # takes half a second, and only rank 0 draws

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    series = (("train_loss", left, "tab:blue"), (f"validation_{metric}", right, "tab:orange"))
    for name, axes, color in series:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=color, marker=".", markersize=3)
        axes.set_ylabel(name, color=color)
    left.set_xlabel("step")
    left.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def results(task: Task, model: Any, state: ckpt.TrainerState, metrics: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The flat figures of `all_results.json`."""
    figures = {f"{split}_{name}": value for split, values in metrics.items() for name, value in values.items()}
    return {
        **figures,
        "num_parameters": model.num_parameters(),
        "num_recurrent_parameters": model.num_recurrent_parameters(),
        "train_tokens_per_second": round(state.train_elements / max(state.train_seconds, 1e-9), 1),
        "train_runtime": round(state.train_seconds, 2),
        "steps": state.step,
        "best_step": state.best_step,
    }


def write_results(folder: Path, task: Task, model: Any, state: ckpt.TrainerState, figures: dict[str, Any]) -> None:
    """`all_results.json`, `log_history.json`, `learning_curve.png` and the card, each complete or absent."""
    ckpt.write_json(folder / "log_history.json", state.history)
    ckpt.write_files(folder, lambda t: learning_curve(state.history, task.metric, t / "learning_curve.png"))
    ckpt.write_json(folder / "all_results.json", figures)
    card = render_card(folder)
    ckpt.write_files(folder, lambda t: (t / "README.md").write_text(card, encoding="utf-8"))
