"""The table of all runs, runs.jsonl: a line per run, or one for several seeds of which only mean and spread are known.

A line holds all that pages, pictures and cards show of it, so the run's folder may be gone. Runs of one model in one
setting that differ in their seed alone are one row.
"""

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from kru_hf.cells import BY_TYPE

from ..common.errors import UserError
from ..common.files import check_fields, one_line, read, read_json
from ..common.machine import shown_path
from ..common.run_folder import STATE, checkpoints, is_checkpoint
from ..common.saving import write_text
from ..options.model import OFF_AT_ZERO
from ..tasks import get_task, task_names
from .paper_figures import ADDING, COPY, JSB, PERMUTED, PHONEMES, PIANO, PTB_LARGE, PTB_SMALL, SEQUENTIAL
from .run_record import HISTORY, RESULTS, RUN, RunRecord, read_history
from .text import shown

RUNS = "runs.jsonl"
POINTS = 40  # of a learning curve
# Metrics in the order in which a run without a known task is asked for them; True: more is better.
METRIC_ORDER = {"bpc": False, "nll_per_frame": False, "mse": False, "accuracy": True, "loss": False}
# What may differ between the seeds of one row, and is no difference between two models.
INCIDENTAL = {
    "seed", "model", "report_to", "save_steps", "save_total_limit", "logging_steps", "sample_length", "num_threads",
    "use_cpu", "evaluate_test", "data_license", "dataset", "eval_batch_size", "backend", "use_cache",
    "parameter_budget", "eval_steps", "architecture",
}  # fmt: skip
OFF = (*OFF_AT_ZERO, "max_recurrent_norm")
NAMES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "orthogonal": "orthogonal RNN", "low_rank": "low-rank RNN"}
CELLS = {name: "KRU" if cell.complex else f"Kron-{cell.name.upper()}" for name, cell in BY_TYPE.items()}
CELLS["kru_linear"] = "Linear-KRU"


@dataclass(frozen=True)
class Entry:
    """A line of runs.jsonl."""

    name: str  # the run's folder
    setting: str  # heading of the table that it belongs to
    label: str  # the model with its sizes
    metric: str  # which chose the best weights
    seeds: list[int] = field(default_factory=list)
    variant: str | None = None  # what sets it apart from others of the same label, where that was told in words
    released: str | None = None  # folder of the model beside runs.jsonl
    # Of several seeds means, or [least, most]; {}: not finished.
    results: dict[str, float | int | list[float | int]] = field(default_factory=dict)
    spread: dict[str, float | int] | None = None  # standard deviations over the seeds, of validation and test figure
    decimals: int | None = None  # of the figures, where fewer are known than a page shows
    stopped_at: int | None = None  # step of the last checkpoint of a run that has not finished
    recipe: dict[str, Any] = field(default_factory=dict)  # the options that are known and not None
    data: dict[str, Any] = field(default_factory=dict)
    machines: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # for people
    history: list[list[float | int]] | None = None  # pairs of step and validation figure

    @property
    def is_kru(self) -> bool:
        """Whether the model is the project's own; strictly unitary ones, whose names begin so, are baselines."""
        return self.label.split(" ")[0] in CELLS.values()

    @property
    def machine(self) -> str:
        """Where it ran, in short; blank where that was not recorded."""
        return ", then ".join(dict.fromkeys(map(machine_name, self.machines)))

    @cached_property
    def choices(self) -> dict[str, Any]:
        """All options that distinguish this run from one of another row."""
        return {k: v for k, v in self.recipe.items() if k not in INCIDENTAL and v is not None and (v or k not in OFF)}


TYPES = get_type_hints(Entry)


def machine_name(given: dict[str, Any]) -> str:
    """A machine's record in short."""
    processes = f"{given['processes']} × " if given.get("processes", 1) > 1 else ""
    if given.get("device") not in ("cpu", None):
        return f"{processes}{given['device']}"
    threads = given.get("threads", 1)
    return f"{processes}{threads} thread{'s' * (threads > 1)} of {given.get('processor')}"


