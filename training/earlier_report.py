"""Reports that `training.report` wrote earlier, read again: they keep the rows of runs whose folders are gone."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .cards import METRICS
from .errors import UserError
from .results import CELLS

TITLE = "# Results\n\nMade by `python -m training.report` from the records of the runs; do not edit."
DIFFERENCE = re.compile(r", (?=\w+=)|, same seed again")
PUBLISHED = re.compile(r"\*.+\* \(.+\)")


@dataclass(frozen=True)
class Line:
    """A row of a table as it is printed, of given runs or of an earlier report."""

    model: str  # with what sets it apart from others of the same model, without its link
    parameters: str
    recurrent: str
    validation: str
    test: str
    seeds: str
    steps: str
    time: str
    machine: str
    is_kru: bool = False
    commands: tuple[str, ...] = ()  # of an earlier row: none where they are not known
    link: str = ""  # folder of the released model, relative to the report

    @property
    def cells(self) -> list[str]:
        """What HEAD names."""
        name = f"[{self.model}]({self.link}/)" if self.link else self.model
        return [name, *astuple(self)[1 : len(HEAD)]]

    @property
    def plain(self) -> str:
        """The model without what sets it apart."""
        return DIFFERENCE.split(self.model)[0]

    @property
    def folders(self) -> frozenset[str]:
        """The folders that its runs were written to: they say which runs it counts. None where they are not known."""
        return frozenset(folder for folder in map(output_dir, self.commands) if folder)

    @property
    def finished(self) -> bool:
        """Whether a run of the row has results."""
        return any((self.parameters, self.validation, self.test, self.seeds))

    @property
    def number_of_runs(self) -> int:
        """Finished runs that recorded their seed, and unfinished ones."""
        unfinished = re.search(r"(\d+) not finished", self.steps)
        return len(re.findall(r"-?\d+", self.seeds.partition("(")[2])) + (int(unfinished[1]) if unfinished else 0)

    def order(self, greater: bool) -> tuple[bool, float]:
        """What sorts rows best first by validation, by test where that is missing, and last those with neither."""
        value = figure(self.validation or self.test)
        return value is None, math.inf if value is None or math.isnan(value) else -value if greater else value


HEAD = tuple(field.name for field in fields(Line))[:9]


@dataclass(frozen=True)
class Section:
    """What an earlier report says of one setting."""

    metric: tuple[str, bool]
    lines: tuple[Line, ...]
    others: tuple[str, ...] = ()  # commands of which the row is not known
    pictures: tuple[str, ...] = ()


def is_report(path: str) -> bool:
    """Whether an argument is an earlier report, not a folder of runs."""
    return Path(path).suffix == ".md" and Path(path).is_file()


def figure(text: str) -> float | None:
    """The mean in `1.862 ± 0.022`; None for a blank. Raises a ValueError for anything else."""
    return float(text.partition(" ± ")[0]) if text else None


def read_reports(paths: Iterable[str]) -> dict[str, Section]:
    """The settings of earlier reports in which something was run; a row that two of them have is there once.

    Raises:
        UserError: a file cannot be read, or is not as `training.report` writes it.
    """
    found: dict[str, Section] = {}
    for path in paths:
        for setting, new in read_report(path):
            old = found.get(setting, Section(new.metric, ()))
            lines = {tuple(line.cells): line for line in (*old.lines, *new.lines)}
            if lines:
                others, pictures = old.others + new.others, old.pictures + new.pictures
                found[setting] = Section(old.metric, tuple(lines.values()), others, pictures)
    return found


def read_report(path: str) -> list[tuple[str, Section]]:
    """Headings of one report with what is below them; a UserError as `read_reports` says."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"run={path!r} cannot be read: {error}") from error
    if not text.startswith(TITLE):
        raise UserError(f"run={path!r} is no report of training.report: it does not begin with {TITLE!r}")
    parts = [part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]
    return [(heading, read_section(body, f"run={path!r}, section {heading!r}")) for heading, _, body in parts]


def read_section(body: str, place: str) -> Section:
    """What is below a heading; a UserError for what is malformed names `place`."""
    metric = re.search(r"^(.+), (higher|lower) is better\.$", body, re.MULTILINE)
    if not metric:
        raise UserError(f"{place}: no line that ends with 'higher is better.' or 'lower is better.'")
    text, *blocks = re.split(r"^```(?:bash)?(?:\n|\Z)", body, flags=re.MULTILINE)
    if blocks and len(blocks) != 2:
        raise UserError(f"{place}: not one block of commands that begins with ```bash and ends with ```")
    commands = blocks[0].splitlines() if blocks else []
    lines = read_table([line for line in text.splitlines() if line.startswith("|")], place)
    known = sum(line.number_of_runs for line in lines) == len(commands)
    if known:
        rest = iter(commands)
        lines = [replace(line, commands=tuple(next(rest) for _ in range(line.number_of_runs))) for line in lines]
    name = next((key for key, name in METRICS.items() if name == metric[1]), metric[1])
    pictures = re.findall(r"^!\[learning curves: .*\]\((.+)\)$", text, re.MULTILINE)
    return Section((name, metric[2] == "higher"), tuple(lines), () if known else tuple(commands), tuple(pictures))


def read_table(table: list[str], place: str) -> list[Line]:
    """The rows of a table but for published figures; a UserError for what is malformed names `place`."""
    rows: list[list[Any]] = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    if not rows or tuple(rows[0]) != HEAD:
        raise UserError(f"{place}: the head of its table is {rows[:1]}, not {HEAD}")
    lines = []
    for cells in rows[2:]:
        if len(cells) != len(HEAD):
            raise UserError(f"{place}: a row of {len(cells)} cells, not {len(HEAD)}: {' | '.join(cells)!r}")
        if PUBLISHED.fullmatch(cells[0]):
            continue
        linked = re.fullmatch(r"\[(.+)\]\((.+)/\)", cells[0])
        name, link = linked.groups() if linked else (cells[0], "")
        # As `Run.is_kru` has it: strictly unitary models, whose names begin with these words, are baselines.
        line = replace(Line(*cells), model=name, is_kru=name.split(" ")[0] in CELLS.values(), link=link)
        try:
            for text in (line.validation, line.test):
                figure(text)
        except ValueError as error:
            raise UserError(f"{place}: a figure of {name!r} is no number: {error}") from error
        lines.append(line)
    return lines


def output_dir(command: str) -> str:
    """The folder that a command writes to; blank where it names none."""
    try:
        words = "\0".join(shlex.split(command))
    except ValueError:  # an open quote
        return ""
    found = re.search(r"\0--output_dir[=\0]([^\0]+)", words)
    return found[1] if found else ""
