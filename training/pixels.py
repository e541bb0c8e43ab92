"""Pictures as sequences of pixels: scikit-learn's digits, folders of tables, and Hub data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, load_dataset

from .errors import UserError
from .sequences import SPLITS, fingerprint
from .tasks.base import DataOptions

DIGITS = "digits"
VALIDATION = 12  # one row in that many is held out of the training rows, the last ones: 5,000 of MNIST's 60,000
DIGITS_HELD_OUT = 0.15  # share of scikit-learn's digits in each of validation and test
PIXEL_COLUMNS = ("pixels", "image", "img")
PERMUTATION_SEED = 92916  # as in Lezcano-Casado & Martínez-Rubio 2019 (expRNN) and the work that compares with it


@dataclass(frozen=True)
class Pictures:
    """Pixels (S, P) uint8 and labels (S,) by split; `white` is the largest value that a pixel can have."""

    name: str
    pixels: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    white: int

    def record(self) -> dict[str, Any]:
        """Name, SHA-256 of pixels and labels, and sizes."""
        parts = [part for split in SPLITS for part in (self.pixels[split], self.labels[split])]
        sizes = {f"{split}_pictures": len(self.labels[split]) for split in SPLITS}
        return {"name": self.name, "sha256": fingerprint(self.white, *parts), **sizes}


def fixed_permutation(size: int) -> np.ndarray:
    """The order (size,) in which permuted pictures are read.

    It comes from NumPy's legacy generator, whose numbers never change, with seed 92916.
    """
    return np.random.RandomState(PERMUTATION_SEED).permutation(size)


def load_pictures(data: DataOptions) -> Pictures:
    """The pictures that the options name.

    Raises:
        UserError: nothing there, a split or column missing, pictures of several sizes, labels that are not 0, 1, 2 …
    """
    source = data.dataset or DIGITS
    if source == DIGITS or Path(source).is_dir():
        data.refuse_hub_options()
    if source == DIGITS:
        return sklearn_digits()
    path = Path(source)
    name = path.resolve().name if path.is_dir() else source
    tables = read_folder(path) if path.is_dir() else read_hub(data)
    arrays = {split: read_rows(tables[split], f"{name} {split}") for split in tables if split in SPLITS}
    for split in ("train", "test"):
        if split not in arrays:
            raise UserError(f"dataset={name!r} has no split {split!r}; it has {', '.join(tables)}")
    if "validation" not in arrays:
        pixels, labels = arrays["train"]
        first = len(labels) - len(labels) // VALIDATION
        arrays |= {"train": (pixels[:first], labels[:first]), "validation": (pixels[first:], labels[first:])}
    widths = {split: pixels.shape[1] for split, (pixels, _) in arrays.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"dataset={name!r}: pictures must all have one size, got {widths} pixels")
    for split, (_, labels) in arrays.items():
        if len(labels) == 0:
            raise UserError(f"dataset={name!r}: the {split} part is empty")
        if labels.min() < 0 or labels.max() > arrays["train"][1].max():
            raise UserError(f"dataset={name!r} {split}: labels must be 0 … {arrays['train'][1].max()}, as in training")
    return Pictures(name, {k: v[0] for k, v in arrays.items()}, {k: v[1] for k, v in arrays.items()}, 255)


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
    pixels, labels = found.data.astype(np.uint8), found.target.astype(np.int64)  # (S, 64), (S,)
    by_split = dict(zip(SPLITS, parts, strict=True))
    return Pictures(
        DIGITS, {k: pixels[rows] for k, rows in by_split.items()}, {k: labels[rows] for k, rows in by_split.items()}, 16
    )


def read_folder(folder: Path) -> DatasetDict:
    """`train.parquet`, `test.parquet` and, if there is one, `validation.parquet` of a folder."""
    files = {split: str(folder / f"{split}.parquet") for split in SPLITS if (folder / f"{split}.parquet").is_file()}
    missing = [f"{split}.parquet" for split in ("train", "test") if split not in files]
    if missing:
        raise UserError(f"dataset: folder {str(folder)!r} has no {', '.join(missing)}")
    try:
        return load_dataset("parquet", data_files=files)
    except Exception as error:  # readers have no common base class: damaged, empty, no permission
        raise UserError(f"dataset: {str(folder)!r} cannot be read ({type(error).__name__}: {error})") from error


def read_hub(data: DataOptions) -> DatasetDict:
    """A data set of the Hub with pictures and labels."""
    data.refuse_text_column(f"its columns label and {' or '.join(PIXEL_COLUMNS)}")
    source = str(data.dataset)
    if Path(source).is_absolute() or source.startswith("."):
        raise UserError(f"dataset={source!r} is not a folder; pass a folder, a Hub id or {DIGITS}")
    try:
        return load_dataset(source, data.dataset_config, revision=data.dataset_revision)
    except Exception as error:  # the Hub client has no common base class
        raise UserError(
            f"dataset={source!r} is neither a folder nor a data set that the Hub gives "
            f"({type(error).__name__}: {error}); pass --dataset FOLDER, HUB_ID or {DIGITS}"
        ) from error


def read_rows(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (S, P) uint8, row by row of each picture, and labels (S,) of a table."""
    column = next((c for c in PIXEL_COLUMNS if c in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise UserError(
            f"dataset: {name!r} must have the columns label and {' or '.join(PIXEL_COLUMNS)}; "
            f"it has {', '.join(rows.column_names)}"
        )
    if isinstance(rows.features[column], Image):
        flat = [np.asarray(picture.convert("L"), dtype=np.uint8).ravel() for picture in rows[column]]
    else:
        flat = rows.with_format("numpy", columns=[column])[:][column]
    if len({len(picture) for picture in flat}) != 1:
        raise UserError(f"dataset: {name!r}, column {column}: pictures must all have one size")
    pixels = np.stack(list(flat))  # (S, P)
    if pixels.min() < 0 or pixels.max() > 255 or not np.issubdtype(pixels.dtype, np.integer):
        raise UserError(f"dataset: {name!r}, column {column}: pixels must be whole numbers from 0 to 255")
    labels = np.asarray(rows["label"])  # (S,)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"dataset: {name!r}, column label: labels must be whole numbers, got {rows['label'][0]!r}")
    return pixels.astype(np.uint8), labels.astype(np.int64)