def factors(shapes: Iterable[list[int]]) -> str:
    """`7·8·9`, `2^9` for nine 2x2 factors, `3x4·4x3` for rectangular ones."""
    runs = [
        (name, len(list(same))) for name, same in itertools.groupby(f"{p}x{q}" if p != q else f"{p}" for p, q in shapes)
    ]
    return "·".join(f"{name}^{count}" if count > 1 else name for name, count in runs)


# ---- from a run's folder to a line ----


def metric_of(record: RunRecord) -> str:
    """The metric that chose the best weights."""
    task = record.options.get("task")
    if task in task_names():
        return get_task(task).metric
    known = {name for name, value in record.results.items() if value is not None}
    return next((m for m in METRIC_ORDER if known & {f"validation_{m}", f"test_{m}"}), "loss")


def setting_of(record: RunRecord) -> str:
    """The task on its data, as the paper names it where it has it."""
    options, data = record.options, shown(record.data.get("name"))
    task, name = shown(options.get("task")), data.lower()
    permuted = any(value and "permut" in key for key, value in options.items())
    # Published figures are from training pieces as they are: transposed ones are another setting.
    changed = ", transposed training pieces" if options.get("transpose") else ""
    if task in ("copy_memory", "adding"):
        return (COPY if task == "copy_memory" else ADDING).format(options.get("sequence_length"))
    if task == "phonemes" and "timit" in name:
        return PHONEMES if options.get("phone_set") != 39 else f"{PHONEMES}, 39 classes"
    if task == "pixel_mnist" and re.search(r"(^|/)mnist\b", name):  # not Fashion-MNIST and its like
        return PERMUTED if permuted else SEQUENTIAL
    if task == "char_lm" and re.search(r"ptb|penn", name):
        size = record.results.get("num_parameters") or options.get("parameter_budget") or 0
        large = PTB_LARGE if size <= 500_000 else "Penn Treebank characters, larger models"
        return PTB_SMALL if size <= 160_000 else large
    if task == "piano_roll" and re.search("jsb|piano.?midi", name):
        return (JSB if "jsb" in name else PIANO) + changed
    if task in ("word_problem", "regular_languages"):
        kind = "Word problem" if task == "word_problem" else "Regular language"
        return f"{kind}: {shown(options.get('group') or options.get('language'))}"
    return f"{task or 'task not recorded'} on {data or 'data not recorded'}{changed}{', permuted' * permuted}"


def label_of(record: RunRecord) -> str:
    """Name of the model with its sizes."""
    config = record.config
    if not config:  # a run that ended before its first evaluation, or whose config.json was removed
        return f"{record.options.get('architecture') or 'model'} {record.options.get('state_size') or ''}"
    unitary = config.get("model_type") == "kru_unitary"
    if unitary or record.is_kru:
        kind = "strictly unitary " * unitary + CELLS.get(config.get("cell_type") or "kru", "KRU")
        shapes = config.get("factor_shapes") or []
    else:
        kind, shapes = NAMES.get(config.get("cell") or "", "model"), config.get("recurrent_factor_shapes")
    layers = config.get("num_hidden_layers") or 1
    parts = [
        f"{kind} {config.get('state_size', '')}",
        f", rank {config['recurrent_rank']}" if config.get("recurrent_rank") else "",
        f" ({factors(shapes)})" if shapes is not None else "",
        f", rank-{config['io_rank']} maps" if config.get("io_rank") else "",
        f", maps of {config['kronecker_terms']} terms" if config.get("kronecker_terms") else "",
        f", feed-forward {config['intermediate_size']}" if config.get("intermediate_size") else "",
        f", {config['num_heads']} heads" if (config.get("num_heads") or 1) > 1 else "",
        ", frozen factors" if record.options.get("freeze_factors") else "",
        f", {layers} layers" if layers > 1 else "",
    ]
    return "".join(parts)


