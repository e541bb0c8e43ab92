"""A piece that a model continues, and its files: MIDI, picture, sound and score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .midi import MidiError
from .render import check_length, draw_roll, write_wav
from .rolls import NUM_PITCHES, PianoRoll, write_midi
from .score import write_score

ENDINGS = (".mid", ".png", ".wav", ".mxl")  # of the files of a piece
OPENING = 4  # whole bars of a held-out piece that a model continues


def opening(piece: PianoRoll) -> int:
    """Frames of the upbeat and the first ``OPENING`` bars of a piece, at most half of it."""
    return max(1, min(piece.upbeat + int(OPENING * piece.bar), len(piece.roll) // 2))


def continue_piece(model: Any, prime: PianoRoll, num_frames: int, progress: Any = iter, **sampling: Any) -> PianoRoll:
    """The prime and ``num_frames`` frames after it by the model: one piece in the prime's tempo and meter.

    Without an onset plane in the model's frames a note of the prime ends where the model takes over.

    Args:
        model: a KRUForPianoRoll of 88 keys. prime: without frames the model begins by itself.
        progress: wraps the stream of frames. sampling: of ``stream_piano_roll``.

    Raises:
        MidiError: the piece would be too long, which is known before it is composed.
    """
    silence = np.zeros((num_frames, NUM_PITCHES), dtype=bool)
    whole = replace(prime, roll=np.concatenate([prime.roll, silence]), onsets=None, report={})
    check_length(whole.frame_seconds()[-1])
    with_onsets = bool(getattr(model.config, "frame_onsets", False))
    given = torch.from_numpy(prime.planes(with_onsets)).flatten(1).float()  # (T, 88 or 176)
    start = given if len(given) else None
    stream: Iterable[torch.Tensor] = progress(model.stream_piano_roll(start, num_frames, **sampling))
    frames = np.stack([frame[0].numpy() > 0.5 for frame in stream])  # (num_frames, 88 or 176)
    return joined(prime, frames)


def joined(prime: PianoRoll, frames: np.ndarray) -> PianoRoll:
    """A piece and the frames (T, 88), or with their onsets (T, 176), that follow it."""
    roll, onsets = frames[:, :NUM_PITCHES], frames[:, NUM_PITCHES:]
    if not onsets.shape[1]:
        onsets = PianoRoll(roll).onsets
    roll, onsets = np.concatenate([prime.roll, roll]), np.concatenate([prime.onsets, onsets])
    return replace(prime, roll=roll, onsets=onsets, report={})


def write_piece(piece: PianoRoll, path: Path, prime_frames: int = 0) -> tuple[list[str], list[str]]:
    """Write a piece's MIDI file, and beside it picture, sound and score.

    Args:
        path: of the MIDI file. prime_frames: how many of the first frames were given.

    Returns:
        the names of the files; why others are not there, a sentence each.
    """
    midi, picture, sound, score = (path.with_suffix(ending) for ending in ENDINGS)
    midi = path
    written, missing = [], []
    for file, write in (
        (midi, lambda: write_midi(piece, midi)),
        (picture, lambda: draw_roll(piece, picture, prime_frames, piece.name or path.stem)),
        (sound, lambda: write_wav(piece, sound)),
        (score, lambda: write_score(piece, score)),
    ):
        try:
            write()
            written.append(file.name)
        except MidiError as error:
            missing.append(str(error))
    return written, missing
