"""The tasks under Lightning: `TaskModule` for any Trainer, and the driver of `training.train_lightning` built on it.

In that command Lightning owns the steps: forward, backward, DDP, mixed precision and accumulation. What is done between
two steps is the driver's. So a run leaves the same folder as with accelerate, and either driver resumes from the
other's checkpoints; Lightning writes and reads none of its own there.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler

from ..common.errors import UserError
from ..models.build import using_backend
from ..models.optimization import build_optimizer, learning_rate
from ..tasks import Batch, Task
from .arguments import Arguments
from .checkpoint import TrainerState
from .driver import Bound, Driver
from .run import prepare_task
from .scoring import Scores, to_device
from .slots import Slots, figures_of

PRECISIONS: dict[str, Any] = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DEVICES = ("cpu", "cuda", "mps")


class Batches:
    """What `make` gives, as often as it is asked for. A DataLoader would draw from dropout's generator."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int | None = None) -> None:
        self.make, self.length = make, length

    def __iter__(self) -> Iterator[Batch]:
        return self.make()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of batches is not known")  # as Lightning expects it of such data
        return self.length


def batches_of(slots: Slots, steps: range) -> Iterator[Batch]:
    """The batches of these steps, all parts of each."""
    return (slots.batch(step, part) for step in steps for part in range(slots.parts))


