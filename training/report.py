"""The results table and learning curves of runs: `python -m training.report RUNS… --output model_cards/RESULTS.md`.

RUNS are folders of `training.train`, of released models, or folders that hold such; their weights are not needed. All
figures come from the runs' own records. What was not run stays blank.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from .cards import METRICS as METRIC_NAMES
from .cards import shown
from .checkpoint import write_files
from .errors import UserError
from .paper_figures import FIGURES, PaperFigure
from .paper_figures import METRICS as PAPER_METRICS
from .results import Row, Run, find_runs, mean_and_spread, settings

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = ("model", "parameters", "recurrent", "validation", "test", "seeds", "steps", "time", "machine")
FOOT = (
    "± is the standard deviation over seeds (n − 1). Rows are ordered by the validation figure, which also chose the "
    "weights of each run. time: mean wall time of training, evaluations excluded. Blank: not run, or not recorded."
)


def table(head: tuple[str, ...], lines: list[list[str]]) -> str:
    """A Markdown table; numbers are aligned to the right by the renderer's own defaults."""
    rows = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def digits(values: list[float]) -> str:
    """Mean ± spread with as many decimals as mean anything; blank without values."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    decimals = 3 if abs(mean) >= 0.1 else 5 if abs(mean) >= 1e-3 else None
    if decimals is None:
        return f"{mean:.2g}" if spread is None else f"{mean:.2g} ± {spread:.1g}"
    return f"{mean:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def published(value: float | str) -> str:
    """A published figure, with the digits that it was published with."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as `50 s`, `12 min` or `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def joined(value: Any) -> str:
    """A common result, or the range of differing ones."""
    if isinstance(value, list):
        return f"{shown(value[0])} – {shown(value[-1])}"
    return shown(value)


def own_line(row: Row, output: Path | None) -> list[str]:
    """The table line of a row of runs."""
    finished = row.finished
    seconds = [run.results["train_runtime"] for run in finished if run.results.get("train_runtime") is not None]
    missing = len(row.runs) - len(finished)
    steps = joined(row.common("steps"))
    if missing:
        last = max((run.stopped_at or 0 for run in row.runs if not run.results), default=0)
        note = f"{missing} not finished" + (f" (last checkpoint at {last:,})" if last else "")
        steps = f"{steps}; {note}" if steps else note
    seeds = [str(run.seed) for run in finished if run.seed is not None]
    return [
        link(row, output),
        joined(row.common("num_parameters")),
        joined(row.common("num_recurrent_parameters")),
        digits(row.figures("validation")),
        digits(row.figures("test")),
        f"{len(seeds)} ({', '.join(seeds)})" if seeds else "",
        steps,
        duration(sum(seconds) / len(seconds)) if seconds else "",
        shown(", ".join(dict.fromkeys(run.machine for run in finished if run.machine))),
    ]


def link(row: Row, output: Path | None) -> str:
    """The row's name; with a link where its only run lies beside the report, as released models do."""
    name = shown(row.label)
    if output is None or len(row.runs) > 1:
        return name
    folder, root = row.runs[0].folder.resolve(), output.resolve().parent
    return f"[{name}]({folder.relative_to(root)}/)" if folder.is_relative_to(root) else name


def paper_line(figure: PaperFigure) -> list[str]:
    """The table line of a published figure."""
    value = published(figure.value)
    counts = [shown(figure.num_parameters), shown(figure.num_recurrent_parameters)]
    return [f"*{figure.name}* ({figure.source})", *(f"≈{c}" if c else "" for c in counts), "", value, "", "", "", ""]


def metric_of(setting: str, rows: list[Row]) -> tuple[str, bool]:
    """Metric of a setting, and whether more is better."""
    return rows[0].runs[0].metric if rows else PAPER_METRICS[setting]


