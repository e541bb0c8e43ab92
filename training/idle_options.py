"""Options that another option leaves without effect: on the command line they are errors, for nothing is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import UserError

KRONECKER = ("kru", "unitary")  # architectures with hidden_dropout in each block; others have it between two layers
WITH_FACTORS = ("kru", "unitary", "orthogonal")  # architectures whose recurrent matrices come from trained generators


def given_names(words: list[str]) -> set[str]:
    """The options that command-line words name."""
    return {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def idle(values: Mapping[str, Any]) -> dict[str, str]:
    """The options of a run, by name and value, that have no effect beside the others, and what they would work with."""
    frozen = values.get("train_factors") is False
    architecture = values.get("architecture", "kru")
    with_factors = values.get("model") is not None or architecture in WITH_FACTORS
    one_layer = architecture not in KRONECKER and values.get("num_hidden_layers") in (None, 1)
    plain, tied = values.get("wiring") == "plain", bool(values.get("tie_word_embeddings"))
    adamw = values.get("optimizer", "adamw") == "adamw"
    schedule = values.get("lr_scheduler_type", "cosine")
    pushed = bool(values.get("push_to_hub"))
    works = {
        "architecture": (values.get("model") is None, "a new network, not with model, which brings its own"),
        "adam_beta1": (adamw, "optimizer adamw"),
        "adam_beta2": (adamw, "optimizer adamw"),
        "num_train_epochs": (values.get("max_steps", -1) < 0, "max_steps -1"),
        "min_learning_rate_ratio": (schedule == "cosine", "lr_scheduler_type cosine"),
        "plateau_factor": (schedule == "plateau", "lr_scheduler_type plateau"),
        "factor_learning_rate_scale": (
            with_factors and not frozen,
            f"trained factors, of architecture {', '.join(WITH_FACTORS)}",
        ),
        "unitary_loss_coef": (not (frozen and values.get("unitary_loss_coef")), "trained factors"),
        "bias_init": (values.get("activation") != "identity", "activation modrelu"),
        "input_scale": (not (plain and tied), "tie_word_embeddings false"),
        "layer_norm_epsilon": (not (plain and values.get("readout_norm") is False), "readout_norm true"),
        "hidden_dropout": (not (one_layer and values.get("hidden_dropout")), "num_hidden_layers 2 or more"),
        "use_cache": (not (values.get("bidirectional") and values.get("use_cache")), "bidirectional false"),
        "overwrite_output_dir": (
            not (values.get("resume_from_checkpoint") and values.get("overwrite_output_dir")),
            "a new run, not with resume_from_checkpoint",
        ),
        "hub_model_id": (pushed, "push_to_hub true"),
        "hub_private_repo": (pushed or not values.get("hub_private_repo"), "push_to_hub true"),
    }
    return {name: needed for name, (effective, needed) in works.items() if not effective}


def refuse_idle(words: list[str], values: Mapping[str, Any]) -> None:
    """`UserError` naming the first option of command-line words that has no effect, and what it works with.

    A recipe may hold such a pair: its lines are defaults, and the command line may turn off what they were for.
    """
    without_effect = idle(values)
    for name in sorted(given_names(words) & set(without_effect)):
        needed = without_effect[name]
        raise UserError(f"{name}={values[name]!r} has no effect here: it works with {needed}; remove it")
