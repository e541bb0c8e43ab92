"""Options of the model. One left at None keeps the model's own default."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from kru_hf import KRUConfig
from kru_hf.cells import STARTS, TRANSITIONS
from kru_hf.configuration_kru import GATED_TYPES

from ..common.errors import UserError
from .fields import AT_LEAST_1, FINITE, Condition, Is, Options, one_of, option, require
from .rule import effective, is_off, refuse_idle

KRONECKER, TORCH = ("kru", "unitary"), ("rnn", "lstm", "gru")
BASELINES = (*TORCH, "orthogonal", "low_rank")
ARCHITECTURES = (*KRONECKER, *BASELINES)

KRU: Condition = {"architecture": KRONECKER}
SOFT: Condition = {"architecture": ("kru",)}
COMPLEX: Condition = {**KRU, "cell_type": ("kru",)}
LINEAR: Condition = {**SOFT, "cell_type": ("kru_linear",)}
FIXED: Condition = {**LINEAR, "transition": ("fixed",)}
TRAINED: Condition = {**SOFT, "cell_type": ("kru",), "freeze_factors": Is.OFF}
RESIDUAL: Condition = {**KRU, "block_type": ("residual",)}
MUSIC: Condition = {"task": ("piano_roll",)}
LAYERS: Condition = {"architecture": BASELINES, "num_hidden_layers": 2}


def of_new(text: str, *only: Condition, default: Any = None, **metadata: Any) -> Any:
    """An option of a new model, under one of these conditions: a trained one has its configuration already."""
    conditions = tuple({"model": Is.OFF, **condition} for condition in only or ({},))
    return option(default, text, "model", only=conditions, **metadata)


size_or_0 = partial(of_new, off=0, allowed=("positive, or 0 to turn it off", lambda value: value >= 0))


@dataclass
class ModelOptions(Options):
    """What is trained."""

    architecture: str = of_new(
        f"Kind of network: {', '.join(ARCHITECTURES)}.",
        default="kru",
        replaces=("initializer_range",),
        allowed=one_of(*ARCHITECTURES),
    )
    model: str | None = option(
        None,
        "Trained folder or Hub id to start from, instead of a new model.",
        "model",
        replaces=("max_recurrent_norm",),
        absent="a new network, not with model, which brings its own configuration",
    )
    parameter_budget: int | None = of_new(
        "Most real parameters of the whole model: the size that is not given is chosen to come near it.",
        replaces=("state_size", "factor_shapes"),
        allowed=AT_LEAST_1,
    )
    state_size: int | None = of_new(
        "Units of the state: N complex ones for kru, the hidden size for others.",
        replaces=("parameter_budget", "factor_shapes", "factor_size"),
    )
    factor_size: int | None = of_new(
        "Size of the square Kronecker factors, from which their shapes are planned.",
        {**KRU, "factor_shapes": Is.OFF},
        replaces=("factor_shapes",),
    )
    factor_shapes: str | None = of_new(
        "Shapes of the Kronecker factors: 7x7,8x8,9x9 or [[7,7],[8,8],[9,9]].",
        KRU,
        replaces=("parameter_budget", "state_size", "factor_size"),
    )
    cell_type: str | None = of_new("Recurrent cell of a kru model.", SOFT)
    transition: str | None = of_new(
        f"Transitions of kru_linear: {', '.join(TRANSITIONS)} (given by the input).", LINEAR
    )
    num_heads: int | None = of_new("Heads of kru_linear, each with factors of its own.", LINEAR, allowed=AT_LEAST_1)
    decay: bool | None = of_new("Whether the heads of kru_linear forget.", LINEAR, off=False)
    num_hidden_layers: int | None = of_new("Number of recurrent layers.")
    hidden_size: int | None = of_new("Width of the real features between layers, and of the embedding.")
    block_type: str | None = of_new(
        "How kru layers are joined: residual, or plain (the paper's network).",
        KRU,
        replaces=("num_hidden_layers", "hidden_size", "io_rank"),
    )
    bidirectional: bool | None = of_new(
        "Whether a kru model also reads from the end of the sequence: for tasks that classify.", KRU, off=False
    )
    io_rank: int | None = size_or_0(
        "Rank of the input and readout maps of a residual kru model; 0: full.",
        {**RESIDUAL, "kronecker_terms": Is.OFF},
        replaces=("kronecker_terms",),
    )
    kronecker_terms: int | None = size_or_0(
        "Kronecker products whose sum each map of a residual kru model is; 0: dense maps.",
        {**RESIDUAL, "io_rank": Is.OFF},
        replaces=("io_rank",),
    )
    intermediate_size: int | None = size_or_0(
        "Width of the gated feed-forward block after each recurrence of a kru model; 0: none.", RESIDUAL
    )
    readout_norm: bool | None = of_new("Whether the state is normalised where it is read.", KRU, off=False)
    recurrent_rank: int | None = of_new(
        "Rank of the recurrent matrix of low_rank; default: state_size / 8.", {"architecture": ("low_rank",)}
    )
    recurrent_terms: int | None = of_new(
        "Kronecker products whose sum the recurrent matrix of a kru model is.", SOFT, allowed=AT_LEAST_1
    )
    recurrent_init: str | None = of_new(
        f"Start of the recurrence: {', '.join(STARTS)}; fourier too for kru_linear.", COMPLEX, FIXED
    )
    bias_init: float | None = of_new("Start value of the modReLU bias.", {**COMPLEX, "activation": ("modrelu",)})
    chrono_max_length: int | None = size_or_0(
        "Longest memory, in steps, that gates start with (chrono initialisation); 0: forget bias 1.",
        {**SOFT, "cell_type": GATED_TYPES},
        {"architecture": ("lstm", "gru")},
    )
    activation: str | None = of_new("State activation of a kru model: modrelu or identity.", COMPLEX)
    state_dropout: float | None = of_new("Dropout on the states before they are read.", off=0)
    hidden_dropout: float | None = of_new(
        "Dropout on the residual branches (between the layers of baselines).", LAYERS, RESIDUAL, off=0
    )
    frame_head: str | None = of_new(
        "Keys of a frame of music: chain (each given the lower ones; the default), or independent.",
        MUSIC,
        replaces=("frame_head_size", "frame_head_channels", "frame_head_dropout"),
    )
    frame_head_size: int | None = of_new("Hidden units of the chain.", MUSIC, allowed=AT_LEAST_1)
    frame_head_channels: int | None = of_new(
        "Hidden units with which the chain reads the keys around each key.", MUSIC, allowed=AT_LEAST_1
    )
    frame_head_dropout: float | None = of_new("Dropout on the hidden units of the chain.", MUSIC, off=0)
    unitary_loss_coef: float | None = of_new(
        "Weight of the soft unitary penalty in the training loss.",
        TRAINED,
        {**FIXED, "freeze_factors": Is.OFF},
        off=0,
        allowed=FINITE,
    )
    max_recurrent_norm: float | None = option(
        None,
        "Largest spectral norm of a kru model's recurrent matrix, held after every step; 0: no bound.",
        "model",
        only=(TRAINED, {"model": Is.ON}),
        off=0,
        allowed=FINITE,
    )
    layer_norm_epsilon: float | None = of_new("Epsilon of the RMS norms.", {**KRU, "readout_norm": (True,)}, RESIDUAL)
    initializer_range: float | None = of_new("Standard deviation of the output head's weights at the start.")
    use_cache: bool | None = of_new(
        "Whether the saved model returns its state by default.", {"bidirectional": Is.OFF}, off=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_factor_shapes(self.factor_shapes)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        # Beside a model the architecture is recorded, as it is known from the model's own run.
        refuse_idle(given, self.__dataclass_fields__, given.keys() - {"architecture"})

    def turned_off(self) -> list[str]:
        """The config fields that were given as 0, which stands for none."""
        return [name for name in OFF_AT_ZERO if getattr(self, name) == 0]

    def config_values(self) -> dict[str, Any]:
        """The config fields that were given, have an effect and are not turned off, by name."""
        others = ("architecture", "model", "parameter_budget", "max_recurrent_norm", *self.turned_off())
        values = effective(dataclasses.asdict(self), self.__dataclass_fields__)
        if "factor_shapes" in values:
            values["factor_shapes"] = parse_factor_shapes(values["factor_shapes"])
        return {name: value for name, value in values.items() if name not in others}

    def check_turned_off(self, config: Any) -> None:
        """`UserError` for an option that is given as off, and is on in the trained model that the run starts from."""
        for field in dataclasses.fields(self):
            value, has = getattr(self, field.name), getattr(config, field.name, None)
            if value is not None and is_off(field, value) and not is_off(field, has):
                raise UserError(
                    f"model={self.model!r} brings its own configuration, with {field.name}={has!r}; remove {field.name}"
                )


# Config fields whose None is 0 on the command line, and in a recipe.
OFF_AT_ZERO = tuple(
    f.name for f in dataclasses.fields(ModelOptions) if f.metadata["off"] == 0 and getattr(KRUConfig, f.name, 0) is None
)


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
