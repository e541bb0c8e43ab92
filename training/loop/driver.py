"""What both ways to train share: the state of a run, and what is done between two steps.

`accelerate_loop.py` adds the step with accelerate, `lightning_module.py` with Lightning. Whatever a run leaves behind
comes from here, so that either of them resumes from the other's checkpoints.
"""

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kru_hf import KRURecurrence
from kru_hf.export.weight_file import rounded_weights

from ..common.errors import Interrupted, UserError
from ..common.run_folder import checkpoints
from ..common.saving import write_files
from ..common.stopping import StopRequest
from ..models.optimization import build_optimizer, learning_rate, set_learning_rate
from ..tasks import Task
from .arguments import Arguments
from .checkpoint import TrainerState, save
from .progress import Progress
from .scoring import evaluate
from .slots import Slots


class Driver(ABC):
    """A run: model, optimizer, position and history. `state.step` optimizer steps are done.

    Args:
        model: unwrapped.
        accelerator: says which device and process this is, and joins figures of all processes.
    """

    libraries: ClassVar[dict[str, str]] = {}  # name and version of what a driver needs besides those of every run
    optimizer: Any  # of torch, or a wrapper with the same groups and states
    scaler: Any = None  # what scales the losses of fp16
    progress: Progress

    def __init__(
        self, arguments: Arguments, task: Task, model: Any, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.arguments, self.options, self.folder = arguments, arguments.run, arguments.output_dir
        self.task, self.model, self.accelerator, self.stop = task, model, accelerator, stop
        rank, ranks = accelerator.process_index, accelerator.num_processes
        rows, parts = self.options.per_device_train_batch_size, self.options.gradient_accumulation_steps
        self.slots = Slots(task, rows, rank, ranks, parts)
        epochs = math.ceil(task.num_batches(self.slots.layout) * self.options.num_train_epochs)
        self.total_steps = self.options.max_steps if self.options.max_steps > 0 else epochs
        self.bound = Bound(model, arguments.model.max_recurrent_norm)
        self.state = TrainerState()
        self.pending: list[torch.Tensor] = []  # figures of steps that have not been collected yet
        self.signal_number, self.started, self.processed = 0, 0.0, 0.0
        optimizer = build_optimizer(model, self.options)
        self.prepare(optimizer)
        self.rounding = Rounding(model, optimizer, self.options.weight_dtype)
        self.average = Average(model, self.options.ema_decay)
        torch.manual_seed(self.options.seed + 1 + rank)  # dropout differs between ranks

    @abstractmethod
    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the model on its device and set `self.optimizer`."""

    @abstractmethod
    def train(self) -> None:
        """Make the steps that are left, and `between_steps` after each of them."""

    def run(self) -> None:
        """Train to the end; the best weights are then at the top of the folder.

        Raises:
            Interrupted: a signal came; a checkpoint has been written.
            UserError: the loss is not finite, or a save failed.
        """
        self.progress = Progress(self.task, self.accelerator, self.total_steps, self.state.step)
        self.model.train()
        self.start_clocks()
        self.set_rate()
        try:
            if not self.ended():
                self.train()
        finally:
            self.progress.close()

    # ---- one step ----

    def set_rate(self) -> None:
        """The learning rate of the next step."""
        rate = learning_rate(self.state.step, self.total_steps, self.options, self.state.plateau_scale)
        set_learning_rate(self.optimizer, rate)

    def finish_step(self, figures: torch.Tensor, norm: torch.Tensor, num_elements: int) -> None:
        """A step is done: the sum of its parts' `figures` (3,), the gradient's norm (), and the elements of a slot."""
        self.bound.hold()
        self.rounding.round()
        self.average.update()
        self.pending.append(torch.cat([figures, norm.detach().double().reshape(1)]))  # (4,)
        self.state.step += 1
        self.state.train_elements += num_elements * self.slots.layout.num_slots

    # ---- between two steps ----

    def between_steps(self) -> None:
        """Figures, validation, checkpoint; then the learning rate of the next step."""
        options = self.options
        due = any(self.due(every) for every in (options.logging_steps, options.eval_steps, options.save_steps))
        if due or self.accelerator.device.type == "cpu":  # a GPU waits for the figures, so there only where needed
            self.observe()
            if self.due(options.eval_steps):
                self.validate()
            if self.due(options.save_steps) or self.signal_number or self.exhausted():
                save(self)
            if self.signal_number:
                raise Interrupted(f"stopped at step {self.state.step}; the checkpoint is written", self.signal_number)
            self.start_clocks()
        self.set_rate()

    def start_clocks(self) -> None:
        """What comes now is training time: on the wall, and of this process's processors."""
        self.started, self.processed = time.perf_counter(), time.process_time()

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is done after this one; all is after the last."""
        last = self.state.step == self.total_steps or self.timed_out()
        return last or self.state.step % every == 0

    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state.step >= self.total_steps or self.exhausted()

    def exhausted(self) -> bool:
        """Whether early stopping, or the time that there is, says that it is enough."""
        patience = self.options.early_stopping_patience
        return self.timed_out() or (bool(patience) and self.state.stalled >= patience)

    def timed_out(self) -> bool:
        """Whether the time of `--max_time` is over."""
        minutes = self.options.max_time
        return bool(minutes) and self.state.train_seconds >= 60 * minutes

    def observe(self) -> None:
        """Collect the figures of the last steps, which end the run if they are not finite, and show them."""
        self.signal_number = self.collect_figures()
        self.progress.update(self.state)
        if self.due(self.options.logging_steps):  # close a window of training figures
            nats, targets = self.state.window
            self.state.window = [0.0, 0.0]
            rate = self.optimizer.param_groups[0]["lr"]
            self.progress.log(self.state, {"train_loss": nats / targets, "learning_rate": rate})

    def collect_figures(self) -> int:
        """Add up the pending figures of all ranks, and the time since the clocks were started.

        Returns:
            the signal that asked some rank to stop, or 0; the same on every rank.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        figures = torch.stack(self.pending) if self.pending else torch.zeros(0, 4, dtype=torch.float64)  # (steps, 4)
        figures, signal_number = figures.cpu(), self.stop.pending()
        seconds, wall = time.process_time() - self.processed, time.perf_counter() - self.started
        if self.accelerator.num_processes > 1:
            last = torch.tensor([float(signal_number), wall, seconds], dtype=torch.float64)
            packed = torch.cat([figures.flatten(), last]).to(self.accelerator.device)
            ranks = self.accelerator.gather(packed[None])  # (ranks, 4·steps + 3)
            signal_number, wall, seconds = int(ranks[:, -3].max()), float(ranks[:, -2].max()), float(ranks[:, -1].sum())
            figures = ranks[:, :-3].sum(0).reshape(-1, 4).cpu()
        self.state.train_seconds += wall
        self.state.processor_seconds += seconds
        first = self.state.step - len(self.pending) + 1
        self.pending = []
        watched = figures[:, 2] if self.accelerator.mixed_precision == "fp16" else figures[:, 2:].sum(1)
        for index in (~torch.isfinite(watched)).nonzero().flatten().tolist()[:1]:
            self.stop_diverged(first + index, *figures[index, 2:].tolist())
        new = figures[:, :2].sum(0).tolist()
        self.state.window = [self.state.window[0] + new[0], self.state.window[1] + new[1]]
        return signal_number

    def validate(self) -> None:
        """Score the validation data; the best weights are saved, others lower the rate where it follows plateaus."""
        with self.average.applied():
            self.score_and_save()

    def score_and_save(self) -> None:
        """`validate`, with the weights that the model has now."""
        metrics = evaluate(self.task, self.model, "validation", self.accelerator)
        self.progress.log(self.state, {f"validation_{name}": value for name, value in metrics.items()})
        self.progress.update(self.state)  # the bar closes with the last figure, not with the one before
        value = metrics[self.task.metric]
        if not math.isfinite(value):
            self.stop_diverged(self.state.step, value, math.nan)
        if self.state.update_best(value, self.task.greater_is_better):
            if self.accelerator.is_main_process:
                write_files(self.folder, self.save_model)
        elif self.options.lr_scheduler_type == "plateau":
            self.state.plateau_scale *= self.options.plateau_factor

    def save_model(self, folder: Path) -> None:
        """Write model and tokenizer."""
        self.model.save_pretrained(folder)
        if self.task.tokenizer is not None:
            self.task.tokenizer.save_pretrained(folder)

    def stop_diverged(self, step: int, loss: float, norm: float) -> None:
        """Raise the `UserError` of a run whose loss or gradients are no longer finite."""
        found = checkpoints(self.folder)
        kept = f"the last good checkpoint is {str(found[-1])!r}" if found else "no checkpoint had been written yet"
        advice = "lower --learning_rate or --max_grad_norm"
        if self.model.config.model_type == "kru":
            advice += ", or --factor_learning_rate_scale"
            advice += "" if self.model.config.gated else ", or raise --unitary_loss_coef"
        raise UserError(
            f"training diverged: loss {loss} with gradient norm {norm} at step {step}; {kept}; {advice}", shared=True
        )

    def close(self) -> None:
        """Let go of what torch wrapped around the model, before the processes part.

        A process group that only that wrapper still holds is taken down while Python's lock is held, and its threads
        may be waiting for that lock: the process would hang now and then.
        """
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()
            gc.collect()


class Bound:
    """The recurrences whose spectral norm `--max_recurrent_norm` holds; an error where there is none to hold."""

    def __init__(self, model: Any, limit: float | None) -> None:
        self.limit = limit or math.inf
        found = [m for m in model.modules() if isinstance(m, KRURecurrence) and m.cell.complex] if limit else []
        self.cells = [cell for cell in found if any(factor.requires_grad for factor in cell.factors)]
        if limit and (model.config.model_type != "kru" or not self.cells):
            raise UserError(f"max_recurrent_norm={limit!r} is for trained factors of cell_type kru alone: leave it out")

    def hold(self) -> None:
        """After an update: scale the factors of what has grown beyond it."""
        for cell in self.cells:
            cell.bound_norm(self.limit)


class Rounding:
    """Training with rounded weights, or nothing for "fp32": the model holds them, and has its own for an update alone.

    So gradients are those of the rounded weights and pass straight through the rounding (Bengio et al. 2013), and what
    is scored and saved is what a weight file of that dtype will hold.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        self.exact: dict[str, torch.Tensor] | None = None
        self.holds_exact = dtype != "fp32"
        self.round()
        optimizer.register_step_pre_hook(lambda *_: self.restore())

    @torch.no_grad()
    def round(self) -> None:
        """After an update: keep the exact weights, and give the model rounded ones."""
        if not self.holds_exact:  # fp16 leaves out an update whose gradients are not finite
            return
        self.holds_exact = False
        self.exact = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        for name, weight in rounded_weights(self.model, self.dtype).items():
            self.model.get_parameter(name).copy_(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Before an update: give the model its exact weights."""
        for name, weight in (self.exact or {}).items():
            self.model.get_parameter(name).copy_(weight)
            self.holds_exact = True

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint holds of it."""
        return self.exact

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Resume from it."""
        if self.exact is not None:
            self.exact = {name: saved[name].to(weight.device) for name, weight in self.exact.items()}


class Average:
    """The exponential moving average of the weights over the steps (Polyak averaging), or nothing for a decay of 0.

    It is scored and saved in place of the weights that are trained. Early on its decay is (1 + n) / (10 + n) after n
    steps, so that the first weights are soon forgotten.
    """

    def __init__(self, model: Any, decay: float) -> None:
        def average(averaged: Any, current: Any, count: Any) -> None:
            steps = int(count)
            get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=average) if decay else None

    def update(self) -> None:
        """After a step."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        if self.averaged is None:
            yield
            return
        weights = [parameter.data for parameter in self.model.parameters()]
        averaged = [parameter.data for parameter in self.averaged.parameters()]
        own = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, averaged)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, own)

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint holds of it."""
        return None if self.averaged is None else self.averaged.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resume from it."""
        if self.averaged is not None:
            self.averaged.load_state_dict(saved)
