"""Figures of a model on a split: every element counted once, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..tasks import Batch, Task


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch, with its tensors on `device`."""
    batch.inputs = send_to_device(batch.inputs, device)
    batch.extra = send_to_device(batch.extra, device)
    return batch


@torch.no_grad()
def evaluate(task: Task, model: Any, split: str, accelerator: Accelerator) -> dict[str, float]:
    """The task's metrics of a split, the same on every rank.

    Args:
        model: the unwrapped model; its training mode is restored afterwards.
        split: "validation" or "test".
    """
    training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    state = None
    for batch in task.eval_batches(split, accelerator.process_index, accelerator.num_processes):
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            out = task.forward(model, batch, None if batch.reset_state else state)
        state = out.state.detach() if out.state is not None else None
        for name, value in out.sums.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
    model.train(training)
    return task.metrics(total(sums, accelerator))


def total(sums: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Sums over all ranks; a rank that had no batch contributes nothing, not even names."""
    if accelerator.num_processes == 1:
        return {name: float(value) for name, value in sums.items()}
    parts: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(parts, {name: float(value) for name, value in sums.items()})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
