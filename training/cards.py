"""Model cards, rendered from what a run's own folder records; a field that the folder lacks stays blank.

A card reads `config.json`, `all_results.json`, `log_history.json` (through its picture, `learning_curve.png`),
`training.json` and, if there is one, `comparison.json`:

    {"metric": "bpc", "rows": [{"name": "LSTM of the same size", "value": 1.9, "num_parameters": 1, "source": "…"}]}

`num_parameters`, `num_recurrent_parameters` and `source` of a row may be missing. `training.compare` writes that file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card_text import BLANK, CITATION, DATA_SOURCES, DataSource, how_to_load, limits, local_place, plain, snippet
from .errors import UserError
from .files import check_fields, one_line, read_json

TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"
SPLITS = ("train_", "validation_", "test_")  # what the record of a data set counts begins with one of these
PAPER = "https://arxiv.org/abs/1705.10142"
# A short piece that a released music model brings along, its picture, and how `training.compose` made it.
COMPOSITION = ("composition.mid", "composition.png", "composition.json")
METRICS = {
    "loss": "Cross-entropy (nats)",
    "bpc": "Bits per character",
    "nll_per_frame": "Negative log-likelihood per frame (nats)",
    "accuracy": "Accuracy",
    "f1": "F1",
    "mse": "Mean squared error",
}

# End of the class name -> Auto class, task of the Hub.
HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForPianoRoll": ("AutoModel", "other"),
}

RECIPE_OPTIONS = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("sequence_length", "carry_state", "frames_per_quarter", "transpose", "optimizer", "adam_beta1", "adam_beta2"),
    *("learning_rate", "factor_learning_rate_scale", "lr_scheduler_type", "warmup_steps", "min_learning_rate_ratio"),
    *("plateau_factor", "weight_decay", "max_grad_norm", "mixed_precision"),
)
CONFIG_ROWS = (
    *("cell_type", "wiring", "num_hidden_layers", "hidden_size", "readout_norm", "io_rank"),
    *("kronecker_terms", "intermediate_size", "recurrent_init", "recurrent_init_scale"),
    *("recurrent_init_max_phase", "chrono_max_length", "train_factors"),
    *("input_dropout", "state_dropout", "hidden_dropout"),
)


# Types of the fields that are read of each file, and of the parts of training.json; other fields are left alone.
MAPPING = dict[str, Any]
SIZES = ("state_size", "vocab_size", "input_size", "io_rank", "num_hidden_layers", "recurrent_rank", "kronecker_terms")
FIELDS: dict[str, dict[str, Any]] = {
    "config.json": {
        **dict.fromkeys(("model_type", "cell_type", "cell"), str | None),
        **dict.fromkeys((*SIZES, "intermediate_size"), int | None),
        **dict.fromkeys(("factor_shapes", "recurrent_factor_shapes"), list[list[int]] | None),
        "architectures": list[str] | None,
    },
    "training.json": {
        **dict.fromkeys(("options", "dataset", "versions", "machine"), MAPPING),
        "command": str | None,
        "earlier_machines": list[MAPPING],
    },
    "comparison.json": {"metric": str, "rows": list[MAPPING]},
    "composition.json": {"command": str, "prime_frames": int, "num_frames": int, "report": MAPPING},
    "options": {
        **dict.fromkeys(("task", "architecture", "model", "data_license"), str | None),
        **dict.fromkeys(("optimizer", "lr_scheduler_type"), str | None),
        **dict.fromkeys(("seed", "max_steps", "parameter_budget", "sequence_length", "state_size"), int | None),
    },
    "dataset": dict.fromkeys(("name", "dataset_config", "dataset_revision", "sha256"), str | None),
    "machine": {"processes": int, "threads": int, "device": str | None, "processor": str | None},
    "report": {
        **dict.fromkeys(("density", "lowest", "highest"), float | None),
        **dict.fromkeys(("density_band", "lowest_band", "highest_band"), list[float | int]),
        "within": bool,
    },
}


def read_fields(path: Path) -> dict[str, Any]:
    """A JSON object of a run's folder, with the fields that are used in their types; empty if it is not there."""
    values = read_json(path, optional=True)
    check_fields(path, values, FIELDS.get(path.name, {}))
    return values


