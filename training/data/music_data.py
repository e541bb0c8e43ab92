"""Pieces of music as piano rolls: note tables, folders of MIDI files, and the chorales of music21's corpus."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kru_hf.music import MidiError, PianoRoll, frames_to_roll, quantise, read_midi, roll_to_frames
from kru_hf.music.rolls import PROBLEMS

from ..common.errors import UserError
from ..options.data import DataOptions
from .cache import cached
from .splits import SPLITS, DataSet, Parts
from .tables import TABLE_KINDS, open_data, read_tables

CHORALES = "bach_chorales"
HELD_OUT = 0.1  # share of the pieces in each of validation and test, where the data has no splits of its own
MIDI_ENDINGS = (".mid", ".midi", ".rmi", ".kar")
# What a note gives as the number of files of a folder that have it.
IN_FILES = {
    "pedal_notes": "files with notes that a pedal holds on",
    "merged_tracks": "files whose tracks are laid over each other",
    "velocities": "files whose velocities are made one",
    "meter_changes": "files with changes of meter",
    "tempo_changes": "files with changes of tempo, which the grid leaves out",
}
WORDS = {
    **PROBLEMS,
    **IN_FILES,
    "unusable_files": "files left out",
    "short_pieces": "pieces of fewer than two frames left out",
}


def load_pieces(data: DataOptions, frames_per_quarter: int) -> DataSet:
    """The pieces that the options name; `extra["onsets"]`: whether the data say where notes begin.

    Raises:
        UserError: nothing there, damaged, no column `notes`, no usable piece, too few pieces.
    """
    report = Counter[str]()
    tables: list[str] = []

    def reader(part: Any, name: str, notes: list[str]) -> list[PianoRoll]:
        if isinstance(part, list) and part[0].suffix.lower() in MIDI_ENDINGS:
            return read_midi_files(part, frames_per_quarter, report)
        tables.append(name)
        found = [roll for rows, where in read_tables(part, name) for roll in read_rows(rows, where, report)]
        return [PianoRoll(roll, None, frames_per_quarter) for roll in found]

    if data.dataset in (None, CHORALES):
        data.refuse_hub_options()
        parts = Parts(CHORALES, {"train": music21_chorales(frames_per_quarter)})
    else:
        kinds = (MIDI_ENDINGS, *TABLE_KINDS)
        parts = open_data(data, CHORALES, kinds, reader, whole=MIDI_ENDINGS, columns="its column notes")
    for split, pieces in parts.found.items():
        for number, piece in enumerate(pieces, 1):
            piece.name = piece.name or f"{split}-{number}"
    splits = {split: [piece for piece in pieces if len(piece.roll) > 1] for split, pieces in parts.found.items()}
    report["short_pieces"] = sum(len(parts.found[split]) - len(pieces) for split, pieces in splits.items())
    if parts.missing:
        pieces = splits["train"]
        if len(pieces) <= len(parts.missing):
            raise UserError(
                f"dataset={parts.name!r} has {len(pieces)} usable pieces; splits need at least {len(parts.missing) + 1}"
            )
        order = np.random.default_rng(0).permutation(len(pieces))
        cuts = parts.cuts(len(pieces), max(1, round(len(pieces) * HELD_OUT)))
        splits |= {split: [pieces[i] for i in order[place]] for split, place in cuts.items()}
    for split in SPLITS:
        if not any(piece.roll.any() for piece in splits[split]):
            raise UserError(f"dataset={parts.name!r}: the {split} part holds no piece of two frames with notes")
    counts = "; ".join(f"{count} {WORDS[name]}" for name, count in report.items() if count)
    notes = [*parts.notes, *([counts] if counts else [])]
    digest = hashlib.sha256()
    for split in SPLITS:
        for piece in splits[split]:
            for plane in [piece.roll] if tables else [piece.roll, piece.onsets]:
                digest.update(json.dumps(roll_to_frames(plane)).encode())
        digest.update(split.encode())
    extra: dict[str, Any] = {f"{split}_frames": sum(len(piece.roll) for piece in splits[split]) for split in SPLITS}
    return DataSet(parts.name, splits, "pieces", digest.hexdigest(), notes, {**extra, "onsets": not tables})


def read_rows(rows: Any, name: str, report: Counter[str]) -> list[np.ndarray]:
    """Rolls of the rows of a table."""
    if "notes" not in rows.column_names:
        raise UserError(f"dataset: {name!r} has no column 'notes'; it has {', '.join(rows.column_names)}")
    rolls = []
    for index, notes in enumerate(rows["notes"]):
        try:
            roll, outside = frames_to_roll(notes)
        except (TypeError, IndexError) as error:  # no lists, or numbers that are not whole
            raise UserError(
                f"dataset: {name!r}, row {index}: notes must be a list of frames, a frame a list of MIDI pitches, "
                "whole numbers"
            ) from error
        except MidiError as error:
            raise UserError(f"dataset: {name!r}, row {index}: {error}") from error
        report["out_of_range_notes"] += outside
        rolls.append(roll)
    return rolls


def read_midi_files(paths: list[Path], frames_per_quarter: int, report: Counter[str]) -> list[PianoRoll]:
    """The pieces of MIDI files; unusable ones are counted and named."""
    pieces, bad = [], []
    for path in tqdm(paths, desc="reading MIDI", unit="file", disable=len(paths) < 20):
        try:
            piece = read_midi(path, frames_per_quarter)
        except MidiError as error:
            bad.append(str(error))
            continue
        counts = {**piece.report, "tempo_changes": len(piece.tempos) - 1}
        report.update({name: min(count, 1) if name in IN_FILES else count for name, count in counts.items()})
        piece.name = path.stem
        pieces.append(piece)
    report["unusable_files"] += len(bad)
    for message in bad[:5]:
        tqdm.write(f"left out: {message}")
    if not pieces:
        raise UserError(f"dataset: none of the {len(paths)} MIDI files is usable: {bad[0]}")
    return pieces


# ---- the chorales that come with music21 ----------------------------------------------------------------------------


def music21_chorales(frames_per_quarter: int) -> list[PianoRoll]:
    """The four-part Bach chorales of music21's corpus on a grid: parsed once (a minute), then read from the cache."""
    try:
        from music21 import corpus
    except ImportError as error:
        raise UserError(f"dataset={CHORALES!r} needs music21: pip install 'kru-hf[music]'") from error
    found = parsed_chorales(sorted(map(Path, corpus.getComposer("bach")), key=str))
    try:
        return [on_grid(Chorale(*values), frames_per_quarter) for values in zip(*found.values(), strict=True)]
    except MidiError as error:
        raise UserError(f"dataset={CHORALES!r} with frames_per_quarter={frames_per_quarter}: {error}") from error


