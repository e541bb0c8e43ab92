"""Columns of pictures and labels as arrays: pictures of every mode, and lists of numbers; one scale for a data set."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import Image as Pillow

from ..common.errors import UserError
from ..common.files import one_line

WHITES = (1, 16, 255, 65_535)  # the largest value of a pixel is the first of these that is not exceeded
SIXTEEN = 65_535 // 255  # a level of 8 bits as one of 16
OPAQUE = 255


@dataclass
class Block:
    """The pictures of a table: pixels (S, P), the white of each one's mode (S,), and how opaque they are (S, P).

    A white of 0 says that the numbers alone tell it; `alpha` is None where all are opaque.
    """

    pixels: np.ndarray
    whites: np.ndarray
    alpha: np.ndarray | None = None


def read_pictures(rows: Dataset, column: str, name: str) -> Block:
    """The pictures of a column, row by row of each picture.

    Raises:
        UserError: an empty cell, pictures of several sizes, damaged, of a mode or in a form that is not read.
    """
    where = f"{name!r}, column {column}"
    cells = rows.with_format("arrow")[:].column(column).combine_chunks()
    kind = cells.type
    if cells.null_count:
        raise UserError(f"dataset: {where}: row {cells.is_null().to_pylist().index(True)} is empty")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return read_images([{"bytes": cell} for cell in cells.to_pylist()], where)
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        return read_images(cells.to_pylist(), where)
    values = rows.with_format("numpy")[:][column]
    if not isinstance(cells, pa.ExtensionArray) and (pa.types.is_struct(kind) or not pa.types.is_nested(kind)):
        raise UserError(f"dataset: {where}: a picture must be a list of numbers or the bytes of a file, not {kind}")
    while pa.types.is_nested(kind):
        kind = kind.value_type
    if pa.types.is_string(kind):
        raise UserError(f"dataset: {where}: pixels must be numbers, not {kind}")
    if values.dtype == object and values.size:
        shapes = [np.shape(value) for value in values]
        row = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), 0)
        raise UserError(f"dataset: {where}: pictures must all have one size, and row {row} differs")
    channels = values.ndim == 4 and 1 not in (values.shape[1], values.shape[3])
    if channels or values.ndim > 4 or not values.size:
        shape = values.shape[1:]
        raise UserError(f"dataset: {where}: a picture must be (height, width) or (pixels,) numbers, not {shape}")
    flat = values.reshape(len(values), -1)  # (S, P)
    return Block(flat.astype(np.uint8) if flat.dtype == bool else flat, np.zeros(len(flat), int))


def read_images(cells: Sequence[dict[str, Any]], where: str) -> Block:
    """Pictures from the bytes of files, or from their paths."""
    found = []
    for row, cell in enumerate(cells):
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell.get("path")
        if source is None:
            raise UserError(f"dataset: {where}: row {row} is empty")
        try:
            with Pillow.open(source) as picture:
                found.append((picture.size, *levels(picture)))
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise UserError(f"dataset: {where}: row {row} cannot be read as a picture ({one_line(error)})") from error
        if found[-1][0] != found[0][0]:
            raise UserError(f"dataset: {where}: pictures must all have one size, and row {row} differs")
    _, greys, alphas, whites = zip(*found, strict=True)
    pixels = np.stack([grey.ravel() for grey in greys])  # (S, P)
    if all(alpha is None for alpha in alphas):
        return Block(pixels, np.array(whites))
    opaque = np.full(pixels.shape[1], OPAQUE, np.uint8)
    alpha = np.stack([opaque if alpha is None else alpha.ravel() for alpha in alphas])  # (S, P)
    return Block(pixels, np.array(whites), alpha)


def levels(picture: Pillow.Image) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Grey levels (H, W) of a picture, how opaque it is (H, W) or None, and the white of its mode or 0."""
    mode = picture.mode
    if mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16), None, 65_535
    if mode in ("I", "F"):
        return np.asarray(picture), None, 0
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        return np.asarray(whole.convert("RGB").convert("L")), np.asarray(whole.getchannel("A")), 255
    if mode in ("LAB", "HSV"):
        picture = picture.convert("RGB")
    return np.asarray(picture.convert("L")), None, 255