def composition(folder: Path) -> dict[str, Any] | None:
    """How the released piece was made and how it compares with the training pieces; None without such a piece."""
    if not all((folder / name).is_file() for name in COMPOSITION):
        return None
    path = folder / COMPOSITION[2]
    made = read_json(path)
    check_fields(path, made, FIELDS[path.name], required=True)
    report = made["report"]
    check_fields(f"{path}: report", report, FIELDS["report"], required=True)
    names, figures = {"density": "keys a frame", "lowest": "lowest pitch", "highest": "highest pitch"}, []
    for key, name in names.items():
        band = report[f"{key}_band"]
        if len(band) != 2:
            raise UserError(f"{path}: report: {key}_band={band} is not valid: it must be two figures")
        figures.append(f"{name} {shown(report[key])} (training pieces: {shown(band[0])} to {shown(band[1])})")
    return {**made, "command": one_line(made["command"]), "figures": ", ".join(figures), "within": report["within"]}


@dataclass
class RunRecord:
    """What a run's folder says about itself."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    command: str = BLANK
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the files that are there.

        Raises:
            UserError: one of them cannot be read, or a field is of another type than it must be; it is named.
        """
        training, config = read_fields(folder / "training.json"), read_fields(folder / "config.json")
        for name in ("factor_shapes", "recurrent_factor_shapes"):
            if any(len(shape) != 2 for shape in config.get(name) or []):
                raise UserError(f"{folder / 'config.json'}: {name}={config[name]} is not valid: it must hold pairs")
        options, data, versions, machine = (
            training.get(name, {}) for name in ("options", "dataset", "versions", "machine")
        )
        earlier = [("machine", given) for given in training.get("earlier_machines", [])]
        for name, part in (("options", options), ("dataset", data), ("machine", machine), *earlier):
            check_fields(f"{folder / 'training.json'}: {name}", part, FIELDS[name])
        results = read_json(folder / "all_results.json", optional=True)
        check_fields(folder / "all_results.json", results, dict.fromkeys(results, float | None))
        beside, command = read_fields(folder / "comparison.json"), one_line(training.get("command") or BLANK)
        return cls(folder, config, results, options, data, versions, beside, command, machine)

    @property
    def class_name(self) -> str:
        """The model class that was trained."""
        return (self.config.get("architectures") or [BLANK])[0]

    @property
    def is_kru(self) -> bool:
        """Whether the model is a KRU, not a baseline."""
        return self.config.get("model_type") == "kru"

    @property
    def is_gated(self) -> bool:
        """Whether it is a KRU whose gates bound the state: real factors, no penalty, no modReLU."""
        return self.is_kru and self.config.get("cell_type", "kru") != "kru"

    @property
    def head(self) -> tuple[str, str]:
        """Auto class and Hub task."""
        return next((value for end, value in HEADS.items() if self.class_name.endswith(end)), ("AutoModel", "other"))

    @property
    def source(self) -> DataSource | None:
        """What is known of the data beyond the record."""
        return DATA_SOURCES.get(self.data.get("name", BLANK))

    def data_license(self, given: str | None) -> str:
        """Licence of the data: as given now or to the training, or known for a built-in set, or blank."""
        return given or self.options.get("data_license") or (self.source.license if self.source else BLANK)

    def figures(self) -> list[tuple[str, Any, Any]]:
        """Metric name, validation and test figure, of those that `all_results.json` holds."""
        pairs = [(name, self.results.get(f"validation_{name}"), self.results.get(f"test_{name}")) for name in METRICS]
        return [pair for pair in pairs if pair[1] is not None or pair[2] is not None]


