"""Runs read from their folders and put in order for the report: by setting, then by model, seeds together."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import checkpoint as ckpt
from .cards import RunRecord, read_fields, shown
from .errors import UserError
from .files import check_fields, read_json
from .paper_figures import ADDING, COPY, JSB, PERMUTED, PHONEMES, PIANO, PTB_LARGE, PTB_SMALL, SEQUENTIAL
from .tasks import get_task, task_names

# Metrics in the order in which a run without a known task is asked for them; True: more is better.
METRIC_ORDER = {"bpc": False, "nll_per_frame": False, "mse": False, "accuracy": True, "loss": False}
# What may differ between the seeds of one row, and is no difference between two models.
INCIDENTAL = {
    "seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "model", "command", "report_to",
    "save_steps", "save_total_limit", "logging_steps", "sample_length", "num_threads", "use_cpu", "evaluate_test",
    "push_to_hub", "hub_model_id", "hub_private_repo", "data_license", "dataset", "eval_batch_size", "scan_backend",
    "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "_name_or_path", "id2label",
    "label2id", "use_cache", "parameter_budget", "eval_steps", "architecture", "return_dict",
}  # fmt: skip
PTB_SIZES = ((160_000, PTB_SMALL), (500_000, PTB_LARGE))
NAMES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "orthogonal": "orthogonal RNN", "low_rank": "low-rank RNN"}
CELLS = {"kru": "KRU", "kru_lstm": "Kron-LSTM", "kru_gru": "Kron-GRU", "kru_janet": "Kron-JANET"}


@dataclass(frozen=True)
class Run:
    """A folder that `training.train` made, or a released model's: weights are not needed."""

    folder: Path
    record: RunRecord
    history: list[dict[str, Any]]
    training: dict[str, Any]
    stopped_at: int | None  # step of the last checkpoint of a run that has not finished

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read what is there; an unfinished run brings the history of its last checkpoint."""
        path, stopped = folder / "log_history.json", None
        history, saved = read_json(path, list, optional=True), ckpt.checkpoints(folder)
        if not (folder / "all_results.json").is_file() and saved:
            path = saved[-1] / ckpt.STATE
            state = read_json(path, optional=True)
            check_fields(path, state, {"history": list, "step": int})
            history, stopped = state.get("history", []), state.get("step")
        check_fields(path, {"history": history}, {"history": list[dict[str, Any]]})
        for entry in history:
            check_fields(path, entry, {**dict.fromkeys(entry, float), "step": int}, required=True)
        return cls(folder, RunRecord.read(folder), history, read_fields(folder / "training.json"), stopped)

    @property
    def results(self) -> dict[str, Any]:
        """`all_results.json`; empty while the run is not finished."""
        return self.record.results

    @property
    def seed(self) -> int | None:
        """Seed of weights and order."""
        return self.record.options.get("seed")

    @property
    def is_kru(self) -> bool:
        """Whether the model is the project's own, with the soft constraint or gated."""
        return self.record.is_kru

    @cached_property
    def metric(self) -> tuple[str, bool]:
        """The metric that chose the best weights, and whether more of it is better."""
        name = self.record.options.get("task")
        if name in task_names():
            task = get_task(name)
            return task.metric, task.greater_is_better
        recorded = (m for m in METRIC_ORDER if f"validation_{m}" in self.results or f"test_{m}" in self.results)
        found = next(recorded, "loss")
        return found, METRIC_ORDER[found]

    def figure(self, split: str) -> float | None:
        """The metric on a split, or None where it was not measured."""
        return self.results.get(f"{split}_{self.metric[0]}")

    @cached_property
    def setting(self) -> str:
        """Heading of the table that the run belongs to."""
        options, data = self.record.options, shown(self.record.data.get("name"))
        task, length = shown(options.get("task")), options.get("sequence_length")
        if task in ("copy_memory", "adding"):
            return (COPY if task == "copy_memory" else ADDING).format(length)
        if task == "phonemes" and "timit" in data.lower():
            return PHONEMES if options.get("phone_set") != 39 else f"{PHONEMES}, 39 classes"
        if task == "pixel_mnist" and re.search(r"(^|/)mnist\b", data.lower()):  # not Fashion-MNIST and its like
            return PERMUTED if any(value and "permut" in key for key, value in options.items()) else SEQUENTIAL
        if task == "char_lm" and re.search(r"ptb|penn", data.lower()):
            size = self.results.get("num_parameters") or options.get("parameter_budget") or 0
            return next((name for limit, name in PTB_SIZES if size <= limit), "Penn Treebank characters, larger models")
        # Published figures are from training pieces as they are: transposed ones are another setting.
        changed = ", transposed training pieces" if options.get("transpose") else ""
        for pattern, name in (("jsb", JSB), ("piano.?midi", PIANO)):
            if task == "piano_roll" and re.search(pattern, data.lower()):
                return name + changed
        changed += ", permuted" if any(value and "permut" in key for key, value in options.items()) else ""
        return f"{task or 'task not recorded'} on {data or 'data not recorded'}{changed}"

    @cached_property
    def label(self) -> str:
        """Name of the model with its sizes."""
        config = self.record.config
        if not config:  # a run that ended before its first evaluation, or whose config.json was removed
            return f"{self.record.options.get('architecture') or 'model'} {self.record.options.get('state_size') or ''}"
        layers = config.get("num_hidden_layers") or 1
        several = f", {layers} layers" if layers > 1 else ""
        size = config.get("state_size", "")
        if config.get("model_type") in ("kru", "kru_unitary"):
            kind = CELLS.get(config.get("cell_type", "kru"), "KRU")
            kind = f"strictly unitary {kind}" if config["model_type"] == "kru_unitary" else kind
            rank = f", rank-{config['io_rank']} maps" if config.get("io_rank") else ""
            rank += f", maps of {config['kronecker_terms']} terms" if config.get("kronecker_terms") else ""
            rank += f", feed-forward {config['intermediate_size']}" if config.get("intermediate_size") else ""
            frozen = "" if config.get("train_factors", True) else ", frozen factors"
            return f"{kind} {size} ({factors(config.get('factor_shapes') or [])}){rank}{frozen}{several}"
        rank = f", rank {config['recurrent_rank']}" if config.get("recurrent_rank") else ""
        shapes = config.get("recurrent_factor_shapes")
        kron = f" ({factors(shapes)})" if shapes else ""
        return f"{NAMES.get(config.get('cell', ''), 'model')} {size}{rank}{kron}{several}"

    @cached_property
    def choices(self) -> dict[str, Any]:
        """All that distinguishes this run from one of another row."""
        both = {**self.record.options, **self.record.config}
        if both.get("recurrent_init") == "random":  # what older runs had, whose records do not name it
            del both["recurrent_init"]
        return {name: value for name, value in both.items() if value is not None and name not in INCIDENTAL}

    @property
    def command(self) -> str:
        """The command that made the run, as it was recorded, but for what would end a block of code; may be blank."""
        return self.record.command.lstrip("`~ ")

    @property
    def machine(self) -> str:
        """Where it ran, in short, first machine first; blank where that was not recorded."""
        given = [*self.training.get("earlier_machines", []), self.training.get("machine", {})]
        return ", then ".join(dict.fromkeys(machine_name(machine) for machine in given if machine))


