"""Options of a training run: dataclasses, read from a recipe (YAML of the same flat names) and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from kru_hf.configuration_kru import GATED_TYPES

from .errors import UserError, printable
from .files import one_line
from .idle_options import given_names, refuse_idle
from .machine import shown_command
from .superseded import superseded
from .tasks import DataOptions, get_task, task_names

ARCHITECTURES = ("kru", "rnn", "lstm", "gru", "orthogonal", "low_rank", "unitary")
RECIPES = Path(__file__).parent / "recipes"
# Of a value in a recipe: what YAML gives it by itself. Its text alone counts, so they make no difference.
TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")]
# Options of the model that 0 turns off, as if they were not given: so a recipe's own can be taken back.
OFF_AT_ZERO = ("io_rank", "kronecker_terms", "intermediate_size", "chrono_max_length")
MAX_COUNT = 2**31 - 1  # of every other whole number: what arrays and tensors of such sizes can still be counted with
MAX_THREADS = 1024  # OpenMP ends the process where it cannot start them
MAX_RECIPE = 1 << 20  # bytes
MAX_SEED = 2**63 - 1  # torch takes unsigned numbers of 64 bits, and each process adds its own number to the seed


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help sentence."""
    return field(default=default, metadata={"help": text})


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the option, its value and what is allowed."""
    if not condition:
        raise UserError(f"{name}={value!r} is not valid: it must be {allowed}")


def check_seed(seed: int) -> None:
    """Raise `UserError` for a seed that torch or NumPy would not take."""
    require(0 <= seed <= MAX_SEED, "seed", seed, f"between 0 and {MAX_SEED}")


@dataclass
class ModelOptions:
    """What is trained. An option left at None keeps the model's own default."""

    architecture: str = option("kru", f"Kind of network: {', '.join(ARCHITECTURES)}.")
    model: str | None = option(None, "Trained folder or Hub id to go on from, instead of a new model.")
    parameter_budget: int | None = option(
        None, "Most real parameters of the whole model: the size that is not given is chosen to come near it."
    )
    state_size: int | None = option(None, "Units of the state: N complex ones for kru, the hidden size for others.")
    factor_size: int | None = option(None, "Size of the square Kronecker factors, from which their shapes are planned.")
    factor_shapes: str | None = option(None, "Shapes of the Kronecker factors: 7x7,8x8,9x9 or [[7,7],[8,8],[9,9]].")
    cell_type: str | None = option(None, "Recurrent cell of a kru model.")
    num_hidden_layers: int | None = option(None, "Number of recurrent layers.")
    hidden_size: int | None = option(None, "Width of the real features between layers, and of the embedding.")
    wiring: str | None = option(None, "How kru layers are joined: residual, or plain (the paper's network).")
    bidirectional: bool | None = option(
        None, "Whether a kru model also reads from the end of the sequence: for tasks that classify."
    )
    io_rank: int | None = option(None, "Rank of the input and readout maps of a kru model; not given or 0: full.")
    kronecker_terms: int | None = option(
        None, "Kronecker products whose sum each map of a residual kru model is; not given or 0: dense maps."
    )
    intermediate_size: int | None = option(
        None, "Width of the gated feed-forward block after each recurrence of a kru model; not given or 0: none."
    )
    readout_norm: bool | None = option(None, "Whether the state is normalised where it is read.")
    recurrent_rank: int | None = option(None, "Rank of the recurrent matrix of low_rank; default: state_size / 8.")
    recurrent_init: str | None = option(None, "Start of the recurrent matrix: random (unitary) or identity.")
    recurrent_init_scale: float | None = option(None, "Spectral norm of the recurrent matrix at the start.")
    recurrent_init_max_phase: float | None = option(
        None, "Largest phase (radians) of the recurrent matrix's eigenvalues at the start; not given: all of them."
    )
    bias_init: float | None = option(None, "Start value of the modReLU bias.")
    chrono_max_length: int | None = option(
        None, "Longest memory, in steps, that gates start with (chrono initialisation); not given or 0: forget bias 1."
    )
    input_scale: float | None = option(None, "Standard deviation of the input map at the start.")
    activation: str | None = option(None, "State activation of a kru model: modrelu or identity.")
    input_dropout: float | None = option(None, "Dropout after the input map (after the embedding for baselines).")
    state_dropout: float | None = option(None, "Dropout on the states before they are read.")
    hidden_dropout: float | None = option(None, "Dropout on the residual branches (between the layers of baselines).")
    unitary_loss_coef: float | None = option(None, "Weight of the soft unitary penalty in the training loss.")
    max_recurrent_norm: float | None = option(
        None, "Largest spectral norm of a kru model's recurrent matrix, held after every step; 0: no bound."
    )
    train_factors: bool | None = option(None, "Whether the Kronecker factors are trained; false freezes them.")
    scan_backend: str | None = option(None, "Engine of the recurrence: auto, reference, torch, cpu or triton.")
    layer_norm_epsilon: float | None = option(None, "Epsilon of the RMS norms.")
    initializer_range: float | None = option(None, "Standard deviation of the output head's weights at the start.")
    use_cache: bool | None = option(None, "Whether the saved model returns its state by default.")
    tie_word_embeddings: bool | None = option(None, "Whether embedding and output layer share their weights.")

    def __post_init__(self) -> None:
        require(
            self.architecture in ARCHITECTURES, "architecture", self.architecture, f"one of {', '.join(ARCHITECTURES)}"
        )
        if self.unitary_loss_coef is not None:
            require(self.unitary_loss_coef >= 0, "unitary_loss_coef", self.unitary_loss_coef, "0 or more")
        if self.max_recurrent_norm is not None:
            require(0 <= self.max_recurrent_norm < math.inf, "max_recurrent_norm", self.max_recurrent_norm, "0 or more")
        if self.parameter_budget is not None:
            require(self.parameter_budget >= 1, "parameter_budget", self.parameter_budget, "1 or more")
        for name in OFF_AT_ZERO:
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "positive, or 0 to turn it off")
        if self.cell_type in GATED_TYPES:
            for name in ("bias_init", "unitary_loss_coef", "max_recurrent_norm"):
                require(not getattr(self, name), name, getattr(self, name), f"left out with cell_type {self.cell_type}")
        parse_factor_shapes(self.factor_shapes)
        if self.model is not None and self.parameter_budget is not None:
            raise UserError(f"model={self.model!r} has its size already; remove parameter_budget")
        own = sorted([*self.config_values(), *self.turned_off()])
        if self.model is not None and own:
            raise UserError(f"model={self.model!r} brings its own configuration; remove {', '.join(own)}")

    def turned_off(self) -> list[str]:
        """The config fields that were given as 0, which stands for none."""
        return [name for name in OFF_AT_ZERO if getattr(self, name) == 0]

    def config_values(self) -> dict[str, Any]:
        """The config fields that were given and not turned off, by name."""
        others = ("architecture", "model", "parameter_budget", "max_recurrent_norm", *self.turned_off())
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in others}
        if "factor_shapes" in values:
            values["factor_shapes"] = parse_factor_shapes(values["factor_shapes"])
        return values


