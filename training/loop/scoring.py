"""Figures of a model on a split: every element counted once, over all processes."""

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


class Scores:
    """Sums of a task's figures over the batches of a split; the recurrent state goes from each to the next."""

    def __init__(self, task: Task) -> None:
        self.task, self.state = task, None
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, model: Any, batch: Batch) -> None:
        """Score the next batch of this process."""
        out = self.task.forward(model, batch, None if batch.reset_state else self.state)
        self.state = out.state.detach() if out.state is not None else None
        for name, value in out.sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()

    def metrics(self) -> dict[str, float]:
        """The task's metrics over all ranks; one that had no batch contributes nothing, not even names."""
        own = {name: float(value) for name, value in self.sums.items()}
        parts: list[Any] = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, own)
        names = dict.fromkeys(name for part in parts for name in part)
        return self.task.metrics({name: sum(part.get(name, 0.0) for part in parts) for name in names})


@torch.no_grad()
def evaluate(task: Task, model: Any, split: str, accelerator: Accelerator) -> dict[str, float]:
    """The task's metrics of a split, the same on every rank.

    Args:
        model: the unwrapped model; its training mode is restored afterwards.
        split: "validation" or "test".
    """
    training = model.training
    model.eval()
    scores = Scores(task)
    for batch in task.eval_batches(split, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            scores.add(model, to_device(batch, accelerator.device))
    model.train(training)
    return scores.metrics()
