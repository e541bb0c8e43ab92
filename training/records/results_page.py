"""RESULTS.md, the table of README.md and the rows beside a model in its card, all from runs.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from ..common import checkpoint as ckpt
from ..common.errors import UserError
from ..common.files import read
from .card_text import METRICS, shown
from .paper_figures import FIGURES, PaperFigure
from .paper_figures import METRICS as PAPER_METRICS
from .plots import validation_curves
from .runs import Entry, Row, read_runs, settings

PAGE, TEMPLATE = "RESULTS.md", Path(__file__).parent / "results.md.jinja"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = ("model", "parameters", "recurrent", "validation", "test", "seeds", "steps", "time", "machine")


def table(head: Iterable[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *lines])


def digits(found: tuple[float, float | None] | None, metric: str, known: int | None = None) -> str:
    """Mean ± spread with as many decimals as mean anything, of an accuracy four (97.97 %), or are known."""
    if found is None:
        return ""
    mean, spread = found
    decimals = 4 if metric == "accuracy" else 3 if abs(mean) >= 0.1 else 5 if abs(mean) >= 1e-3 else None
    if decimals is not None and known is not None:
        decimals = min(decimals, known)
    if decimals is None:
        return f"{mean:.2g}" if spread is None else f"{mean:.2g} ± {spread:.1g}"
    return f"{mean:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def duration(seconds: float) -> str:
    """Seconds as `50 s`, `12 min` or `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def span(values: list[float]) -> str:
    """A common result, or the range of differing ones."""
    ends = sorted({min(values), max(values)}) if values else []
    return " – ".join(shown(int(value)) for value in ends)


def own_line(row: Row) -> list[str]:
    """The table line of a row of runs."""
    times = row.values("train_runtime")
    missing = [entry for entry in row.entries if not entry.results]
    steps = [span(row.values("steps"))]
    if missing:
        last = max(entry.stopped_at or 0 for entry in missing)
        number = sum(max(len(entry.seeds), 1) for entry in missing)
        steps.append(f"{number} not finished" + (f" (last checkpoint at {last:,})" if last else ""))
    released = [entry.released for entry in row.entries if entry.released]
    return [
        f"[{shown(row.label)}]({released[0]}/)" if len(released) == 1 else shown(row.label),
        span(row.values("num_parameters")),
        span(row.values("num_recurrent_parameters")),
        digits(row.figure("validation"), row.first.metric, row.first.decimals),
        digits(row.figure("test"), row.first.metric, row.first.decimals),
        f"{len(row.seeds)} ({', '.join(map(str, row.seeds))})" if row.seeds else "",
        "; ".join(part for part in steps if part),
        duration(sum(times) / len(times)) if times else "",
        shown(", ".join(dict.fromkeys(entry.machine for entry in row.finished if entry.machine))),
    ]


def published(value: float | str) -> str:
    """A published figure, with the digits that it was published with."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.3g}"


def paper_line(figure: PaperFigure) -> list[str]:
    """The table line of a published figure."""
    counts = [shown(figure.num_parameters), shown(figure.num_recurrent_parameters)]
    counts = [f"≈{count}" if count else "" for count in counts]
    return [f"*{figure.name}* ({figure.source})", *counts, "", published(figure.value), "", "", "", ""]


def overview_line(setting: str, rows: list[Row]) -> list[str]:
    """One line of a setting: the best KRU by validation and the best baseline, beside the paper's."""

    def brief(row: Row | None) -> str:
        if row is None:
            return ""
        cells = own_line(row)
        return f"{cells[4] or f'{cells[3]} validation'} ({shown(row.first.label)}; {cells[1]} parameters)"

    def brief_paper(figure: PaperFigure | None) -> str:
        size = f" (≈{figure.num_parameters:,} parameters)" if figure and figure.num_parameters else ""
        return published(figure.value) + size if figure else ""

    finished = [row for row in rows if row.figure("validation") or row.figure("test")]
    best = [next((row for row in finished if row.first.is_kru == kru), None) for kru in (True, False)]
    known = [figure for figure in FIGURES if figure.setting == setting]
    papers = [
        next((figure for figure in known if figure.ours), None),
        next((figure for figure in known if figure.name.split()[0] == "LSTM"), None),
    ]
    metric, greater = metric_of(setting, rows)
    name = f"{METRICS.get(metric, metric)} {'↑' if greater else '↓'}"
    return [shown(setting), name, *map(brief, best), *map(brief_paper, papers)]


def metric_of(setting: str, rows: list[Row]) -> tuple[str, bool]:
    """The metric of a setting, and whether more of it is better."""
    return (rows[0].first.metric, rows[0].first.greater) if rows else PAPER_METRICS[setting]


def tables(entries: list[Entry], only_runs: bool = False) -> dict[str, list[Row]]:
    """Rows of the paper's settings in its order, also where nothing was run unless `only_runs`; then of all others."""
    found, paper = settings(entries), dict.fromkeys(figure.setting for figure in FIGURES)
    names = [name for name in paper if name in found or not only_runs]
    return {name: found.get(name, []) for name in [*names, *sorted(found.keys() - paper)]}


def overview(found: dict[str, list[Row]]) -> str:
    """One line a setting."""
    head = ("task", "metric", "KRU, here", "best baseline, here", "KRU, paper", "LSTM, paper")
    return table(head, [overview_line(setting, rows) for setting, rows in found.items()])


def section(setting: str, rows: list[Row], picture: str) -> dict[str, str]:
    """What the page shows of a setting."""
    metric, greater = metric_of(setting, rows)
    others = [paper_line(figure) for figure in FIGURES if figure.setting == setting]
    commands = dict.fromkeys(c for row in rows for entry in row.entries for c in entry.commands)
    return {
        "setting": shown(setting),
        "metric": f"{METRICS.get(metric, metric)}, {'higher' if greater else 'lower'} is better.",
        "table": table(HEAD, [*map(own_line, rows), *others]),
        "picture": picture,
        "commands": "\n".join(command.lstrip("`~ ") for command in commands),
    }


