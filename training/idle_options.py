"""Options that another option leaves without effect: on the command line they are errors, for nothing is ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from .arguments import ModelOptions, RunOptions

WITH_FACTORS = ("kru", "unitary", "orthogonal")  # architectures whose recurrent matrices come from trained generators


def given_names(words: list[str]) -> set[str]:
    """The options that command-line words name."""
    return {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def refuse_idle(words: list[str], run: RunOptions, model: ModelOptions) -> None:
    """`UserError` naming the first option of `words` that has no effect, and what it works with.

    A recipe may hold such a pair: its lines are defaults, and the command line may turn off what they were for.
    """
    frozen = model.train_factors is False
    trained = model.model is not None or (model.architecture in WITH_FACTORS and not frozen)
    works = {
        "adam_beta1": (run.optimizer == "adamw", "optimizer adamw"),
        "adam_beta2": (run.optimizer == "adamw", "optimizer adamw"),
        "num_train_epochs": (run.max_steps < 0, "max_steps -1"),
        "min_learning_rate_ratio": (run.lr_scheduler_type == "cosine", "lr_scheduler_type cosine"),
        "plateau_factor": (run.lr_scheduler_type == "plateau", "lr_scheduler_type plateau"),
        "factor_learning_rate_scale": (trained, f"trained factors, of architecture {', '.join(WITH_FACTORS)}"),
        "unitary_loss_coef": (not (frozen and model.unitary_loss_coef), "trained factors"),
        "hub_model_id": (run.push_to_hub, "push_to_hub true"),
        "hub_private_repo": (run.push_to_hub or not run.hub_private_repo, "push_to_hub true"),
    }
    values = {**vars(run), **vars(model)}
    for name in sorted(given_names(words) & set(works)):
        effective, needed = works[name]
        if not effective:
            raise UserError(f"{name}={values[name]!r} has no effect here: it works with {needed}; remove it")