def parse_factor_shapes(text: str | None) -> list[list[int]] | None:
    """`"7x7,8x8"` or `"[[7, 7], [8, 8]]"` as a list of pairs."""
    if text is None:
        return None
    try:
        if text.lstrip().startswith("["):
            shapes = [[n if isinstance(n, int) else 0 for n in shape] for shape in json.loads(text)]
        else:
            shapes = [[int(n) for n in shape.lower().split("x")] for shape in text.split(",")]
    except (TypeError, ValueError):
        shapes = []
    good = bool(shapes) and all(len(shape) == 2 and min(shape) > 0 for shape in shapes)
    require(good, "factor_shapes", text, "pairs of positive numbers such as 7x7,8x8,9x9")
    return shapes


@dataclass
class RunOptions:
    """How it is trained, and where it is kept. Names follow transformers' TrainingArguments."""

    task: str = option("char_lm", "What is trained on: the name of a file of training/tasks.")
    output_dir: str | None = option(None, "Folder of the run (default: runs/<task>-<architecture>).")
    overwrite_output_dir: bool = option(False, "Delete an earlier run in the output folder.")
    resume_from_checkpoint: str | None = option(None, "Go on from 'last' or from a checkpoint folder.")
    seed: int = option(0, "Seed of initial weights, dropout and data order.")
    max_steps: int = option(-1, "Optimizer steps; -1 means that num_train_epochs decides.")
    num_train_epochs: float = option(20.0, "Passes over the training data.")
    per_device_train_batch_size: int = option(32, "Rows (streams or samples) a process and accumulation step.")
    gradient_accumulation_steps: int = option(1, "Batches whose gradients are averaged in one optimizer step.")
    learning_rate: float = option(3e-3, "Peak learning rate.")
    factor_learning_rate_scale: float = option(0.1, "Learning rate of the factors, as a multiple of learning_rate.")
    weight_decay: float | None = option(
        None, "AdamW weight decay (0.01; 0 with rmsprop); never on biases, norms and recurrent factors."
    )
    adam_beta1: float = option(0.9, "AdamW's first momentum.")
    adam_beta2: float = option(0.98, "AdamW's second momentum.")
    optimizer: Literal["adamw", "rmsprop"] = option("adamw", "Optimizer; rmsprop has decay 0.9.")
    lr_scheduler_type: Literal["cosine", "plateau", "constant"] = option("cosine", "Learning rate after the warm-up.")
    warmup_steps: int = option(100, "Steps of linear warm-up (at most a tenth of the run).")
    min_learning_rate_ratio: float = option(0.02, "Where the cosine ends, as a multiple of learning_rate.")
    plateau_factor: float = option(0.3, "Multiplies the learning rate when the validation figure stalls (plateau).")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 turns clipping off.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Precision of matrix products.")
    num_threads: int = option(0, "CPU threads a process; 0 shares the cores out among this machine's processes.")
    use_cpu: bool = option(False, "Train on the CPU even if there is an accelerator.")
    eval_steps: int = option(200, "Steps between evaluations on the validation data.")
    save_steps: int = option(200, "Steps between checkpoints.")
    save_total_limit: int = option(2, "Checkpoints that are kept; 0 keeps all.")
    logging_steps: int = option(20, "Steps between log entries.")
    early_stopping_patience: int = option(0, "Stop after that many evaluations without improvement; 0 never does.")
    report_to: str = option("tensorboard", "Tracker of accelerate that gets the figures, or none.")
    sample_length: int = option(300, "Length of the sample that is shown at the end.")
    evaluate_test: bool = option(True, "Score the test split at the end; false while models are still being chosen.")
    push_to_hub: bool = option(False, "Publish the folder at the end, as training.publish does.")
    hub_model_id: str | None = option(None, "ME/NAME of the repository to publish to.")
    hub_private_repo: bool = option(False, "Make that repository private.")
    data_license: str | None = option(None, "Licence of the data set, for the card; built-in sets bring their own.")

    def __post_init__(self) -> None:
        for name in ("output_dir", "resume_from_checkpoint"):
            require(getattr(self, name) != "", name, "", "a path, or left out")
        require(self.task in task_names(), "task", self.task, f"one of {', '.join(task_names())}")
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
            "save_steps",
            "logging_steps",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in (
            "warmup_steps",
            "save_total_limit",
            "early_stopping_patience",
            "sample_length",
            "num_threads",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        check_seed(self.seed)
        if self.weight_decay is None:
            self.weight_decay = 0.0 if self.optimizer == "rmsprop" else 0.01
        if self.optimizer == "rmsprop":
            require(self.weight_decay == 0, "weight_decay", self.weight_decay, "0 with optimizer rmsprop")
        require(0 < self.learning_rate < 1e36, "learning_rate", self.learning_rate, "positive, and fit for fp32")
        epochs = self.num_train_epochs
        require(0 < epochs <= MAX_COUNT, "num_train_epochs", epochs, f"positive and at most {MAX_COUNT}")
        require(self.num_threads <= MAX_THREADS, "num_threads", self.num_threads, f"at most {MAX_THREADS}")
        for name in ("weight_decay", "max_grad_norm", "factor_learning_rate_scale"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more and finite")
        for name in ("min_learning_rate_ratio", "plateau_factor"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more and less than 1")
        if self.push_to_hub:
            ok = self.hub_model_id is not None and self.hub_model_id.count("/") == 1
            require(ok, "hub_model_id", self.hub_model_id, "ME/NAME where push_to_hub is true")
        require(self.max_steps == -1 or self.max_steps > 0, "max_steps", self.max_steps, "-1 or 1 and more")


@dataclass
class Arguments:
    """All options of a run; `command` is how to repeat it."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    task: Any
    command: str = ""

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output_dir or f"runs/{self.run.task}-{self.model.architecture}")

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        parts = (self.run, self.model, self.data, self.task)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are `UserError`, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or an empty string if nothing is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def read_recipe(path: Path) -> dict[str, str]:
    """The flat mapping of a recipe file: names to values as they are written, as on the command line.

    So `no` and `010` mean what they mean there; YAML 1.1 would make false and 8 of them. Keys without a value are left
    out.

    Raises:
        UserError: no such file, not YAML, not a mapping of names to values, a key given twice.
    """
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"recipe {str(path)!r} does not exist; recipes here: {', '.join(names)}")
    if path.stat().st_size > MAX_RECIPE:
        raise UserError(f"recipe {str(path)!r} has {path.stat().st_size:,} bytes; it may have {MAX_RECIPE:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        check_flat(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, or what check_flat refuses
        raise UserError(f"recipe {str(path)!r} is not valid YAML: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"recipe {str(path)!r} must be a mapping of option names to values")
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"recipe {str(path)!r}, line {line}: a key must be the name of an option")
        if key.value in lines:
            raise UserError(
                f"recipe {str(path)!r}: {key.value!r} is given twice, in lines {lines[key.value]} and {line}"
            )
        lines[key.value] = line
        value = written(value, f"recipe {str(path)!r}, line {line}: {key.value}")
        if value is not None:
            values[key.value] = value
    return values


def check_flat(text: str) -> None:
    """`ValueError` for a recipe with aliases, which can stand for more than memory holds, or deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has the alias *{event.anchor}; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 3:
            raise ValueError("it is nested deeper than a list of lists")


def written(node: yaml.Node, where: str) -> str | None:
    """A value of a recipe as it is written, lists (of lists) in brackets; None for an empty one."""
    if node.tag not in TAGS:
        raise UserError(f"{where} has the tag {node.tag}, and must be a plain value")
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null", "Null", "NULL") else node.value
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(written(item, where) or 'null' for item in node.value)}]"
    raise UserError(f"{where} must be a value or a list of pairs")


def recipe_arguments(values: dict[str, str], fields: list[dataclasses.Field[Any]], source: str) -> list[str]:
    """A recipe as command-line words, so that both are converted and checked in the same way."""
    kinds = {f.name: str(f.type) for f in fields}
    words: list[str] = []
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{source}: unknown key {name!r}{nearest(name, list(kinds))}")
        if "bool" in kinds[name]:  # what YAML itself allows beside yes, no, true and false
            value = {"on": "true", "off": "false"}.get(value.lower(), value)
        words.append(f"--{name}={value}")
    return words


def parse_arguments(argv: list[str] | None = None, program: str = "training.train") -> Arguments:
    """Options from `[RECIPE.yaml] [--option value …]`; the command line wins over the recipe.

    Without a recipe the defaults of `recipes/<task>.yaml` are used if there is such a file.

    Raises:
        UserError: an unknown key or option (naming the nearest right one), or a value that is not allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = argv[1:] if argv and not argv[0].startswith("-") else argv
    source = Path(argv[0]) if len(words) < len(argv) else None
    if source is not None and not source.is_file() and (RECIPES / f"{source.name}.yaml").is_file():
        source = RECIPES / f"{source.name}.yaml"
    recipe = read_recipe(source) if source is not None else {}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=recipe.get("task", "char_lm"))
    task = get_task(first.parse_known_args(words)[0].task)
    usual = RECIPES / f"{task.default_recipe or task.name}.yaml"
    if source is None and usual.is_file():
        source = usual
        recipe = read_recipe(source)

    classes = [RunOptions, ModelOptions, DataOptions, task.Options]
    fields = [f for c in classes for f in dataclasses.fields(c)]
    # A recipe's own kind of network, or length, is dropped when the command line asks for another.
    given = parse_words(classes, words, program)
    recipe = {name: value for name, value in recipe.items() if not superseded(name, recipe, given[1], words)}
    if "num_train_epochs" in given_names(words):
        recipe.pop("max_steps", None)
    if given[0].optimizer not in ("adamw", recipe.get("optimizer")):  # it has no weight decay
        recipe.pop("weight_decay", None)
    arguments = Arguments(*parse_words(classes, [*recipe_arguments(recipe, fields, str(source)), *words], program))
    refuse_idle(words, arguments.flat())
    arguments.command = shown_command(argv, program)
    return arguments


def parse_words(classes: list[Any], words: list[str], program: str) -> list[Any]:
    """One object of each dataclass from command-line words."""
    known = [f.name for c in classes for f in dataclasses.fields(c)]
    parser = _Parser(classes, prog=program, allow_abbrev=False, description="See README.md.")
    namespace, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0].replace("-", "_")
            raise UserError(f"unknown option {word!r}{nearest(name, known)}")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: a recipe comes first, then --option value")
    values = vars(namespace)
    for name in known:
        if isinstance(values[name], int) and "seed" not in name:
            require(values[name] <= MAX_COUNT, name, values[name], f"at most {MAX_COUNT}")
    for name, value in values.items():
        if name != "dataset" and isinstance(value, str) and printable(value) != value:
            raise UserError(f"{name}={value!r} is not valid: it must be UTF-8, as the libraries need that write there")
    return [c(**{f.name: values[f.name] for f in dataclasses.fields(c)}) for c in classes]