def machine_name(given: dict[str, Any]) -> str:
    """A machine's record in short."""
    processes = f"{given['processes']} × " if given.get("processes", 1) > 1 else ""
    if given.get("device") not in ("cpu", None):
        return f"{processes}{given['device']}"
    threads = given.get("threads", 1)
    return f"{processes}{threads} thread{'s' * (threads > 1)} of {given.get('processor')}"


def factors(shapes: Iterable[list[int]]) -> str:
    """`7·8·9`, `2^9` for nine 2x2 factors, `3x4·4x3` for rectangular ones."""
    names = [str(p) if p == q else f"{p}x{q}" for p, q in shapes]
    runs: list[list[str]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return "·".join(run[0] if len(run) == 1 else f"{run[0]}^{len(run)}" for run in runs)


@dataclass(frozen=True)
class Row:
    """The runs of one model in one setting that differ in their seed alone."""

    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """Runs with results."""
        return [run for run in self.runs if run.results]

    def common(self, name: str) -> Any:
        """A result that is the same in every finished run, else the list of them; None if there is none."""
        values = sorted({run.results[name] for run in self.finished if run.results.get(name) is not None})
        return values[0] if len(values) == 1 else values or None

    def figures(self, split: str) -> list[float]:
        """The metric of the finished runs that have it."""
        return [value for run in self.finished if (value := run.figure(split)) is not None]


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of a sample (n − 1) where there are two and more."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs named, each once; a folder that is no run stands for all runs below it.

    Raises:
        UserError: a path does not exist, or holds no run.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"run={str(path)!r} is not a folder")
        found = [path] if is_run(path) else sorted(p for p in path.rglob("*") if p.is_dir() and is_run(p))
        if not found:
            raise UserError(f"run={str(path)!r} holds no run: no training.json and no all_results.json in or below it")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [Run.read(folder) for folder in folders.values()]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, of which the weights may be gone."""
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        return False
    return (folder / "training.json").is_file() or (folder / "all_results.json").is_file()


def settings(runs: Iterable[Run]) -> dict[str, list[Row]]:
    """Rows of each setting: the best first by validation, then those without a figure."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.setting, []).append(run)
    return {setting: rows(group) for setting, group in grouped.items()}


def rows(group: list[Run]) -> list[Row]:
    """The runs of one setting as rows."""
    models: dict[str, dict[str, list[Run]]] = {}
    for run in group:
        variants = models.setdefault(run.label, {})
        variants.setdefault(json.dumps(run.choices, sort_keys=True, default=str), []).append(run)
    table = []
    for label, variants in models.items():
        members = list(variants.values())
        for runs in members:
            name = label + difference(runs[0], [other[0] for other in members])
            repeats: list[list[Run]] = []  # a seed twice is no second seed: it gets a row of its own
            for run in sorted(runs, key=lambda run: (run.seed is None, run.seed or 0)):
                place = next((row for row in repeats if all(other.seed != run.seed for other in row)), None)
                if place is None:
                    repeats.append([run])
                else:
                    place.append(run)
            for number, row in enumerate(repeats, 1):
                table.append(Row(name if number == 1 else f"{name}, same seed again ({number})", tuple(row)))
    sign = -1 if group[0].metric[1] else 1

    def order(row: Row) -> tuple[bool, float, str]:
        values = row.figures("validation") or row.figures("test")
        return not values, sign * statistics.fmean(values) if values else math.inf, row.label

    return sorted(table, key=order)


def difference(run: Run, others: list[Run]) -> str:
    """What sets a run apart from the other rows of the same model, as `, name=value`."""
    names = dict.fromkeys(name for other in others for name in other.choices)
    varied = [n for n in names if any(other.choices.get(n) != others[0].choices.get(n) for other in others)]
    return "".join(f", {name}={run.choices.get(name)}" for name in varied)
