"""What the training loop knows of a task. A new task is one file `training/tasks/<name>.py`; nothing else changes.

Protocol
--------
The file `training/tasks/<name>.py` defines

- `Options`: a dataclass of the task's own flat options (each field is an `option` of
  `options/fields.py`, which says what it may be). They become command-line options and recipe keys when
  `--task <name>` is chosen.
- a subclass of `Task`, and at the end of the file `TASK = ThatSubclass`.

The drivers (`loop/driver.py`) and `evaluate.py` call, in this order:

1. `task = TASK(options, data, seed)`; no work is done here.
2. `task.load(tokenizer=None)`: reads or generates the data. `tokenizer` is given when a trained folder is continued or
   evaluated; otherwise the task builds one if it needs one (`task.tokenizer`, may stay None).
   Afterwards `task.dataset_record()` says which data it was, by name and SHA-256, never by an absolute path.
3. `task.model_kwargs()`: what the data fixes in the model (`{"vocab_size": 99}`, `{"input_size": 1}`).
   `training.models.build.build_model(task.head, architecture, model_options, **task.model_kwargs())` makes the model.
4. `task.num_batches(layout)`: batches in one pass (epoch) over the training data, the same number on every rank.
5. `task.train_batch(index, slot, layout)`: batch number `index` (0, 1, 2 … over all epochs) for one slot. **It is a
   pure function of its arguments, the options and the seed**: shuffling and generated data take their randomness from
   `numpy.random.default_rng([seed, epoch or index])`, never from a global generator. So the position in the data is
   one integer, and a resumed run sees exactly the batches that an uninterrupted one sees.
6. `out = task.forward(model, batch, state)`: calls the model, in training and in evaluation. `out.state` is handed
   back, detached by the loop, with the next batch of the same slot unless that batch says `reset_state`.
7. `task.eval_batches(split, slot, num_slots)`: an iterator over the `split` ("validation" or "test"): every element
   (character, frame, picture) is in exactly one slot and counted once. Slots may be empty or of different length.
8. `task.metrics(sums)`: figures from the sums of `out.sums` over all batches and slots. The names are those of
   `all_results.json` without prefix: `loss`, `bpc`, `nll_per_frame`, `accuracy`, `mse`.

Layout. A global batch has `layout.global_batch_size` rows and is cut into `layout.num_slots` equal slots (ranks ×
gradient-accumulation steps); slot s holds rows [s·G/S, (s+1)·G/S). What row g holds in batch `index` must depend on g,
`index` and G only, never on the number of slots: so two processes with half the batch each train as one process does.

Loss. `out.loss` is the mean over the slot's targets (plus the model's own penalty); the loop averages slots. Where
slots hold different numbers of targets (variable lengths), set `batch.loss_weight` = targets in the slot · num_slots /
targets in the global batch, and the average is the mean over all targets.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
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
        loss_weight: see "Loss" above.
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
    """One task: its data, its head and its metrics. See the module docstring for the protocol."""

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
        """Read or generate the data; `tokenizer` is that of a trained folder, if there is one."""

    def dataset_record(self) -> dict[str, Any]:
        """`{"name": …, "sha256": …}` and what else identifies the data; flat, JSON, no absolute paths."""
        return {**self.dataset.record(), **self.data.hub_options()}

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Config fields that the data fixes."""

    @abstractmethod
    def num_batches(self, layout: Layout) -> int:
        """Batches in one pass over the training data; raises `UserError` if there is not one."""

    @abstractmethod
    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        """Batch number `index` of one slot; pure (see point 5)."""

    @abstractmethod
    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        """The slot's share of a split, each element counted once over all slots."""

    @abstractmethod
    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        """Run the model on a batch."""

    @abstractmethod
    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures from summed sums."""

    def state_from_tensors(self, states: list[Tensor]) -> Any:
        """The carried state again from its `.states`, when a run resumes from a checkpoint."""
        return KRUCache.from_states(states)

    def check_vocabulary(self) -> None:  # noqa: B027 (most tasks have nothing to check)
        """For a run from a trained folder: raise `UserError` if its tokenizer does not cover the training data."""

    def notes(self, splits: tuple[str, ...]) -> list[str]:
        """What in the data of these splits is not as it should be, a sentence each."""
        return [*self.dataset.notes]

    def progress(self, loss: float) -> dict[str, str]:
        """What the progress bar shows for a mean training loss."""
        return {"loss": f"{loss:.4f}"}

    def sample(self, model: Any, length: int, seed: int) -> str | None:
        """Something to look at from the trained model, as text; None if the task has nothing to show."""
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
