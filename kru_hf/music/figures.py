"""Pieces in figures: how dense and wide they are, what drones, which voices cross, which chords are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from .rolls import LOWEST_PITCH, PianoRoll

DRONE = 8  # quarter notes without a pause, from which on a key is a drone
# The figures of a piece, and what they are in words.
FIGURES = {
    "density": "keys per frame",
    "lowest": "lowest pitch",
    "highest": "highest pitch",
    "crossings": "share of steps in which voices cross",
    "drones": f"share of frames with a key held for {DRONE} quarter notes",
    "known_chords": "share of chords that occur in the training pieces, in any key",
}


def chords(roll: np.ndarray) -> list[bytes]:
    """The chords of the frames of a roll (T, 88) in which a key sounds, as intervals above the lowest key."""
    rows = [row[row.argmax() :] for row in roll if row.any()]
    return [np.flatnonzero(row).astype(np.uint8).tobytes() for row in rows]


def known_chords(pieces: Iterable[PianoRoll]) -> Counter[bytes]:
    """In how many pieces each chord occurs."""
    return Counter(chord for piece in pieces for chord in set(chords(piece.roll)))


def crossings(roll: np.ndarray) -> float:
    """Of the steps between frames of as many keys (two or more), the share in which two voices go past each other.

    Voices are the keys from low to high; one goes past another where it is above the place that its upper neighbour
    has just left, or below that of its lower one.
    """
    frames = [np.flatnonzero(row) for row in roll]
    pairs = [(a, b) for a, b in zip(frames, frames[1:], strict=False) if len(a) == len(b) > 1]
    return sum(bool((b[:-1] > a[1:]).any() or (b[1:] < a[:-1]).any()) for a, b in pairs) / max(len(pairs), 1)


def drones(piece: PianoRoll) -> float:
    """The share of frames in which a key sounds that does so for ``DRONE`` quarter notes, struck again or not."""
    found = np.zeros(len(piece.roll), dtype=bool)
    for start, length, _ in PianoRoll(piece.roll).notes():
        if length >= DRONE * piece.frames_per_quarter:
            found[start : start + length] = True
    return float(found.mean())


def piece_figures(piece: PianoRoll, known: Counter[bytes], own: bool = False) -> dict[str, float]:
    """``FIGURES`` of a piece; NaN for pitches and chords of a silent one.

    Args:
        known: of the training pieces, by :func:`known_chords`. own: the piece is one of them, and does not count.
    """
    sounding = np.flatnonzero(piece.roll.any(0)) + LOWEST_PITCH
    low, high = (float(sounding[0]), float(sounding[-1])) if len(sounding) else (float("nan"), float("nan"))
    found = [known[chord] > own for chord in chords(piece.roll)]
    return {
        "density": float(piece.roll.sum(1).mean()),
        "lowest": low,
        "highest": high,
        "crossings": crossings(piece.roll),
        "drones": drones(piece),
        "known_chords": float(np.mean(found)) if found else float("nan"),
    }


def bands(pieces: Iterable[PianoRoll]) -> tuple[Counter[bytes], dict[str, tuple[float, float]]]:
    """The chords of the training pieces, and of each of ``FIGURES`` the 5 % and 95 % quantile over these pieces."""
    pieces = [piece for piece in pieces if piece.roll.any()]
    known = known_chords(pieces)
    figures = [piece_figures(piece, known, own=True) for piece in pieces]
    quantiles = {name: np.quantile([figure[name] for figure in figures], [0.05, 0.95]) for name in FIGURES}
    return known, {name: (round(float(low), 4), round(float(high), 4)) for name, (low, high) in quantiles.items()}


def compare(piece: PianoRoll, known: Counter[bytes], within: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Each figure of a piece beside the training pieces' band, and whether it is ``within`` all of them."""
    result: dict[str, Any] = {}
    for name, value in piece_figures(piece, known).items():
        low, high = within[name]
        result |= {name: None if np.isnan(value) else round(value, 4), f"{name}_band": [low, high]}
        result[f"{name}_within"] = bool(low <= round(value, 4) <= high)
    return {**result, "within": all(result[f"{name}_within"] for name in FIGURES)}


def sentence(result: dict[str, Any]) -> str:
    """What :func:`compare` found, for people."""
    parts = []
    for name, words in FIGURES.items():
        low, high = result[f"{name}_band"]
        value = "none" if result[name] is None else f"{result[name]:g}"
        mark = "" if result[f"{name}_within"] else ", outside"
        parts.append(f"{words} {value} ({low:g} to {high:g}{mark})")
    kept = "keeps" if result["within"] else "leaves"
    return f"The piece {kept} the 5-95 % band of the training pieces: {'; '.join(parts)}."
