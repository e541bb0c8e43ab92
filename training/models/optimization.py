"""Optimizer groups and the learning rate as a plain function of the step."""

import math
from typing import Any

import torch
from torch import nn

from ..options.run import RunOptions


def parameter_groups(model: Any, options: RunOptions) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases (also the (·, N) of gated cells) and norms without; factors at their own rate.

    `scale` of a group multiplies the learning rate of the schedule. Generators of unitary and orthogonal matrices are
    treated as factors are: weight decay would draw the matrix to the identity. So are the maps that give the generators
    of selective transitions, but at the full rate: a bias of the angles adds up over the steps. The dense and low-rank
    recurrent matrices of the other baselines are ordinary matrices.
    """
    kind = getattr(model.config, "cell", model.config.model_type)
    factors = dict(model.recurrent_parameters()) if kind in ("kru", "kru_unitary", "orthogonal") else {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in factors]
    matrices = {name for name, p in trained if p.ndim > 1 and not name.endswith("bias")}
    decayed = {name for name in matrices if not _generating(model.config) & {*name.split(".")}}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": options.weight_decay, "scale": 1.0},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0, "scale": 1.0},
        {
            "params": [p for p in factors.values() if p.requires_grad],
            "weight_decay": 0.0,
            "scale": options.factor_learning_rate_scale,
        },
    ]
    return [group for group in groups if group["params"]]


def _generating(config: Any) -> set[str]:
    """Modules whose output makes the factors of selective transitions: with a plain block the embedding itself."""
    if getattr(config, "transition", None) != "selective":
        return set()
    return {"embed_tokens", "input_map"} if config.block_type == "plain" else {"in_proj"}


def build_optimizer(model: nn.Module, options: RunOptions) -> torch.optim.Optimizer:
    """AdamW, or RMSprop with decay 0.9 and without weight decay, which torch would normalise with the gradient."""
    groups = parameter_groups(model, options)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=options.learning_rate, alpha=0.9)
    # One kernel for all parameters: a model of many small ones waits for Python otherwise.
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, fused=True)


def learning_rate(step: int, total_steps: int, options: RunOptions, plateau_scale: float = 1.0) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the chosen schedule."""
    warmup = min(options.warmup_steps, total_steps // 10)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.lr_scheduler_type == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        floor = options.min_learning_rate_ratio
        return options.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    return options.learning_rate * plateau_scale


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
