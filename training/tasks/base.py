"""What the training loop knows of a task. A new task is one file `training/tasks/<name>.py`; nothing else changes.

The file defines a subclass of `Task` and ends with `TASK = ThatSubclass`. `Task.Options` is a dataclass of the task's
own options (each field is an `option` of `options/fields.py`): they are options of the command line and keys of a
recipe where `--task <name>` is chosen. Sets of labelled sequences need less: see `sequences.py`.

In order of the calls:

1. `task = TASK(options, data, seed)`, without any work; `task.load(tokenizer)` reads or makes the data, `task.dataset`.
2. `task.model_kwargs()`, what the data fix in the model; `training.models.build.build_model` makes it.
3. `task.train_batch(index, slot, layout)`: batch `index` (0, 1, 2 … over all passes) for one slot. **It depends on
   nothing but its arguments, the options and the seed**: randomness is `numpy.random.default_rng([seed, pass])`, never
   a global generator. So the position in the data is one number, and a resumed run sees the batches of an
   uninterrupted one.
4. `task.forward(model, batch, state)`, in training and in evaluation. The `state` that it returns comes back,
   detached, with the next batch of the slot, unless that says `reset_state`.
5. `task.eval_batches(split, slot, num_slots)`, then `task.metrics(sums)` of the sums over all batches and slots.
   Metrics have the names of `all_results.json` without prefix: `loss`, `bpc`, `nll_per_frame`, `accuracy`, `mse`.

Layout: a global batch has `layout.global_batch_size` rows (G), cut into `layout.num_slots` equal slots (ranks × steps
of accumulation). What row g holds in batch `index` depends on g, `index` and G only, so that two processes with half
the batch each train as one does.

Loss: `out.loss` is the mean over the slot's targets (and the model's penalty); the loop averages slots. Where slots
hold different numbers of targets, `batch.loss_weight` = targets in the slot · num_slots / targets in the global batch
makes it the mean over all targets.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from kru_hf import KRUCache

from ..common.errors import UserError
from ..data.splits import DataSet
from ..options.data import DataOptions


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: `global_batch_size` rows (G) in `num_slots` equal slots."""

    global_batch_size: int
    num_slots: int = 1

    def rows(self, slot: int) -> range:
        """The rows of the global batch that `slot` holds."""
        size = self.global_batch_size // self.num_slots
        return range(slot * size, (slot + 1) * size)


@dataclass
class Batch:
    """Keyword arguments for the model (`inputs`, CPU tensors with B first) and what the loop has to know about them.

    Args:
        inputs: passed as `model(**inputs)`, moved to the device by the loop.
        reset_state: True if the batch starts new sequences: the carried state is dropped before it.
        num_elements: characters, frames or steps in it, for the throughput.
        loss_weight: see above, "Loss".
        extra: tensors for the task's metrics that the model must not see; moved to the device too.
    """

    inputs: dict[str, Tensor]
    reset_state: bool = True
    num_elements: int = 0
    loss_weight: float = 1.0
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class TaskOutput:
    """Result of one forward pass.

    Args:
        loss: scalar to minimise, with the model's penalty in training mode.
        sums: scalars that add up over batches and ranks ("loss": summed nats without penalty, "count": targets, …).
        state: object with `.detach()` and `.states` (a list of tensors with B first), or None where nothing is carried.
        penalty: the unitary penalty alone, unscaled, or None.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    state: Any = None
    penalty: Tensor | None = None


class Task(ABC):
    """One task: its options, data, head and metrics. The module says in which order it is called."""

    name: ClassVar[str]
    head: ClassVar[str]  # "causal_lm", "sequence_classification", "token_classification" or "piano_roll"
    unit: ClassVar[str] = "steps"  # what `num_elements` counts: "characters", "frames" or "steps"
    metric: ClassVar[str] = "loss"  # the figure that picks the best model
    greater_is_better: ClassVar[bool] = False
    default_recipe: ClassVar[str | None] = None  # of the same name as the task if None
    default_dataset: ClassVar[str | None] = None
    Options: ClassVar[type]
    carries_state: bool = False  # whether a training batch starts from the state after the one before
    dataset: DataSet  # what `load` has read

    def __init__(self, options: Any, data: DataOptions, seed: int = 0) -> None:
        self.options, self.data, self.seed = options, data, seed
        self.tokenizer: Any = None

    @abstractmethod
    def load(self, tokenizer: Any = None) -> None:
        """Read or make `dataset`, and `self.tokenizer` if the task has one: that of a trained folder if it is given."""

    def dataset_record(self) -> dict[str, Any]:
        """`{"name": …, "sha256": …}` and what else identifies the data; flat, JSON, no absolute paths."""
        return {**self.dataset.record(), **self.data.hub_options()}

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Config fields that the data fixes."""

    @abstractmethod
    def num_batches(self, layout: Layout) -> int:
        """Batches in one pass over the training data, the same on every rank; `UserError` if there is not one."""

    @abstractmethod
    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        """Batch number `index` of one slot, from its arguments, the options and the seed alone."""

    @abstractmethod
    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        """The slot's share of a split ("validation" or "test"): each element once in one slot."""

    @abstractmethod
    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        """Run the model on a batch."""

    @abstractmethod
    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures from summed sums."""

    def state_from_tensors(self, states: list[Tensor]) -> Any:
        """The carried state from its `.states`, when a run is resumed from a checkpoint."""
        return KRUCache.from_states(states)

    def check_vocabulary(self) -> None:  # noqa: B027 (most tasks have nothing to check)
        """For training a trained model further: `UserError` if its tokenizer does not cover the training data."""

    def notes(self, splits: tuple[str, ...]) -> list[str]:
        """What in the data of these splits is not as it should be, a sentence each."""
        return [*self.dataset.notes]

    def progress(self, loss: float) -> dict[str, str]:
        """What the progress bar shows for a mean training loss."""
        return {"loss": f"{loss:.4f}"}

    def sample(self, model: Any, length: int, seed: int, folder: Path) -> str | None:
        """Something to look at from the trained model, as text; None if the task has nothing to show.

        Args:
            folder: of the run, where files may be put whose names `common/run_folder.py` knows.
        """
        return None


def task_names() -> list[str]:
    """Names of the tasks: one a file of this package."""
    package = importlib.import_module(__package__)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base", "sequences"))


def get_task(name: str) -> type[Task]:
    """The task class of that name; `UserError` names the tasks that there are."""
    if name not in task_names():
        raise UserError(f"task={name!r} is not known; allowed: {', '.join(task_names())}")
    return importlib.import_module(f"{__package__}.{name}").TASK