def missing_fields(folder: Path, data_license: str | None = None) -> list[str]:
    """What a card needs before it is published and the folder does not say, as names of fields with their file."""
    record = RunRecord.read(folder)
    needed = {
        "architectures (config.json)": record.class_name,
        "options.task (training.json)": record.options.get("task"),
        "dataset.name (training.json)": record.data.get("name"),
        "licence of the data (--data_license)": record.data_license(data_license),
        "num_parameters (all_results.json)": record.results.get("num_parameters"),
        "num_recurrent_parameters (all_results.json)": record.results.get("num_recurrent_parameters"),
        "a validation_ or test_ figure (all_results.json)": record.figures(),
    }
    return [name for name, value in needed.items() if value in (None, BLANK, [])]


def shown(value: Any) -> str:
    """A value as the card prints it: blank for None, at most five significant digits."""
    if value is None or value == BLANK:
        return BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return plain(value)


def eval_results(record: RunRecord) -> list[EvalResult]:
    """The figures as the Hub's model-index wants them."""
    name = one_line(record.data.get("name") or BLANK)
    if not name:
        return []
    return [
        EvalResult(
            task_type=record.head[1],
            dataset_type=name,
            dataset_name=name,
            dataset_config=one_line(record.data.get("dataset_config") or BLANK) or None,
            dataset_revision=one_line(record.data.get("dataset_revision") or BLANK) or None,
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=value,
        )
        for metric, *values in record.figures()
        for split, value in zip(("validation", "test"), values, strict=True)
        if value is not None
    ]


def on_hub(name: str | None) -> list[str]:
    """A name alone if it can be that of a repository of somebody on the Hub, else nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return []
    return [name] if name and "/" in name else []


def card_data(record: RunRecord, title: str, license: str) -> ModelCardData:
    """The metadata at the head of the card."""
    results = eval_results(record)
    return ModelCardData(
        library_name="transformers",
        license=license,
        language=record.source.language if record.source else None,
        pipeline_tag=record.head[1] if record.head[1] != "other" else None,
        tags=[*(["kru", "kronecker", "arxiv:1705.10142"] if record.is_kru else []), "recurrent-neural-network"],
        datasets=on_hub(record.data.get("name")) or None,
        base_model=next(iter(on_hub(record.options.get("model"))), None),
        metrics=[metric for metric, *_ in record.figures()] or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def architecture_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Names and values of the config fields that describe the network."""
    config = record.config
    rows = [("state_size N", shown(config.get("state_size"))), ("vocab_size V", shown(config.get("vocab_size")))]
    shapes = config.get("factor_shapes")
    if record.is_kru:
        rows.append(("Factor shapes P_f x Q_f", " ⊗ ".join(f"{p}x{q}" for p, q in shapes or [])))
    names = [*CONFIG_ROWS, "cell"]
    if record.is_kru and not record.is_gated:
        rows.append(("unitary_loss_coef λ", shown(config.get("unitary_loss_coef"))))
        names.insert(0, "activation")
    rows += [(name, shown(config[name])) for name in names if config.get(name) is not None]
    return rows


def recipe_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Names and values of the options that describe the training; those without effect in this run are left out."""
    options = record.options
    without_effect = {"num_train_epochs"} if (options.get("max_steps") or -1) > 0 else {"max_steps"}
    if options.get("lr_scheduler_type") != "plateau":
        without_effect.add("plateau_factor")
    if options.get("lr_scheduler_type") != "cosine":
        without_effect.add("min_learning_rate_ratio")
    if options.get("optimizer") == "rmsprop":
        without_effect |= {"adam_beta1", "adam_beta2"}
    names = [name for name in RECIPE_OPTIONS if options.get(name) is not None and name not in without_effect]
    rows = [(name, shown(options[name])) for name in names]
    if record.machine.get("processes"):
        rows.append(("processes", shown(record.machine["processes"])))
    done = (("steps", "steps done"), ("best_step", "step of these weights"))
    return rows + [(text, shown(record.results[name])) for name, text in done if record.results.get(name)]


def speed(record: RunRecord) -> str:
    """Run time and throughput, as far as recorded."""
    runtime, rate = record.results.get("train_runtime"), record.results.get("train_tokens_per_second")
    if runtime is None:
        return BLANK
    return f"{shown(float(runtime))} s" + (f", at {rate:,.0f} elements of the sequence a second" if rate else BLANK)


def comparison(record: RunRecord) -> dict[str, Any]:
    """The rows of comparison.json, this model's own first."""
    given = record.comparison.get("rows", [])
    metric = record.comparison.get("metric", BLANK)
    if not given:
        return {"metric": metric, "rows": []}
    own = {
        "value": record.results.get(f"test_{metric}"),
        "num_parameters": record.results.get("num_parameters"),
        "num_recurrent_parameters": record.results.get("num_recurrent_parameters"),
        "source": "all_results.json, test",
    }
    columns = ("name", "value", "num_parameters", "num_recurrent_parameters", "source")
    rows = [{column: shown(row.get(column)) for column in columns} for row in [own, *given]]
    rows[0]["name"] = "**this model**"
    for row in rows:  # a command in backticks, as earlier records have it
        row["source"] = row["source"].removeprefix("\\`").removesuffix("\\`")
    return {"metric": METRICS.get(metric) or plain(metric), "rows": rows}


