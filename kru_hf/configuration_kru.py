"""The options of a KRU model, and their validation."""

import difflib
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from .cells import (
    ACTIVATIONS,
    BY_TYPE,
    CELLS,
    LINEAR,
    SELECTIVE_START,
    Cell,
    Start,
    check_chrono,
    check_linear,
    check_start,
    selective_widths,
)
from .frame_heads import CHAIN_CHANNELS, CHAIN_SIZE, check_frame_head
from .kronecker import MOST_UNITS, check_choice, check_pairs, plan_with_warning

logger = logging.getLogger(__name__)

CELL_TYPES = tuple(BY_TYPE)
GATED_TYPES = tuple(name for name, cell in BY_TYPE.items() if not cell.complex)
BLOCK_TYPES = ("residual", "plain")

# Fields that there were, and what stands in their place: said wherever one is still given.
REMOVED = {
    "wiring": "it is called block_type",
    "scan_backend": "kru_hf.use_backend(NAME) chooses the engine, and --backend of training",
    "train_factors": "requires_grad_(False) on the factors freezes them, and --freeze_factors of training",
    "recurrent_init_scale": "recurrent_init names a start, see kru_hf.cells.STARTS",
    "recurrent_init_max_phase": "recurrent_init='slow' starts with phases of at most 0.9",
    "input_scale": "recurrent_init names a start, see kru_hf.cells.STARTS",
    "input_dropout": "there are state_dropout and hidden_dropout",
}

# What transformers and the Hub read in a config.json without declaring it: no reason for a warning.
_READ_ELSEWHERE = (
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "layer_types",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
)

# The most that a size may be: beyond it a slip of the keyboard is likelier than a model, and planning or building would
# take hours or all memory before it fails.
LIMITS = {
    "num_hidden_layers": 2**12,
    "vocab_size": 2**24,
    "state_size": MOST_UNITS,
    "hidden_size": 4 * MOST_UNITS,  # with plain blocks that of the states
    "intermediate_size": 2**20,
    "io_rank": 2**20,
    "kronecker_terms": 2**20,
    "recurrent_terms": 2**10,
    "num_heads": 2**16,
    "input_size": 2**20,
    "frame_head_size": 2**20,
    "frame_head_channels": 2**10,
    "chrono_max_length": 2**40,
}
# Numbers, what they may be in words, and as a test; None is not tested.
RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("vocab_size", "num_hidden_layers", "hidden_size", "io_rank", "kronecker_terms", "intermediate_size")
        + ("input_size", "recurrent_terms"),
        "at least 1",
        lambda value: value >= 1,
    ),
    (("state_dropout", "hidden_dropout"), "in [0, 1)", lambda value: 0 <= value < 1),
    (("layer_norm_epsilon",), "positive and finite", lambda value: 0 < value < math.inf),
    (("unitary_loss_coef", "initializer_range"), "non-negative and finite", lambda value: 0 <= value < math.inf),
    (("bias_init",), "finite", math.isfinite),
    (("tie_word_embeddings",), "False: a head has weights of its own", lambda value: not value),
)
MOST_FACTORS = 64
MOST_ENTRIES = 2**28  # of a factor


