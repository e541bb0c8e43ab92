"""Model cards, rendered from what a run's folder records; a field that the folder lacks stays blank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..common.errors import UserError
from ..common.files import check_fields, one_line, read_json
from .card_text import (
    BLANK,
    CITATION,
    DATA_SOURCES,
    METRICS,
    DataSource,
    how_to_load,
    limits,
    local_place,
    plain,
    shown,
    snippet,
)
from .results_page import beside
from .run_record import RECIPE, RESULTS, RUN, RunRecord

TEMPLATE = Path(__file__).parent / "card.md.jinja"
SPLITS = ("train_", "validation_", "test_")  # what the record of a data set counts begins with one of these
PAPER = "https://arxiv.org/abs/1705.10142"
# A short piece that a released music model brings along, its picture, and how `training.compose` made it.
COMPOSITION = ("composition.mid", "composition.png", "composition.json")
COMPOSITION_FIELDS = {"command": str, "prime_frames": int, "num_frames": int, "report": dict[str, Any]}
REPORT_FIELDS = {
    **dict.fromkeys(("density", "lowest", "highest"), float | None),
    **dict.fromkeys(("density_band", "lowest_band", "highest_band"), list[float | int]),
    "within": bool,
}
RECIPE_OPTIONS = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("sequence_length", "carry_state", "frames_per_quarter", "transpose", "optimizer", "adam_beta1", "adam_beta2"),
    *("learning_rate", "factor_learning_rate_scale", "lr_scheduler_type", "warmup_steps", "min_learning_rate_ratio"),
    *("plateau_factor", "weight_decay", "max_grad_norm", "mixed_precision"),
)
CONFIG_ROWS = (
    *("cell_type", "block_type", "num_hidden_layers", "hidden_size", "readout_norm", "io_rank"),
    *("kronecker_terms", "intermediate_size", "recurrent_terms", "recurrent_init", "recurrent_init_scale"),
    *("recurrent_init_max_phase", "chrono_max_length", "train_factors"),
    *("input_dropout", "state_dropout", "hidden_dropout", "cell"),
)


class CardRecord(RunRecord):
    """What a run's folder says about itself, and what follows for a card."""

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
        return [pair for pair in pairs if pair[1:] != (None, None)]


def missing_fields(folder: Path, data_license: str | None = None) -> list[str]:
    """What a card needs before it is published and the folder does not say, as names of fields with their file."""
    record = CardRecord.read(folder)
    needed = {
        "architectures (config.json)": record.class_name,
        f"task ({RECIPE})": record.options.get("task"),
        f"data.name ({RUN})": record.data.get("name"),
        "licence of the data (--data_license)": record.data_license(data_license),
        f"num_parameters ({RESULTS})": record.results.get("num_parameters"),
        f"num_recurrent_parameters ({RESULTS})": record.results.get("num_recurrent_parameters"),
        f"a validation_ or test_ figure ({RESULTS})": record.figures(),
    }
    return [name for name, value in needed.items() if value in (None, BLANK, [])]


def composition(folder: Path) -> dict[str, Any] | None:
    """How the released piece was made and how it compares with the training pieces; None without such a piece."""
    if not all((folder / name).is_file() for name in COMPOSITION):
        return None
    path = folder / COMPOSITION[2]
    made = read_json(path)
    check_fields(path, made, COMPOSITION_FIELDS, required=True)
    report = made["report"]
    check_fields(f"{path}: report", report, REPORT_FIELDS, required=True)
    names, figures = {"density": "keys a frame", "lowest": "lowest pitch", "highest": "highest pitch"}, []
    for key, name in names.items():
        band = report[f"{key}_band"]
        if len(band) != 2:
            raise UserError(f"{path}: report: {key}_band={band} is not valid: it must be two figures")
        figures.append(f"{name} {shown(report[key])} (training pieces: {shown(band[0])} to {shown(band[1])})")
    return {**made, "command": one_line(made["command"]), "figures": ", ".join(figures), "within": report["within"]}


def eval_results(record: CardRecord) -> list[EvalResult]:
    """The figures as the Hub's model-index wants them."""
    name, config, revision = (
        one_line(record.data.get(key) or BLANK) for key in ("name", "dataset_config", "dataset_revision")
    )
    return [
        EvalResult(
            task_type=record.head[1],
            dataset_type=name,
            dataset_name=name,
            dataset_config=config or None,
            dataset_revision=revision or None,
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=value,
        )
        for metric, *values in (record.figures() if name else [])
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


def card_data(record: CardRecord, title: str, license: str) -> ModelCardData:
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


def architecture_rows(record: CardRecord) -> list[tuple[str, str]]:
    """Names and values of the config fields that describe the network."""
    config = record.config
    rows = [("state_size N", shown(config.get("state_size"))), ("vocab_size V", shown(config.get("vocab_size")))]
    names = list(CONFIG_ROWS)
    if record.is_kru:
        shapes = config.get("factor_shapes") or []
        rows.append(("Factor shapes P_f x Q_f", " ⊗ ".join(f"{p}x{q}" for p, q in shapes)))
    if record.is_kru and not record.is_gated:
        rows.append(("unitary_loss_coef λ", shown(config.get("unitary_loss_coef"))))
        names.insert(0, "activation")
    return rows + [(name, shown(config[name])) for name in names if config.get(name) is not None]


def recipe_rows(record: CardRecord) -> list[tuple[str, str]]:
    """Names and values of the options that describe the training; those without effect in this run are left out."""
    options = record.options
    idle = {"num_train_epochs"} if (options.get("max_steps") or -1) > 0 else {"max_steps"}
    idle |= set() if options.get("lr_scheduler_type") == "plateau" else {"plateau_factor"}
    idle |= set() if options.get("lr_scheduler_type") == "cosine" else {"min_learning_rate_ratio"}
    idle |= {"adam_beta1", "adam_beta2"} if options.get("optimizer") == "rmsprop" else set()
    names = [name for name in RECIPE_OPTIONS if options.get(name) is not None and name not in idle]
    rows = [(name, shown(options[name])) for name in names]
    rows += [("processes", shown(machine["processes"])) for machine in record.machines[-1:] if "processes" in machine]
    done = (("steps", "steps done"), ("best_step", "step of these weights"))
    return rows + [(text, shown(record.results[name])) for name, text in done if record.results.get(name)]


def speed(record: CardRecord) -> str:
    """Run time and throughput, as far as recorded."""
    wall, used, rate = (
        record.results.get(name) for name in ("train_runtime", "processor_seconds", "train_tokens_per_second")
    )
    parts = [
        f"{shown(float(wall or 0))} s",
        f"{shown(float(used))} s of processor time" if used is not None else BLANK,
        f"at {rate:,.0f} elements of the sequence a second" if rate else BLANK,
    ]
    return ", ".join(part for part in parts if part) if wall is not None else BLANK


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
    record = CardRecord.read(Path(folder))
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
        versions=", ".join(f"{plain(key)} {plain(value)}" for key, value in record.run.get("versions", {}).items()),
        results=[(METRICS[n], shown(validation), shown(test)) for n, validation, test in record.figures()],
        beside=beside(record.folder),
        speed=speed(record),
        learning_curve=(record.folder / "learning_curve.png").is_file(),
        composition=composition(record.folder),
        how_to_load=how_to_load(record, pin, carries_code),
        snippet=(snippet(record, repo_id or local_place(record.folder), pin, carries_code) if record.is_kru else BLANK),
        limits=limits(record),
        citation=CITATION,
    )
    return str(card)
