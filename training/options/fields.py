"""What an option is: a dataclass field whose metadata say what it is for, which values it takes, and when it has an
effect."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..common.errors import UserError

REQUIRED: Any = dataclasses.MISSING  # the default of an option that has to be given
NEVER = object()  # the off value of an option that has none
MAX_COUNT = (
    2**31 - 1
)  # of every whole number but seeds: what arrays and tensors of such sizes can still be counted with
MAX_SEED = 2**63 - 1  # torch takes unsigned numbers of 64 bits, and each process adds its own number to the seed


class Is(Enum):
    """A condition on another option without naming its values."""

    OFF = "off"
    ON = "on"


# Other options, and for each whether it is on, its least value, or its values.
Condition = Mapping[str, "Is | int | Collection[Any]"]
Allowed = tuple[str, Callable[[Any], bool]]  # in words, and as a test
AT_LEAST_1: Allowed = ("1 or more", lambda value: value >= 1)
AT_LEAST_0: Allowed = ("0 or more", lambda value: value >= 0)
FINITE: Allowed = ("0 or more and finite", lambda value: 0 <= value < math.inf)
SHARE: Allowed = ("between 0 and 1", lambda value: 0 <= value <= 1)
MOMENTUM: Allowed = ("0 or more and less than 1", lambda value: 0 <= value < 1)


def at_most(high: int, low: int = 1) -> Allowed:
    """Whole numbers from `low` to `high`."""
    return f"at most {high}, and {low} or more", lambda value: low <= value <= high


def one_of(*values: Any) -> Allowed:
    """One of these values."""
    return f"one of {', '.join(map(str, values))}", values.__contains__


SEED: Allowed = (f"between 0 and {MAX_SEED}", lambda value: 0 <= value <= MAX_SEED)


def option(
    default: Any,
    text: str,
    group: str = "task",
    *,
    only: Condition | tuple[Condition, ...] = (),
    off: Any = ...,
    replaces: tuple[str, ...] = (),
    absent: str = "",
    allowed: Allowed | None = None,
) -> Any:
    """A dataclass field with metadata.

    Args:
        text: help sentence. group: heading in the page of help.
        only: what the option works with: other options and their values, all of one condition or of one of several.
        off: its value that stands for nothing, beside None. Usual: False where that is the default, else no other.
        replaces: options of a recipe that give way where the command line gives this one another value than the recipe.
        absent: how a message says that this option is off.
        allowed: which values it may have; None may be given whatever is said here.
    """
    if off is ...:
        off = default if default is None or default is False else NEVER
    conditions = only if isinstance(only, tuple) else (only,)
    names = ("help", "group", "only", "off", "replaces", "absent", "allowed")
    values = (text, group, conditions, off, replaces, absent, allowed)
    return dataclasses.field(default=default, metadata=dict(zip(names, values, strict=True)))


def fields_of(classes: Iterable[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The options of several dataclasses by name."""
    return {field.name: field for kind in classes for field in dataclasses.fields(kind)}


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the option, its value and what is allowed."""
    if not condition:
        raise UserError(f"{name}={value!r} is not valid: it must be {allowed}")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """`UserError` unless the metadata of an option allow the value."""
    if value is not None and field.metadata.get("allowed") is not None:
        text, test = field.metadata["allowed"]
        require(test(value), field.name, value, text)


@dataclass
class Options:
    """Options whose values are held against what their metadata allow."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