class Chorale(NamedTuple):
    """A score: notes (start, length, pitch), the meter (beats in a bar, part of a whole note), quarters of upbeat."""

    name: str
    notes: list[tuple[float, float, float]]
    meter: tuple[int, int]
    upbeat: float


def on_grid(chorale: Chorale, frames_per_quarter: int) -> PianoRoll:
    """A score as a piece."""
    piece = quantise([(start, length, int(pitch)) for start, length, pitch in chorale.notes], frames_per_quarter)
    beats, part = chorale.meter
    return replace(piece, name=chorale.name, meter=(beats, part), upbeat=round(chorale.upbeat * frames_per_quarter))


def parsed_chorales(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """The fields of the chorales with four parts, from a cache under all that decides them.

    That is the files, music21 and the parser; the grid is laid over the notes afterwards.
    """
    digest = hashlib.sha256(f"{version('music21')}\n{inspect.getsource(parse_chorale)}".encode())
    for path in paths:
        digest.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())

    def make() -> dict[str, list[Any]]:
        parsed = [parse_chorale(path) for path in tqdm(paths, desc="parsing chorales, once", unit="piece")]
        columns = zip(*[chorale for chorale in parsed if chorale], strict=True)
        return dict(zip(Chorale._fields, map(list, columns), strict=True))

    return cached(f"{CHORALES}-{digest.hexdigest()[:16]}", make)


def parse_chorale(path: Path) -> Chorale | None:
    """A score in quarter notes; None unless it has four parts."""
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    try:
        score: Any = converter.parse(path)
    except (Music21Exception, ValueError, KeyError):
        return None
    if len(score.parts) != 4:
        return None
    notes = [
        (float(element.offset), float(element.quarterLength), float(pitch.midi))
        for part in score.parts
        for element in part.flatten().notes
        if element.quarterLength > 0
        for pitch in element.pitches
    ]
    meters = score.parts[0].flatten().getElementsByClass("TimeSignature")
    meter = (meters[0].numerator, meters[0].denominator) if meters else (4, 4)
    measures = score.parts[0].getElementsByClass("Measure")
    first = float(measures[0].duration.quarterLength) if measures else 0.0
    return Chorale(path.stem, notes, meter, first if first < 4 * meter[0] / meter[1] else 0.0) if notes else None
