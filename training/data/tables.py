"""Where a task's data come from, files and folders of this machine or data sets of the Hub, and how tables are read."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, load_dataset_builder
from huggingface_hub import HfFileSystem

from ..common.errors import UserError, printable
from ..common.files import one_line, read
from ..options.data import DataOptions
from .splits import SHARD, Parts, assign, describe, folder_parts, spelling

# By kind: of a folder that is a part, the files of one kind are read.
TABLE_KINDS = ((".parquet",), (".arrow",), (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"))
TABLES = tuple(ending for kind in TABLE_KINDS for ending in kind)
# The first bytes of files that are no text, what they are, and the command that makes text of one (`{0}`, into `{1}`).
PACKED = {
    b"\x1f\x8b": ("packed by gzip", "gzip -dc {0} > {1}"),
    b"PK\x03\x04": ("packed by zip, or an office document", "unzip {0}"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "zstd -dc {0} > {1}"),
    b"BZh": ("packed by bzip2", "bzip2 -dc {0} > {1}"),
    b"\xfd7zXZ\x00": ("packed by xz", "xz -dc {0} > {1}"),
    b"7z\xbc\xaf\x27\x1c": ("packed by 7-Zip", "7z x {0}"),
    b"Rar!": ("packed by RAR", "unrar x {0}"),
    b"%PDF": ("a PDF document", "pdftotext {0} {1}"),
}
TAR = b"ustar"  # from byte 257 on
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
CUT = 1 << 20  # bytes that are looked at to tell an encoding


# ---- sources --------------------------------------------------------------------------------------------------------


def open_data(
    data: DataOptions,
    builtin: str,
    kinds: Sequence[Collection[str]],
    reader: Callable[[Any, str, list[str]], Any],
    whole: Collection[str] = (),
    columns: str | None = None,
) -> Parts:
    """The parts that `--dataset` names, each as `reader` makes it.

    Args:
        builtin: the name that a message offers beside files and Hub ids.
        kinds, whole: as :func:`training.data.splits.folder_parts` takes them.
        reader: called with a part (a list of paths of this machine, or a table of the Hub), its name, and the list of
            notes on the data.
        columns: what is read of a table, in words; None: `text_column` says it.

    Raises:
        UserError: nothing there, an option that has no effect, and all that `folder_parts` and `assign` refuse.
    """
    if columns is not None:
        data.refuse_text_column(columns)
    source = str(data.dataset)
    path = Path(source)
    endings = {ending for kind in kinds for ending in kind}
    if path.is_dir() or path.is_file():
        data.refuse_hub_options(texts=columns is None)
        if path.is_file() and columns is not None and path.suffix.lower() not in endings:
            raise UserError(f"dataset={source!r} cannot be read: it must be a folder or {', '.join(sorted(endings))}")
        parts = folder_parts(path, kinds, whole) if path.is_dir() else Parts(path.name, {"train": [path]})
    elif path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in endings or source.count("/") > 1:
        raise UserError(f"dataset={source!r} does not exist; pass --dataset FILE, FOLDER, HUB_ID or {builtin}")
    else:
        parts = hub_parts(data, builtin)
    parts.name = printable(parts.name)
    parts.found = {split: reader(part, f"{parts.name} {split}", parts.notes) for split, part in parts.found.items()}
    return parts


def hub_parts(data: DataOptions, builtin: str) -> Parts:
    """The parts of a data set of the Hub, as tables."""
    source = str(data.dataset)
    try:
        builder = load_dataset_builder(source, data.dataset_config, revision=data.dataset_revision)
        used, unused = files_of(builder)
        more = {name: paths for name, paths in unused.items() if spelling(name) and name not in used}
        if more:  # parts of names that `datasets` does not know
            builder = load_dataset_builder(source, data_files={**used, **more}, revision=data.dataset_revision)
        builder.download_and_prepare()
        found: Any = builder.as_dataset()
    except Exception as error:  # network, missing data set, …: the Hub client has no base class for them
        raise UserError(
            f"dataset={source!r} is neither a local file or folder nor a data set that the Hub gives "
            f"({type(error).__name__}: {one_line(error)}); pass --dataset FILE, FOLDER, HUB_ID or {builtin}"
        ) from error
    chosen, others = assign(list(found), repr(source))
    others += [path for name, paths in unused.items() if name not in more for path in paths]
    return Parts(source, {part: found[name] for part, name in chosen.items()}, describe(chosen, others))


def files_of(builder: Any) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The files of a Hub data set by split, and those that belong to no split of it by the name of what they are."""
    splits = getattr(builder.config, "data_files", None) or {}
    used = {str(split): [inside(str(file)) for file in files] for split, files in splits.items()}
    every = {path for paths in used.values() for path in paths}
    if len(builder.builder_configs) > 1 or not all("://" in str(file) for files in splits.values() for file in files):
        return used, {}
    try:
        there = sorted(inside(str(file)) for file in HfFileSystem().find(str(builder.base_path)))
    except Exception:  # without a network the data come from the cache, and nothing more can be known of them
        return used, {}
    endings = {PurePosixPath(path).suffix for path in every}
    unused: dict[str, list[str]] = {}
    for path in there:
        if PurePosixPath(path).suffix in endings and path not in every:
            unused.setdefault(SHARD.sub("", PurePosixPath(path).stem), []).append(path)
    return used, unused


def inside(address: str) -> str:
    """The path of a file inside its repository, of `hf://datasets/ME/NAME@REVISION/PATH`."""
    return address.rpartition("@")[2].partition("/")[2]


