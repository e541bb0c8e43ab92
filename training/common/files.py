"""Readers of JSON, safetensors and torch files: whatever is wrong with one is an error of one line that names it."""

import hashlib
import json
import os
import pickle
import reprlib
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from huggingface_hub.dataclasses import type_validator
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError

Value = TypeVar("Value")


def one_line(value: object, limit: int | None = None) -> str:
    """A text, or what an exception says (its kind if nothing), without line breaks and control characters.

    Args:
        limit: characters after which it is cut.
    """
    text = str(value) or (type(value).__name__ if isinstance(value, BaseException) else "")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if limit is None or len(text) <= limit else f"{text[:limit]}…"


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
        raise UserError(f"{str(path)!r} is damaged: {one_line(error, 400)}") from error


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        optional: a file that is not there counts as an empty one.

    Raises:
        UserError: it is missing, cannot be read, is not UTF-8 or not JSON, or holds another kind of value.
    """
    if optional and not os.path.lexists(path):
        return {}
    value = read(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is damaged: it must hold an object, not {reprlib.repr(value)}")
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
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            shown = reprlib.repr(values[name])
            raise UserError(f"{place}: {name}={shown} is not valid: it must be of the type {wanted}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU. Raises `UserError` as `read` does."""
    return read(path, load_file)


def read_torch(path: Path) -> Any:
    """A file of `torch.save`, on the CPU; code in it is never run. Raises `UserError` as `read` does."""

    def reader(file: Path) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of random bytes torch says that they are an unknown version
                return torch.load(BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text advises to load it with its code
            raise ValueError("it is not a file of tensors that torch.save wrote") from error

    return read(path, reader)


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the parameters with a NaN or an infinity among their numbers."""
    return [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]


def fingerprint(*parts: Any) -> str:
    """SHA-256 of arrays (their type, shape and bytes) and of the text of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
