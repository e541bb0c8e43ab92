"""RESULTS.md, the table of README.md and the rows beside a model in its card, all from runs.jsonl."""

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..common.errors import UserError
from ..common.files import read
from ..common.saving import write_files, write_text
from .paper_figures import FIGURES, PaperFigure
from .paper_figures import metric_of as metric_of_paper
from .plots import accuracy_by_length, validation_curves
from .runs import METRIC_ORDER, Entry, Row, read_runs, settings
from .text import METRICS, TEMPLATES, shown, table

PAGE = "RESULTS.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = (
    *("model", "parameters", "recurrent", "int8 bytes", "multiply-adds", "validation", "test", "seeds", "steps"),
    *("time", "processor time", "machine"),
)
OVERVIEW = ("task", "metric", "KRU, here", "best baseline, here", "KRU, paper", "LSTM, paper")
LONG = 256  # the overview has accuracies of sequences from this length on
# What a card shows of them.
BESIDE = ("model", "test", "parameters", "recurrent", "int8 bytes", "multiply-adds", "steps", "time")


def digits(found: tuple[float, float | None] | None, metric: str, known: int | None = None) -> str:
    """Mean ± spread with as many decimals as mean anything, of an accuracy four (97.97 %), or are known."""
    if found is None:
        return ""
    mean, spread = found
    decimals = 4 if metric == "accuracy" else 3 if abs(mean) >= 0.1 else 5 if abs(mean) >= 1e-3 else None
    if decimals is None:
        return f"{mean:.2g}" if spread is None else f"{mean:.2g} ± {spread:.1g}"
    decimals = decimals if known is None else min(decimals, known)
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


def own_line(row: Row, link: bool = True) -> list[str]:
    """The table line of a row of runs. `link`: to the released model, beside which the page lies."""
    times, processor = row.values("train_runtime"), row.values("processor_seconds")
    missing = [entry for entry in row.entries if not entry.results]
    steps = [span(row.values("steps"))] if row.values("steps") else []
    if missing:
        last = max(entry.stopped_at or 0 for entry in missing)
        number = sum(max(len(entry.seeds), 1) for entry in missing)
        steps.append(f"{number} not finished" + (f" (last checkpoint at {last:,})" if last else ""))
    released = [entry.released for entry in row.entries if entry.released]
    name = shown(row.label)
    return [
        Markup(f"[{name}]({released[0]}/)" if link and len(released) == 1 else name),
        span(row.values("num_parameters")),
        span(row.values("num_recurrent_parameters")),
        span(row.values("int8_bytes")),
        span(row.values("multiply_adds")),
        digits(row.figure("validation"), row.first.metric, row.first.decimals),
        digits(row.figure("test"), row.first.metric, row.first.decimals),
        f"{len(row.seeds)} ({', '.join(map(str, row.seeds))})" if row.seeds else "",
        "; ".join(steps),
        *(duration(sum(seconds) / len(seconds)) if seconds else "" for seconds in (times, processor)),
        ", ".join(dict.fromkeys(entry.machine for entry in row.finished if entry.machine)),
    ]


def published(figure: PaperFigure) -> str:
    """A published figure, with the digits that it was published with."""
    value = figure.value
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.3g}"


def paper_lines(setting: str) -> list[list[str]]:
    """The table lines of a setting's published figures."""
    return [
        [
            Markup(f"*{shown(figure.name)}* ({figure.source})"),
            *(f"≈{size:,}" if size else "" for size in (figure.num_parameters, figure.num_recurrent_parameters)),
            *("", "", "", published(figure), *[""] * 5),
        ]
        for figure in FIGURES.get(setting, [])
    ]


def overview_line(setting: str, rows: list[Row]) -> list[str]:
    """One line of a setting: the best KRU by validation and the best baseline, beside the paper's."""

    def brief(row: Row) -> str:
        line = dict(zip(HEAD, own_line(row), strict=True))
        parameters, validation, test = (line[name] for name in ("parameters", "validation", "test"))
        if row.lengths:
            test = ", ".join(f"{digits((row.lengths[n], None), 'accuracy')} at {n:,}" for n in row.lengths if n >= LONG)
        return f"{test or f'{validation} validation'} ({row.first.label}; {parameters} parameters)"

    def brief_paper(figure: PaperFigure) -> str:
        return published(figure) + (f" (≈{figure.num_parameters:,} parameters)" if figure.num_parameters else "")

    finished = [row for row in rows if row.figure("validation") or row.figure("test")]
    known = FIGURES.get(setting, [])
    kinds = (
        [brief(row) for row in finished if row.first.is_kru],
        [brief(row) for row in finished if not row.first.is_kru],
        [brief_paper(figure) for figure in known if figure.ours],
        [brief_paper(figure) for figure in known if figure.name.split()[0] == "LSTM"],
    )
    metric = "accuracy" if any(row.lengths for row in rows) else metric_of(setting, rows)
    name = f"{METRICS.get(metric, metric)} {'↑' if METRIC_ORDER[metric] else '↓'}"
    return [setting, name, *(next(iter(found), "") for found in kinds)]


