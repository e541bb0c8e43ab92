"""From options to a model, new or trained."""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import kru_hf
from kru_hf import scan, scan_triton

from ..common import processes
from ..common.errors import UserError
from ..common.files import check_fields, not_finite, one_line, read, read_json
from ..common.run_folder import MODEL_FILES, WEIGHTS
from ..options.model import ModelOptions
from .baselines import CELLS, BaselineConfig
from .heads import HEADS
from .sizing import fit_to_budget
from .unitary import UnitaryKRUConfig

FLOATS = ("F32", "F16", "BF16")  # what weights can be stored as, by safetensors' names
# Heads that predict what comes next, so that nothing may be read from the end of a sequence.
STREAMED = ("causal_lm", "piano_roll")


def model_class(head: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that has that head for that config."""
    if config.model_type == "kru":
        return HEADS[head].kru
    try:
        return HEADS[head].auto._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(f"there is no {config.model_type} model with the head {head!r} yet") from error


def build_model(head: str, options: ModelOptions, **fixed: Any) -> PreTrainedModel:
    """A new model with random weights.

    Args:
        head: a key of HEADS.
        options: architecture and config fields.
        fixed: config fields that the data decides, such as vocab_size.
    """
    values = {**options.config_values(), **fixed}
    config_type: Any = kru_hf.KRUConfig
    if options.architecture == "unitary":
        config_type = UnitaryKRUConfig
    if options.architecture in CELLS:
        config_type = BaselineConfig
        values["cell"] = options.architecture
    if head == "piano_roll":
        values.setdefault("frame_head", "chain")
    if values.get("bidirectional") and head in STREAMED:
        raise UserError(f"bidirectional=True cannot be given for a {head} task: it would read what it is to predict")
    if options.parameter_budget is not None:
        values = within_budget(head, config_type, options, values)
    config = make_config(config_type, values)
    model = in_memory(head, config, options)
    if options.parameter_budget is not None and processes.rank() == 0:
        names = ("state_size", "factor_shapes", "io_rank", "hidden_size", "recurrent_rank")
        sizes = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name, None) is not None]
        print(f"sized: {options.architecture} with {', '.join(sizes)}: {model.num_parameters():,} parameters")
    return model


def make_config(config_type: Any, values: dict[str, Any]) -> PreTrainedConfig:
    """A config of these values; `UserError` says which of them is not allowed."""
    try:
        return config_type(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model options: {_root_cause(error)}") from error


@contextmanager
def using_backend(backend: str, model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Run the recurrences of a KRU model by an engine; `UserError` if it cannot run here: the first step would say it.

    "auto" leaves the choice to ``kru_hf.use_backend``.
    """
    if backend == "auto":
        yield
        return
    check_kronecker(model, f"backend={backend!r}")
    reason = scan.unavailable_reason(backend, model.config.recurrent_cell)
    if reason is not None:
        raise UserError(f"backend={backend!r} cannot run here: {reason}; 'auto' takes what can")
    on_cpu = backend == "cpu" or (backend == "triton" and scan_triton.is_interpreted())
    if backend in ("cpu", "triton") and on_cpu != (device.type == "cpu"):
        raise UserError(f"backend={backend!r} cannot run on the device {device.type!r}; 'auto' takes what can")
    kru_hf.use_backend(backend)
    try:
        yield
    finally:
        kru_hf.use_backend("auto")


def freeze_factors(model: PreTrainedModel) -> None:
    """Leave the factors of a KRU model out of training: W stays where it is."""
    check_kronecker(model, "freeze_factors=True")
    for _, factor in cast(kru_hf.KRUPreTrainedModel, model).recurrent_parameters():
        factor.requires_grad_(False)


def check_kronecker(model: PreTrainedModel, given: str) -> None:
    """`UserError` for an option of Kronecker recurrences, and a trained model without any."""
    if not isinstance(model.config, kru_hf.KRUConfig):
        raise UserError(f"{given} has no effect here: the model is a {model.config.model_type}, without factors")


def count_parameters(head: str, config: PreTrainedConfig) -> int:
    """Parameters of the model of a config, which is not built for it."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model_class(head, config)(config).num_parameters()


def in_memory(head: str, config: PreTrainedConfig, options: ModelOptions) -> PreTrainedModel:
    """The model of a config; `UserError` if its weights do not fit into this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    num_parameters = 0
    try:
        num_parameters = count_parameters(head, config)  # a parametrized matrix is built for it
        if 4 * num_parameters > memory:
            raise MemoryError
        return model_class(head, config)(config)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        given = {**options.config_values(), "parameter_budget": options.parameter_budget}
        sizes = ", ".join(f"{name}={value}" for name, value in given.items() if isinstance(value, int) and value > 1)
        counted = f"has {num_parameters:,} parameters, and their {4 * num_parameters / 2**30:,.1f} GiB"
        counted = counted if num_parameters else "has matrices that"
        raise UserError(f"{sizes}: the model {counted} do not fit into this machine's memory") from error


def within_budget(head: str, config_type: Any, options: ModelOptions, values: dict[str, Any]) -> dict[str, Any]:
    """Config values of the largest model within `options.parameter_budget`; what was turned off stays so."""
    known = {f.name for f in dataclasses.fields(config_type)}
    values = {**values, **{name: None for name in options.turned_off() if name in known}}

    def count(trial: dict[str, Any]) -> int:
        return count_parameters(head, make_config(config_type, trial))

    return fit_to_budget(int(options.parameter_budget or 0), options.architecture, values, count)


def _root_cause(error: BaseException) -> str:
    """The message of the innermost error: strict configs wrap the one that says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@contextmanager
def loading(folder: str, part: str) -> Iterator[None]:
    """An error of one line that names `part` for whatever transformers' readers raise, in place of their reports."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what they do not expect in a damaged file ends in errors of any kind
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        cause = _root_cause(error) if isinstance(error, StrictDataclassError) else error
        raise UserError(f"model={folder!r} cannot be loaded: {part}: {kind}{one_line(cause, 400)}") from error
    finally:
        logging.set_verbosity(level)


def load_model(folder: str, head: str) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer (or None) of a trained folder or Hub id; pushed code is never executed.

    Raises:
        UserError: it does not exist, is incomplete or damaged, or model and tokenizer do not fit together; it names the
            file.
    """
    local = Path(folder)
    if not local.exists() and (local.is_absolute() or folder.startswith(".") or len(local.parts) > 2):
        raise UserError(f"model={folder!r} does not exist; pass the folder of a model or a Hub id")
    if local.exists() and not os.path.lexists(local / "config.json"):
        raise UserError(f"model={folder!r} is not a model folder: it has no config.json")
    if local.exists():
        check_files(local)
    with loading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        load: Any = model_class(head, config).from_pretrained
    if (local / "generation_config.json").exists():
        with loading(folder, "generation_config.json"):
            GenerationConfig.from_pretrained(folder)
    with loading(folder, f"{WEIGHTS} by config.json"):
        model, found = load(folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    check_weights(folder, model, found)
    tokenizer = None
    if head == "causal_lm" and (not local.exists() or (local / "tokenizer.json").exists()):
        with loading(folder, "tokenizer.json or tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.decode(tokenizer("a text")["input_ids"])  # some wrong fields only show when it is used
            last = max([*tokenizer.get_vocab().values(), *tokenizer.all_special_ids])
            if last >= len(tokenizer):
                raise UserError(f"model={folder!r}: tokenizer.json has the id {last} and {len(tokenizer)} tokens")
    if tokenizer is not None and len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"model={folder!r}: the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{model.config.vocab_size} (tokenizer.json, config.json)"
        )
    return model, tokenizer


def check_files(folder: Path) -> None:
    """`UserError` that names a file of a model's folder which is not JSON, or not weights that a model can have."""
    for name in MODEL_FILES:
        values = read_json(folder / name, optional=True)
        check_fields(folder / name, values, {"architectures": list[str] | None})
    path = folder / WEIGHTS
    if not os.path.lexists(path):
        return

    def reader(file: Path) -> dict[str, str]:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)

    for name, dtype in read(path, reader).items():
        if dtype not in FLOATS:
            raise UserError(f"{str(path)!r}: {name} is of the type {dtype}; weights must be {', '.join(FLOATS)}")


