"""The tasks under Lightning: one optimizer step after another, as `loop.py` makes them with accelerate.

Lightning owns the steps: forward, backward, DDP, mixed precision, accumulation and the order of callbacks. What is done
between two steps is the driver's, in callbacks. So a run leaves the same folder, and either driver goes on from the
other's checkpoints; Lightning writes and reads none of its own. `trainer.global_step` counts from where this process
began, `run.state.step` from the beginning of the run.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..common.errors import UserError
from ..tasks import Batch
from .driver import Driver
from .progress import Progress
from .scoring import to_device

PRECISIONS: dict[str, Any] = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DEVICES = ("cpu", "cuda", "mps")


class TaskModule(pl.LightningModule):
    """A task's training step: truncated BPTT, with a state carried from window to window for each slot of this rank."""

    def __init__(self, run: Driver) -> None:
        super().__init__()
        self.model, self.run = run.bare_model, run
        self.figures = torch.zeros(3)  # (3,) nats, targets, loss of the step's parts so far
        self.norm = torch.zeros(())  # () of the gradient
        self.num_elements = 0

    def on_train_start(self) -> None:
        """What Lightning sets up is not training time."""
        self.run.begin(self.run.progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One slot's loss (); Lightning divides it by the number of parts of a step."""
        part = batch_idx % self.run.accumulation
        out = self.run.forward(self.model, batch, part)
        self.num_elements = batch.num_elements
        figures = self.run.figures(out)  # (3,)
        self.figures = self.figures + figures if part else figures
        return out.loss * batch.loss_weight  # ()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.run.optimizer

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """As the other driver clips, which looks at the norm afterwards."""
        self.norm = clip_grad_norm_(self.model.parameters(), self.run.max_norm)  # ()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The update of a step, whose last part is computed in the closure."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.run.finish_step(self.figures, self.norm, self.num_elements)


class Batches:
    """The batches of the steps that are left, all parts of each. A DataLoader would draw from dropout's generator."""

    def __init__(self, run: Driver) -> None:
        self.run = run

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.run.state.step, self.run.total_steps):
            for part in range(self.run.accumulation):
                yield self.run.batch(step, part)


class TaskData(pl.LightningDataModule):
    """A task's training batches. Validation and test data are scored by `evaluation.evaluate`, as in every run."""

    def __init__(self, run: Driver) -> None:
        super().__init__()
        self.run = run

    def train_dataloader(self) -> Batches:
        return Batches(self.run)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)


# ---- what is done between two steps, in this order (Lightning calls checkpoints last) ----


class Between(Callback):
    """Something that is done after every optimizer step that the run attends to."""

    def __init__(self, run: Driver) -> None:
        self.run = run

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.run.accumulation == 0 and self.run.needs_sync():
            self.after_step(trainer)

    def after_step(self, trainer: pl.Trainer) -> None:
        raise NotImplementedError


class ProgressBar(Between):
    """The bar, the history and the trackers; a loss that is not finite ends the run."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.run.set_rate()

    def after_step(self, trainer: pl.Trainer) -> None:
        self.run.observe()


class EarlyStopping(Between):
    """Validation, the best weights, and the end if there have been no better ones for long."""

    def after_step(self, trainer: pl.Trainer) -> None:
        self.run.evaluate_if_due()
        trainer.should_stop = self.run.exhausted()


class Checkpoints(Between, Checkpoint):
    """Folders checkpoint-<step>, complete or absent; and the end that a signal asked for."""

    def after_step(self, trainer: pl.Trainer) -> None:
        self.run.save_if_due()


# ---- what Lightning would do by itself ----


class Tracker(Logger):
    """The trackers of `--report_to`, for callbacks of Lightning."""

    def __init__(self, run: Driver) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        return "kru"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Figures that callbacks log before a step, under the number of that step."""
        self.run.progress.track(metrics, self.run.state.step + 1)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in recipe.yaml."""


class NoCheckpoints(CheckpointIO):
    """Lightning looks for checkpoints of its own in some places, and would unpickle them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        raise UserError(f"{str(path)!r} is not written: checkpoints are the folders checkpoint-<step>")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise UserError(f"{str(path)!r} is not read: --resume_from_checkpoint takes a folder checkpoint-<step>")

    def remove_checkpoint(self, path: Any) -> None:
        """There are none."""


# ---- the driver ----


class LightningLoop(Driver):
    """The driver of `training.train_lightning`; processes are those that torchrun or accelerate started."""

    libraries: ClassVar[dict[str, str]] = {"lightning": pl.__version__}

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.bare_model.to(self.accelerator.device)
        self.optimizer = optimizer
        self.trainer = build_trainer(self)

    @property
    def scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def run(self, progress: Progress) -> None:
        self.begin(progress)
        if self.ended():
            return
        try:
            self.trainer.fit(TaskModule(self), datamodule=TaskData(self))
        finally:
            self.bare_model.to(self.accelerator.device)  # Lightning leaves it on the CPU

    def close(self) -> None:
        del self.trainer
        super().close()


def build_trainer(run: Driver) -> pl.Trainer:
    """Lightning's trainer for this device and these processes: one epoch of all steps that are left.

    Raises:
        UserError: a device or precision that Lightning does not have.
    """
    device, precision, processes = (getattr(run.accelerator, n) for n in ("device", "mixed_precision", "num_processes"))
    if device.type not in DEVICES:
        raise UserError(f"Lightning has no device {device.type!r}: pass --use_cpu true, or use training.train")
    if precision not in PRECISIONS:
        raise UserError(f"mixed_precision={precision!r} has no meaning under Lightning: one of {', '.join(PRECISIONS)}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what it found and why it ended is said here already
    warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own use of torch
    own = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    tracked = run.options.report_to != "none"
    monitor = [LearningRateMonitor(logging_interval="step")] if tracked else []
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=own,
        num_nodes=processes // own,
        plugins=[TorchElasticEnvironment() if processes > 1 else LightningEnvironment(), NoCheckpoints()],
        precision=PRECISIONS[precision],
        max_epochs=1,
        accumulate_grad_batches=run.accumulation,
        logger=Tracker(run) if tracked else False,
        log_every_n_steps=run.options.logging_steps,
        callbacks=[ProgressBar(run), EarlyStopping(run), *monitor, Checkpoints(run)],
        enable_progress_bar=False,  # ours is a callback of another kind
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )
    # Its handler for SIGTERM starts a broadcast in the middle of whatever the process is doing, where other processes
    # wait for something else: for ever. There is no option to leave it out.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
