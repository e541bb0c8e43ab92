"""The training loop: one optimizer step after another, with accelerate."""

from __future__ import annotations

from typing import Any

import torch

from ..tasks import Batch, TaskOutput
from .driver import Driver
from .progress import Progress
from .scoring import to_device


class TrainingLoop(Driver):
    """The driver of `training.train`."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.bare_model, optimizer)

    @property
    def scaler(self) -> Any:
        return self.accelerator.scaler

    def train_step(self) -> None:
        """Forward and backward over this rank's slots, then one update."""
        self.set_rate()
        figures = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)  # (3,)
        for part in range(self.accumulation):
            batch = to_device(self.batch(self.state.step, part), self.accelerator.device)
            if part < self.accumulation - 1:
                with self.accelerator.no_sync(self.model):
                    out = self.forward_backward(batch, part)
            else:
                out = self.forward_backward(batch, part)
            figures += self.figures(out)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.finish_step(figures, norm, batch.num_elements)

    def forward_backward(self, batch: Batch, part: int) -> TaskOutput:
        """One slot's batch."""
        out = self.forward(self.model, batch, part)
        self.accelerator.backward(out.loss * (batch.loss_weight / self.accumulation))
        return out

    def run(self, progress: Progress) -> None:
        self.begin(progress)
        while not self.ended():
            self.train_step()
            if self.needs_sync():
                self.observe()
                self.evaluate_if_due()
                self.save_if_due()

    def close(self) -> None:
        self.model = self.bare_model
        super().close()