def check_weights(folder: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """`UserError` for weights that are not there, which would be drawn anew, of another shape, or not finite.

    Another head than the saved one is new, and leaves the saved one's weights alone.
    """
    same_head = type(model).__name__ in (model.config.architectures or [])
    inside = f"{model.base_model_prefix}."
    wrong = {
        f"{kind} keys": sorted(name for name in found[f"{kind}_keys"] if same_head or name.startswith(inside))
        for kind in ("missing", "unexpected")
    }
    shapes = sorted(found["mismatched_keys"])
    wrong["shapes"] = [f"{name} is {list(stored)}, not {list(wanted)}" for name, stored, wanted in shapes]
    if any(wrong.values()):
        shown = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in wrong.items() if names)
        raise UserError(f"the weights in {folder!r} ({WEIGHTS}) do not fit config.json: {shown}")
    if broken := not_finite(model):
        raise UserError(f"the weights in {folder!r} ({WEIGHTS}) are not finite: {', '.join(broken[:5])}")


def check_fit(folder: str, model: PreTrainedModel, task: str, wanted: dict[str, Any]) -> None:
    """`UserError` unless a trained model takes what a task gives, and has an output for each of its targets.

    Args:
        task: its name. wanted: the config fields that its data fix.
    """
    config = model.config
    width, kind = getattr(config, "input_size", None), wanted.get("problem_type")
    checks = [
        ("input_size", width, wanted.get("input_size"), width == wanted.get("input_size")),
        ("vocab_size", config.vocab_size, wanted["vocab_size"], wanted["vocab_size"] <= config.vocab_size),
        ("num_labels", config.num_labels, wanted.get("num_labels"), wanted.get("num_labels", 0) <= config.num_labels),
        ("problem_type", config.problem_type, kind, kind is None or config.problem_type in (None, kind)),
    ]
    for name, has, needs, fits in checks:
        if not fits:
            raise UserError(f"model={folder!r} does not fit the task {task}: its {name} is {has}, not {needs}")
