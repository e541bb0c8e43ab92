"""Readers of JSON, safetensors and torch files: whatever is wrong with one is an error of one line that names it."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError

Value = TypeVar("Value")
KINDS: dict[type, str] = {dict: "an object", list: "a list"}


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def read(path: Path, reader: Callable[[Path], Value]) -> Value:
    """What `reader` makes of a file.

    Raises:
        UserError: it is missing or cannot be read, or `reader` fails on its contents.
    """
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} is missing") from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # parsers fail in every way on damaged files, safetensors and pickle above all
        raise UserError(f"{str(path)!r} is damaged: {one_line(error)}") from error


def read_json(path: Path, kind: type[Value] = dict) -> Value:  # type: ignore[assignment]
    """A JSON file whose outermost value is of this kind: dict (an object) or list.

    Raises:
        UserError: it is missing, cannot be read, is not UTF-8 or not JSON, or holds another kind of value.
    """
    value = read(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(value, kind):
        raise UserError(f"{str(path)!r} is damaged: it must hold {KINDS[kind]}, not {str(value)[:40]!r}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU. Raises `UserError` as `read` does."""
    return read(path, load_file)


def read_torch(path: Path) -> Any:
    """A file of `torch.save`, on the CPU; code in it is never run. Raises `UserError` as `read` does."""

    def reader(file: Path) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of random bytes torch says that they are an unknown version
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text advises to load it with its code
            raise ValueError("it is not a file of tensors that torch.save wrote") from error

    return read(path, reader)
