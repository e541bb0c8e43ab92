"""The results table and learning curves of runs: `python -m training.report RUNS… --output model_cards/RESULTS.md`.

RUNS are folders of `training.train`, of released models, or folders that hold such; their weights are not needed. All
figures come from the runs' own records. What was not run stays blank. RUNS may also be reports that this command wrote
earlier (`.md`): of runs whose folders are gone, their rows and commands are taken over as they stand there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cards import METRICS as METRIC_NAMES
from .cards import shown
from .checkpoint import write_files
from .earlier_report import HEAD, TITLE, Line, Section, is_report, output_dir, read_reports
from .errors import UserError
from .paper_figures import FIGURES, PaperFigure
from .paper_figures import METRICS as PAPER_METRICS
from .results import Row, Run, find_runs, mean_and_spread, settings

BEGIN, END = "<!-- results -->", "<!-- /results -->"
FOOT = (
    "± is the standard deviation over seeds (n − 1). Rows are ordered by the validation figure, which also chose the "
    "weights of each run. time: mean wall time of training, evaluations excluded. Blank: not run, or not recorded."
)


@dataclass(frozen=True)
class Table:
    """What the report shows of a setting."""

    metric: tuple[str, bool]  # and whether more is better
    lines: list[Line]
    commands: list[str]
    rows: list[Row]  # the given runs whose learning curves are drawn
    picture: str = ""  # of an earlier report, for where there are no curves


def table(head: Iterable[str], lines: list[list[str]]) -> str:
    """A Markdown table; numbers are aligned to the right by the renderer's own defaults."""
    names = list(head)
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def digits(values: list[float], metric: str) -> str:
    """Mean ± spread with as many decimals as mean anything, of an accuracy four: 97.97 %; blank without values."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    decimals = 4 if metric == "accuracy" else 3 if abs(mean) >= 0.1 else 5 if abs(mean) >= 1e-3 else None
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


def own_line(row: Row, output: Path | None) -> Line:
    """The table line of a row of runs."""
    finished, metric = row.finished, row.runs[0].metric[0]
    seconds = [run.results["train_runtime"] for run in finished if run.results.get("train_runtime") is not None]
    missing = len(row.runs) - len(finished)
    steps = joined(row.common("steps"))
    if missing:
        last = max((run.stopped_at or 0 for run in row.runs if not run.results), default=0)
        note = f"{missing} not finished" + (f" (last checkpoint at {last:,})" if last else "")
        steps = f"{steps}; {note}" if steps else note
    seeds = [str(run.seed) for run in finished if run.seed is not None]
    return Line(
        shown(row.label),
        joined(row.common("num_parameters")),
        joined(row.common("num_recurrent_parameters")),
        digits(row.figures("validation"), metric),
        digits(row.figures("test"), metric),
        f"{len(seeds)} ({', '.join(seeds)})" if seeds else "",
        steps,
        duration(sum(seconds) / len(seconds)) if seconds else "",
        shown(", ".join(dict.fromkeys(run.machine for run in finished if run.machine))),
        is_kru=row.runs[0].is_kru,
        commands=tuple(run.command for run in row.runs if run.command),
        link=link(row, output),
    )


def link(row: Row, output: Path | None) -> str:
    """The folder of the row's one run that lies beside the report, as released models do; blank for none or several."""
    if output is None:
        return ""
    root = output.resolve().parent
    folders = [run.folder.resolve() for run in row.runs]
    beside = [folder for folder in folders if folder.is_relative_to(root)]
    return str(beside[0].relative_to(root)) if len(beside) == 1 else ""


def paper_line(figure: PaperFigure) -> list[str]:
    """The table line of a published figure."""
    value = published(figure.value)
    counts = [shown(figure.num_parameters), shown(figure.num_recurrent_parameters)]
    return [f"*{figure.name}* ({figure.source})", *(f"≈{c}" if c else "" for c in counts), "", value, "", "", "", ""]


def gives_way(old: Line, given: list[Line]) -> bool:
    """Whether the given rows have all runs of an earlier one: runs are told by their folders, rows else by figures."""
    if not old.folders:
        return any(line.cells[1:] == old.cells[1:] for line in given)
    return old.folders <= {folder for line in given if line.finished or not old.finished for folder in line.folders}