def metric_of(setting: str, rows: list[Row]) -> str:
    """The metric of a setting."""
    return rows[0].first.metric if rows else metric_of_paper(setting)


def tables(entries: list[Entry], only_runs: bool = False) -> dict[str, list[Row]]:
    """Rows of the paper's settings in its order, also where nothing was run unless `only_runs`; then of all others."""
    found = settings(entries)
    names = [name for name in FIGURES if name in found or not only_runs]
    return {name: found.get(name, []) for name in [*names, *sorted(found.keys() - FIGURES)]}


def overview(found: dict[str, list[Row]]) -> str:
    """One line per setting."""
    return table(OVERVIEW, [overview_line(setting, rows) for setting, rows in found.items()])


def length_table(rows: list[Row]) -> Markup:
    """Accuracies of each row by the length of the test sequences."""
    lengths = sorted({length for row in rows for length in row.lengths})
    head = ["length", "parameters", "seeds", *(f"{length:,}" for length in lengths)]
    shares = [[digits((row.lengths[n], None), "accuracy") if n in row.lengths else "" for n in lengths] for row in rows]
    sizes = [[shown(row.label), span(row.values("num_parameters")), len(row.seeds)] for row in rows]
    return table(head, [[*size, *share] for size, share in zip(sizes, shares, strict=True)])


def curve(entry: Entry, over: str) -> list[list[float | int]] | None:
    """Pairs of step, or of minutes of training at the run's mean speed, and validation figure; None if not recorded."""
    if over == "step" or entry.history is None:
        return entry.history
    seconds, steps = entry.results.get("train_runtime"), entry.results.get("steps")
    if isinstance(seconds, list) or isinstance(steps, list) or not seconds or not steps:
        return None
    return [[step * seconds / steps / 60, figure] for step, figure in entry.history]


def section(setting: str, rows: list[Row], over: str) -> dict[str, Any]:
    """What the page shows of a setting; `lengths`, or else `curves`, are those of its picture."""
    metric = metric_of(setting, rows)
    curves = [(row.label, [points for entry in row.entries if (points := curve(entry, over))]) for row in rows]
    tracking = [row for row in rows if row.lengths]
    return {
        "setting": setting,
        "metric": metric,
        "metric_name": METRICS.get(metric, metric),
        "greater": METRIC_ORDER[metric],
        "table": table(HEAD, [*map(own_line, rows), *paper_lines(setting)]),
        "curves": [(name, runs) for name, runs in curves if runs],
        "lengths": [(row.label, row.lengths) for row in tracking],
        "length_table": length_table(tracking) if tracking else "",
        "picture": f"results-{re.sub(r'[^a-z0-9]+', '-', setting.lower()).strip('-')}.png",
    }


def write_page(folder: Path, found: dict[str, list[Row]], over: str = "step") -> None:
    """RESULTS.md and its pictures over steps or minutes, `results-<setting>.png`, in the folder of runs.jsonl."""
    sections = [section(setting, rows, over) for setting, rows in found.items()]
    drawn = [one for one in sections if one["lengths"] or one["curves"]]
    text = TEMPLATES.get_template("results.md.jinja").render(overview=overview(found), sections=sections)

    def fill(temporary: Path) -> None:
        for one in drawn:
            if one["lengths"]:
                accuracy_by_length(one["setting"], one["lengths"], temporary / one["picture"])
                continue
            validation_curves(one["setting"], one["metric"], one["curves"], temporary / one["picture"], over)
        (temporary / PAGE).write_text(text, encoding="utf-8")

    write_files(folder, fill)
    for path in {*folder.glob("results-*.png")} - {folder / one["picture"] for one in drawn}:
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
    write_text(readme, f"{start}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return True


def beside(folder: Path) -> tuple[str, Markup]:
    """For the card of a released model: its metric, and a table of the best of each kind and of the paper's figures."""
    entries = read_runs(folder.resolve().parent)
    own = next((entry for entry in entries if entry.released == folder.resolve().name), None)
    if own is None:
        return "", Markup("")
    best: dict[str, Row] = {}
    for row in settings(entries)[own.setting]:
        alone = row.entries == [own] and len(own.seeds) == 1
        if row.figure("test") and not alone:
            best.setdefault(row.first.label.split(" ")[0], row)
    lines = [*(own_line(row, link=False) for row in best.values()), *paper_lines(own.setting)]
    shown_lines = [[line[HEAD.index(name)] for name in BESIDE] for line in lines]
    return METRICS[own.metric], table(BESIDE, shown_lines) if lines else Markup("")