def entry_of(folder: Path, table: Path) -> Entry:
    """The line of a run's folder; an unfinished run brings the history of its last checkpoint.

    Args:
        table: the folder of runs.jsonl; a model that lies in it is a released one.
    """
    record, saved, stopped = RunRecord.read(folder), checkpoints(folder), None
    history = read_history(folder / HISTORY)
    if not record.results and saved:
        state = read_json(saved[-1] / STATE, optional=True)
        check_fields(saved[-1] / STATE, state, {"history": list[dict[str, Any]], "step": int})
        history, stopped = state.get("history", []), state.get("step")
    metric = metric_of(record)
    points = [[row["step"], row[f"validation_{metric}"]] for row in history if f"validation_{metric}" in row]
    released = folder.name if folder.resolve().parent == table.resolve() else None
    options = {name: value for name, value in record.options.items() if value is not None}
    options |= {name: shown_path(options[name]) for name in ("dataset", "model") if name in options}
    return Entry(
        name=released or shown_path(str(folder)),
        setting=setting_of(record),
        label=label_of(record),
        metric=metric,
        seeds=[options["seed"]] if "seed" in options else [],
        released=released,
        results={name: value for name, value in record.results.items() if value is not None},
        stopped_at=stopped,
        recipe=options,
        data=record.data,
        machines=record.machines,
        commands=[record.command] if record.command else [],
        history=points[:: -math.ceil(len(points) / POINTS)][::-1] if points else None,
    )


# ---- the file ----


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The folders of runs named, each once; a folder that is no run stands for all runs below it.

    Raises:
        UserError: a path does not exist, or holds no run.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"run={str(path)!r} is not a folder")
        found = [path] if is_run(path) else sorted(p for p in path.rglob("*") if p.is_dir() and is_run(p))
        if not found:
            raise UserError(f"run={str(path)!r} holds no run: no {RUN} and no {RESULTS} in or below it")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, of which the weights may be gone."""
    return not is_checkpoint(folder) and any((folder / name).is_file() for name in (RUN, RESULTS))


def parse_line(line: str, place: str) -> Entry:
    """A line of runs.jsonl. Raises `UserError`, naming the place, if it is not as it must be."""
    values = read(Path(place), lambda _: json.loads(line))
    if not isinstance(values, dict) or values.keys() - TYPES.keys():
        raise UserError(f"{place}: it must be an object of {', '.join(TYPES)}")
    check_fields(place, values, {name: TYPES[name] for name in ("name", "setting", "label", "metric")}, required=True)
    check_fields(place, values, TYPES)
    if values["metric"] not in METRIC_ORDER:
        raise UserError(f"{place}: metric={values['metric']!r} is not valid: one of {', '.join(METRIC_ORDER)}")
    if any(len(point) != 2 for point in values.get("history") or []):
        raise UserError(f"{place}: history is not valid: it must hold pairs of step and figure")
    return Entry(**values)


def read_runs(table: Path) -> list[Entry]:
    """The lines of a folder's runs.jsonl, in their order; none if there is no such file.

    Raises:
        UserError: a line is not as it must be; it is named.
    """
    path = table / RUNS
    lines = read(path, lambda file: file.read_text(encoding="utf-8")).splitlines() if path.is_file() else []
    return [parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def write_runs(table: Path, entries: Iterable[Entry]) -> None:
    """Replace a folder's runs.jsonl."""
    lines = [{k: v for k, v in asdict(entry).items() if v not in (None, [], {})} for entry in entries]
    text = "".join(f"{json.dumps(line, ensure_ascii=False, default=str)}\n" for line in lines)
    write_text(table / RUNS, text)


def add(entries: list[Entry], new: Entry) -> list[Entry]:
    """The lines with a run in them: in place of its earlier one, or at the end.

    A released model that is one of several seeds of a line gives it its curve; the figures stay those of all seeds.
    """
    for index, old in enumerate(entries):
        if old.name == new.name or (old.released is not None and old.released == new.released):
            kept = replace(old, history=new.history) if len(old.seeds) > 1 else replace(new, variant=old.variant)
            return [*entries[:index], kept, *entries[index + 1 :]]
    return [*entries, new]


