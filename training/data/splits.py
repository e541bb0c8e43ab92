"""The parts of a data set, for every task: what the data call train, validation and test, and what is cut from train.

A part that the data bring is used whole, however it is spelt; only a part that they lack is cut from the training rows.
The notes of a data set name what is not used.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UserError, printable
from ..common.files import one_line

SPLITS = ("train", "validation", "test")
IGNORED = -100  # label that is not scored
EITHER = "eval"  # of validation and test the one that the data do not name otherwise, validation first
SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development"),
    "test": ("test", "testing"),
    EITHER: ("eval", "evaluation", "heldout", "holdout"),
}
SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # of `save_to_disk`
SHOWN = 5  # names in a message


@dataclass
class DataSet:
    """What a task reads, by split, and how to name it in a record that may be published.

    Args:
        name: never a path. unit: what is counted of a split, such as "characters". sha256: of what is read.
        notes: what was chosen, cut or left out, a sentence each. extra: what else identifies the data.
    """

    name: str
    splits: Mapping[str, Any]
    unit: str
    sha256: str
    notes: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Name, SHA-256 and the size of each split."""
        sizes = {f"{split}_{self.unit}": len(self.splits[split]) for split in SPLITS}
        return {"name": self.name, "sha256": self.sha256, **sizes, **self.extra}


@dataclass
class Parts:
    """What a data set brings: by part, what the task reads, and notes on what was chosen and what is not used."""

    name: str
    found: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """The parts that have to be cut from train."""
        return [part for part in SPLITS if part not in self.found]

    def cuts(self, count: int, held_out: int) -> dict[str, slice]:
        """Of `count` training rows the places of train and of each missing part: the last `held_out` ones each."""
        first = count - held_out * len(self.missing)
        ends = {part: first + held_out * (index + 1) for index, part in enumerate(self.missing)}
        self.note_cut()
        return {"train": slice(first), **{part: slice(end - held_out, end) for part, end in ends.items()}}

    def note_cut(self) -> None:
        """Say which part is cut from train where the data bring another one."""
        if len(self.missing) == 1:
            self.notes.append(f"the data have no {self.missing[0]} part: it is cut from train")


def listed(names: Iterable[object]) -> str:
    """The first names, and how many more there are."""
    every = [printable(str(name)) for name in names]
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def spelling(name: str) -> tuple[str, int] | None:
    """The part that a name means, and how clearly: 0 for its own name, 1 for another spelling, 2 among other words."""
    if name in SPLITS:
        return name, 0
    joined = re.sub(r"(held|hold)[-_ ]out", r"\1out", name.lower())
    words = [re.sub(r"(?<=.)(set|data|split)$", "", word) for word in re.split(r"[-_. ]+", joined) if word]
    words = [word for word in words if word not in ("set", "data", "split")]
    for part, spelt in SPELLINGS.items():
        if len(words) == 1 and words[0] in spelt:
            return part, 1
    for part in SPLITS:
        if len(words) > 1 and (words[0] in SPELLINGS[part] or words[-1] in SPELLINGS[part]):
            return part, 2
    return None


def assign(names: Collection[str], where: str) -> tuple[dict[str, str], list[str]]:
    """Which of the names that a data set brings are train, validation and test, and the names that are not used.

    Raises:
        UserError: nothing to train on, or several names that are equally clear about one part.
    """
    chosen: dict[str, str] = {}
    meant = {name: found for name in names if (found := spelling(name)) is not None}
    for part in (*SPLITS, EITHER):
        levels = {name: level for name, (its, level) in meant.items() if its == part}
        best = [name for name, level in levels.items() if level == min(levels.values())]
        free = [part] if part != EITHER else [other for other in SPLITS if other not in chosen]
        if best and free:
            if len(best) > 1:
                raise UserError(f"dataset: {where} has {listed(best)}, and one of them alone can be {free[0]}")
            chosen[free[0]] = best[0]
        if part == "train" and not best:
            raise UserError(f"dataset: {where} has no part 'train'; it has {listed(names) or 'nothing'}")
    return chosen, [name for name in names if name not in chosen.values()]


def describe(chosen: dict[str, str], unused: Collection[str]) -> list[str]:
    """Notes on parts of another name, and on what is not used."""
    notes = [f"{part} is {printable(name)!r}" for part, name in chosen.items() if name.lower() != part]
    return notes + ([f"not used: {listed(unused)}"] if unused else [])


