"""What every driver of a run shares: its state, what is done between two steps, saving and going on.

`loop.py` adds the step with accelerate, `lightning_module.py` with Lightning. Whatever a run leaves behind comes from
here, so that either of them goes on from the other's checkpoints.
"""

from __future__ import annotations

import gc
import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from kru_hf import KRURecurrence

from ..common import checkpoint as ckpt
from ..common.errors import Interrupted, UserError
from ..common.stopping import StopRequest
from ..models.optimization import build_optimizer, learning_rate, set_learning_rate
from ..tasks import Batch, Layout, Task, TaskOutput
from .arguments import Arguments
from .progress import Progress
from .scoring import evaluate

# Options that change neither the weights nor which ones are the best: a resumed run may change them.
FREE_OPTIONS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "save_steps", "save_total_limit",
    "logging_steps", "sample_length", "use_cpu", "num_threads", "backend", "evaluate_test", "push_to_hub",
    "hub_model_id", "hub_private_repo", "data_license", "dataset", "per_device_train_batch_size",
    "gradient_accumulation_steps",
}  # fmt: skip
FREE_CONFIG = {"transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"}


class Driver(ABC):
    """A run: model, optimizer, position and history. `state.step` optimizer steps are done.

    Args:
        accelerator: says which device and process this is, and joins figures of all processes.
    """

    libraries: ClassVar[dict[str, str]] = {}  # name and version of what a driver needs besides those of every run
    optimizer: Any  # of torch, or a wrapper with the same groups and states
    progress: Progress

    def __init__(
        self, arguments: Arguments, task: Task, model: Any, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.arguments, self.options, self.task, self.accelerator, self.stop = (
            arguments, arguments.run, task, accelerator, stop,
        )  # fmt: skip
        self.folder: Path = arguments.output_dir
        self.accumulation = self.options.gradient_accumulation_steps
        slots = accelerator.num_processes * self.accumulation
        self.layout = Layout(self.options.per_device_train_batch_size * slots, slots)
        per_epoch = task.num_batches(self.layout)
        epochs = math.ceil(per_epoch * self.options.num_train_epochs)
        self.total_steps = self.options.max_steps if self.options.max_steps > 0 else epochs
        self.bare_model = model
        self.bounded = bounded_cells(model, arguments.model.max_recurrent_norm)
        self.state = ckpt.TrainerState()
        self.carried: list[Any] = [None] * self.accumulation  # one state a slot of this rank
        self.pending: list[torch.Tensor] = []  # figures of steps that have not been looked at yet
        self.signal_number, self.started, self.processed = 0, 0.0, 0.0
        self.prepare(build_optimizer(model, self.options))
        torch.manual_seed(self.options.seed + 1 + accelerator.process_index)  # dropout differs between ranks

    @abstractmethod
    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the model on its device and set `self.optimizer`."""

    @abstractmethod
    def run(self, progress: Progress) -> None:
        """Train to the end; the best weights are then at the top of the folder.

        Raises:
            Interrupted: a signal came; a checkpoint has been written.
            UserError: the loss is not finite, or a save failed.
        """

    @property
    @abstractmethod
    def scaler(self) -> Any:
        """What scales the losses of fp16, or None."""

    # ---- one step ----

    def batch(self, step: int, part: int) -> Batch:
        """The batch of one of this rank's slots."""
        return self.task.train_batch(step, self.accelerator.process_index * self.accumulation + part, self.layout)

    def set_rate(self) -> None:
        """The learning rate of the step that comes."""
        rate = learning_rate(self.state.step, self.total_steps, self.options, self.state.plateau_scale)
        set_learning_rate(self.optimizer, rate)

    def forward(self, model: Any, batch: Batch, part: int) -> TaskOutput:
        """One slot's batch; the state that it ends in is kept for the next one."""
        out = self.task.forward(model, batch, None if batch.reset_state else self.carried[part])
        self.carried[part] = out.state.detach() if out.state is not None and self.task.carries_state else None
        return out

    @staticmethod
    def figures(out: TaskOutput) -> torch.Tensor:
        """Nats, targets and loss (3,) of a slot."""
        return torch.stack([out.sums["loss"], out.sums["count"], out.loss.detach().double()])  # (3,)

    @property
    def max_norm(self) -> float:
        """What gradients are clipped to."""
        return self.options.max_grad_norm or math.inf

    def finish_step(self, figures: torch.Tensor, norm: torch.Tensor, num_elements: int) -> None:
        """A step is done: the sum of its parts' `figures` (3,), the gradient's norm (), and the elements of a slot."""
        for cell in self.bounded:
            cell.bound_norm(self.arguments.model.max_recurrent_norm or math.inf)
        self.pending.append(torch.cat([figures, norm.detach().double().reshape(1)]))  # (4,)
        self.state.step += 1
        self.state.train_elements += num_elements * self.layout.num_slots

    # ---- between two steps ----

    def begin(self, progress: Progress) -> None:
        """The run starts now, or goes on."""
        self.progress = progress
        self.bare_model.train()
        self.start_clocks()

    def start_clocks(self) -> None:
        """What comes now is training time: on the wall, and of this process's processors."""
        self.started, self.processed = time.perf_counter(), time.process_time()

    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state.step >= self.total_steps or self.exhausted()

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is done after this one; all is after the last."""
        return self.state.step == self.total_steps or self.state.step % every == 0

    def needs_sync(self) -> bool:
        """Whether this step is looked at: on a GPU that waits for it, so there only where something is due."""
        options = self.options
        return self.accelerator.device.type == "cpu" or any(
            self.due(every) for every in (options.logging_steps, options.eval_steps, options.save_steps)
        )

    def observe(self) -> None:
        """After a step: first its figures, which end the run if they are not finite."""
        self.signal_number = self.collect_figures()
        self.state.train_seconds += time.perf_counter() - self.started
        self.progress.update(self.state)
        if self.due(self.options.logging_steps):
            self.log()

    def evaluate_if_due(self) -> None:
        """After a step: then the validation data, the best weights, and the plateau."""
        if not self.due(self.options.eval_steps):
            return
        metrics = evaluate(self.task, self.bare_model, "validation", self.accelerator)
        self.progress.log(self.state, {f"validation_{name}": value for name, value in metrics.items()})
        self.progress.update(self.state)  # the bar closes with the last figure, not with the one before
        value = metrics[self.task.metric]
        if not math.isfinite(value):
            raise UserError(self.divergence(self.state.step, torch.tensor([0, 0, value, math.nan])), shared=True)
        if self.weigh(self.state, value):
            self.save_best()

    def save_if_due(self) -> None:
        """After a step: last a checkpoint, and the orderly end that a signal asked for."""
        if self.due(self.options.save_steps) or self.signal_number or self.exhausted():
            self.save()
        if self.signal_number:
            raise Interrupted(f"stopped at step {self.state.step}; the checkpoint is written", self.signal_number)
        self.start_clocks()

    def collect_figures(self) -> int:
        """Look at the figures of the steps since the last look; the same on every rank.

        Returns:
            the signal that asked some rank to stop, or 0.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        figures = torch.stack(self.pending) if self.pending else torch.zeros(0, 4, dtype=torch.float64)  # (steps, 4)
        figures, signal_number = figures.cpu(), self.stop.pending()
        seconds = time.process_time() - self.processed
        if self.accelerator.num_processes > 1:
            last = torch.tensor([float(signal_number), seconds], dtype=torch.float64)
            packed = torch.cat([figures.flatten(), last]).to(self.accelerator.device)
            ranks = self.accelerator.gather(packed[None])  # (ranks, 4·steps + 2)
            signal_number, seconds = int(ranks[:, -2].max()), float(ranks[:, -1].sum())
            figures = ranks[:, :-2].sum(0).reshape(-1, 4).cpu()
        self.state.processor_seconds += seconds
        first = self.state.step - len(self.pending) + 1
        self.pending = []
        watched = figures[:, 2] if self.accelerator.mixed_precision == "fp16" else figures[:, 2:].sum(1)
        for index in (~torch.isfinite(watched)).nonzero().flatten().tolist()[:1]:
            raise UserError(self.divergence(first + index, figures[index]), shared=True)
        new = figures[:, :2].sum(0).tolist()
        self.state.window = [self.state.window[0] + new[0], self.state.window[1] + new[1]]
        return signal_number

    def divergence(self, step: int, figures: torch.Tensor) -> str:
        """What to say when the run has left the finite numbers."""
        found = ckpt.checkpoints(self.folder)
        kept = f"the last good checkpoint is {str(found[-1])!r}" if found else "no checkpoint had been written yet"
        advice = "lower --learning_rate or --max_grad_norm"
        if self.bare_model.config.model_type == "kru":
            advice += ", or --factor_learning_rate_scale"
            advice += "" if self.bare_model.config.gated else ", or raise --unitary_loss_coef"
        return (
            f"training stopped: loss {float(figures[2])} with gradient norm {float(figures[3])} at step {step}; "
            f"{kept}; {advice}"
        )

    def exhausted(self) -> bool:
        """Whether early stopping says that it is enough."""
        patience = self.options.early_stopping_patience
        return bool(patience) and self.state.stalled >= patience

    def log(self) -> None:
        """Close a window of training figures: history and tracker."""
        nats, targets = self.state.window
        self.state.window = [0.0, 0.0]
        rate = self.optimizer.param_groups[0]["lr"]
        self.progress.log(self.state, {"train_loss": nats / targets, "learning_rate": rate})

    def weigh(self, state: ckpt.TrainerState, value: float) -> bool:
        """Whether the validation figure `value` at `state.step` is the best yet; `state` remembers what follows."""
        best = state.best_metric
        if best is None or (value > best if self.task.greater_is_better else value < best):
            state.best_metric, state.best_step, state.stalled = value, state.step, 0
            return True
        state.stalled += 1
        if self.options.lr_scheduler_type == "plateau":
            state.plateau_scale *= self.options.plateau_factor
        return False

    # ---- saving and going on ----

    def signature(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        config = self.bare_model.config.to_dict()
        return {
            **{f"config.{key}": value for key, value in config.items() if key not in FREE_CONFIG},
            **{key: value for key, value in self.arguments.flat().items() if key not in FREE_OPTIONS},
            "data": self.task.dataset_record(),
            "global_batch_size": self.layout.global_batch_size,
            "total_steps": self.total_steps,
        }

    def save_best(self) -> None:
        """Put model and tokenizer at the top of the folder."""

        def fill(temporary: Path) -> None:
            self.bare_model.save_pretrained(temporary)
            if self.task.tokenizer is not None:
                self.task.tokenizer.save_pretrained(temporary)

        if self.accelerator.is_main_process:
            ckpt.write_files(self.folder, fill)

    def save(self) -> None:
        """Write a checkpoint of this step; every rank takes part, rank 0 writes."""
        carried, random = self.gather_states(), self.gather_random()
        if self.accelerator.is_main_process:
            target = self.folder / f"checkpoint-{self.state.step}"
            ckpt.save_checkpoint(
                target,
                model=self.bare_model,
                optimizer={
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler and self.scaler.state_dict(),
                },
                carried=carried,
                random=random,
                state=self.state,
                signature=self.signature(),
            )
            ckpt.prune(self.folder, self.options.save_total_limit, target)
        self.accelerator.wait_for_everyone()

    def gather_states(self) -> dict[str, torch.Tensor]:
        """Carried states of all rows of the global batch, one tensor a layer with rows first."""
        if self.carried[0] is None:
            return {}
        layers = zip(*(slot.states for slot in self.carried), strict=True)
        return {str(i): self.accelerator.gather(torch.cat(layer)).cpu() for i, layer in enumerate(layers)}

    def gather_random(self) -> dict[str, torch.Tensor]:
        """Random generator states, ranks first."""
        device = self.accelerator.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return {name: self.accelerator.gather(value.to(device)[None]).cpu() for name, value in states.items()}

    def close(self) -> None:
        """Let go of what torch wrapped around the model, before the processes part.

        A process group that only that wrapper still holds is taken down while Python's lock is held, and its threads
        may be waiting for that lock: the process would hang now and then.
        """
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()
            gc.collect()


def bounded_cells(model: Any, limit: float | None) -> list[KRURecurrence]:
    """The recurrences whose spectral norm `--max_recurrent_norm` holds; an error where there is none to hold."""
    if not limit:
        return []
    cells = [m for m in model.modules() if isinstance(m, KRURecurrence) and m.cell.complex]
    if model.config.model_type != "kru" or not cells or not cells[0].factors[0].requires_grad:
        raise UserError(f"max_recurrent_norm={limit!r} is for trained factors of cell_type kru alone: leave it out")
    return cells
