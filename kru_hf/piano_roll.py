"""MIDI files and scores as piano rolls and back, pictures of rolls, and their sound.

A roll is a grid: row t is a frame, ``frames_per_quarter`` of them in a quarter note, column k is the pitch 21 + k.
symusic is needed for MIDI files only (extra ``music``), matplotlib for pictures only; the synthesizer is a few lines.
"""

from __future__ import annotations

import wave
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOWEST_PITCH, NUM_PITCHES = 21, 88  # the keys of a piano
SLOWEST, FASTEST = 10.0, 1000.0  # quarter notes a minute that are taken seriously
DEFAULT_TEMPO = 120.0
MAX_FRAMES = 100_000  # a roll beyond that is a damaged file: at 4 frames a quarter and 120 quarters a minute, 3.5 hours
TICKS_PER_QUARTER = 480
SAMPLE_RATE = 22_050
# What each count of a report means, for people.
PROBLEMS = {
    "drum_notes": "notes of drum tracks dropped",
    "out_of_range_notes": f"notes outside the pitches {LOWEST_PITCH}..{LOWEST_PITCH + NUM_PITCHES - 1} dropped",
    "zero_length_notes": "notes without length given one frame",
    "unended_notes": "notes that never end dropped",
    "short_notes": "notes shorter than the grid given one frame",
    "overlapping_notes": "notes that start where the same pitch starts on the grid, merged",
    "cut_notes": "notes that sounded when the same pitch started again, ended there",
    "absurd_tempos": f"tempo changes outside {SLOWEST:g}..{FASTEST:g} quarter notes a minute ignored",
}


class MidiError(ValueError):
    """A file that is no usable piece; the message names the file and what is wrong with it."""


@dataclass
class PianoRoll:
    """A piece on a grid.

    Args:
        roll: (T, 88) bool, which pitches sound in each frame.
        onsets: (T, 88) bool, where a note begins; None: where a pitch sounds that did not before.
        frames_per_quarter: frames in a quarter note.
        tempos: (frame, quarter notes a minute), ascending; the first at frame 0.
        report: counts of what was changed or dropped on the way, by the names of ``PROBLEMS``.
    """

    roll: np.ndarray
    onsets: np.ndarray | None = None
    frames_per_quarter: int = 4
    tempos: list[tuple[int, float]] = field(default_factory=lambda: [(0, DEFAULT_TEMPO)])
    report: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roll = np.asarray(self.roll)
        if roll.ndim != 2 or roll.shape[1] != NUM_PITCHES:
            raise ValueError(f"roll must have the shape (T, {NUM_PITCHES}), got {roll.shape}")
        if self.frames_per_quarter < 1:
            raise ValueError(f"frames_per_quarter must be at least 1, got {self.frames_per_quarter}")
        self.roll = roll > 0.5  # (T, 88)
        if self.onsets is None:
            self.onsets = self.roll & ~np.vstack([np.zeros_like(self.roll[:1]), self.roll[:-1]])  # (T, 88)

    @property
    def problems(self) -> str:
        """The report in words; empty if nothing was changed."""
        return "; ".join(f"{count} {PROBLEMS[name]}" for name, count in self.report.items() if count)

    def notes(self) -> list[tuple[int, int, int]]:
        """(start frame, frames, pitch) of every note, in that order."""
        assert self.onsets is not None
        found = []
        for key in range(NUM_PITCHES):
            sounding, begins = self.roll[:, key], self.onsets[:, key]  # (T,)
            start = None
            for frame in range(len(sounding) + 1):
                on = frame < len(sounding) and sounding[frame]
                if start is not None and (not on or begins[frame]):
                    found.append((start, frame - start, key + LOWEST_PITCH))
                    start = None
                if on and start is None:
                    start = frame
        return sorted(found)

    def frame_seconds(self) -> np.ndarray:
        """When each frame begins, and when the last one ends, in seconds: (T + 1,)."""
        lengths = np.empty(len(self.roll))  # (T,)
        for frame, tempo in self.tempos:
            lengths[frame:] = 60 / tempo / self.frames_per_quarter
        return np.concatenate([[0.0], np.cumsum(lengths)])


