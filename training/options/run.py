"""Options of training, saving and sharing. Names follow transformers' TrainingArguments."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from kru_hf.scan import BACKENDS

from .fields import (
    AT_LEAST_0,
    AT_LEAST_1,
    FINITE,
    MAX_COUNT,
    MOMENTUM,
    NEVER,
    SEED,
    SHARE,
    Condition,
    Is,
    Options,
    at_most,
    option,
    require,
)

MAX_THREADS = 1024  # OpenMP ends the process where it cannot start them
ADAMW: Condition = {"optimizer": ("adamw",)}
PUSHED: Condition = {"push_to_hub": (True,)}
KRONECKER: tuple[Condition, ...] = ({"architecture": ("kru", "unitary")}, {"model": Is.ON})
LEARNED: tuple[Condition, ...] = tuple(
    {**condition, "freeze_factors": Is.OFF}
    for condition in ({"architecture": ("kru", "unitary", "orthogonal")}, {"model": Is.ON})
)
PATH = ("a path, or left out", bool)

training = partial(option, group="training")
saving = partial(option, group="saving")
sharing = partial(option, group="sharing")


@dataclass
class TrainingOptions(Options):
    """How a model is trained and evaluated."""

    task: str = training("char_lm", "What is trained on: the name of a file of training/tasks.")
    seed: int = training(0, "Seed of initial weights, dropout and data order.", allowed=SEED)
    max_steps: int = training(
        -1,
        "Optimizer steps; -1 means that num_train_epochs decides.",
        off=-1,
        allowed=("-1 or 1 and more", lambda value: value == -1 or value > 0),
    )
    num_train_epochs: float = training(
        20.0,
        "Passes over the training data.",
        only={"max_steps": Is.OFF},
        replaces=("max_steps",),
        allowed=(f"positive and at most {MAX_COUNT}", lambda value: 0 < value <= MAX_COUNT),
    )
    per_device_train_batch_size: int = training(
        32, "Rows (streams or samples) per process and accumulation step.", allowed=AT_LEAST_1
    )
    gradient_accumulation_steps: int = training(
        1, "Batches whose gradients are averaged in one optimizer step.", allowed=AT_LEAST_1
    )
    max_time: float = training(
        0.0,
        "Minutes of training, evaluations excluded, after which a run ends as after its last step; 0: no limit. The "
        "learning rate follows the steps.",
        off=0,
        allowed=FINITE,
    )
    learning_rate: float = training(
        3e-3, "Peak learning rate.", allowed=("positive, and fit for fp32", lambda value: 0 < value < 1e36)
    )
    factor_learning_rate_scale: float = training(
        0.1,
        "Learning rate of the factors, as a multiple of learning_rate.",
        only=LEARNED,
        allowed=FINITE,
    )
    freeze_factors: bool = training(
        False, "Leave the Kronecker factors where they start (the paper's copy memory).", only=KRONECKER
    )
    weight_decay: float | None = training(
        None,
        "AdamW weight decay (0.01); never on biases, norms and recurrent factors.",
        only=ADAMW,
        off=0,
        allowed=FINITE,
    )
    adam_beta1: float = training(0.9, "AdamW's first momentum.", only=ADAMW, allowed=MOMENTUM)
    adam_beta2: float = training(0.98, "AdamW's second momentum.", only=ADAMW, allowed=MOMENTUM)
    optimizer: Literal["adamw", "rmsprop"] = training("adamw", "Optimizer; rmsprop has decay 0.9.")
    lr_scheduler_type: Literal["cosine", "plateau", "constant"] = training("cosine", "Learning rate after the warm-up.")
    warmup_steps: int = training(
        100, "Steps of linear warm-up (at most a tenth of the run).", off=0, allowed=AT_LEAST_0
    )
    min_learning_rate_ratio: float = training(
        0.02,
        "Where the cosine ends, as a multiple of learning_rate.",
        only={"lr_scheduler_type": ("cosine",)},
        allowed=SHARE,
    )
    plateau_factor: float = training(
        0.3,
        "Multiplies the learning rate when the validation figure stalls (plateau).",
        only={"lr_scheduler_type": ("plateau",)},
        allowed=SHARE,
    )
    max_grad_norm: float = training(
        1.0, "Gradients are clipped to this norm; 0 turns clipping off.", off=0, allowed=FINITE
    )
    ema_decay: float = training(
        0.0,
        "Decay a step of the moving average of the weights, which is scored and saved in their place; 0: none.",
        off=0,
        allowed=MOMENTUM,
    )
    weight_dtype: Literal["fp32", "int8", "int4"] = training(
        "fp32",
        "Train with the weights rounded as the C runtime stores them; gradients pass straight through.",
        only=tuple({**kind, "ema_decay": Is.OFF} for kind in KRONECKER),
        off="fp32",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = training(None, "Precision of matrix products.", off=NEVER)
    num_threads: int = training(
        0,
        "CPU threads per process; 0 shares the cores out among this machine's processes.",
        allowed=at_most(MAX_THREADS, 0),
    )
    backend: str = training(
        "auto",
        f"Engine of the recurrence: {', '.join(BACKENDS)}.",
        only=KRONECKER,
        off="auto",
        allowed=(f"one of {', '.join(BACKENDS)}", BACKENDS.__contains__),
    )
    use_cpu: bool = training(False, "Train on the CPU even if there is an accelerator.")
    eval_steps: int = training(200, "Steps between evaluations on the validation data.", allowed=AT_LEAST_1)
    evaluate_test: bool = training(
        True, "Score the test split at the end; false while models are still being chosen.", off=False
    )
    early_stopping_patience: int = training(
        0, "Stop after that many evaluations without improvement; 0 never does.", off=0, allowed=AT_LEAST_0
    )
    sample_length: int = training(300, "Length of the sample that is shown at the end.", off=0, allowed=AT_LEAST_0)


@dataclass
class SavingOptions(Options):
    """Where a run is kept, and what of it."""

    output_dir: str | None = saving(
        None, "Folder of the run (default: runs/<task>-<architecture>).", off=NEVER, allowed=PATH
    )
    overwrite_output_dir: bool = saving(
        False, "Delete an earlier run in the output folder.", only={"resume_from_checkpoint": Is.OFF}
    )
    resume_from_checkpoint: str | None = saving(
        None,
        "Resume from 'last' or from a checkpoint folder.",
        absent="a new run, not with resume_from_checkpoint",
        allowed=PATH,
    )
    save_steps: int = saving(200, "Steps between checkpoints.", allowed=AT_LEAST_1)
    save_total_limit: int = saving(2, "Checkpoints that are kept; 0 keeps all.", off=0, allowed=AT_LEAST_0)
    logging_steps: int = saving(20, "Steps between log entries.", allowed=AT_LEAST_1)
    report_to: str = saving("tensorboard", "Tracker of accelerate that gets the figures, or none.", off="none")


@dataclass
class SharingOptions(Options):
    """Whether and where it is published."""

    push_to_hub: bool = sharing(False, "Publish the folder at the end, as training.publish does.")
    hub_model_id: str | None = sharing(None, "ME/NAME of the repository to publish to.", only=PUSHED)
    hub_private_repo: bool = sharing(False, "Make that repository private.", only=PUSHED)
    data_license: str | None = sharing(
        None, "Licence of the data set, for the card; built-in sets bring their own.", off=NEVER
    )


@dataclass
class RunOptions(SharingOptions, SavingOptions, TrainingOptions):
    """How a model is trained, kept and shared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay is None:
            self.weight_decay = 0.0 if self.optimizer == "rmsprop" else 0.01
        if self.push_to_hub:
            ok = self.hub_model_id is not None and self.hub_model_id.count("/") == 1
            require(ok, "hub_model_id", self.hub_model_id, "ME/NAME where push_to_hub is true")