def slug(text: str) -> str:
    """A setting as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_page(folder: Path, found: dict[str, list[Row]]) -> None:
    """RESULTS.md and its pictures, `results-<setting>.png`, in the folder of runs.jsonl."""
    curves = {
        setting: [(row.label, [e.history for e in row.entries if e.history]) for row in rows]
        for setting, rows in found.items()
    }
    drawn = {setting: [(name, runs) for name, runs in rows if runs] for setting, rows in curves.items()}
    pictures = {setting: f"results-{slug(setting)}.png" if rows else "" for setting, rows in drawn.items()}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=False, keep_trailing_newline=True)
    sections = [section(setting, rows, pictures[setting]) for setting, rows in found.items()]
    text = template.render(overview=overview(found), sections=sections)

    def fill(temporary: Path) -> None:
        for setting, rows in drawn.items():
            if rows:
                metric = metric_of(setting, found[setting])[0]
                validation_curves(setting, metric, rows, temporary / pictures[setting])
        (temporary / PAGE).write_text(text, encoding="utf-8")

    ckpt.write_files(folder, fill)
    for path in folder.glob("results-*.png"):
        if path.name not in pictures.values():
            path.unlink()


def update_readme(readme: Path, text: str) -> bool:
    """Put `text` between the two markers of a README; False if it is not there or has none of them.

    Raises:
        UserError: it cannot be read, or has the markers wrong.
    """
    before = read(readme, lambda path: path.read_text(encoding="utf-8")) if readme.is_file() else ""
    if BEGIN not in before and END not in before:
        return False
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise UserError(f"{str(readme)!r} must hold {BEGIN} and, after it, {END}, each once")
    start, rest = before.split(BEGIN)
    ckpt.write_text(readme, f"{start}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return True


def beside(folder: Path) -> dict[str, Any]:
    """For the card of a released model, the best of each kind that was scored on its task, and the paper's figures."""
    entries = read_runs(folder.resolve().parent)
    own = next((entry for entry in entries if entry.released == folder.resolve().name), None)
    if own is None:
        return {}
    best: dict[str, Row] = {}
    for row in settings(entries)[own.setting]:
        alone = row.entries == (own,) and len(own.seeds) == 1
        if row.figure("test") and not alone:
            best.setdefault(row.first.label.split(" ")[0], row)
    names = ("model", "test", "parameters", "recurrent", "steps", "time")
    lines = [[shown(row.label), *own_line(row)[1:]] for row in best.values()]
    lines += [paper_line(figure) for figure in FIGURES if figure.setting == own.setting]
    cells = [[line[0], line[4], line[1], line[2], *line[6:8]] for line in lines]
    return {"metric": METRICS[own.metric], "table": table(names, cells)} if cells else {}
