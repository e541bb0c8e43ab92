"""Pictures as sequences of pixels: scikit-learn's digits, tables of this machine, and Hub data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from ..common.errors import UserError
from ..common.files import fingerprint
from ..options.data import DataOptions
from .picture_columns import Block, joined_pictures, read_labels, read_pictures
from .splits import SPLITS, DataSet, Parts
from .tables import TABLE_KINDS, open_data, read_tables

DIGITS = "digits"
HELD_OUT = 12  # one row of so many in each part that is cut from the training rows
MNIST = (60_000, 784)  # rows and pixels of MNIST's training part: its last twelfth is for validation, in every paper
DIGITS_HELD_OUT = 0.15  # share of scikit-learn's digits in each of validation and test
PIXEL_COLUMNS = ("pixels", "image", "img")
PERMUTATION_SEED = 92916  # as in Lezcano-Casado & Martínez-Rubio 2019 (expRNN) and the work that compares with it


@dataclass
class Pictures(DataSet):
    """Labels (S,) and pixels (S, P) by split; `white` is the largest value that a pixel can have.

    Pixels are uint8 up to a `white` of 255, uint16 up to 65,535, and float32 where the data have fractions.
    """

    pixels: Mapping[str, np.ndarray] = field(default_factory=dict)
    white: int = 255


def pictures(name: str, labels: Any, pixels: Any, white: int, notes: Sequence[str] = ()) -> Pictures:
    """The data set of these pictures, with the SHA-256 of pixels and labels."""
    digest = fingerprint(white, *(part for split in SPLITS for part in (pixels[split], labels[split])))
    return Pictures(name, labels, "pictures", digest, notes, pixels=pixels, white=white)


def fixed_permutation(size: int) -> np.ndarray:
    """The order (size,) in which permuted pictures are read.

    It comes from NumPy's legacy generator, whose numbers never change, with seed 92916.
    """
    return np.random.RandomState(PERMUTATION_SEED).permutation(size)


def load_pictures(data: DataOptions) -> Pictures:
    """The pictures that the options name.

    Raises:
        UserError: nothing there, a split or column missing, pictures of several sizes or of a kind that is not read,
            labels that are not 0, 1, 2 …
    """
    if data.dataset in (None, DIGITS):
        data.refuse_hub_options()
        return sklearn_digits()
    parts = open_data(
        data, DIGITS, TABLE_KINDS, read_part, columns=f"its columns label and {' or '.join(PIXEL_COLUMNS)}"
    )
    name, found = parts.name, [(split, *table) for split, tables in parts.found.items() for table in tables]
    arrays, white = joined_pictures([block for _, block, _ in found], name)
    labels = {split: np.concatenate([y for owner, _, y in found if owner == split]) for split in parts.found}  # (S,)
    pixels = {
        split: np.concatenate([x for x, (owner, _, _) in zip(arrays, found, strict=True) if owner == split])
        for split in parts.found
    }  # (S, P)
    rows, numbers = pixels["train"], labels["train"]
    for split, places in held_out(parts, numbers, rows.shape[1]).items():
        pixels[split], labels[split] = rows[places], numbers[places]
    for split in SPLITS:
        if labels[split].min() < 0 or labels[split].max() > labels["train"].max():
            raise UserError(f"dataset={name!r} {split}: labels must be 0 … {labels['train'].max()}, as in training")
    return pictures(name, labels, pixels, white, parts.notes)


def held_out(parts: Parts, labels: np.ndarray, size: int) -> dict[str, Any]:
    """Of the training rows, with labels (S,) and pictures of `size` pixels, the places of train and each missing part.

    A twelfth of the rows of every class (at least one, if it has more) goes to each missing part, drawn by a fixed
    shuffle. MNIST's validation part is the documented one, its last 5,000 training rows: so it is for data of exactly
    MNIST's form that lack this part alone, if all classes are in those rows.
    """
    if not parts.missing:
        return {}
    last = len(labels) // HELD_OUT
    if (len(labels), size) == MNIST and parts.missing == ["validation"] and {*labels[-last:]} == {*labels}:
        return parts.cuts(len(labels), last)
    parts.note_cut()
    order = np.random.default_rng(0).permutation(len(labels))
    places: dict[str, list[int]] = {split: [] for split in ("train", *parts.missing)}
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        share = max(1, round(len(rows) / HELD_OUT)) if len(rows) > len(parts.missing) else 0
        for index, split in enumerate(parts.missing):
            places[split] += rows[index * share :][:share].tolist()
        places["train"] += rows[len(parts.missing) * share :].tolist()
    if not all(places.values()):
        raise UserError(f"dataset={parts.name!r}: no class has the {len(places)} rows that it takes to split it")
    return {split: np.sort(rows) for split, rows in places.items()}


def sklearn_digits() -> Pictures:
    """The 1,797 digits of 8x8 pixels with 17 grey levels that scikit-learn ships, split by a fixed shuffle."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"dataset={DIGITS!r} needs scikit-learn: pip install scikit-learn") from error
    found: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    held_out = round(len(order) * DIGITS_HELD_OUT)
    parts = np.split(order, [len(order) - 2 * held_out, len(order) - held_out])
    pixels, targets = found.data.astype(np.uint8), found.target.astype(np.int64)  # (S, 64), (S,)
    by_split = dict(zip(SPLITS, parts, strict=True))
    labels = {split: targets[rows] for split, rows in by_split.items()}
    return pictures(DIGITS, labels, {split: pixels[rows] for split, rows in by_split.items()}, 16)


def read_part(part: Any, name: str, notes: list[str]) -> list[tuple[Block, np.ndarray]]:
    """Pictures and labels (S,) of each table of a part."""
    tables = [read_rows(table, where) for table, where in read_tables(part, name) if len(table)]
    if not tables:
        raise UserError(f"dataset: {name!r} is empty")
    return tables


def read_rows(rows: Dataset, name: str) -> tuple[Block, np.ndarray]:
    """Pictures and labels (S,) of a table."""
    column = next((c for c in PIXEL_COLUMNS if c in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise UserError(
            f"dataset: {name!r} must have the columns label and {' or '.join(PIXEL_COLUMNS)}; "
            f"it has {', '.join(rows.column_names)}"
        )
    return read_pictures(rows, column, name), read_labels(rows, name)