def table_of(rows: list[Row], earlier: Section, output: Path | None) -> Table:
    """The rows of given runs, and those of earlier reports that they do not replace."""
    given = [own_line(row, output) for row in rows]
    kept = {place: old for place, old in enumerate(earlier.lines) if not gives_way(old, given)}
    taken = {line.link for line in given}  # an earlier row's folder may hold the model of another run by now
    lines = [
        (place, replace(old, link="" if old.link in taken else alive(old.link, output))) for place, old in kept.items()
    ]
    known = True
    for line in given:
        if line.folders and any(line.folders < old.folders for old in kept.values()):
            continue  # a single run of an earlier row of several seeds, as a released model is
        known = known and any((line.plain, line.cells[1:]) == (old.plain, old.cells[1:]) for old in earlier.lines)
        places = [place for place, old in enumerate(earlier.lines) if old.folders & line.folders and place not in kept]
        names = [earlier.lines[place].model for place in places]
        # With what sets it apart from siblings that are not given.
        name = next((name for name in names if name.startswith(f"{line.model}, ")), line.model)
        lines.append((min(places, default=len(earlier.lines)), replace(line, model=name)))
    metric = rows[0].runs[0].metric if rows else earlier.metric
    # The figures of earlier rows are rounded: where they are alike, the rows stay in the order that they had.
    ordered = [line for _, line in sorted(lines, key=lambda item: (item[1].order(metric[1]), item[0]))]
    folders = frozenset[str]().union(*(line.folders for line in given))
    others = [command for command in earlier.others if output_dir(command) not in folders]
    commands = dict.fromkeys([*(command for line in ordered for command in line.commands), *others])
    picture = next((name for name in earlier.pictures if output and (output.parent / name).is_file()), "")
    # The earlier picture has the curves of all its rows: it stays as long as no row is new.
    return Table(metric, ordered, list(commands), [] if picture and known else rows, picture)


def alive(link: str, output: Path | None) -> str:
    """An earlier row's link if it still leads somewhere, else blank."""
    return link if output and link and (output.parent / link).is_dir() else ""


def section(setting: str, content: Table, picture: str) -> str:
    """A setting: table, learning curves, commands."""
    metric, greater = content.metric
    others = [paper_line(figure) for figure in FIGURES if figure.setting == setting]
    name = METRIC_NAMES.get(metric, metric)
    parts = [f"## {setting}", f"{name}, {'higher' if greater else 'lower'} is better."]
    parts.append(table(HEAD, [*(line.cells for line in content.lines), *others]))
    if picture:
        parts.append(f"![learning curves: {setting}]({picture})")
    if content.commands:
        parts.append("```bash\n" + "\n".join(content.commands) + "\n```")
    return "\n\n".join(parts)


def tables(runs: list[Run], earlier: dict[str, Section], output: Path | None, only_runs: bool) -> dict[str, Table]:
    """Settings of the paper in its order, with no rows where nothing was run, then all others."""
    groups = settings(runs)
    names = dict.fromkeys(figure.setting for figure in FIGURES)
    found = {}
    for name in [*names, *sorted({*groups, *earlier} - set(names))]:
        if name in groups or name in earlier or not only_runs:
            blank = Section(PAPER_METRICS.get(name, ("", False)), ())
            found[name] = table_of(groups.get(name, []), earlier.get(name, blank), output)
    return found


def overview(found: dict[str, Table]) -> str:
    """One line a setting: the best KRU by validation and the best baseline, beside the paper's."""
    lines = []
    for setting, content in found.items():
        finished = [line for line in content.lines if line.validation or line.test]
        ours = next((line for line in finished if line.is_kru), None)
        baseline = next((line for line in finished if not line.is_kru), None)
        known = [figure for figure in FIGURES if figure.setting == setting]
        kru = next((figure for figure in known if figure.ours), None)
        lstm = next((figure for figure in known if figure.name.split()[0] == "LSTM"), None)
        metric, greater = content.metric
        name = f"{METRIC_NAMES.get(metric, metric)} {'↑' if greater else '↓'}"
        cells = [brief(line) for line in (ours, baseline)] + [brief_paper(figure) for figure in (kru, lstm)]
        lines.append([setting, name, *cells])
    return table(("task", "metric", "KRU, here", "best baseline, here", "KRU, paper", "LSTM, paper"), lines)