# ---- folders --------------------------------------------------------------------------------------------------------


def folder_parts(folder: Path, kinds: Sequence[Collection[str]], whole: Collection[str] = ()) -> Parts:
    """The files of a folder by part: `train.txt`, shards `train-00000-of-00002.parquet`, or those below `train/`.

    Args:
        kinds: endings of files that can be read; below a folder the first kind is read of which there are files.
        whole: endings of files that may lie anywhere below a folder without parts: all are train then.

    Returns:
        a list of paths for each part.

    Raises:
        UserError: no part to train on, two files for one part, shards missing, a part that cannot be read.
    """
    where, endings = f"folder {printable(str(folder))!r}", sorted({ending for kind in kinds for ending in kind})
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if visible(entry, folder)]
        below = {e: [p for p in sorted(e.rglob("*")) if visible(p, folder)] if e.is_dir() else [e] for e in entries}
    except OSError as error:
        raise UserError(f"dataset: {where} cannot be read: {one_line(error)}") from error
    files = {entry: first_kind(below[entry], kinds) for entry in entries}
    named: dict[str, list[Path]] = {}
    for entry in entries:
        named.setdefault(part_name(entry, bool(files[entry])), []).append(entry)
    readable = {name: found for name, those in named.items() if (found := [e for e in those if files[e]])}
    if any(spelling(name) for name in readable):
        refuse_unreadable(named, readable, where, endings)
        chosen, _ = assign(readable.keys(), where)
        for name in chosen.values():
            check_shards(readable[name], where)
        taken = {part: [path for entry in readable[name] for path in files[entry]] for part, name in chosen.items()}
    else:
        anywhere = [path for entry in entries for path in below[entry] if path.suffix.lower() in whole]
        chosen, taken = {}, {"train": [path for path in anywhere if path.is_file()]}
        if not taken["train"]:
            what = f"train{', train'.join(endings)}{' or files ' + ', '.join(whole) if whole else ''}"
            raise UserError(f"dataset: {where} has no {what}; it has {listed(e.name for e in entries) or 'nothing'}")
    used = {path for paths in taken.values() for path in paths}
    unused = [path for entry in entries for path in below[entry] if path.is_file() and path not in used]
    notes = describe(chosen, [str(path.relative_to(folder)) for path in unused])
    return Parts(folder.resolve().name, taken, notes)


def visible(path: Path, folder: Path) -> bool:
    """Whether a file or folder below `folder` may hold data."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.name not in METADATA


def refuse_unreadable(
    named: dict[str, list[Path]], readable: Collection[str], where: str, endings: Collection[str]
) -> None:
    """`UserError` for what has the name of a part, no ending that is read, and nothing beside it that is that part."""
    there = {meant[0] for name in readable if (meant := spelling(name))}
    for name, found in named.items():
        meant = spelling(name)
        if name not in readable and meant and meant[1] < 2 and meant[0] not in there:
            what = printable(found[0].name)
            raise UserError(
                f"dataset: {what!r} of {where} cannot be read: a part is {', '.join(endings)}, or a folder of them"
            )


def first_kind(paths: Sequence[Path], kinds: Sequence[Collection[str]]) -> list[Path]:
    """The files of the first kind of which there are any."""
    for kind in kinds:
        found = [path for path in paths if path.suffix.lower() in kind and path.is_file()]
        if found:
            return found
    return []


def part_name(entry: Path, is_read: bool) -> str:
    """The name of a folder, or of a file without its endings and the number of its shard."""
    if entry.is_dir():
        return entry.name
    return SHARD.sub("", entry.stem if is_read else entry.name.split(".")[0])


def check_shards(entries: list[Path], where: str) -> None:
    """`UserError` unless they are one file or folder, or all the shards of one."""
    numbers = [SHARD.search(entry.stem) for entry in entries]
    if len(entries) > 1 and not all(numbers):
        raise UserError(f"dataset: {where} has {listed(e.name for e in entries)}: keep one of them")
    for found in filter(None, numbers):
        if len(entries) != int(found[2]):
            raise UserError(f"dataset: {where} has {len(entries)} of the {int(found[2])} files {entries[0].name!r} …")
