"""MIDI files and scores as piano rolls and back.

A roll is a grid: row t is a frame, ``frames_per_quarter`` of them in a quarter note, column k is the pitch 21 + k.
symusic is needed to write MIDI files (extra ``music``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .midi import DEFAULT_TEMPO, MidiError, read_score

LOWEST_PITCH, NUM_PITCHES = 21, 88  # the keys of a piano
SLOWEST, FASTEST = 10.0, 1000.0  # quarter notes per minute that are believed
MAX_FRAMES = (
    100_000  # a roll beyond that is a damaged file: at 4 frames per quarter and 120 quarters per minute, 3.5 hours
)
MAX_GRID = 480  # frames in a quarter note
MAX_BYTES = 1 << 24  # of a MIDI file
TICKS_PER_FRAME = 480  # in files that are written
# What each count of a report means, for people.
PROBLEMS = {
    "drum_notes": "notes of drum tracks dropped",
    "out_of_range_notes": f"notes outside the pitches {LOWEST_PITCH}..{LOWEST_PITCH + NUM_PITCHES - 1} dropped",
    "zero_length_notes": "notes without length given one frame",
    "unended_notes": "notes that never end dropped",
    "short_notes": "notes shorter than the grid given one frame",
    "overlapping_notes": "notes that start where the same pitch starts on the grid, merged",
    "pedal_notes": "notes that a pedal holds on",
    "velocities": "different velocities made one",
    "merged_tracks": "tracks merged into one",
    "missing_tracks": "tracks that the header counts and the file lacks",
    "smpte_time": f"files timed in seconds (SMPTE), read at {DEFAULT_TEMPO:g} quarter notes per minute",
    "meter_changes": "changes of the meter that bar lines do not follow",
    "absurd_tempos": f"tempo changes outside {SLOWEST:g}..{FASTEST:g} quarter notes per minute ignored",
}


@dataclass
class PianoRoll:
    """A piece on a grid.

    Args:
        roll: (T, 88) bool, which pitches sound in each frame; T is at most ``MAX_FRAMES``.
        onsets: (T, 88) bool, where a note begins; None: where a pitch sounds that did not before.
        frames_per_quarter: frames in a quarter note.
        tempos: (frame, quarter notes per minute), ascending; the first at frame 0.
        meter: beats in a bar, and what part of a whole note a beat is. upbeat: frames before the first whole bar.
        name: of the piece, for people.
        report: counts of what was changed or dropped on the way, by the names of ``PROBLEMS``.
    """

    roll: np.ndarray
    onsets: Any = None
    frames_per_quarter: int = 4
    tempos: list[tuple[int, float]] = field(default_factory=lambda: [(0, DEFAULT_TEMPO)])
    meter: tuple[int, int] = (4, 4)
    upbeat: int = 0
    name: str = ""
    report: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roll = np.asarray(self.roll)
        if roll.ndim != 2 or roll.shape[1] != NUM_PITCHES:
            raise ValueError(f"roll must have the shape (T, {NUM_PITCHES}), got {roll.shape}")
        if len(roll) > MAX_FRAMES:
            raise MidiError(f"the piece has {len(roll)} frames, more than {MAX_FRAMES}")
        check_grid(self.frames_per_quarter)
        self.roll = roll > 0.5  # (T, 88)
        begins = self.roll & ~np.vstack([np.zeros_like(self.roll[:1]), self.roll[:-1]])  # (T, 88)
        self.onsets = begins if self.onsets is None else self.roll & (self.onsets | begins)  # (T, 88)

    @property
    def problems(self) -> str:
        """The report in words; empty if nothing was changed."""
        return "; ".join(f"{count} {PROBLEMS[name]}" for name, count in self.report.items() if count)

    def notes(self) -> list[tuple[int, int, int]]:
        """(start frame, frames, pitch) of every note, in that order."""
        over = np.vstack([(self.onsets | ~self.roll)[1:], np.ones_like(self.roll[:1])])  # (T, 88): nothing is held on
        ends = self.roll & over  # (T, 88): last frames
        pairs = zip(np.argwhere(self.onsets.T).tolist(), np.argwhere(ends.T).tolist(), strict=True)
        return sorted((start, last + 1 - start, key + LOWEST_PITCH) for (key, start), (_, last) in pairs)

    def voice(self, note: tuple[int, int, int]) -> int:
        """The voice of one of :meth:`notes`: 0 for the highest key that sounds where it begins, and so on downwards."""
        start, _, pitch = note
        return int(self.roll[start, pitch - LOWEST_PITCH + 1 :].sum())

    @property
    def bar(self) -> float:
        """Frames in a bar."""
        return 4 * self.frames_per_quarter * self.meter[0] / self.meter[1]

    def planes(self, onsets: bool = False) -> np.ndarray:
        """What sounds, and in a second plane what begins: (T, 1, 88) or (T, 2, 88) bool."""
        return np.stack([self.roll, self.onsets][: 1 + onsets], 1)

    def part(self, first: int, end: int) -> PianoRoll:
        """The frames [first, end) as a piece."""
        tempos = [(max(0, frame - first), tempo) for frame, tempo in self.tempos if frame < end]
        roll, onsets = self.roll[first:end], self.onsets[first:end]
        return replace(self, roll=roll, onsets=onsets, tempos=tempos, upbeat=max(0, self.upbeat - first), report={})

    def frame_seconds(self) -> np.ndarray:
        """When each frame begins, and when the last one ends, in seconds: (T + 1,).

        Raises:
            MidiError: a tempo is not positive and finite.
        """
        lengths = np.empty(len(self.roll))  # (T,)
        for frame, tempo in self.tempos:
            if not 0 < tempo < float("inf"):
                raise MidiError(f"tempos has {tempo} at frame {frame}: a tempo must be positive and finite")
            lengths[frame:] = 60 / tempo / self.frames_per_quarter
        return np.concatenate([[0.0], np.cumsum(lengths)])


def check_grid(frames_per_quarter: int) -> None:
    """`MidiError` for a grid that is too coarse or too fine."""
    if not 1 <= frames_per_quarter <= MAX_GRID:
        raise MidiError(f"frames_per_quarter={frames_per_quarter} is not valid: it must be between 1 and {MAX_GRID}")


def frames_to_roll(frames: Sequence[Iterable[int]]) -> tuple[np.ndarray, int]:
    """Lists of sounding MIDI pitches to (T, 88) bool, and how many notes were outside the range."""
    if len(frames) > MAX_FRAMES:
        raise MidiError(f"the piece has {len(frames)} frames, more than {MAX_FRAMES}")
    roll, outside = np.zeros((len(frames), NUM_PITCHES), dtype=bool), 0
    for row, pitches in zip(roll, frames, strict=True):
        for pitch in pitches:
            if LOWEST_PITCH <= pitch < LOWEST_PITCH + NUM_PITCHES:
                row[pitch - LOWEST_PITCH] = True
            else:
                outside += 1
    return roll, outside


def roll_to_frames(roll: np.ndarray) -> list[list[int]]:
    """(T, 88) to lists of sounding MIDI pitches, ascending."""
    return [(np.flatnonzero(row) + LOWEST_PITCH).tolist() for row in np.asarray(roll) > 0.5]


def quantise(notes: Iterable[tuple[float, float, int]], frames_per_quarter: int) -> PianoRoll:
    """Notes (start and length in quarter notes, pitch) on the grid: starts and ends go to the nearest line.

    A pitch sounds where any note of it does. Notes of a pitch that start on the same line become one.
    """
    check_grid(frames_per_quarter)
    report: Counter[str] = Counter()
    placed: dict[tuple[int, int], int] = {}
    for start, length, pitch in notes:
        if not LOWEST_PITCH <= pitch < LOWEST_PITCH + NUM_PITCHES:
            report["out_of_range_notes"] += 1
            continue
        if not 0 <= start <= start + length < float("inf"):
            raise MidiError(
                f"a note starts at {start} quarter notes and is {length} long: it must be 0 or more, finite"
            )
        first = int(np.floor(start * frames_per_quarter + 0.5))
        end = int(np.floor((start + length) * frames_per_quarter + 0.5))
        if end <= first:
            report["zero_length_notes" if length <= 0 else "short_notes"] += 1
            end = first + 1
        if (first, pitch) in placed:
            report["overlapping_notes"] += 1
        placed[first, pitch] = max(end, placed.get((first, pitch), 0))
    length = max(placed.values(), default=0)
    if length > MAX_FRAMES:
        raise MidiError(f"the piece has {length} frames, more than {MAX_FRAMES}: a damaged file, or too fine a grid")
    onsets, edges = np.zeros((length, NUM_PITCHES), dtype=bool), np.zeros((length + 1, NUM_PITCHES), dtype=np.int32)
    for (first, pitch), end in placed.items():
        onsets[first, pitch - LOWEST_PITCH] = True
        edges[first, pitch - LOWEST_PITCH] += 1
        edges[end, pitch - LOWEST_PITCH] -= 1
    return PianoRoll(edges[:-1].cumsum(0) > 0, onsets, frames_per_quarter, report=dict(report))


def read_midi(path: str | Path, frames_per_quarter: int = 4) -> PianoRoll:
    """A MIDI file on a grid of its own beats, so that changes of tempo do not shift notes; drums are dropped.

    Notes that a pedal holds sound until it goes up.

    Raises:
        MidiError: the file is missing, damaged, empty, too long, several pieces in one, or holds no note that a piano
            has. What is dropped or changed without making the piece useless is counted in ``report``.
    """
    path = Path(path)
    if not path.is_file():
        raise MidiError(f"{str(path)!r} does not exist or is not a file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MidiError(f"has {path.stat().st_size:,} bytes; a MIDI file may have {MAX_BYTES:,}")
        score = read_score(path.read_bytes())
        ticks = score.ticks_per_quarter
        notes = ((start / ticks, (end - start) / ticks, pitch) for start, end, pitch in score.notes)
        piece = quantise(notes, frames_per_quarter)
    except OSError as error:
        raise MidiError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except MidiError as error:
        raise MidiError(f"{str(path)!r} {error}") from error
    report = {**piece.report, **score.report}
    if not len(piece.roll):
        raise MidiError(
            f"{str(path)!r} holds no note that a piano has ({report['drum_notes']} notes of drums, "
            f"{report['unended_notes']} that never end, {report.get('out_of_range_notes', 0)} outside the pitches "
            f"{LOWEST_PITCH}..{LOWEST_PITCH + NUM_PITCHES - 1})"
        )
    tempos = {0: DEFAULT_TEMPO}
    for tick, tempo in score.tempos:
        frame = int(np.floor(tick / ticks * frames_per_quarter + 0.5))
        if not SLOWEST <= tempo <= FASTEST:
            report["absurd_tempos"] = report.get("absurd_tempos", 0) + 1
        elif frame < len(piece.roll):
            tempos[frame] = tempo
    meters = [(tick / ticks * frames_per_quarter, (beats, part)) for tick, beats, part in score.meters]
    report["meter_changes"] = set_meter(piece, [found for found in meters if found[0] < len(piece.roll)])
    changes = sorted(tempos.items())
    piece.tempos = [changes[0], *(now for before, now in pairwise(changes) if now[1] != before[1])]
    piece.report = {name: count for name, count in report.items() if count}
    return piece


def set_meter(piece: PianoRoll, meters: list[tuple[float, tuple[int, int]]]) -> int:
    """Give a piece the first of its file's meters (frame, meter), and return how many changes follow.

    A first meter that holds for one bar, shorter than that of the next, is an upbeat.
    """
    if not meters:
        return 0
    (_, piece.meter), *others = meters
    if others and others[0][0] == piece.bar:
        short, (first, later), *rest = piece.bar, *others
        if 4 * piece.frames_per_quarter * later[0] / later[1] > short:
            piece.meter, piece.upbeat, others = later, int(first), rest
    return sum(now[1] != before[1] for before, now in pairwise([(0, piece.meter), *others]))


def write_midi(piece: PianoRoll, path: str | Path, velocity: int = 80) -> None:
    """Write a piece as a MIDI file with one piano track; :func:`read_midi` with the same grid gives the piece again.

    Raises:
        MidiError: symusic is not there.
    """
    midi_score(piece, velocity).dump_midi(str(path))


def midi_score(piece: PianoRoll, velocity: int = 80) -> Any:
    """A piece as symusic's score: notes, bars and tempo."""
    try:
        import symusic
    except ImportError as error:
        raise MidiError("writing MIDI files needs symusic: pip install 'kru-hf[music]'") from error
    ticks = min(TICKS_PER_FRAME, 0x7FFF // piece.frames_per_quarter)  # the header has 15 bits for those of a quarter
    score: Any = symusic.Score(ticks * piece.frames_per_quarter)
    track: Any = symusic.Track(name="piano", program=0, is_drum=False)
    for start, length, pitch in piece.notes():
        track.notes.append(symusic.Note(start * ticks, length * ticks, pitch, velocity))
    score.tracks.append(track)
    upbeat = Fraction(piece.upbeat, 4 * piece.frames_per_quarter)  # of a whole note
    if upbeat and upbeat.denominator.bit_count() == 1:  # else no meter has its length
        score.time_signatures.append(symusic.TimeSignature(0, *upbeat.as_integer_ratio()))
    score.time_signatures.append(symusic.TimeSignature(piece.upbeat * ticks, *piece.meter))
    for frame, tempo in piece.tempos:
        score.tempos.append(symusic.Tempo(frame * ticks, tempo))
    return score
