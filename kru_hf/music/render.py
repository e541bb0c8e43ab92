"""What a piano roll looks and sounds like: a picture by matplotlib, and a synthesizer of a few lines."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from .midi import MidiError
from .rolls import LOWEST_PITCH, PianoRoll

SAMPLE_RATE = 22_050
MAX_SECONDS = 3600  # of sound: 160 MB
RINGING = 10.0  # seconds after which a string is silent in 16 bits


def check_length(seconds: float, sample_rate: int = SAMPLE_RATE) -> None:
    """`MidiError` for a sound that is too long to be made, or a sample rate below 1."""
    if sample_rate < 1:
        raise MidiError(f"sample_rate={sample_rate} is not valid: it must be at least 1")
    if not seconds * sample_rate <= MAX_SECONDS * SAMPLE_RATE:
        limit = MAX_SECONDS * SAMPLE_RATE / sample_rate
        raise MidiError(f"a sound of {seconds:,.0f} seconds is too long: it may have {limit:,.0f}")


def synthesize(piece: PianoRoll, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A simple struck string for every note: decaying harmonics. Samples (L,), float32, peak below 1.

    Raises:
        MidiError: it would have more samples than ``MAX_SECONDS`` at the usual rate.
    """
    seconds = piece.frame_seconds()  # (T + 1,)
    check_length(seconds[-1], sample_rate)
    tail = 0.3
    sound = np.zeros(int((seconds[-1] + tail) * sample_rate) + 1, dtype=np.float32)
    for start, length, pitch in piece.notes():
        first = int(seconds[start] * sample_rate)
        held = min(seconds[start + length] - seconds[start], RINGING)
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
    peak = max(float(sound.max()), -float(sound.min()))
    sound *= 0.8 / peak if peak > 0 else 1.0
    return sound


def write_wav(piece: PianoRoll, path: str | Path, sample_rate: int = SAMPLE_RATE) -> None:
    """Write what :func:`synthesize` gives as a mono 16-bit WAV file."""
    sound = synthesize(piece, sample_rate)  # (L,)
    sound *= 32767
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(sound.astype("<i2").tobytes())


def draw_roll(piece: PianoRoll, path: str | Path, prime_frames: int = 0, title: str = "") -> None:
    """Write a picture of a piece; its first ``prime_frames`` frames have another colour, and a line marks their end."""
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
    axes.set(xlabel=f"frame ({piece.frames_per_quarter} per quarter note)", ylabel="MIDI pitch")
    axes.grid(alpha=0.3)
    figure.savefig(str(path), dpi=120)
