"""A recipe's lines that give way, where the command line names another network than the recipe's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .idle_options import given_names

if TYPE_CHECKING:
    from .arguments import ModelOptions

# Not of a baseline.
KRU_ONLY = frozenset(
    [
        "factor_size",
        "factor_shapes",
        "cell_type",
        "wiring",
        "bidirectional",
        "io_rank",
        "kronecker_terms",
        "intermediate_size",
        "readout_norm",
        "recurrent_init",
        "recurrent_init_scale",
        "recurrent_init_max_phase",
        "bias_init",
        "input_scale",
        "activation",
        "unitary_loss_coef",
        "max_recurrent_norm",
        "train_factors",
        "scan_backend",
        "layer_norm_epsilon",
        "initializer_range",
    ]
)
# Not of a strictly unitary kru.
SOFT_ONLY = frozenset(["cell_type", "recurrent_init_scale", "unitary_loss_coef", "max_recurrent_norm"])
# What a recipe chooses for its own cell_type.
CELL_ONLY = frozenset(
    ["input_scale", "recurrent_init", "recurrent_init_scale", "recurrent_init_max_phase", "bias_init"]
    + ["chrono_max_length", "activation", "unitary_loss_coef", "max_recurrent_norm"]
)
# What a recipe chooses for its own wiring.
OF_WIRING = frozenset(
    ["num_hidden_layers", "hidden_size", "io_rank", "kronecker_terms", "intermediate_size", "hidden_dropout"]
)


def superseded(name: str, recipe: dict[str, Any], given: ModelOptions, words: list[str]) -> bool:
    """Whether a recipe's key is about another network than the one that the command line names."""
    if name not in {f.name for f in dataclasses.fields(given)}:
        return False
    if given.model is not None:
        return True
    # Another size, or other factors, than the recipe's: its own would contradict them.
    if name in ("state_size", "factor_shapes") and given.parameter_budget is not None:
        return True
    if name == "parameter_budget" and (given.state_size or given.factor_shapes):
        return True
    if name in ("factor_shapes", "factor_size") and (given.state_size or given.factor_shapes or given.factor_size):
        return True
    if name == "state_size" and given.factor_shapes is not None:
        return True
    # Maps are low-rank or sums of Kronecker products, not both.
    if (name == "io_rank" and given.kronecker_terms) or (name == "kronecker_terms" and given.io_rank):
        return True
    # Only random factors have phases to choose.
    if name == "recurrent_init_max_phase" and given.recurrent_init not in (None, "random"):
        return True
    # Another cell starts in another way, and only trained factors of a complex one have a norm to hold.
    if name in CELL_ONLY and given.cell_type not in (None, recipe.get("cell_type", "kru")):
        return name != "chrono_max_length" or given.cell_type == "kru"
    if name == "max_recurrent_norm" and given.train_factors is False:
        return True
    # Another wiring is another network: the plain one has a single layer, and its width follows from the state.
    if name in OF_WIRING and given.wiring not in (None, recipe.get("wiring")):
        return True
    asked = "architecture" in given_names(words)
    foreign = (SOFT_ONLY if given.architecture == "unitary" else KRU_ONLY) | {"architecture"}
    if given.architecture not in ("lstm", "gru"):
        foreign |= {"chrono_max_length"}
    return asked and given.architecture != recipe.get("architecture", "kru") and name in foreign
