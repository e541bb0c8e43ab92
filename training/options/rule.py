"""The one rule about options that would do nothing: refused where they are asked for, dropped from a recipe where the
command line has chosen something else."""

from collections.abc import Collection, Mapping
from dataclasses import Field
from typing import Any

from kru_hf import KRUConfig

from ..common.errors import UserError
from .fields import NEVER, Condition, Is

Fields = Mapping[str, Field[Any]]
Values = Mapping[str, Any]


def is_off(field: Field[Any], value: object) -> bool:
    """Whether a value stands for nothing."""
    off = field.metadata.get("off", NEVER)
    return value is None or (off is not NEVER and value == off)


def value_of(name: str, values: Values, fields: Fields) -> Any:
    """The value that an option has in the end: as given, else by its default, else by that of a KRU model."""
    candidates = (values.get(name), fields[name].default, getattr(KRUConfig, name, None))
    return next((value for value in candidates if value is not None), None)


def unmet(condition: Condition, values: Values, fields: Fields) -> list[str]:
    """The parts of a condition that do not hold, in words. An option that the program does not have holds."""
    found = []
    for name, wanted in condition.items():
        if name not in fields:
            continue
        field, value = fields[name], value_of(name, values, fields)
        if isinstance(wanted, Is):
            holds = is_off(field, value) == (wanted is Is.OFF)
        elif isinstance(wanted, int):
            holds = value is not None and value >= wanted
        else:
            holds = value in wanted
        if not holds:
            found.append(in_words(name, wanted, field))
    return found


def in_words(name: str, wanted: Is | int | Collection[Any], field: Field[Any]) -> str:
    """A part of a condition as a message says it."""
    if wanted is Is.ON:
        return name
    if isinstance(wanted, Is):
        return field.metadata["absent"] or f"{name} {str(field.metadata['off']).lower()}"
    if isinstance(wanted, int):
        return f"{name} {wanted} or more"
    return f"{name} {', '.join(str(value).lower() for value in wanted)}"


def missing(name: str, values: Values, fields: Fields) -> str:
    """What an option would need to have an effect beside these values, or an empty string if it has one."""
    found = [unmet(condition, values, fields) for condition in fields[name].metadata.get("only", ())]
    shortest: list[str] = min(found, key=len) if found else []
    return " and ".join(shortest)


def idle(values: Values, fields: Fields) -> dict[str, str]:
    """The options among `values` that have no effect, and what each of them needs."""
    found = {name: missing(name, values, fields) for name in values}
    return {name: needed for name, needed in found.items() if needed}


def effective(values: Values, fields: Fields) -> dict[str, Any]:
    """The values that are given and have an effect."""
    without = idle(values, fields)
    return {name: value for name, value in values.items() if value is not None and name not in without}


def refuse_idle(values: Values, fields: Fields, names: Collection[str] | None = None) -> None:
    """`UserError` for the first option (of these names) without effect: what it works with. One that is off passes."""
    for name, needed in sorted(idle(values, fields).items()):
        if (names is None or name in names) and not is_off(fields[name], values[name]):
            raise UserError(f"{name}={values[name]!r} has no effect here: it works with {needed}; remove {name}")


def settle(recipe: Values, given: Values, fields: Fields) -> dict[str, Any]:
    """The values of a recipe and of the command line together.

    Of the recipe, what contradicts the command line is dropped: options that an option given there replaces, and those
    that had an effect without it. What had none before is left: a complete recipe names every option.

    Raises:
        UserError: an option of the command line has no effect.
    """
    kept = dict(recipe)
    for name, value in given.items():
        if not is_off(fields[name], value) and value != value_of(name, recipe, fields):
            for other in fields[name].metadata.get("replaces", ()):
                kept.pop(other, None)
    before = {name for name in idle(recipe, fields) if not is_off(fields[name], recipe[name])}
    while gone := [name for name in idle({**kept, **given}, fields) if name not in given and name not in before]:
        kept = {name: value for name, value in kept.items() if name not in gone}
    merged = {**kept, **given}
    refuse_idle(merged, fields, given)
    return merged