def brief(line: Line | None) -> str:
    """`1.653 (KRU 1100 (10·10·11), 113,022)`: the test figure, or the validation one where that is not scored yet."""
    if line is None:
        return ""
    return f"{line.test or f'{line.validation} validation'} ({line.plain}; {line.parameters} parameters)"


def brief_paper(figure: PaperFigure | None) -> str:
    """The same for a published figure."""
    if figure is None:
        return ""
    value = published(figure.value)
    return f"{value} (≈{figure.num_parameters:,} parameters)" if figure.num_parameters else value


def draw(setting: str, rows: list[Row], metric: str, path: Path) -> None:
    """Validation figure over the steps: a colour a row, a line a seed."""
    from matplotlib.figure import Figure

    height = 0.22 * sum(any(curve(run) for run in row.runs) for row in rows)  # the legend, below the axes
    figure = Figure(figsize=(8, 4.2 + height), layout="constrained")
    axes = figure.add_subplot()
    lowest, named = 1.0, set()
    for index, row in enumerate(rows):
        for run in row.runs:
            points = curve(run)
            if points:
                lowest = min(lowest, *(value for _, value in points))
                style = "-" if index < 10 else "--"
                (line,) = axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", linewidth=1.2)
                line.set_label(row.label.replace("$", r"\$") if row.label not in named else "_again")
                named.add(row.label)
    if metric in ("loss", "mse") and lowest > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {metric}")
    axes.set_title(setting, parse_math=False)
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


def write_report(found: dict[str, Table], output: Path) -> None:
    """Write the report, and its pictures beside it as `<report>-<setting>.png`."""
    drawn = {name for name, content in found.items() if any(curve(run) for row in content.rows for run in row.runs)}
    pictures = {
        name: f"{output.stem.lower()}-{slug(name)}.png" if name in drawn else content.picture
        for name, content in found.items()
    }
    sections = [section(name, content, pictures[name]) for name, content in found.items()]
    text = "\n\n".join([TITLE, overview(found), FOOT, *sections]) + "\n"

    def fill(folder: Path) -> None:
        for name in drawn:
            draw(name, found[name].rows, found[name].metric[0], folder / pictures[name])
        (folder / output.name).write_text(text, encoding="utf-8")

    write_files(output.parent, fill)


def update_readme(readme: Path, text: str) -> None:
    """Put `text` between the two markers of a README.

    Raises:
        UserError: the file or one of the markers is missing.
    """
    if not readme.is_file():
        raise UserError(f"readme={str(readme)!r} does not exist")
    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"readme={str(readme)!r} cannot be read: {error}") from error
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
    kinds = (
        "Folder of a run, folder that holds runs, or earlier report (.md), whose rows stay unless a run replaces them."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=kinds)
    parser.add_argument("--output", type=Path, help="Report to write, with its pictures beside it.")
    parser.add_argument("--readme", type=Path, help=f"File whose table between {BEGIN} and {END} is replaced.")
    parser.add_argument("--markdown", action="store_true", help="Print the table of one line a task, nothing else.")
    parser.add_argument(
        "--only_runs",
        action="store_true",
        help="Leave out the paper's tasks of which no run or row is given.",
    )
    options = parser.parse_args(argv)
    try:
        if options.output is not None and options.output.is_dir():
            raise UserError(f"output={str(options.output)!r} is a folder: pass a file in it")
        reports = [path for path in options.runs if is_report(path)]
        runs = find_runs(path for path in options.runs if path not in reports)
        found = tables(runs, read_reports(reports), options.output, options.only_runs)
        if options.output:
            write_report(found, options.output)
            print(f"report: {options.output}")
        if options.readme:
            update_readme(options.readme, overview(found))
            print(f"table: {options.readme}")
        if options.markdown:
            print(overview(found))
        elif not options.output and not options.readme:
            print("\n\n".join(section(name, content, "") for name, content in found.items()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
