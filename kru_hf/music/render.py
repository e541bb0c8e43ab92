"""What a piano roll looks and sounds like: a picture, a sampled piano, and a synthesizer of a few lines."""

from __future__ import annotations

import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .midi import MidiError
from .rolls import LOWEST_PITCH, PianoRoll, midi_score

SAMPLE_RATE = 22_050
PEAK = 0.8  # of a sound, in 1
SOUND_FONT = "TimGM6mb.sf2"
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
COLORS = ("tab:red", "tab:green", "tab:purple", "tab:blue", "tab:gray")  # of the voices, from the highest down
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
    sound *= PEAK / peak if peak > 0 else 1.0
    return sound


def sampled(piece: PianoRoll, sample_rate: int = SAMPLE_RATE) -> np.ndarray | None:
    """A piano as it was recorded: symusic's synthesizer with the sound font that comes with pretty_midi.

    Samples (L,), float32, peak below 1; None where the two are not there (extra ``music``), or cannot (symusic 0.6.0
    does not return its samples).
    """
    check_length(piece.frame_seconds()[-1], sample_rate)
    found = find_spec("pretty_midi")
    font = Path(str(found.origin)).with_name(SOUND_FONT) if found else None
    if font is None or not font.is_file() or find_spec("symusic") is None:
        return None
    from symusic import Synthesizer

    try:
        channels = Synthesizer(str(font), sample_rate, 0).render(midi_score(piece), stereo=True)
    except TypeError:
        return None
    sound = np.asarray(channels, dtype=np.float32).mean(0)  # (L,)
    end = min(len(sound), sample_rate // 20)  # it stops with the last note: no click there
    sound[len(sound) - end :] *= np.linspace(1, 0, end, dtype=np.float32)
    return sound * (PEAK / max(float(np.abs(sound).max(initial=0.0)), 1e-9))


def write_wav(piece: PianoRoll, path: str | Path, sample_rate: int = SAMPLE_RATE) -> None:
    """Write what :func:`sampled` gives, or else :func:`synthesize`, as a mono 16-bit WAV file."""
    sound = sampled(piece, sample_rate)  # (L,)
    if sound is None:
        sound = synthesize(piece, sample_rate)  # (L,)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def note_name(pitch: int) -> str:
    """C4 for MIDI pitch 60, and so on."""
    return f"{NAMES[pitch % 12]}{pitch // 12 - 1}"


def draw_roll(piece: PianoRoll, path: str | Path, prime_frames: int = 0, title: str = "") -> None:
    """Write a picture of a piece: a colour for each voice, lines and numbers of bars, names of notes.

    Rows of black keys are darker, and so is the ground of the first ``prime_frames`` frames.
    """
    from matplotlib.figure import Figure

    length = max(1, len(piece.roll))
    figure = Figure(figsize=(min(max(6.0, length / 12), 24.0), 4.5), layout="constrained")
    axes = figure.add_subplot()
    sounding = np.flatnonzero(piece.roll.any(0)) + LOWEST_PITCH
    low, high = (int(sounding[0]) - 2, int(sounding[-1]) + 2) if len(sounding) else (48, 72)
    if prime_frames:
        axes.axvspan(0, prime_frames, color="tab:orange", alpha=0.15, label="prime", linewidth=0)
    for pitch in range(low, high + 1):
        if "#" in note_name(pitch):
            axes.axhspan(pitch - 0.5, pitch + 0.5, color="black", alpha=0.06, linewidth=0)
    voices: dict[int, list[tuple[int, int, int]]] = {}
    for note in piece.notes():
        voices.setdefault(min(piece.voice(note), len(COLORS) - 1), []).append(note)
    for voice, notes in sorted(voices.items()):
        starts, lengths, pitches = zip(*notes, strict=True)
        label = f"voice {voice + 1}" + (" (highest)" if not voice else " and lower" if voice == len(COLORS) - 1 else "")
        look: Any = {"color": COLORS[voice], "edgecolor": "white", "linewidth": 0.6}
        axes.barh(pitches, lengths, left=starts, height=0.9, label=label, **look)
    bars = np.arange(piece.upbeat, length + 1e-9, piece.bar)
    for bar in bars:
        axes.axvline(bar, color="black", alpha=0.35, linewidth=0.7, zorder=0)
    every = max(1, len(bars) // 24)
    axes.set_xticks(bars[::every], [str(number + 1) for number in range(len(bars))][::every])
    named = [pitch for pitch in range(low, high + 1) if note_name(pitch)[0] in ("CEG" if high - low < 50 else "C")]
    named = [pitch for pitch in named if "#" not in note_name(pitch)]
    axes.set_yticks(named, [note_name(pitch) for pitch in named], fontsize=8)
    axes.set(xlim=(0, length), ylim=(low - 0.5, high + 0.5), title=title)
    axes.set(xlabel=f"bar ({piece.meter[0]}/{piece.meter[1]})")
    if prime_frames or voices:
        figure.legend(loc="outside upper right", ncols=len(COLORS) + 1, frameon=False, fontsize=8)
    figure.savefig(str(path), dpi=120)