def section(setting: str, rows: list[Row], output: Path | None, pictures: dict[str, str]) -> str:
    """A setting: table, learning curves, commands."""
    metric, greater = metric_of(setting, rows)
    others = [paper_line(figure) for figure in FIGURES if figure.setting == setting]
    name = METRIC_NAMES.get(metric, metric)
    parts = [f"## {setting}", f"{name}, {'higher' if greater else 'lower'} is better."]
    parts.append(table(HEAD, [*(own_line(row, output) for row in rows), *others]))
    if setting in pictures:
        parts.append(f"![learning curves: {setting}]({pictures[setting]})")
    commands = dict.fromkeys(run.command for row in rows for run in row.runs if run.command)
    if commands:
        parts.append("```bash\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts)


def ordered(groups: dict[str, list[Row]], only_runs: bool) -> dict[str, list[Row]]:
    """Settings of the paper in its order, with no rows where nothing was run, then all others."""
    names = dict.fromkeys(figure.setting for figure in FIGURES)
    return {
        name: groups.get(name, [])
        for name in [*names, *sorted(set(groups) - set(names))]
        if name in groups or not only_runs
    }


def overview(groups: dict[str, list[Row]]) -> str:
    """One line a setting: the best KRU by validation and the best baseline, beside the paper's."""
    lines = []
    for setting, rows in groups.items():
        finished = [row for row in rows if row.figures("validation") or row.figures("test")]
        ours = next((row for row in finished if row.runs[0].is_kru), None)
        baseline = next((row for row in finished if not row.runs[0].is_kru), None)
        known = [figure for figure in FIGURES if figure.setting == setting]
        kru = next((figure for figure in known if figure.ours), None)
        lstm = next((figure for figure in known if figure.name.split()[0] == "LSTM"), None)
        metric, greater = metric_of(setting, rows)
        name = f"{METRIC_NAMES.get(metric, metric)} {'↑' if greater else '↓'}"
        cells = [brief(row) for row in (ours, baseline)] + [brief_paper(figure) for figure in (kru, lstm)]
        lines.append([setting, name, *cells])
    return table(("task", "metric", "KRU, here", "best baseline, here", "KRU, paper", "LSTM, paper"), lines)


def brief(row: Row | None) -> str:
    """`1.653 (KRU 1100 (10·10·11), 113,022)`: the test figure, or the validation one where that is not scored yet."""
    if row is None:
        return ""
    size = joined(row.common("num_parameters"))
    split = "test" if row.figures("test") else "validation"
    note = "" if split == "test" else " validation"
    return f"{digits(row.figures(split))}{note} ({shown(row.runs[0].label)}; {size} parameters)"


def brief_paper(figure: PaperFigure | None) -> str:
    """The same for a published figure."""
    if figure is None:
        return ""
    value = published(figure.value)
    return f"{value} (≈{figure.num_parameters:,} parameters)" if figure.num_parameters else value


def draw(setting: str, rows: list[Row], path: Path) -> None:
    """Validation figure over the steps: a colour a row, a line a seed."""
    from matplotlib.figure import Figure

    height = 0.22 * sum(any(curve(run) for run in row.runs) for row in rows)  # the legend, below the axes
    figure = Figure(figsize=(8, 4.2 + height), layout="constrained")
    axes = figure.add_subplot()
    metric, _ = metric_of(setting, rows)
    lowest, named = 1.0, set()
    for index, row in enumerate(rows):
        for run in row.runs:
            points = curve(run)
            if points:
                lowest = min(lowest, *(value for _, value in points))
                style = "-" if index < 10 else "--"
                (line,) = axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", linewidth=1.2)
                line.set_label(row.label if row.label not in named else "_again")
                named.add(row.label)
    if metric in ("loss", "mse") and lowest > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {metric}")
    axes.set_title(setting)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curve(run: Run) -> list[tuple[int, float]]:
    """Steps and validation figures of a run's history."""
    name = f"validation_{run.metric[0]}"
    return [(entry["step"], entry[name]) for entry in run.history if name in entry]


def slug(text: str) -> str:
    """A setting as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_report(runs: list[Run], output: Path, only_runs: bool = False) -> None:
    """Write the report, and its pictures beside it as `<report>-<setting>.png`."""
    groups = ordered(settings(runs), only_runs)
    drawn = {name: rows for name, rows in groups.items() if any(curve(run) for row in rows for run in row.runs)}
    pictures = {name: f"{output.stem.lower()}-{slug(name)}.png" for name in drawn}
    title = "# Results\n\nMade by `python -m training.report` from the records of the runs; do not edit."
    sections = [section(name, rows, output, pictures) for name, rows in groups.items()]
    text = "\n\n".join([title, overview(groups), FOOT, *sections]) + "\n"

    def fill(folder: Path) -> None:
        for name, rows in drawn.items():
            draw(name, rows, folder / pictures[name])
        (folder / output.name).write_text(text, encoding="utf-8")

    write_files(output.parent, fill)


def update_readme(readme: Path, text: str) -> None:
    """Put `text` between the two markers of a README.

    Raises:
        UserError: the file or one of the markers is missing.
    """
    if not readme.is_file():
        raise UserError(f"readme={str(readme)!r} does not exist")
    before = readme.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise UserError(f"readme={str(readme)!r} must hold {BEGIN} and, after it, {END}, each once")
    start, rest = before.split(BEGIN)
    after = rest.split(END)[1]
    write_files(
        readme.parent,
        lambda folder: (folder / readme.name).write_text(f"{start}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8"),
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="training.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or a folder that holds runs.")
    parser.add_argument("--output", type=Path, help="Report to write, with its pictures beside it.")
    parser.add_argument("--readme", type=Path, help=f"File whose table between {BEGIN} and {END} is replaced.")
    parser.add_argument("--markdown", action="store_true", help="Print the table of one line a task, nothing else.")
    parser.add_argument(
        "--only_runs", action="store_true", help="Leave out the paper's tasks of which no run is given."
    )
    options = parser.parse_args(argv)
    try:
        runs = find_runs(options.runs)
        groups = ordered(settings(runs), options.only_runs)
        if options.output:
            write_report(runs, options.output, options.only_runs)
            print(f"report: {options.output}")
        if options.readme:
            update_readme(options.readme, overview(groups))
            print(f"table: {options.readme}")
        if options.markdown:
            print(overview(groups))
        elif not options.output and not options.readme:
            print("\n\n".join(section(name, rows, None, {}) for name, rows in groups.items()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