@strict
class KRUConfig(PreTrainedConfig):
    r"""
    Options of a Kronecker recurrent model; ``KRUConfig()`` is valid. N, F, P_f, Q_f, λ are the paper's.

    Args:
        vocab_size: V, number of tokens.
        state_size: N, complex units of the recurrent state. Default: the product of ``factor_shapes``, or 504.
        factor_shapes: [[P_0, Q_0], …] with ∏ P_f = ∏ Q_f = N. Default: planned from ``factor_size``. A non-square
            factor makes the recurrent matrix a partial isometry at best, never unitary.
        factor_size: wanted size of square factors, from which ``factor_shapes`` is planned (8); stored as shapes.
        cell_type: "kru", the paper's complex recurrence; "kru_lstm", "kru_gru" or "kru_janet" (an LSTM with a forget
            gate alone: half the parameters), gated cells of N real units, a set of real factors a gate and no soft
            unitary penalty; "kru_linear", h_t = d_t R_t h_{t-1} + U x_t, complex and without an activation between
            the steps, so that time is computed in parallel.
        transition: of "kru_linear": "fixed", learned factors that are the same at all steps; "selective", unitary
            factors that the input gives at every step, which can track states. num_heads: H, heads of "kru_linear",
            each with factors of its own and N / H units. decay: whether each head forgets.
        num_hidden_layers: recurrent layers; 1 with plain blocks (default there), 2 by default otherwise.
        hidden_size: D, width of the real features between layers (128 by default); if plain that of the states: 2·N
            (N for gated cells), twice that if bidirectional.
        block_type: "residual" (pre-norm blocks D → 2N → scan → D) or "plain" (the paper's network in one layer: the
            embedding is the input map U, the head reads [Re h; Im h]).
        bidirectional: a second recurrence in each layer runs from the end of the sequence, and the features of both are
            read. Such a model has no state to carry: it classifies, but neither generates nor streams, and
            ``use_cache`` becomes False.
        io_rank: None for full-rank input and readout maps of residual blocks, else their rank: both pass through that
            width.
        kronecker_terms: n, the maps of residual blocks (input, output, feed-forward) are sums of n Kronecker
            products of (n, n) and (out/n, in/n) matrices: full rank for 1/n of the parameters (PHM layers, Zhang et
            al. 2021). None: dense. n divides ``hidden_size``, the width of the states and ``intermediate_size``.
        intermediate_size: width of a gated feed-forward block after each recurrence (residual blocks); None for none.
        readout_norm: RMS-normalise the state where it is read, without parameters. An exactly unitary W never forgets.
        recurrent_terms: R, terms of the recurrent matrix W = Σ_r ⊗_f W_f^(r), each with factors of its own. R > 1: the
            terms start scaled by 1/√R, and the penalty is ‖W^H W − I‖² of W itself.
        recurrent_init: where the recurrence starts, a name of ``kru_hf.cells.STARTS``, where the numbers are: "random",
            unitary factors that forget slowly, for text and music; "unitary", which forgets nothing, for copies;
            "slow", whose eigenvalues turn slowly, for smooth signals such as pixels in their order; "identity", which
            keeps what it reads where it is, for sums; "accumulate", for sums over hundreds of steps. Gated cells have
            "random" orthogonal factors. "kru_linear" has "fourier" too, whose eigenvalues are all N-th roots of unity.
        bias_init: modReLU's b at the start (activation "modrelu").
        chrono_max_length: T_max in steps, for gated cells: the gates start with memories spread over 1 … T_max steps
            (chrono initialisation, Tallec & Ollivier 2018). None: forget bias 1, all biases 0 (kru_gru).
        activation: "modrelu" or "identity" (the linear network, without a bias).
        state_dropout, hidden_dropout: probabilities on the states before the readout, and on the residual branches (0
            with a plain block, which has none).
        unitary_loss_coef: λ, weight of Σ_f ‖W_f^H W_f − I‖² in the training loss. With 0.001 the norm of W grows past
            1.5 on text and gradients through carried state explode within 500 steps; 0.1 holds it near 1.1.
        input_size: width of continuous frames given as ``input_values``; None for token ids alone.
        frame_head: of a model of piano rolls: "independent" keys given the state, or a "chain" from low to high, where
            each key is drawn given the lower ones.
        frame_head_size: H, hidden units of the chain. frame_head_dropout: on them.
        frame_onsets: with a chain, a frame has a second plane: the keys that begin to sound. ``input_size`` is doubled.
        frame_head_channels: C, hidden units with which the chain reads the keys around each key, alike for all keys.
        layer_norm_epsilon: of every RMS norm.
        initializer_range: standard deviation of the output head's weights at the start.

    As every config of transformers it takes other names (``tokenizer_class``, notes of tools) and keeps them, with
    a warning, unless they are nearly those of an option.

    Raises:
        ValueError: a value outside what is allowed. TypeError: a misspelt option; the message names the nearest one.
    """

    model_type = "kru"
    keys_to_ignore_at_inference = ["past_key_values", "unitary_loss", "frame_context"]

    vocab_size: int = 256
    state_size: int | None = None
    factor_shapes: list | tuple | None = None
    factor_size: int | None = None
    cell_type: str = "kru"
    transition: str = "fixed"
    num_heads: int = 1
    decay: bool = False
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    block_type: str = "residual"
    bidirectional: bool = False
    io_rank: int | None = None
    kronecker_terms: int | None = None
    intermediate_size: int | None = None
    readout_norm: bool = True
    recurrent_terms: int = 1
    recurrent_init: str = "random"
    bias_init: float | int = -0.1
    chrono_max_length: int | None = None
    activation: str = "modrelu"
    state_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    unitary_loss_coef: float | int = 0.1
    input_size: int | None = None
    frame_head: str = "independent"
    frame_onsets: bool = False
    frame_head_size: int = CHAIN_SIZE
    frame_head_channels: int = CHAIN_CHANNELS
    frame_head_dropout: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-6
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False  # no other value: transformers' own default is True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_names(kwargs)
        kwargs.pop("layer_types", None)
        self._check_sizes()
        self._resolve_shapes()
        for name, value in self._derived_defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.bidirectional:
            self.use_cache = False
        super().__post_init__(**kwargs)
        if self.architectures is None:
            self.architectures = []  # AutoModel looks here for which of two classes a folder holds

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a saved dictionary, with the options in ``kwargs`` in place of its own.

        They are put in before the config is built, so that what follows from them (shapes of the factors, defaults of
        the cell and of the block_type) follows again, and everything is validated.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        cls._check_names([*kwargs, *(name for name in config_dict if name in REMOVED)], warn=False)
        options = {name: value for name, value in config_dict.items() if cls._has(name)}
        notes = {name: value for name, value in config_dict.items() if not cls._has(name)}
        given = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        if given:
            stored = cls(**options)
            for name, value in stored._derived_defaults().items():
                if getattr(stored, name) == value:
                    options.pop(name, None)
            other_size = given.get("state_size", stored.state_size) != stored.state_size
            if "factor_shapes" in given:
                options.pop("state_size", None)
            elif other_size or given.get("factor_size") is not None:
                options.pop("factor_shapes", None)
        return super().from_dict({**options, **notes, **given}, **kwargs)

    @classmethod
    def _has(cls, name: str) -> bool:
        """Whether transformers or a KRU model reads a name that a config may hold."""
        foreign = hasattr(PreTrainedConfig, name) or name in GenerationConfig._get_default_generation_params()
        return name in cls.__dataclass_fields__ or name.startswith("_") or foreign or name in _READ_ELSEWHERE

    @classmethod
    def _check_names(cls, names: Iterable[str], warn: bool = True) -> None:
        """Refuse removed and misspelt options, which nothing would read, and warn of other names."""
        for name in names:
            if name in REMOVED:
                raise TypeError(f"KRUConfig has no {name} any more: {REMOVED[name]}")
        notes = [name for name in names if not cls._has(name)]
        for name in notes:
            if isinstance(getattr(cls, name, None), property) and name != "layer_types":
                raise TypeError(f"{name} of a KRUConfig follows from its options: it cannot be given")
            # transformers names dozens of tokens, which look alike
            nearest = difflib.get_close_matches(name, cls.__annotations__, n=1, cutoff=0.7)
            if nearest and not name.endswith("_token_id"):
                raise TypeError(f"KRUConfig has no option {name!r}; did you mean {nearest[0]!r}?")
        if notes and warn:
            logger.warning("KRUConfig has no option %s: kept, but no KRU model reads it", ", ".join(map(repr, notes)))

    def _check_sizes(self) -> None:
        """Each size at most its limit, before anything is planned or built from it."""
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        for name, most in LIMITS.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}")
        if self.factor_shapes is not None and len(self.factor_shapes) > MOST_FACTORS:
            raise ValueError(f"factor_shapes must hold at most {MOST_FACTORS} pairs, got {len(self.factor_shapes):,}")

    def _check_tokens(self) -> None:
        """The ids of special tokens are tokens of the vocabulary."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be at least 0 and below vocab_size = {self.vocab_size}, got {token}")

    def _derived_defaults(self) -> dict[str, Any]:
        """What options that are not given become, by the cell, the block type and the shapes."""
        plain = self.block_type == "plain"
        return {
            "num_hidden_layers": 1 if plain else 2,
            "hidden_size": self.feature_planes * int(self.state_size or 0) if plain else 128,
        }

    def _resolve_shapes(self) -> None:
        """Fill in state_size and factor_shapes from whichever of state_size, factor_shapes, factor_size was given."""
        if self.factor_shapes is not None:
            if self.factor_size is not None:
                raise ValueError(
                    f"give factor_shapes or factor_size, not both: got {self.factor_shapes} and {self.factor_size}"
                )
            self.factor_shapes = check_pairs(self.factor_shapes)
        else:
            if self.state_size is None:
                self.state_size = 504
            size = 8 if self.factor_size is None else self.factor_size
            self.factor_shapes = plan_with_warning(max(1, self.state_size // max(1, self.num_heads)), size)
            self.factor_size = None
        if self.state_size is None:
            self.state_size = self.num_heads * math.prod(p for p, _ in self.factor_shapes)
        self._check_product()

    def _check_product(self) -> None:
        rows, columns = (math.prod(sizes) for sizes in zip(*(self.factor_shapes or []), strict=True))
        for p, q in self.factor_shapes or []:
            if p * q > MOST_ENTRIES:
                raise ValueError(f"a factor of factor_shapes must have at most {MOST_ENTRIES:,} entries, got {p}x{q}")
        if not rows * self.num_heads == columns * self.num_heads == self.state_size:
            heads = "" if self.num_heads == 1 else f" and num_heads = {self.num_heads}: one head's share"
            raise ValueError(
                f"factor_shapes {self.factor_shapes} multiply to {rows}x{columns}; "
                f"both must equal state_size = {self.state_size}{heads}"
            )

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each layer, by the name that ``KRUCacheLayer`` registers."""
        return ["kru"] * int(self.num_hidden_layers or 0)

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding: with a plain block that of U x, else D."""
        if self.block_type == "plain":
            return self.directions * self.input_width
        return int(self.hidden_size or 0)

    @property
    def input_width(self) -> int:
        """Width of what a recurrence reads in a step: K·N, and of selective transitions what makes their factors."""
        if self.linear and self.transition == "selective":
            return sum(selective_widths(self.factor_shapes, self.num_heads, self.decay))
        return self.recurrent_cell.planes * int(self.state_size or 0)

    @property
    def linear(self) -> bool:
        """Whether the cell is the linear one."""
        return self.recurrent_cell is LINEAR

    @property
    def feature_size(self) -> int:
        """Width of what the body returns and a head reads."""
        return int(self.hidden_size or 0)

    @property
    def start(self) -> Start:
        """The numbers of ``recurrent_init``."""
        selective = self.linear and self.transition == "selective"
        return SELECTIVE_START if selective else self.recurrent_cell.starts[self.recurrent_init]

    @property
    def recurrent_cell(self) -> Cell:
        """The entry of CELLS that ``cell_type`` names."""
        return BY_TYPE.get(self.cell_type, CELLS["kru"])  # read before the name is checked

    @property
    def gated(self) -> bool:
        """Whether the cell is gated: real factors, no penalty."""
        return not self.recurrent_cell.complex

    @property
    def directions(self) -> int:
        """Recurrences a layer."""
        return 2 if self.bidirectional else 1

    @property
    def feature_planes(self) -> int:
        """Width of a layer's states, of both directions if there are two, in multiples of N."""
        return self.directions * self.recurrent_cell.feature_planes

    def validate_layer_type(self) -> None:
        """The stock check knows attention layers only; ``layer_types`` is computed here and always right."""

    def validate_kru_options(self) -> None:
        """Every field within its range; runs at construction, before saving, and before a model is built."""
        self._check_sizes()
        self._check_product()
        self._check_tokens()
        if self.factor_size is not None:
            raise ValueError(f"factor_size is read at construction: it must be None later, got {self.factor_size}")
        for name, allowed in (("cell_type", CELL_TYPES), ("block_type", BLOCK_TYPES), ("activation", ACTIVATIONS)):
            check_choice(name, getattr(self, name), allowed)
        for names, words, fits in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} must be {words}, got {value}")
        check_frame_head(self)
        shapes = self.factor_shapes or []
        check_start("recurrent_init", self.recurrent_init, self.recurrent_cell, shapes, self.recurrent_terms)
        self._check_linear()
        if self.chrono_max_length is not None and self.gated:
            check_chrono("chrono_max_length", self.chrono_max_length)
        if self.gated:
            unused = {"activation": ("modrelu",), "bias_init": (-0.1,), "unitary_loss_coef": (0.1, 0.0)}
            self._check_unused("a gated cell", unused)
        else:
            self._check_unused("an ungated cell", {"chrono_max_length": (None,)})
            if self.activation == "identity":
                self._check_unused("activation 'identity'", {"bias_init": (-0.1,)})
        if self.block_type == "plain":
            width = self.feature_planes * int(self.state_size or 0)
            self._check_unused(
                "block_type 'plain', which is one recurrence without maps,",
                {
                    **dict.fromkeys(("io_rank", "kronecker_terms", "intermediate_size"), (None,)),
                    "hidden_dropout": (0,),
                    "num_hidden_layers": (1,),
                    "hidden_size": (width,),
                },
            )
        elif self.kronecker_terms is not None:
            self._check_terms(self.kronecker_terms)

    def _check_linear(self) -> None:
        """The options of the linear cell fit together, and no other cell has one."""
        if not self.linear:
            own = {"transition": ("fixed",), "num_heads": (1,), "decay": (False,)}
            self._check_unused("a cell other than 'kru_linear'", own)
            return
        check_linear(self.factor_shapes, self.transition, self.recurrent_init)
        self._check_unused(
            "the cell 'kru_linear'", {"activation": ("modrelu",), "bias_init": (-0.1,), "recurrent_terms": (1,)}
        )
        if self.transition == "selective":
            self._check_unused("selective transitions, which are unitary,", {"unitary_loss_coef": (0.1, 0.0)})

    def _check_unused(self, place: str, values: dict[str, tuple[Any, ...]]) -> None:
        """Options that do nothing in this place stay at one of these values."""
        for name, allowed in values.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} of {place} must be {allowed[0]!r}, got {getattr(self, name)!r}")

    def _check_terms(self, terms: int) -> None:
        """Each width that a sum of Kronecker products maps has to be a multiple of their number."""
        if self.io_rank is not None:
            raise ValueError(f"give io_rank or kronecker_terms, not both: got {self.io_rank} and {terms}")
        outputs = self.recurrent_cell.feature_planes
        widths = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "the width of U x": self.directions * self.input_width,
            "the width of the states": self.directions * outputs * int(self.state_size or 0),
        }
        for name, width in widths.items():
            if width is not None and width % terms:
                raise ValueError(f"kronecker_terms must divide {name} = {width}, got {terms}")