def in_16_bits(block: Block) -> np.ndarray:
    """The pixels (S, P) of pictures of 8 and 16 bits, on the scale of the latter."""
    pixels = block.pixels.astype(np.uint16)
    return np.where(block.whites[:, None] == 255, pixels * SIXTEEN, pixels)


def joined_pictures(blocks: Sequence[Block], name: str) -> tuple[list[np.ndarray], int]:
    """The pixels (S, P) of tables on the scale of the whole data set, and its white.

    Where only the opacity varies, the ink is in it; where it is the same everywhere, it says nothing.

    Raises:
        UserError: pictures of several sizes, pixels that are negative, not finite or beyond 16 bits, or opacity and
            colours that both vary.
    """
    widths = sorted({block.pixels.shape[1] for block in blocks})
    if len(widths) > 1:
        raise UserError(f"dataset={name!r}: pictures must all have one size, got {widths} pixels")
    whites = np.concatenate([block.whites for block in blocks])  # (S,)
    white = int(whites.max())
    if white and not whites.all():
        raise UserError(
            f"dataset={name!r}: pictures of 32 bits a pixel, or numbers, and others are mixed; convert them"
        )
    pixels = [block.pixels if (block.whites == white).all() else in_16_bits(block) for block in blocks]
    if any(block.alpha is not None for block in blocks):
        opaque = [np.full(block.pixels.shape, OPAQUE, np.uint8) for block in blocks]
        alphas = [full if block.alpha is None else block.alpha for block, full in zip(blocks, opaque, strict=True)]
        if varies(alphas):
            if varies([grey[alpha > 0] for grey, alpha in zip(pixels, alphas, strict=True)]):
                raise UserError(
                    f"dataset={name!r}: colours and opacity of the pictures both vary; put them on a background first"
                )
            return alphas, OPAQUE
    return (pixels, white) if white else on_one_scale(pixels, name)


def varies(arrays: Sequence[np.ndarray]) -> bool:
    """Whether more than one value occurs in arrays."""
    filled = [array for array in arrays if array.size]
    return bool(filled) and min(map(np.min, filled)) < max(map(np.max, filled))


def on_one_scale(pixels: Sequence[np.ndarray], name: str) -> tuple[list[np.ndarray], int]:
    """Numbers in the smallest type that holds all of them, and what white is among them."""
    for values in pixels:
        bad = ~np.isfinite(values) | (values < 0) | (values > WHITES[-1])
        if bad.any():
            row, place = np.argwhere(bad)[0]
            raise UserError(
                f"dataset={name!r}, row {row}: a pixel is {values[row, place]}, and must be a number from 0 to 1, 16, "
                "255 or 65535"
            )
    top = max(values.max(initial=0) for values in pixels)
    white = next(white for white in WHITES if top <= white)
    whole = all((values == np.floor(values)).all() for values in pixels)
    kind = (np.uint8 if white <= 255 else np.uint16) if whole else np.float32
    return [values.astype(kind) for values in pixels], white


def read_labels(rows: Dataset, name: str) -> np.ndarray:
    """The labels (S,) of a table."""
    labels = rows.with_format("arrow")[:].column("label").combine_chunks()
    if pa.types.is_integer(labels.type) and not labels.null_count:
        return labels.to_numpy(zero_copy_only=False).astype(np.int64)
    found = labels.to_pylist()
    row = next((row for row, label in enumerate(found) if label is None or not pa.types.is_integer(labels.type)), 0)
    shown = repr(found[row]) if found else str(labels.type)
    raise UserError(f"dataset: {name!r}, column label: labels must be whole numbers, got {shown} in row {row}")
