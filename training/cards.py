"""Model cards, rendered from what a run's own folder records; a field that the folder lacks stays blank.

A card reads `config.json`, `all_results.json`, `log_history.json` (through its picture, `learning_curve.png`),
`training.json` and, if there is one, `comparison.json`:

    {"metric": "bpc", "rows": [{"name": "LSTM of the same size", "value": 1.9, "num_parameters": 1, "source": "…"}]}

`num_parameters`, `num_recurrent_parameters` and `source` of a row may be missing. `training.compare` writes that file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_text import BLANK, CITATION, DATA_SOURCES, DataSource, how_to_load, limits, local_place, snippet
from .commands import amended
from .errors import UserError

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


def composition(folder: Path) -> dict[str, Any] | None:
    """How the released piece was made and how it compares with the training pieces; None without such a piece."""
    if not all((folder / name).is_file() for name in COMPOSITION):
        return None
    made = read_json(folder / COMPOSITION[2])
    report = made["report"]
    figures = [
        f"{name} {shown(report[key])} (training pieces: {shown(report[f'{key}_band'][0])} to "
        f"{shown(report[f'{key}_band'][1])})"
        for key, name in (("density", "keys a frame"), ("lowest", "lowest pitch"), ("highest", "highest pitch"))
    ]
    return {**made, "figures": ", ".join(figures), "within": report["within"]}


def read_json(path: Path) -> Any:
    """A JSON file, or an empty mapping if it is not there; a damaged one is a `UserError`."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} of {path.parent.name!r} cannot be read: {error}") from error


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
        """Read the files that are there."""
        training = read_json(folder / "training.json")
        config, options = read_json(folder / "config.json"), training.get("options", {})
        return cls(
            folder,
            config,
            read_json(folder / "all_results.json"),
            options,
            training.get("dataset", {}),
            training.get("versions", {}),
            read_json(folder / "comparison.json"),
            amended(training.get("command") or BLANK, options, config),
            training.get("machine", {}),
        )

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
    return str(value).replace("|", "\\|").replace("\n", " ")


def eval_results(record: RunRecord) -> list[EvalResult]:
    """The figures as the Hub's model-index wants them."""
    name = record.data.get("name")
    if not name:
        return []
    return [
        EvalResult(
            task_type=record.head[1],
            dataset_type=name,
            dataset_name=name,
            dataset_config=record.data.get("dataset_config"),
            dataset_revision=record.data.get("dataset_revision"),
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=value,
        )
        for metric, *values in record.figures()
        for split, value in zip(("validation", "test"), values, strict=True)
        if value is not None
    ]


def card_data(record: RunRecord, title: str, license: str) -> ModelCardData:
    """The metadata at the head of the card."""
    name = record.data.get("name", BLANK)
    base = record.options.get("model")
    results = eval_results(record)
    return ModelCardData(
        library_name="transformers",
        license=license,
        language=record.source.language if record.source else None,
        pipeline_tag=record.head[1] if record.head[1] != "other" else None,
        tags=[*(["kru", "kronecker", "arxiv:1705.10142"] if record.is_kru else []), "recurrent-neural-network"],
        datasets=[name] if "/" in name else None,
        base_model=base if base and "/" in base else None,
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
        rows.append(("Factor shapes P_f x Q_f", " ⊗ ".join(f"{p}x{q}" for p, q in shapes) if shapes else BLANK))
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
        "name": "**this model**",
        "value": record.results.get(f"test_{metric}"),
        "num_parameters": record.results.get("num_parameters"),
        "num_recurrent_parameters": record.results.get("num_recurrent_parameters"),
        "source": "all_results.json, test",
    }
    columns = ("name", "value", "num_parameters", "num_recurrent_parameters", "source")
    rows = [{column: shown(row.get(column)) for column in columns} for row in [own, *given]]
    return {"metric": METRICS.get(metric, metric), "rows": rows}


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
        UserError: one of the folder's files is damaged.
    """
    record = RunRecord.read(Path(folder))
    name = record.data.get("name", BLANK)
    pin = (revision or "main") if repo_id else None
    title = (repo_id or f"{record.class_name or 'Model'} {name}".strip()).split("/")[-1]
    kind = "A Kronecker recurrent unit" if record.is_kru else "A recurrent baseline"
    size = [f"{shown(value)} {key.replace('_', ' ')}" for key, value in record.data.items() if key.startswith(SPLITS)]
    source = record.source
    # What is published always brings its code; a folder of this repository leaves it to the checkout that it lies in.
    carries_code = repo_id is not None or (record.folder / "modeling_kru.py").is_file()
    paper = f"[Kronecker Recurrent Units]({PAPER}) (Jose, Cissé, Fleuret, ICML 2018)"
    card = ModelCard.from_template(
        card_data(record, title, license),
        template_path=str(TEMPLATE),
        title=title,
        summary=f"{kind}" + (f" trained on {name}" if name else BLANK) + f". The method: {paper}.",
        task=record.options.get("task", BLANK),
        data={
            "name": name,
            "description": source.description if source else BLANK,
            "license": record.data_license(data_license),
            "revision": record.data.get("dataset_revision", BLANK),
            "sha256": record.data.get("sha256", BLANK),
            "size": ", ".join(size),
        },
        architecture={
            "name": record.class_name,
            "num_parameters": shown(record.results.get("num_parameters")),
            "num_recurrent_parameters": shown(record.results.get("num_recurrent_parameters")),
            "rows": architecture_rows(record),
        },
        is_kru=record.is_kru,
        is_gated=record.is_gated,
        recipe=recipe_rows(record),
        command=record.command,
        versions=", ".join(f"{package} {version}" for package, version in record.versions.items()),
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
