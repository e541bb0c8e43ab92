"""Pieces of music as piano rolls: note tables, folders of MIDI files, and the chorales of music21's corpus."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kru_hf.music import MidiError, frames_to_roll, quantise, read_midi, roll_to_frames
from kru_hf.music.rolls import LOWEST_PITCH, PROBLEMS

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
    "tempo_changes": "files with changes of tempo, which the grid leaves out",
}
WORDS = {
    **PROBLEMS,
    **IN_FILES,
    "unusable_files": "files left out",
    "short_pieces": "pieces of fewer than two frames left out",
}


def piece_figures(roll: np.ndarray) -> dict[str, float]:
    """Notes that sound in a frame on average, and the lowest and highest MIDI pitch, of a roll (T, 88)."""
    sounding = np.flatnonzero(roll.any(0)) + LOWEST_PITCH
    low, high = (float(sounding[0]), float(sounding[-1])) if len(sounding) else (float("nan"), float("nan"))
    return {"density": float(roll.sum(1).mean()), "lowest": low, "highest": high}


def bands(rolls: Sequence[np.ndarray]) -> dict[str, float]:
    """The 5 % and 95 % quantiles over pieces of each of :func:`piece_figures`."""
    figures = [piece_figures(roll) for roll in rolls if roll.any()]
    found: dict[str, float] = {}
    for name in ("density", "lowest", "highest"):
        low, high = np.quantile([figure[name] for figure in figures], [0.05, 0.95])
        found |= {f"{name}_low": round(float(low), 4), f"{name}_high": round(float(high), 4)}
    return found


def load_pieces(data: DataOptions, frames_per_quarter: int) -> DataSet:
    """The pieces that the options name, as rolls (T, 88) bool; the record has the bands of the training pieces.

    Raises:
        UserError: nothing there, damaged, no column `notes`, no usable piece, too few pieces.
    """
    report = Counter[str]()

    def reader(part: Any, name: str, notes: list[str]) -> list[np.ndarray]:
        if isinstance(part, list) and part[0].suffix.lower() in MIDI_ENDINGS:
            return read_midi_files(part, frames_per_quarter, report)
        return [roll for rows, where in read_tables(part, name) for roll in read_rows(rows, where, report)]

    if data.dataset in (None, CHORALES):
        data.refuse_hub_options()
        parts = Parts(CHORALES, {"train": music21_chorales(frames_per_quarter)})
    else:
        kinds = (MIDI_ENDINGS, *TABLE_KINDS)
        parts = open_data(data, CHORALES, kinds, reader, whole=MIDI_ENDINGS, columns="its column notes")
    splits = {split: [roll for roll in rolls if len(roll) > 1] for split, rolls in parts.found.items()}
    report["short_pieces"] = sum(len(parts.found[split]) - len(rolls) for split, rolls in splits.items())
    if parts.missing:
        rolls = splits["train"]
        if len(rolls) <= len(parts.missing):
            raise UserError(
                f"dataset={parts.name!r} has {len(rolls)} usable pieces; splits need at least {len(parts.missing) + 1}"
            )
        order = np.random.default_rng(0).permutation(len(rolls))
        cuts = parts.cuts(len(rolls), max(1, round(len(rolls) * HELD_OUT)))
        splits |= {split: [rolls[i] for i in order[place]] for split, place in cuts.items()}
    for split in SPLITS:
        if not any(roll.any() for roll in splits[split]):
            raise UserError(f"dataset={parts.name!r}: the {split} part holds no piece of two frames with notes")
    counts = "; ".join(f"{count} {WORDS[name]}" for name, count in report.items() if count)
    notes = [*parts.notes, *([counts] if counts else [])]
    digest = hashlib.sha256()
    for split in SPLITS:
        for roll in splits[split]:
            digest.update(json.dumps(roll_to_frames(roll)).encode())
        digest.update(split.encode())
    frames = {f"{split}_frames": sum(map(len, splits[split])) for split in SPLITS}
    return DataSet(parts.name, splits, "pieces", digest.hexdigest(), notes, {**frames, **bands(splits["train"])})


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


def read_midi_files(paths: list[Path], frames_per_quarter: int, report: Counter[str]) -> list[np.ndarray]:
    """The pieces of MIDI files; unusable ones are counted and named."""
    rolls, bad = [], []
    for path in tqdm(paths, desc="reading MIDI", unit="file", disable=len(paths) < 20):
        try:
            piece = read_midi(path, frames_per_quarter)
        except MidiError as error:
            bad.append(str(error))
            continue
        counts = {**piece.report, "tempo_changes": len(piece.tempos) - 1}
        report.update({name: min(count, 1) if name in IN_FILES else count for name, count in counts.items()})
        rolls.append(piece.roll)
    report["unusable_files"] += len(bad)
    for message in bad[:5]:
        tqdm.write(f"left out: {message}")
    if not rolls:
        raise UserError(f"dataset: none of the {len(paths)} MIDI files is usable: {bad[0]}")
    return rolls


# ---- the chorales that come with music21 ----------------------------------------------------------------------------


def music21_chorales(frames_per_quarter: int) -> list[np.ndarray]:
    """The four-part Bach chorales of music21's corpus on a grid: parsed once (a minute), then read from the cache."""
    try:
        from music21 import corpus
    except ImportError as error:
        raise UserError(f"dataset={CHORALES!r} needs music21: pip install 'kru-hf[music]'") from error
    pieces = chorale_notes(sorted(map(Path, corpus.getComposer("bach")), key=str))
    try:
        return [
            quantise([(start, length, int(pitch)) for start, length, pitch in notes], frames_per_quarter).roll
            for notes in pieces
        ]
    except MidiError as error:
        raise UserError(f"dataset={CHORALES!r} with frames_per_quarter={frames_per_quarter}: {error}") from error


def chorale_notes(paths: Sequence[Path]) -> list[list[list[float]]]:
    """The notes (start, length, pitch) of the pieces with four parts, from a cache under all that decides them.

    That is the files, music21 and the parser; the grid is laid over the notes afterwards.
    """
    digest = hashlib.sha256(f"{version('music21')}\n{inspect.getsource(parse_chorale)}".encode())
    for path in paths:
        digest.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())

    def make() -> dict[str, list[Any]]:
        parsed = [parse_chorale(path) for path in tqdm(paths, desc="parsing chorales, once", unit="piece")]
        return {"notes": [[list(map(float, note)) for note in notes] for notes in parsed if notes]}

    return cached(f"{CHORALES}-{digest.hexdigest()[:16]}", make)["notes"]


def parse_chorale(path: Path) -> list[tuple[float, float, int]]:
    """Start and length in quarter notes and pitch of the notes of a score; none unless it has four parts."""
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    try:
        score: Any = converter.parse(path)
    except (Music21Exception, ValueError, KeyError):
        return []
    if len(score.parts) != 4:
        return []
    return [
        (float(element.offset), float(element.quarterLength), pitch.midi)
        for part in score.parts
        for element in part.flatten().notes
        if element.quarterLength > 0
        for pitch in element.pitches
    ]