def read_tables(part: Any, name: str) -> Iterator[tuple[Dataset, str]]:
    """The tables of a part and what to call each: one of the Hub, or the files of a list of paths."""
    if isinstance(part, Dataset):
        yield part, name
    else:
        for path in part:
            yield read_table(path), printable(path.name)


# ---- files ----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that is not packed.

    Raises:
        UserError: it cannot be read, or it is packed or a document (and how to unpack it).
    """
    content, name = read(path, Path.read_bytes), printable(str(path))
    found = next((words for start, words in PACKED.items() if content.startswith(start)), None)
    if content[257:].startswith(TAR) or (found and {".tar", ".tgz"} & {*path.suffixes}):
        found = "an archive of tar", "tar -xf {0}"
    if found is not None:
        command = found[1].format(shlex.quote(name), converted(path, ""))
        raise UserError(f"dataset: {name!r} is {found[0]}; unpack it first: {command}")
    return content


def converted(path: Path, mark: str) -> str:
    """The name of a new file, for a command: without a packer's ending, or with `mark` before its ending."""
    if mark:
        new = path.with_name(f"{path.stem}{mark}{path.suffix}")
    else:
        new = path.with_suffix("") if path.with_suffix("").suffix else path.with_suffix(".txt")
    return shlex.quote(printable(str(new if not new.exists() else new.with_stem(f"{new.stem}-new"))))


def read_text(path: Path) -> str:
    """The exact text of a UTF-8 file, without a byte-order mark, which is no letter of it.

    Line ends stay as they are (readers of `datasets` would translate them).

    Raises:
        UserError: it cannot be read, is packed, is no text, or is of another encoding (and how to convert it).
    """
    content, name = read_bytes(path), printable(str(path))
    encoding, where = wide_encoding(content[:CUT]), ""
    if content.startswith((b"PAR1", b"ARROW1")) or (encoding is None and b"\0" in content):
        raise UserError(f"dataset: {name!r} is no text: it holds other bytes; tables must end in {', '.join(TABLES)}")
    if encoding is None:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = f": byte {content[error.start]:#04x} at offset {error.start}"
    words = f"-f {encoding or narrow_encoding(content)} -t UTF-8 {shlex.quote(name)} > {converted(path, '-utf8')}"
    other = "" if encoding else ", with the encoding that it has after -f (iconv -l lists all)"
    raise UserError(f"dataset: {name!r} is not UTF-8 text{where}; convert it first: iconv {words}{other}")


def narrow_encoding(content: bytes) -> str:
    """The name that iconv has for a western encoding in which every byte of a text is a letter."""
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "WINDOWS-1252"


def wide_encoding(content: bytes) -> str | None:
    """The name that iconv has for text of 16 or 32 bits a unit, by its mark or its zero bytes; None for other text."""
    for mark, name in MARKS.items():
        if content.startswith(mark):
            return name
    half = len(content) // 4  # half of every second byte
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros = content[first::2].count(0)
        if zeros > half and not content[1 - first :: 2].count(0):
            return name
    return None


def read_table(path: Path) -> Dataset:
    """A table of this machine: parquet, arrow, JSON or JSON lines, CSV or TSV with a line of names.

    It is read anew every time: a cache would know it by its time stamp and size.

    Raises:
        UserError: it cannot be read, is damaged, or has columns of several types.
    """
    ending = path.suffix.lower()
    if ending in (".parquet", ".arrow"):
        content = read_bytes(path)
        table = read(path, lambda _: arrow_table(content, ending))
    else:
        text = read_text(path)
        content, separator = text.encode(), {".csv": ",", ".tsv": "\t"}.get(ending)
        columns = read(path, lambda _: csv_columns(text, separator) if separator else json_columns(text))
        table = pa.table({name: typed(path, name, values) for name, values in columns.items()})
    return read(path, lambda _: Dataset(plain(table), fingerprint=sha256(content).hexdigest()[:16]))


def plain(table: pa.Table) -> pa.Table:
    """The table with the values of dictionaries (as of pandas' categories) in their place."""
    for place, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            values = table.column(place).cast(column.type.value_type)
            table = table.set_column(place, column.name, values)
    return table


def arrow_table(content: bytes, ending: str) -> pa.Table:
    """The table of a parquet file, or of an arrow file or stream."""
    buffer = pa.BufferReader(content)
    if ending == ".parquet":
        return pyarrow.parquet.read_table(buffer)
    if content.startswith(b"ARROW1"):
        return pa.ipc.open_file(buffer).read_all()
    return pa.ipc.open_stream(buffer).read_all()


def json_columns(text: str) -> dict[str, list[Any]]:
    """The columns of a list of objects, or of one object a line."""
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} must be an object with the columns as names, not {str(row)[:40]!r}")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def csv_columns(text: str, delimiter: str) -> dict[str, list[Any]]:
    """The columns of a table with a line of names: of numbers where every value is one, else of text as it stands."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than its 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names, *rows = [row for row in reader if row] or [[]]
    for index, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(f"row {index} has {len(row)} values, and the first line {len(names)} names")
    if len({*names}) != len(names):
        raise ValueError(f"the first line names a column twice: {', '.join(names)}")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    return {name: numbers(values) or values for name, values in columns.items()}


def numbers(values: list[str]) -> list[int] | list[float] | None:
    """The numbers that all the values stand for, or None."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except (ValueError, OverflowError):
            continue
    return None


def typed(path: Path, name: str, values: list[Any]) -> pa.Array:
    """A column of one type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise UserError(f"dataset: {printable(str(path))!r}, column {name}: {one_line(error)}") from error
