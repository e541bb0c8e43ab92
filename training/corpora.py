"""Text corpora: the embedded one, local files and Hub data sets, as three strings."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from .errors import UserError
from .tasks.base import DataOptions

SPLITS = ("train", "validation", "test")
EMBEDDED = "python_docs"
HELD_OUT = 0.05  # share of the characters in each of validation and test, where the data has no splits of its own


@dataclass(frozen=True)
class Corpus:
    """A text in three parts, and how to name it in a record that may be published."""

    name: str
    splits: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """SHA-256 of train + validation + test in UTF-8: of the file itself where a single file was split."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(self.splits[split].encode())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """Name, SHA-256 and number of characters of each part."""
        sizes = {f"{split}_characters": len(self.splits[split]) for split in SPLITS}
        return {"name": self.name, "sha256": self.sha256, **sizes}


def split_text(text: str) -> dict[str, str]:
    """The first 90 % of the characters, the next 5 % and the last 5 %, each in one piece."""
    held_out = int(len(text) * HELD_OUT)
    first, second = len(text) - 2 * held_out, len(text) - held_out
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


def python_docs() -> str:
    """CPython's language reference as shipped with the interpreter: all topics in the order of their names."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """The exact text of a UTF-8 file, without a byte-order mark, which is no letter of it.

    Line ends stay as they are (readers of `datasets` would translate them).
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"dataset: {str(path)!r} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}; "
            "convert it first, for example with iconv -t utf-8"
        ) from error
    except OSError as error:
        raise UserError(f"dataset: {str(path)!r} cannot be read: {error.strerror or error}") from error


def one_document(text: str) -> Dataset:
    """A data set of one row that holds the whole text."""
    return Dataset.from_dict({"text": [text]})


def load_folder(folder: Path) -> DatasetDict:
    """`train.txt`, `validation.txt` and `test.txt` of a folder."""
    missing = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").is_file()]
    if missing:
        raise UserError(f"dataset: folder {str(folder)!r} has no {', '.join(missing)}")
    return DatasetDict({split: one_document(read_text(folder / f"{split}.txt")) for split in SPLITS})


def load_hub(options: DataOptions) -> DatasetDict:
    """A data set of the Hub."""
    try:
        data = load_dataset(options.dataset, options.dataset_config, revision=options.dataset_revision)
    except Exception as error:  # network, missing data set, …: the Hub client has no base class for them
        raise UserError(
            f"dataset={options.dataset!r} is neither a local file or folder nor a data set that the Hub gives "
            f"({type(error).__name__}: {error}); pass --dataset FILE, FOLDER, HUB_ID or {EMBEDDED}"
        ) from error
    if "train" not in data:
        raise UserError(f"dataset={options.dataset!r} has no split 'train'; it has {', '.join(data)}")
    return data


def joined(data: Dataset, column: str, name: str) -> str:
    """The rows of a split as one text; rows that do not end a line are joined by newlines."""
    if column not in data.column_names:
        raise UserError(f"text_column={column!r} is not in {name}; it has {', '.join(data.column_names)}")
    rows = [row or "" for row in data[column]]
    separator = "" if len(rows) == 1 or all(row.endswith("\n") for row in rows if row) else "\n"
    return separator.join(rows)


def load_corpus(options: DataOptions) -> Corpus:
    """The corpus that the options name.

    Raises:
        UserError: nothing there, not UTF-8, a missing split or column, an empty part.
    """
    source = options.dataset or EMBEDDED
    path = Path(source)
    name = source
    if source == EMBEDDED:
        data = DatasetDict({"train": one_document(python_docs())})
    elif path.is_file():
        data, name = DatasetDict({"train": one_document(read_text(path))}), path.name
    elif path.is_dir():
        data, name = load_folder(path), path.resolve().name
    elif path.is_absolute() or path.suffix == ".txt" or source.startswith("."):
        raise UserError(f"dataset={source!r} does not exist; pass --dataset FILE, FOLDER, HUB_ID or {EMBEDDED}")
    else:
        data = load_hub(options)
    local = source == EMBEDDED or path.exists()
    if local:
        options.refuse_hub_options()
    texts = {key: joined(data[key], "text" if local else options.text_column, name) for key in SPLITS if key in data}
    if set(texts) != set(SPLITS):
        least = round(2 / HELD_OUT)
        if len(texts["train"]) < least:
            raise UserError(
                f"dataset={name!r} has {len(texts['train'])} characters; to hold out {HELD_OUT:.0%} twice takes {least}"
            )
        texts = split_text(texts["train"])
    for split in SPLITS:
        if len(texts[split]) < 2:
            raise UserError(
                f"dataset={name!r}: the {split} part has {len(texts[split])} characters; each part needs at least 2"
            )
    return Corpus(name, texts)