def frames_to_roll(frames: Sequence[Iterable[int]]) -> tuple[np.ndarray, int]:
    """Lists of sounding MIDI pitches to (T, 88) bool, and how many notes were outside the range."""
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

    Two notes of a pitch that start on the same line become one, as long as the longer; a note ends where its pitch
    starts again.
    """
    report: Counter[str] = Counter()
    placed: dict[tuple[int, int], int] = {}
    for start, length, pitch in notes:
        if not LOWEST_PITCH <= pitch < LOWEST_PITCH + NUM_PITCHES:
            report["out_of_range_notes"] += 1
            continue
        first = int(np.floor(start * frames_per_quarter + 0.5))
        end = int(np.floor((start + length) * frames_per_quarter + 0.5))
        if end <= first:
            report["zero_length_notes" if length <= 0 else "short_notes"] += 1
            end = first + 1
        if (first, pitch) in placed:
            report["overlapping_notes"] += 1
        placed[first, pitch] = max(end, placed.get((first, pitch), 0))
    following: dict[int, int] = {}  # pitch to the start after the one that is looked at
    for first, pitch in sorted(placed, reverse=True):
        if placed[first, pitch] > following.get(pitch, placed[first, pitch]):
            report["cut_notes"] += 1
            placed[first, pitch] = following[pitch]
        following[pitch] = first
    length = max(placed.values(), default=0)
    if length > MAX_FRAMES:
        raise MidiError(f"the piece has {length} frames, more than {MAX_FRAMES}: a damaged file, or too fine a grid")
    roll, onsets = np.zeros((length, NUM_PITCHES), dtype=bool), np.zeros((length, NUM_PITCHES), dtype=bool)
    for (first, pitch), end in placed.items():
        roll[first:end, pitch - LOWEST_PITCH] = True
        onsets[first, pitch - LOWEST_PITCH] = True
    return PianoRoll(roll, onsets, frames_per_quarter, report=dict(report))


def _symusic() -> Any:
    try:
        import symusic
    except ImportError as error:
        raise MidiError("MIDI files need symusic: pip install 'kru-hf[music]'") from error
    return symusic


def count_begun(data: bytes) -> int:
    """How many notes begin in the bytes of a MIDI file that symusic has read; it gives those alone that end, too."""
    count, place = 0, 8 + int.from_bytes(data[4:8], "big")  # behind the header
    while place + 8 <= len(data):
        kind, end = data[place : place + 4], place + 8 + int.from_bytes(data[place + 4 : place + 8], "big")
        place, status = place + 8 if kind == b"MTrk" else end, 0
        while place < min(end, len(data) - 2):
            place = after_number(data, place)[0]  # time since the last event
            if data[place] >= 0x80:
                status, place = data[place], place + 1
            if status >= 0xF0:  # text, tempo and the like: a kind, and their length
                place, length = after_number(data, place + (status == 0xFF))
                place += length
            else:
                count += status >> 4 == 0x9 and data[place + 1] > 0  # velocity 0 ends a note
                place += 1 if status >> 4 in (0xC, 0xD) else 2
        place = end
    return count


def after_number(data: bytes, place: int) -> tuple[int, int]:
    """Place behind a number of 7 bits a byte, and the number."""
    number = 0
    while True:
        number, place = number << 7 | data[place] & 0x7F, place + 1
        if not data[place - 1] & 0x80:
            return place, number


def read_midi(path: str | Path, frames_per_quarter: int = 4) -> PianoRoll:
    """A MIDI file on a grid of its own beats, so that changes of tempo do not shift notes; drums are dropped.

    Raises:
        MidiError: the file is missing, damaged, empty, or holds no note that a piano has. What is dropped or changed
            without making the piece useless is counted in ``report``.
    """
    path = Path(path)
    if not path.is_file():
        raise MidiError(f"{str(path)!r} does not exist or is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MidiError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if not data.startswith(b"MThd"):
        what = "is empty" if not data else "is not a MIDI file: it does not begin with MThd"
        raise MidiError(f"{str(path)!r} {what}")
    symusic = _symusic()
    try:
        score = symusic.Score.from_midi(data)
        ticks = score.ticks_per_quarter
    except (RuntimeError, ValueError, TypeError) as error:
        raise MidiError(f"{str(path)!r} is damaged: {error}") from error
    if ticks <= 0:
        raise MidiError(f"{str(path)!r} is damaged: it has {ticks} ticks in a quarter note")
    pitched = [track for track in score.tracks if not track.is_drum]
    notes = [(n.time / ticks, n.duration / ticks, n.pitch) for track in pitched for n in track.notes]
    drums = sum(len(track.notes) for track in score.tracks if track.is_drum)
    try:
        unended = max(0, count_begun(data) - len(notes) - drums)
    except IndexError:  # bytes that symusic reads in its own way
        unended = 0
    try:
        piece = quantise(notes, frames_per_quarter)
    except MidiError as error:
        raise MidiError(f"{str(path)!r}: {error}") from error
    piece.report["drum_notes"] = drums
    if unended:
        piece.report["unended_notes"] = unended
    if not len(piece.roll):
        outside = piece.report.get("out_of_range_notes", 0)
        raise MidiError(
            f"{str(path)!r} holds no note that a piano has ({drums} notes of drums, {unended} that never end, "
            f"{outside} outside the pitches {LOWEST_PITCH}..{LOWEST_PITCH + NUM_PITCHES - 1})"
        )
    piece.tempos = read_tempos(score, frames_per_quarter, len(piece.roll), piece.report)
    return piece


def read_tempos(score: Any, frames_per_quarter: int, length: int, report: dict[str, int]) -> list[tuple[int, float]]:
    """The tempo changes of a symusic score on the grid; those that no one plays are counted and left out."""
    tempos = {0: DEFAULT_TEMPO}
    for change in sorted(score.tempos, key=lambda tempo: tempo.time):
        frame = int(np.floor(change.time / score.ticks_per_quarter * frames_per_quarter + 0.5))
        if not SLOWEST <= change.qpm <= FASTEST:
            report["absurd_tempos"] = report.get("absurd_tempos", 0) + 1
        elif frame < length:
            tempos[frame] = float(change.qpm)
    return sorted(tempos.items())


def write_midi(piece: PianoRoll, path: str | Path, velocity: int = 80) -> None:
    """Write a piece as a MIDI file with one piano track; :func:`read_midi` with the same grid gives the piece again."""
    symusic = _symusic()
    ticks = TICKS_PER_QUARTER * piece.frames_per_quarter  # so that every frame is a whole number of ticks
    if ticks > 0x7FFF:
        raise MidiError(f"frames_per_quarter must be at most {0x7FFF // TICKS_PER_QUARTER} in a MIDI file")
    score = symusic.Score(ticks)
    track = symusic.Track(name="piano", program=0, is_drum=False)
    for start, length, pitch in piece.notes():
        track.notes.append(symusic.Note(start * TICKS_PER_QUARTER, length * TICKS_PER_QUARTER, pitch, velocity))
    score.tracks.append(track)
    for frame, tempo in piece.tempos:
        score.tempos.append(symusic.Tempo(frame * TICKS_PER_QUARTER, tempo))
    score.dump_midi(str(path))


def synthesize(piece: PianoRoll, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A simple struck string for every note: decaying harmonics. Samples (L,), float32, peak below 1."""
    seconds = piece.frame_seconds()  # (T + 1,)
    tail = 0.3
    sound = np.zeros(int((seconds[-1] + tail) * sample_rate) + 1, dtype=np.float32)
    for start, length, pitch in piece.notes():
        first = int(seconds[start] * sample_rate)
        held = seconds[start + length] - seconds[start]
        time = np.arange(min(int((held + tail) * sample_rate), len(sound) - first)) / sample_rate
        frequency = 440.0 * 2 ** ((pitch - 69) / 12)
        tone = np.zeros_like(time)
        for harmonic in range(1, 7):
            if harmonic * frequency < sample_rate / 2:
                decay = np.exp(-time * (0.8 + 0.6 * harmonic))
                tone += np.sin(2 * np.pi * harmonic * frequency * time) * decay * harmonic**-1.3
        attack = np.minimum(time / 0.005, 1.0)
        release = np.clip(1 - (time - held) / tail, 0.0, 1.0) ** 2
        sound[first : first + len(time)] += (tone * attack * release).astype(np.float32)
    peak = float(np.abs(sound).max())
    return sound * (0.8 / peak) if peak > 0 else sound


