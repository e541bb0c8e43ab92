"""The training loop: one optimizer step after another, with evaluations, checkpoints and an orderly end."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from . import checkpoint as ckpt
from .arguments import Arguments, RunOptions
from .errors import Interrupted, UserError
from .evaluation import evaluate
from .optimization import build_optimizer, learning_rate, set_learning_rate
from .reporting import Progress
from .stopping import StopRequest
from .tasks import Layout, Task

# Options that change neither the weights nor which ones are the best: a resumed run may change them.
FREE_OPTIONS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "save_steps", "save_total_limit",
    "logging_steps", "sample_length", "use_cpu", "num_threads", "evaluate_test", "push_to_hub", "hub_model_id",
    "hub_private_repo", "data_license", "dataset", "per_device_train_batch_size",
    "gradient_accumulation_steps",
}  # fmt: skip
FREE_CONFIG = {"transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"}


class TrainingLoop:
    """A run: model, optimizer, position and history. `state.step` optimizer steps are done."""

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
        self.total_steps = count_steps(self.options, task, self.layout)
        self.bare_model = model
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, self.options))
        self.state = ckpt.TrainerState()
        self.carried: list[Any] = [None] * self.accumulation  # one state a slot of this rank
        self.pending: list[torch.Tensor] = []  # figures of steps that have not been looked at yet
        torch.manual_seed(self.options.seed + 1 + accelerator.process_index)  # dropout differs between ranks

    # ---- one step ----

    def train_step(self) -> None:
        """Forward and backward over this rank's slots, then one update."""
        rate = learning_rate(self.state.step, self.total_steps, self.options, self.state.plateau_scale)
        set_learning_rate(self.optimizer, rate)
        figures = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)  # nats, targets, loss
        for part in range(self.accumulation):
            slot = self.accelerator.process_index * self.accumulation + part
            batch = self.task.train_batch(self.state.step, slot, self.layout)
            batch.inputs = send_to_device(batch.inputs, self.accelerator.device)
            batch.extra = send_to_device(batch.extra, self.accelerator.device)
            if part < self.accumulation - 1:
                with self.accelerator.no_sync(self.model):
                    out = self.forward_backward(batch, part)
            else:
                out = self.forward_backward(batch, part)
            figures += torch.stack([out.sums["loss"], out.sums["count"], out.loss.detach().double()])
        limit = self.options.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.cat([figures, norm.detach().double().reshape(1)]))
        self.state.step += 1
        self.state.train_elements += batch.num_elements * self.layout.num_slots

    def forward_backward(self, batch: Any, part: int) -> Any:
        """One slot's batch; the state that it ends in is kept for the next one."""
        carried = None if batch.reset_state else self.carried[part]
        out = self.task.forward(self.model, batch, carried)
        self.accelerator.backward(out.loss * (batch.loss_weight / self.accumulation))
        self.carried[part] = out.state.detach() if out.state is not None and self.task.carries_state else None
        return out

    def look(self) -> int:
        """Look at the figures of the steps since the last look; the same on every rank.

        Returns:
            the signal that asked some rank to stop, or 0.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        figures = torch.stack(self.pending) if self.pending else torch.zeros(0, 4, dtype=torch.float64)  # (steps, 4)
        figures, signal_number = figures.cpu(), self.stop.pending()
        if self.accelerator.num_processes > 1:
            last = torch.tensor([float(signal_number)], dtype=torch.float64)
            packed = torch.cat([figures.flatten(), last]).to(self.accelerator.device)
            ranks = self.accelerator.gather(packed[None])  # (ranks, 4·steps + 1)
            signal_number = int(ranks[:, -1].max())
            figures = ranks[:, :-1].sum(0).reshape(-1, 4).cpu()
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
        return (
            f"training stopped: loss {float(figures[2])} with gradient norm {float(figures[3])} at step {step}; "
            f"{kept}. Lower --learning_rate or set --max_grad_norm"
        )

    # ---- the run ----

    def run(self, progress: Progress) -> None:
        """Train to the end; the best weights are then at the top of the folder.

        Raises:
            Interrupted: a signal came; a checkpoint has been written.
            UserError: the loss is not finite, or a save failed.
        """
        self.model.train()
        every_step = self.accelerator.device.type == "cpu"
        started, options = time.perf_counter(), self.options
        while self.state.step < self.total_steps and not self.exhausted():
            self.train_step()
            step = self.state.step
            at_end = step == self.total_steps
            log, judge, save = (
                at_end or step % n == 0 for n in (options.logging_steps, options.eval_steps, options.save_steps)
            )
            if not (every_step or log or judge or save):
                continue
            signal_number = self.look()
            self.state.train_seconds += time.perf_counter() - started
            progress.update(self.state)
            if log:
                self.log(progress)
            if judge:
                self.judge(progress)
            if save or signal_number or self.exhausted():
                self.save()
            if signal_number:
                raise Interrupted(f"stopped at step {step}; the checkpoint is written", signal_number)
            started = time.perf_counter()

    def exhausted(self) -> bool:
        """Whether early stopping says that it is enough."""
        patience = self.options.early_stopping_patience
        return bool(patience) and self.state.stalled >= patience

    def log(self, progress: Progress) -> None:
        """Close a window of training figures: history and tracker."""
        nats, targets = self.state.window
        self.state.window = [0.0, 0.0]
        rate = self.optimizer.param_groups[0]["lr"]
        progress.log(self.state, {"train_loss": nats / targets, "learning_rate": rate})

    def judge(self, progress: Progress) -> None:
        """Evaluate on the validation data, keep the best weights, and follow the plateau."""
        metrics = evaluate(self.task, self.bare_model, "validation", self.accelerator)
        progress.log(self.state, {f"validation_{name}": value for name, value in metrics.items()})
        value = metrics[self.task.metric]
        if not math.isfinite(value):
            raise UserError(self.divergence(self.state.step, torch.tensor([0, 0, value, math.nan])), shared=True)
        if improved(self.state, value, self.task.greater_is_better):
            self.save_best()
        elif self.options.lr_scheduler_type == "plateau":
            self.state.plateau_scale *= self.options.plateau_factor

    # ---- saving and going on ----

    def signature(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return signature(self.arguments, self.task, self.bare_model, self.layout, self.total_steps)

    def save_best(self) -> None:
        """Put model and tokenizer at the top of the folder."""
        if self.accelerator.is_main_process:
            save_best(self.folder, self.bare_model, self.task)

    def save(self) -> None:
        """Write a checkpoint of this step; every rank takes part, rank 0 writes."""
        carried, random = self.gather_states(), self.gather_random()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            ckpt.save_checkpoint(
                self.folder / f"checkpoint-{self.state.step}",
                model=self.bare_model,
                optimizer={"optimizer": self.optimizer.state_dict(), "scaler": scaler and scaler.state_dict()},
                carried=carried,
                random=random,
                state=self.state,
                signature=self.signature(),
            )
            ckpt.prune(self.folder, self.options.save_total_limit)
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
        self.model = self.bare_model
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()
            gc.collect()

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, state of the streams, random generators, history."""
        loaded = ckpt.load_checkpoint(path, self.signature())
        loaded.load_weights(self.bare_model)
        self.optimizer.load_state_dict(loaded.optimizer["optimizer"])
        if loaded.optimizer["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(loaded.optimizer["scaler"])
        self.state = loaded.state
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if loaded.random["cpu"].shape[0] == ranks:  # otherwise dropout starts anew: there is nothing to go on from
            torch.set_rng_state(loaded.random["cpu"][rank])
            if "cuda" in loaded.random and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(loaded.random["cuda"][rank], self.accelerator.device)
        if loaded.carried:
            layers = [loaded.carried[str(i)] for i in range(len(loaded.carried))]
            for part in range(self.accumulation):
                rows = self.layout.rows(rank * self.accumulation + part)
                own = [layer[rows.start : rows.stop].to(self.accelerator.device) for layer in layers]
                self.carried[part] = self.task.state_from_tensors(own)


# ---- what both drivers of a run share: this loop and `lightning_module.py` ----


def signature(arguments: Arguments, task: Task, model: Any, layout: Layout, total_steps: int) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    config = model.config.to_dict()
    return {
        **{f"config.{key}": value for key, value in config.items() if key not in FREE_CONFIG},
        **{key: value for key, value in arguments.flat().items() if key not in FREE_OPTIONS},
        "data": task.dataset_record(),
        "global_batch_size": layout.global_batch_size,
        "total_steps": total_steps,
    }


def count_steps(options: RunOptions, task: Task, layout: Layout) -> int:
    """Optimizer steps of a whole run."""
    per_epoch = task.num_batches(layout)
    return options.max_steps if options.max_steps > 0 else math.ceil(per_epoch * options.num_train_epochs)


def improved(state: ckpt.TrainerState, value: float, greater_is_better: bool) -> bool:
    """Whether the validation figure `value` is the best yet; `state` remembers it."""
    best = state.best_metric
    if best is None or (value > best if greater_is_better else value < best):
        state.best_metric, state.best_step, state.stalled = value, state.step, 0
        return True
    state.stalled += 1
    return False


def save_best(folder: Path, model: Any, task: Task) -> None:
    """Put model and tokenizer at the top of the run's folder."""

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if task.tokenizer is not None:
            task.tokenizer.save_pretrained(temporary)

    ckpt.write_files(folder, fill)
