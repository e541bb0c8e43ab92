"""This process's part of every global batch, and the recurrent states that it carries from batch to batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tasks import Batch, Layout, Task, TaskOutput


class Slots:
    """A global batch has ranks × parts slots; this process holds `parts` of them, whose gradients are accumulated.

    Args:
        rows: of a slot.
        rank: this process's number of `ranks`.
    """

    def __init__(self, task: Task, rows: int, rank: int = 0, ranks: int = 1, parts: int = 1) -> None:
        self.task, self.parts, self.first = task, parts, rank * parts
        self.layout = Layout(rows * ranks * parts, ranks * parts)
        self.carried: list[Any] = [None] * parts

    def batch(self, step: int, part: int) -> Batch:
        """The batch of one slot."""
        return self.task.train_batch(step, self.first + part, self.layout)

    def forward(self, model: Any, batch: Batch, part: int) -> TaskOutput:
        """One slot's batch; the state in which it ends is kept for the next one."""
        out = self.task.forward(model, batch, None if batch.reset_state else self.carried[part])
        self.carried[part] = out.state.detach() if out.state is not None and self.task.carries_state else None
        return out

    def gather(self, gather: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The carried states of all rows of the global batch, a layer each (G, S, N), on the CPU.

        Args:
            gather: joins the rows of all ranks.
        """
        if self.carried[0] is None:
            return []
        layers = zip(*(slot.states for slot in self.carried), strict=True)
        return [gather(torch.cat(layer)).cpu() for layer in layers]

    def scatter(self, layers: list[Tensor], device: torch.device) -> None:
        """Take this process's rows of what `gather` gave, whatever the number of processes was then."""
        for part in range(self.parts if layers else 0):
            rows = self.layout.rows(self.first + part)
            own = [layer[rows.start : rows.stop].to(device) for layer in layers]
            self.carried[part] = self.task.state_from_tensors(own)


def figures_of(out: TaskOutput) -> Tensor:
    """Nats, targets and loss (3,) of a slot."""
    return torch.stack([out.sums["loss"], out.sums["count"], out.loss.detach().double()])  # (3,)