def render_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    data_license: str | None = None,
    license: str = "apache-2.0",
) -> str:
    """The card of a run's folder, as the text of its README.md.

    Args:
        folder: a trained folder. repo_id: where it will be published; None for a card that stays beside the run.
        revision: what the snippet pins; with a ``repo_id`` "main" if None.
        data_license: licence of the data, where it is not a built-in set. license: of the weights.

    Raises:
        UserError: one of the folder's files is damaged; it is named.
    """
    record = RunRecord.read(Path(folder))
    name = shown(record.data.get("name"))
    pin = (revision or "main") if repo_id else None
    own = f"{record.class_name or 'Model'} {record.data.get('name') or BLANK}"
    title = repo_id.split("/")[-1] if repo_id else one_line(own)
    kind = "A Kronecker recurrent unit" if record.is_kru else "A recurrent baseline"
    sizes = {key.replace("_", " "): value for key, value in record.data.items() if key.startswith(SPLITS)}
    source = record.source
    # What is published always brings its code; a folder of this repository leaves it to the checkout that it lies in.
    carries_code = repo_id is not None or (record.folder / "modeling_kru.py").is_file()
    paper = f"[Kronecker Recurrent Units]({PAPER}) (Jose, Cissé, Fleuret, ICML 2018)"
    card = ModelCard.from_template(
        card_data(record, title, license),
        template_path=str(TEMPLATE),
        title=plain(title),
        summary=f"{kind}" + (f" trained on {name}" if name else BLANK) + f". The method: {paper}.",
        task=shown(record.options.get("task")),
        data={
            "name": name,
            "description": source.description if source else BLANK,
            "license": shown(record.data_license(data_license)),
            "revision": shown(record.data.get("dataset_revision")),
            "sha256": shown(record.data.get("sha256")),
            "size": ", ".join(f"{shown(value)} {plain(name)}" for name, value in sizes.items()),
        },
        architecture={
            "name": plain(record.class_name),
            "num_parameters": shown(record.results.get("num_parameters")),
            "num_recurrent_parameters": shown(record.results.get("num_recurrent_parameters")),
            "rows": architecture_rows(record),
        },
        is_kru=record.is_kru,
        is_gated=record.is_gated,
        recipe=recipe_rows(record),
        command=record.command,
        versions=", ".join(f"{plain(package)} {plain(version)}" for package, version in record.versions.items()),
        results=[(METRICS[n], shown(validation), shown(test)) for n, validation, test in record.figures()],
        comparison=comparison(record),
        speed=speed(record),
        learning_curve=(record.folder / "learning_curve.png").is_file(),
        composition=composition(record.folder),
        how_to_load=how_to_load(record, pin, carries_code),
        snippet=(snippet(record, repo_id or local_place(record.folder), pin, carries_code) if record.is_kru else BLANK),
        limits=limits(record),
        citation=CITATION,
    )
    return str(card)
