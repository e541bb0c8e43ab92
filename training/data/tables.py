"""Where a task's data come from, files and folders of this machine or data sets of the Hub, and how tables are read."""

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
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
CUT = 1 << 20  # bytes that tell the encoding of a text


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
    wanted, sure = encoding(content)
    if content.startswith((b"PAR1", b"ARROW1")) or (not sure and b"\0" in content):
        raise UserError(f"dataset: {name!r} is no text: it holds other bytes; tables must end in {', '.join(TABLES)}")
    where = other = ""
    if not sure:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = f": byte {content[error.start]:#04x} at offset {error.start}"
            other = ", with the encoding that it has after -f (iconv -l lists all)"
    command = f"iconv -f {wanted} -t UTF-8 {shlex.quote(name)} > {converted(path, '-utf8')}"
    raise UserError(f"dataset: {name!r} is not UTF-8 text{where}; convert it first: {command}{other}")


def encoding(content: bytes) -> tuple[str, bool]:
    """The name that iconv has for text that is not UTF-8, and whether it is sure.

    Text of 16 or 32 bits a unit is known by its mark or its zero bytes; else a western encoding is named in which
    every byte is a letter.
    """
    for mark, name in MARKS.items():
        if content.startswith(mark):
            return name, True
    start = content[:CUT]
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if start[first::2].count(0) > len(start) // 4 and not start[1 - first :: 2].count(0):
            return name, True
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return "ISO-8859-1", False
    return "WINDOWS-1252", False


def read_table(path: Path) -> Dataset:
    """A table of this machine: parquet, arrow, JSON or JSON lines, CSV or TSV with a line of names.

    It is read every time, never from a cache, which would know it by its time stamp and size alone.

    Raises:
        UserError: it cannot be read, is damaged, or has columns of several types.
    """
    ending = path.suffix.lower()
    content = read_bytes(path) if ending in (".parquet", ".arrow") else read_text(path).encode()
    return read(path, lambda _: Dataset(parse(content, ending), fingerprint=sha256(content).hexdigest()[:16]))


def parse(content: bytes, ending: str) -> pa.Table:
    """The table in the bytes of a file of that ending; arrow's errors for damaged ones."""
    if ending == ".arrow":
        opened = (pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream)(content)
        return plain(opened.read_all())
    if ending == ".parquet":
        return plain(pyarrow.parquet.read_table(pa.BufferReader(content)))
    whole = min(len(content) + 1, 2**31 - 1)  # as one block: a document may be of any length
    if ending in (".csv", ".tsv"):
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content),
            pyarrow.csv.ReadOptions(block_size=whole),
            pyarrow.csv.ParseOptions(delimiter="," if ending == ".csv" else "\t", newlines_in_values=True),
            pyarrow.csv.ConvertOptions(null_values=[], true_values=[], false_values=[]),  # "NA" is a text like others
        )
        if len({*table.column_names}) < table.num_columns:
            raise ValueError(f"the first line names a column twice: {', '.join(table.column_names)}")
        return table
    if content.lstrip().startswith(b"["):
        content = "\n".join(json.dumps(row) for row in json.loads(content)).encode()
    return pyarrow.json.read_json(pa.BufferReader(content), pyarrow.json.ReadOptions(block_size=whole))


def plain(table: pa.Table) -> pa.Table:
    """The table with the values of dictionaries (as of pandas' categories) in their place."""
    for place, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(place, column.name, table.column(place).cast(column.type.value_type))
    return table
