"""Put other results beside a run's own: `python -m training.compare --model FOLDER --beside FOLDER … [--no_paper]`.

Writes `comparison.json` into the folder, with the test figures of the other runs (baselines in the same loop) and the
published ones for the same task and data, and renders the folder's card again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .cards import render_card
from .checkpoint import write_files, write_json
from .errors import UserError
from .lock import locked
from .paper_figures import FIGURES
from .results import Run, find_runs, is_run


def run_row(run: Run, metric: str) -> dict[str, Any]:
    """A row of comparison.json from a finished run."""
    value = run.results.get(f"test_{metric}")
    if value is None:
        raise UserError(f"beside={str(run.folder)!r} has no test_{metric} in all_results.json: it cannot be compared")
    names = ("num_parameters", "num_recurrent_parameters")
    sizes = {name: run.results[name] for name in names if run.results.get(name) is not None}
    return {"name": run.label, "value": value, **sizes, "source": run.command or "all_results.json, test"}


def paper_rows(setting: str) -> list[dict[str, Any]]:
    """Rows of what was published for a task and its data."""
    return [
        {
            "name": figure.name,
            "value": figure.value,
            "num_parameters": figure.num_parameters,
            "num_recurrent_parameters": figure.num_recurrent_parameters,
            "source": figure.source,
        }
        for figure in FIGURES
        if figure.setting == setting
    ]


def what_it_is(run: Run) -> tuple[str | None, str | None]:
    """Task and SHA-256 of the data: runs that share both can be compared."""
    return run.record.options.get("task"), run.record.data.get("sha256")


def comparison(model: Path, beside: list[Path], paper: bool = True) -> dict[str, Any]:
    """The content of comparison.json.

    Raises:
        UserError: a folder that is no finished run, or one of another task or other data.
    """
    if not is_run(model):
        raise UserError(f"model={str(model)!r} is not the folder of a run: it has no training.json")
    (own,) = find_runs([model])
    metric = own.metric[0]
    if own.results.get(f"test_{metric}") is None:
        raise UserError(f"model={str(model)!r} has no test_{metric} in all_results.json: it is not a finished run")
    others = find_runs(beside) if beside else []
    for other in others:
        (task, data), (their_task, theirs) = what_it_is(own), what_it_is(other)
        if (task, data) != (their_task, theirs):
            raise UserError(
                f"beside={str(other.folder)!r} is of the task {their_task!r} on data with SHA-256 {theirs}, and "
                f"{str(model)!r} of {task!r} on {data}: not comparable"
            )
    rows = [run_row(run, metric) for run in others if run.folder.resolve() != model.resolve()]
    return {"metric": metric, "rows": [*rows, *(paper_rows(own.setting) if paper else [])]}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser("training.compare", description="Put other results beside a run's own.")
    parser.add_argument("--model", type=Path, required=True, help="Folder of a finished run.")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="Folders of other runs on the same data.")
    parser.add_argument("--no_paper", action="store_true", help="Leave out what was published.")
    options = parser.parse_args(argv)
    try:
        found = comparison(options.model, options.beside, not options.no_paper)
        with locked(options.model, "model"):
            write_json(options.model / "comparison.json", found)
            card = render_card(options.model)
            write_files(options.model, lambda folder: (folder / "README.md").write_text(card, encoding="utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written: {options.model / 'comparison.json'}, {options.model / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