class TaskModule(pl.LightningModule):
    """A task with data, model, optimizer and learning rate, for any `Trainer`: `trainer.fit(TaskModule(arguments))`.

    Truncated BPTT, with a state carried from window to window for each row; the state is in the Trainer's checkpoints.
    It logs `train_loss` (nats per target), `validation_<m>` and `test_<m>` with the task's metrics m.

    Of the options, the Trainer decides length, accumulation, precision, devices, evaluation and saving, by its own
    arguments; task, data, model, optimizer, `per_device_train_batch_size` and `max_grad_norm` (unless the Trainer has
    a `gradient_clip_val`) are those of `arguments`. One epoch is one pass over the training data.

    Args:
        arguments: of `training.loop.arguments.parse_arguments`.
        task: loaded, with its `model`; made from the options if None.
    """

    def __init__(self, arguments: Arguments, task: Task | None = None, model: Any = None) -> None:
        super().__init__()
        self.arguments, self.options = arguments, arguments.run
        self.task, self.model = (task, model) if task is not None else prepare_task(arguments)
        self.bound = Bound(self.model, arguments.model.max_recurrent_norm)
        self.state = TrainerState()
        self.figures, self.norm = torch.zeros(3), torch.zeros(())  # (3,) nats, targets, loss of the step's parts; ()
        self.num_elements = 0

    def setup(self, stage: str) -> None:
        """The slots of this process, as many as the Trainer accumulates batches."""
        trainer, rows = self.trainer, self.options.per_device_train_batch_size
        self.slots = Slots(self.task, rows, trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        self.engine = using_backend(self.options.backend, self.model, trainer.strategy.root_device)
        self.engine.__enter__()

    def teardown(self, stage: str) -> None:
        self.engine.__exit__(None, None, None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    # ---- training ----

    def train_dataloader(self) -> Batches:
        """The rest of the current pass."""
        steps = self.task.num_batches(self.slots.layout)

        def batches() -> Iterator[Batch]:
            return batches_of(self.slots, range(self.state.step, (self.state.step // steps + 1) * steps))

        return Batches(batches, steps * self.slots.parts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One slot's loss (); Lightning divides it by the number of parts of a step."""
        part = batch_idx % self.slots.parts
        out = self.slots.forward(self.model, batch, part)
        self.num_elements = batch.num_elements
        self.figures = figures_of(out) + (self.figures if part else 0)  # (3,)
        return out.loss * batch.loss_weight  # ()

    def configure_optimizers(self) -> Any:
        if self.options.ema_decay:
            raise UserError(
                f"ema_decay={self.options.ema_decay} is for training.train and training.train_lightning: a Trainer of "
                "your own takes the callback EMAWeightAveraging of Lightning"
            )
        if self.options.weight_dtype != "fp32":
            raise UserError(
                f"weight_dtype={self.options.weight_dtype!r} is for training.train and training.train_lightning, not "
                "for a Trainer of your own"
            )
        optimizer, total = build_optimizer(self.model, self.options), int(self.trainer.estimated_stepping_batches)

        def rate() -> float:
            return learning_rate(self.state.step, total, self.options, self.state.plateau_scale)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Schedule(optimizer, rate), "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """To `max_grad_norm`, or as the Trainer says."""
        if gradient_clip_val is None:
            self.norm = clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or torch.inf)  # ()
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The update of a step, whose last part is computed in the closure."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.finish_step()

    def finish_step(self) -> None:
        """After an update."""
        self.bound.hold()
        self.state.step += 1

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log("train_loss", self.figures[0] / self.figures[1], prog_bar=True)

    # ---- scoring ----

    def val_dataloader(self) -> Batches:
        return self.split("validation")

    def test_dataloader(self) -> Batches:
        return self.split("test")

    def split(self, name: str) -> Batches:
        """This process's share of a split."""
        return Batches(lambda: self.task.eval_batches(name, self.trainer.global_rank, self.trainer.world_size))

    def on_validation_epoch_start(self) -> None:
        self.scores = Scores(self.task)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.scores.add(self.model, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the figures; where the rate follows plateaus, it is lowered after a figure that is not the best."""
        metrics = self.scores.metrics()
        self.log_dict({f"validation_{name}": value for name, value in metrics.items()}, prog_bar=True)
        counts = not self.trainer.sanity_checking and self.trainer.training
        if counts and not self.state.update_best(metrics[self.task.metric], self.task.greater_is_better):
            plateau = self.options.lr_scheduler_type == "plateau"
            self.state.plateau_scale *= self.options.plateau_factor if plateau else 1

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test_{name}": value for name, value in self.scores.metrics().items()})

    # ---- the Trainer's checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        def gather(rows: Tensor) -> Tensor:
            gathered: Any = self.all_gather(rows)  # (ranks, rows, …), or (rows, …) of one process
            return gathered.reshape(-1, *rows.shape[1:])

        checkpoint["kru_run"] = {"state": asdict(self.state), "carried": self.slots.gather(gather)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.state = TrainerState(**checkpoint["kru_run"]["state"])
        self.slots.scatter(checkpoint["kru_run"]["carried"], self.device)


class Schedule(LRScheduler):
    """Sets every group's multiple of `rate()`."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate() * group["scale"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}  # it follows from the module's

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


# ---- the command ----


class DrivenModule(TaskModule):
    """The module whose steps belong to a run of `training.train_lightning`."""

    def __init__(self, run: Driver) -> None:
        super().__init__(run.arguments, run.task, run.model)
        self.run = run

    def setup(self, stage: str) -> None:
        self.slots = self.run.slots

    def teardown(self, stage: str) -> None:
        """The run has its engine."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.run.optimizer

    def on_train_start(self) -> None:
        self.run.start_clocks()  # what Lightning sets up is not training time

    def finish_step(self) -> None:
        self.run.finish_step(self.figures, self.norm, self.num_elements)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """All callbacks have been called."""
        if (batch_idx + 1) % self.slots.parts == 0:
            self.run.between_steps()
            self.trainer.should_stop = self.run.exhausted()


class NoCheckpoints(CheckpointIO):
    """Lightning looks for checkpoints of its own in some places, and would unpickle them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        raise UserError(f"{str(path)!r} is not written: checkpoints are the folders checkpoint-<step>")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise UserError(f"{str(path)!r} is not read: --resume_from_checkpoint takes a folder checkpoint-<step>")

    def remove_checkpoint(self, path: Any) -> None:
        """There are none."""


class LightningLoop(Driver):
    """The driver of `training.train_lightning`; processes are those that torchrun or accelerate started."""

    libraries: ClassVar[dict[str, str]] = {"lightning": pl.__version__}

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.to(self.accelerator.device)
        self.optimizer, self.trainer = optimizer, build_trainer(self)
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)

    def train(self) -> None:
        try:
            left = batches_of(self.slots, range(self.state.step, self.total_steps))
            self.trainer.fit(DrivenModule(self), train_dataloaders=left)
        finally:
            self.model.to(self.accelerator.device)  # Lightning leaves it on the CPU

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
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=own,
        num_nodes=processes // own,
        plugins=[TorchElasticEnvironment() if processes > 1 else LightningEnvironment(), NoCheckpoints()],
        precision=PRECISIONS[precision],
        max_epochs=1,
        accumulate_grad_batches=run.slots.parts,
        limit_val_batches=0,  # the driver scores the validation data
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # ours is not a callback
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )
    # Its handler for SIGTERM starts a broadcast in the middle of whatever the process is doing, where other processes
    # wait for something else, and never end. There is no option to leave it out.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
