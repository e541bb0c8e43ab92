"""Errors that a user can act on, printed as one line without a traceback, and readers of files that raise them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from huggingface_hub.dataclasses import type_validator


class UserError(Exception):
    """Bad input or a run that cannot go on; the message names the field, the value and what is allowed.

    `shared` says that every process of a run raises it, so that one of them saying it is enough.
    """

    exit_code = 1

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Interrupted(UserError):
    """The run was asked to stop (SIGTERM, Ctrl-C); a checkpoint has been written. `exit_code` is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, shared=True)
        self.exit_code = 128 + signal_number


def one_line(value: object, limit: int | None = None) -> str:
    """A text, or what an error says, without line breaks and control characters, cut after `limit` characters."""
    text = str(value) or (type(value).__name__ if isinstance(value, BaseException) else "")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if limit is None or len(text) <= limit else f"{text[:limit]}…"


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict, optional: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        kind: what it must hold, `dict` or `list`. optional: a file that does not exist counts as an empty one.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else; the message names it.
    """
    if optional and not os.path.lexists(path):
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({str(path)!r}): {one_line(error)}") from error
    if not isinstance(value, kind):
        wanted = "an object {…}" if kind is dict else "a list […]"
        raise UserError(f"{path.name} must hold {wanted}, got {one_line(repr(value), 60)} ({str(path)!r})")
    return value


def check_fields(place: object, values: Mapping[str, Any], kinds: Mapping[str, Any], required: bool = False) -> None:
    """Whether the fields of a record have their types; an int is a float, a bool is no number.

    Args:
        place: names the file in the message. kinds: type of each field, such as `str | None` or `list[int]`.
        required: whether all of them must be there.

    Raises:
        UserError: naming the file, the first field that is wrong, its value, and the type that it must have.
    """
    for name, kind in kinds.items():
        if required and name not in values:
            raise UserError(f"{place}: {name} is missing")
        try:
            if name in values:
                type_validator(name, values[name], kind | int if float in (kind, *get_args(kind)) else kind)
        except TypeError as error:
            wanted = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
            value = one_line(repr(values[name]), 60)
            raise UserError(f"{place}: {name}={value} is not valid: it must be of the type {wanted}") from error
