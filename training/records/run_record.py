"""A run is one record in its folder: recipe.yaml, run.json, all_results.json and history.csv.

`recipe.yaml` has every option resolved, so that `training.train RUN/recipe.yaml` repeats the run whatever defaults
become; `run.json` the data, versions, machines, times and the command; `history.csv` one row per evaluation and at most
40 of training.
"""

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from typing_extensions import Self

from ..common.errors import UserError
from ..common.files import check_fields, one_line, read, read_json
from ..common.machine import shown_path
from ..common.run_folder import RECORD
from ..models.heads import BY_CLASS, HEADS, Head
from ..options.recipe import read_recipe
from ..tasks import get_task

RECIPE, RUN, RESULTS, HISTORY = RECORD


TRAINING = ("train_loss", "learning_rate")
TRAINING_ROWS = 40  # as many as a line of a picture shows
MAPPING = dict[str, Any]
# Types of the fields that are computed with; others are shown as they are.
FIELDS: dict[str, dict[str, Any]] = {
    "config.json": {
        **dict.fromkeys(("factor_shapes", "recurrent_factor_shapes"), list[list[int]] | None),
        "architectures": list[str] | None,
        **dict.fromkeys(("num_hidden_layers", "num_heads"), int | None),
        **dict.fromkeys(("model_type", "cell_type", "cell"), str | None),
    },
    RUN: {
        **dict.fromkeys(("data", "versions"), MAPPING),
        **dict.fromkeys(("wall_seconds", "processor_seconds"), float | None),
        "machines": list[MAPPING],
        "command": str,
    },
    RECIPE: {
        **dict.fromkeys(("task", "architecture", "model", "data_license", "dataset", "mixed_precision"), str | None),
        **dict.fromkeys(("seed", "max_steps", "parameter_budget", "sequence_length"), int | None),
    },
    "data": dict.fromkeys(("name", "dataset_config", "dataset_revision", "sha256"), str | None),
    "machine": {"processes": int, "threads": int},
}


# ---- what a run writes ----


def recipe_text(values: Mapping[str, Any]) -> str:
    """Options as a recipe; one that was not given (None) has no line."""
    given = {name: value for name, value in values.items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10**9)


def thinned(history: list[dict[str, Any]], limit: int = TRAINING_ROWS) -> list[dict[str, Any]]:
    """All evaluations, and evenly chosen training figures of at most `limit` steps, the last ones among them."""
    trained = [entry["step"] for entry in history if "train_loss" in entry]
    kept = set(trained[:: -max(math.ceil(len(trained) / limit), 1)])
    rows = [{k: v for k, v in entry.items() if k not in TRAINING or entry["step"] in kept} for entry in history]
    return [row for row in rows if row.keys() - {"step", "seconds"}]


def history_text(history: list[dict[str, Any]]) -> str:
    """A thinned history as CSV: a figure that a step lacks is blank."""
    rows = thinned(history)
    names = list(dict.fromkeys(["step", "seconds", *TRAINING, *(name for row in rows for name in row)]))
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


# ---- what others read ----


def read_options(path: Path) -> dict[str, Any]:
    """A recipe's values in their types; empty if there is no such file.

    Raises:
        UserError: it is no recipe, or a value is of another type than its option.
    """
    if not os.path.lexists(path):
        return {}
    read_recipe(path)  # refuses what YAML can do beyond names and values
    loaded = read(path, lambda file: yaml.safe_load(file.read_text(encoding="utf-8-sig")))
    values = {str(name): value for name, value in loaded.items()}
    check_fields(path, values, FIELDS[RECIPE])
    return values


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history.csv: step, and the figures that are there; empty if there is no such file."""
    if not os.path.lexists(path):
        return []

    def reader(file: Path) -> list[dict[str, Any]]:
        rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
        found = [{name: float(value) for name, value in row.items() if value} for row in rows]
        return [{**row, "step": int(row["step"])} for row in found]

    return read(path, reader)


def read_fields(path: Path) -> dict[str, Any]:
    """config.json or run.json of a run's folder, with the fields that are used in their types; empty if not there."""
    values = read_json(path, optional=True)
    check_fields(path, values, FIELDS[path.name])
    return values


@dataclass
class RunRecord:
    """What a run's folder says about itself; what it lacks is empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the files that are there.

        Raises:
            UserError: one of them cannot be read, or a field is of another type than it must be; it is named.
        """
        config, run = read_fields(folder / "config.json"), read_fields(folder / RUN)
        for name in ("factor_shapes", "recurrent_factor_shapes"):
            if any(len(shape) != 2 for shape in config.get(name) or []):
                raise UserError(f"{folder / 'config.json'}: {name}={config[name]} is not valid: it must hold pairs")
        check_fields(f"{folder / RUN}: data", run.get("data", {}), FIELDS["data"])
        for machine in run.get("machines", []):
            check_fields(f"{folder / RUN}: machines", machine, FIELDS["machine"])
        results = read_json(folder / RESULTS, optional=True)
        check_fields(folder / RESULTS, results, dict.fromkeys(results, float | None))
        return cls(folder, config, read_options(folder / RECIPE), run, results)

    @property
    def data(self) -> dict[str, Any]:
        """Name, SHA-256 and sizes of the data."""
        return self.run.get("data", {})

    @property
    def machines(self) -> list[dict[str, Any]]:
        """Where it ran, first machine first."""
        return self.run.get("machines", [])

    @property
    def command(self) -> str:
        """How it was started, for people to read."""
        return one_line(self.run.get("command", ""))

    @property
    def class_name(self) -> str:
        """The model class that was trained."""
        return (self.config.get("architectures") or [""])[0]

    @property
    def head(self) -> Head:
        """The head of the class, of a baseline too; of an unknown one what loads without a head."""
        ends = {name.removeprefix("KRU"): HEADS[head] for name, head in BY_CLASS.items()}
        return next((head for end, head in ends.items() if self.class_name.endswith(end)), HEADS["piano_roll"])

    @property
    def is_kru(self) -> bool:
        """Whether the model is the project's own, with the soft constraint or gated; others are baselines."""
        return self.config.get("model_type") == "kru"

    @property
    def is_gated(self) -> bool:
        """Whether it is a KRU whose gates bound the state: real factors, no penalty, no modReLU."""
        return self.is_kru and self.config.get("cell_type", "kru") != "kru"


def read_record(model: str) -> RunRecord:
    """The record of a trained folder or Hub id, with what is needed to evaluate it or to train it further.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    try:
        folder = Path(model)
        if not folder.exists():
            folder = [Path(hf_hub_download(model, name)).parent for name in (RECIPE, RUN)][0]
        options, run = read_options(folder / RECIPE), read_fields(folder / RUN)
        check_fields(RECIPE, options, {"task": str, "seed": int}, required=True)
        check_fields(RECIPE, options, {"architecture": str})
        check_fields(RUN, run, {"data": dict}, required=True)
        check_fields(f"{RUN}: data", run["data"], {"name": str, "sha256": str}, required=True)
        get_task(options["task"])
        return RunRecord(folder, options=options, run=run)
    except Exception as error:  # the Hub client has no common base class
        raise UserError(
            f"model={model!r} has no readable {RECIPE} and {RUN}, which say how it was trained ({one_line(error, 400)})"
        ) from error


def published_recipe(folder: Path) -> bytes:
    """recipe.yaml without the paths of the machine that trained it."""
    options = read_options(folder / RECIPE)
    paths = {name: shown_path(options[name]) for name in ("dataset", "model") if options.get(name)}
    return recipe_text({**options, **paths}).encode()
