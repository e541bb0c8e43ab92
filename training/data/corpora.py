"""Text corpora: the embedded one, local files and tables, and Hub data sets, as three strings."""

import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Value

from ..common.errors import UserError, printable
from ..options.data import DataOptions
from .splits import SPLITS, DataSet, Parts
from .tables import TABLE_KINDS, TABLES, open_data, read_table, read_text

EMBEDDED = "python_docs"
HELD_OUT = 0.05  # share of the characters in each of validation and test, where the data has no splits of its own


def python_docs() -> str:
    """CPython's language reference as shipped with the interpreter: all topics in the order of their names."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "".join(topics[name] for name in sorted(topics))


def column(table: Dataset, wanted: str, name: str, notes: list[str]) -> list[str]:
    """The texts of a table's column; rows without one are left out, and said."""
    if wanted not in table.column_names:
        raise UserError(f"text_column={wanted!r} is not in {name}; it has {', '.join(table.column_names)}")
    kinds = {
        key: kind.dtype if isinstance(kind, Value) else type(kind).__name__ for key, kind in table.features.items()
    }
    texts = [key for key, kind in kinds.items() if kind in ("string", "large_string")]
    if wanted not in texts:
        there = ", ".join(texts) or "none"
        raise UserError(f"text_column={wanted!r} of {name} holds {kinds[wanted]}, not text; columns of text: {there}")
    try:
        every = table[wanted][:]
    except UnicodeDecodeError as error:  # other programs write what arrow itself would refuse
        raise UserError(f"text_column={wanted!r} of {name} is not UTF-8: {error}") from error
    rows = [row for row in every if row is not None]
    if len(rows) < len(every):
        notes.append(f"{len(every) - len(rows):,} of {len(every):,} rows of {name} hold no text and are left out")
    return rows


def joined(rows: Sequence[str]) -> str:
    """Rows as one text; those that do not end a line are joined by newlines."""
    separator = "" if len(rows) == 1 or all(row.endswith("\n") for row in rows if row) else "\n"
    return separator.join(rows)


def load_corpus(options: DataOptions) -> DataSet:
    """The corpus that the options name.

    Raises:
        UserError: nothing there, not UTF-8, a missing column or one that holds no text, an empty part.
    """

    def reader(part: Any, name: str, notes: list[str]) -> str:
        if isinstance(part, Dataset):
            return joined(column(part, options.text_column, name, notes))
        rows = []
        for path in part:
            if path.suffix.lower() in TABLES:
                rows += column(read_table(path), options.text_column, printable(path.name), notes)
            else:
                options.refuse_hub_options()
                rows.append(read_text(path))
        return joined(rows)

    if options.dataset in (None, EMBEDDED):
        options.refuse_hub_options()
        parts = Parts(EMBEDDED, {"train": python_docs()})
    else:
        parts = open_data(options, EMBEDDED, ((".txt",), *TABLE_KINDS), reader)
    name, texts = parts.name, parts.found
    train = texts["train"]
    if parts.missing:
        times = len(parts.missing)
        least = round(2 / HELD_OUT)
        if len(train) < least:
            twice = "twice" if times == 2 else "once"
            raise UserError(
                f"dataset={name!r} has {len(train)} characters; to hold out {HELD_OUT:.0%} {twice} takes {least}"
            )
        texts |= {split: train[place] for split, place in parts.cuts(len(train), int(len(train) * HELD_OUT)).items()}
    for split in SPLITS:
        if len(texts[split]) < 2:
            raise UserError(
                f"dataset={name!r}: the {split} part has {len(texts[split])} characters; each part needs at least 2"
            )
    # Of the file itself where a single file was split.
    digest = hashlib.sha256("".join(texts[split] for split in SPLITS).encode()).hexdigest()
    return DataSet(name, texts, "characters", digest, parts.notes)
