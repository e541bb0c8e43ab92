"""Pictures of figures over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def learning_curve(history: list[dict[str, Any]], metric: str, path: Path) -> None:
    """A picture of a run's training loss and validation figure."""
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


def validation_curves(
    title: str, metric: str, rows: Sequence[tuple[str, list[list[list[float]]]]], path: Path, over: str = "step"
) -> None:
    """Validation figures of several models: a colour a model, a line a run.

    Args:
        rows: name of a model, and of each of its runs the pairs of step, or whatever it is drawn over, and figure.
    """
    from matplotlib.figure import Figure

    height = 0.22 * len(rows)  # the legend, below the axes
    figure = Figure(figsize=(8, 4.2 + height), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, curves) in enumerate(rows):
        for number, points in enumerate(curves):
            style = "-" if index < 10 else "--"
            (line,) = axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", linewidth=1.2)
            line.set_label("_again" if number else name.replace("$", r"\$"))
    if metric in ("loss", "mse") and min(value for _, curves in rows for points in curves for _, value in points) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(over)
    axes.set_ylabel(f"validation {metric}")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def accuracy_by_length(title: str, rows: Sequence[tuple[str, dict[int, float]]], path: Path) -> None:
    """Test accuracy of several models against the length of the sequences.

    Args:
        rows: name of a model, and its accuracy at each length.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, found) in enumerate(rows):
        (line,) = axes.plot(list(found), list(found.values()), "-" if index < 10 else "--", color=f"C{index % 10}")
        line.set(label=name.replace("$", r"\$"), marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set(xlabel="length", ylabel="test accuracy", ylim=(-0.02, 1.02))
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