# ---- rows ----


@dataclass(frozen=True)
class Row:
    """The runs of one model in one setting that differ in their seed alone."""

    label: str  # with what sets it apart from others of the same model
    entries: list[Entry]

    @property
    def first(self) -> Entry:
        """One of them, for what they share."""
        return self.entries[0]

    @property
    def finished(self) -> list[Entry]:
        """Runs with results."""
        return [entry for entry in self.entries if entry.results]

    @property
    def seeds(self) -> list[int]:
        """Of the finished runs."""
        return [seed for entry in self.finished for seed in entry.seeds]

    def values(self, name: str) -> list[float]:
        """A result of the finished runs that have it."""
        found = [entry.results[name] for entry in self.finished if name in entry.results]
        return [value for given in found for value in (given if isinstance(given, list) else [given])]

    def figure(self, split: str) -> tuple[float, float | None] | None:
        """Mean of the metric, and its standard deviation (n − 1) over two seeds and more; None if not measured."""
        name = f"{split}_{self.first.metric}"
        values = self.values(name)
        if not values:
            return None
        if self.first.spread is not None:
            return values[0], self.first.spread.get(name)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def lengths(self) -> dict[int, float]:
        """Mean test accuracy by the length of the sequences, of tasks that test several."""
        names = {name for entry in self.finished for name in entry.results if re.fullmatch(r"test_accuracy_\d+", name)}
        numbers = sorted(int(name.rpartition("_")[2]) for name in names)
        return {number: statistics.fmean(self.values(f"test_accuracy_{number}")) for number in numbers}

    @property
    def order(self) -> tuple[bool, float]:
        """What sorts rows best first by validation, by test where that is missing, and last those with neither."""
        found = self.figure("validation") or self.figure("test")
        return found is None, (-1 if METRIC_ORDER[self.first.metric] else 1) * found[0] if found else math.inf


def settings(entries: Iterable[Entry]) -> dict[str, list[Row]]:
    """Rows of each setting: the best first by validation, then those without a figure."""
    grouped: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        grouped.setdefault(entry.setting, {}).setdefault(entry.label, []).append(entry)
    return {
        setting: sorted((row for group in models.values() for row in rows(group)), key=lambda row: row.order)
        for setting, models in grouped.items()
    }


def rows(group: list[Entry]) -> list[Row]:
    """The runs of one model in one setting as rows."""
    variants: dict[str, list[Entry]] = {}
    for entry in group:
        told = json.dumps(entry.choices, sort_keys=True, default=str) if entry.variant is None else entry.variant
        variants.setdefault(f"{entry.name if entry.spread else ''} {told}", []).append(entry)
    untold = [runs[0] for runs in variants.values() if runs[0].variant is None]
    table = []
    for runs in variants.values():
        first = runs[0]
        apart = difference(first, untold) if first.variant is None else first.variant
        name = f"{first.label}, {apart}" if apart else first.label
        repeats: dict[int, list[Entry]] = {}  # a seed twice is no second seed: it gets a row of its own
        seen: Counter[int] = Counter()
        for run in sorted(runs, key=lambda run: run.seeds or [math.inf]):
            repeats.setdefault(max((seen[seed] for seed in run.seeds), default=0), []).append(run)
            seen.update(run.seeds)
        for number, again in repeats.items():
            told = f", same seed again ({number + 1})" if number and first.variant is None else ""
            table.append(Row(name + told, again))
    return table


def difference(run: Entry, others: list[Entry]) -> str:
    """What sets a run apart from the other rows of the same model, as `name=value, …`."""
    names = dict.fromkeys(name for other in others for name in other.choices)
    varied = [n for n in names if any(other.choices.get(n) != others[0].choices.get(n) for other in others)]
    return one_line(", ".join(f"{name}={run.choices.get(name)}" for name in varied))