def write_wav(piece: PianoRoll, path: str | Path, sample_rate: int = SAMPLE_RATE) -> None:
    """Write what :func:`synthesize` gives as a mono WAV file of 16 bits."""
    samples = (synthesize(piece, sample_rate) * 32767).astype("<i2")  # (L,)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())


def draw_roll(piece: PianoRoll, path: str | Path, prime_frames: int = 0, title: str = "") -> None:
    """Write a picture of a piece; its first ``prime_frames`` frames have another colour and a line at their end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(6.0, len(piece.roll) / 16), 24.0), 4), layout="constrained")
    axes = figure.add_subplot()
    for label, color, wanted in (("prime", "tab:gray", True), ("continuation", "tab:blue", False)):
        bars = [note for note in piece.notes() if (note[0] < prime_frames) == wanted]
        if bars:
            starts, lengths, pitches = zip(*bars, strict=True)
            axes.barh(pitches, lengths, left=starts, height=0.8, color=color, label=label)
    if prime_frames:
        axes.axvline(prime_frames, color="tab:red", linewidth=1)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)  # over the axes it would hide notes
    sounding = np.flatnonzero(piece.roll.any(0)) + LOWEST_PITCH
    low, high = (sounding[0], sounding[-1]) if len(sounding) else (48, 72)
    axes.set(xlim=(0, max(1, len(piece.roll))), ylim=(low - 2, high + 2), title=title)
    axes.set(xlabel=f"frame ({piece.frames_per_quarter} a quarter note)", ylabel="MIDI pitch")
    axes.grid(alpha=0.3)
    figure.savefig(str(path), dpi=120)
