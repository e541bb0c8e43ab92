"""Pieces as scores: MusicXML for notation programs, by music21 (extra ``music``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .midi import MidiError
from .rolls import LOWEST_PITCH, PianoRoll

MIDDLE_C = 60  # where the staves meet


def write_score(piece: PianoRoll, path: str | Path, title: str = "") -> None:
    """Write a piece as compressed MusicXML for piano: keys from middle C on in the upper staff, others in the lower.

    Raises:
        MidiError: music21 is not there.
    """
    try:
        from music21 import clef, layout, metadata, meter, stream, tempo
    except ImportError as error:
        raise MidiError("writing MusicXML needs music21: pip install 'kru-hf[music]'") from error
    score: Any = stream.Score()
    score.metadata = metadata.Metadata(title=title or piece.name or "piano")
    staves: list[Any] = []
    middle = MIDDLE_C - LOWEST_PITCH
    for symbol, keys in ((clef.TrebleClef(), slice(middle, None)), (clef.BassClef(), slice(middle))):
        staff: Any = stream.PartStaff()
        staff.insert(0, symbol)
        staff.insert(0, meter.TimeSignature("/".join(map(str, piece.meter))))
        if not staves:
            staff.insert(0, tempo.MetronomeMark(number=round(piece.tempos[0][1])))
        fill(staff, piece, keys)
        staves.append(staff)
        score.insert(0, staff)
    score.insert(0, layout.StaffGroup(staves, symbol="brace", name="Piano"))
    score.write("mxl", fp=str(path))


def fill(staff: Any, piece: PianoRoll, keys: slice) -> None:
    """The chords and rests of some keys: a chord ends where any of its notes does, and a note that sounds on is tied.

    An upbeat follows rests that fill its bar.
    """
    from music21 import chord, note, tie

    roll, onsets = piece.roll[:, keys], piece.onsets[:, keys]  # (T, keys)
    first = LOWEST_PITCH + (keys.start or 0)
    before = np.vstack([np.zeros_like(roll[:1]), roll[:-1]])  # (T, keys)
    changes = np.flatnonzero((onsets | (roll != before)).any(1)).tolist()
    edges = sorted({0, *changes, len(roll)})
    grid = piece.frames_per_quarter
    if piece.upbeat:
        staff.append(note.Rest(quarterLength=(piece.bar - piece.upbeat) / grid))
    for start, end in zip(edges, edges[1:], strict=False):
        length = (end - start) / grid
        sounding = np.flatnonzero(roll[start])
        if not len(sounding):
            staff.append(note.Rest(quarterLength=length))
            continue
        notes = []
        for key in sounding.tolist():
            sound = note.Note(first + key, quarterLength=length)
            held, goes_on = not onsets[start, key], end < len(roll) and roll[end, key] and not onsets[end, key]
            if held or goes_on:
                sound.tie = tie.Tie("continue" if held and goes_on else "start" if goes_on else "stop")
            notes.append(sound)
        staff.append(notes[0] if len(notes) == 1 else chord.Chord(notes, quarterLength=length))
