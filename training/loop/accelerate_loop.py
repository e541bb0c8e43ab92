"""The training loop: one optimizer step after another, with accelerate."""

import contextlib

import torch

from .driver import Driver
from .scoring import to_device
from .slots import figures_of


class TrainingLoop(Driver):
    """The driver of `training.train`."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.scaler = self.accelerator.scaler

    def train(self) -> None:
        while not self.ended():
            self.train_step()
            self.between_steps()

    def train_step(self) -> None:
        """Forward and backward over this rank's slots, then one update."""
        figures = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)  # (3,)
        for part in range(self.slots.parts):
            last = part == self.slots.parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                batch = to_device(self.slots.batch(self.state.step, part), self.accelerator.device)
                out = self.slots.forward(self.wrapped, batch, part)
                self.accelerator.backward(out.loss * (batch.loss_weight / self.slots.parts))
            figures += figures_of(out)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.options.max_grad_norm or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.finish_step(figures, norm, batch.num_elements)

    def close(self) -> None:
        self.wrapped = self.model
        super().close()
