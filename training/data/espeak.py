"""Speech with known phones from espeak-ng, where it is installed: its library says at which sample a phone begins."""

import ctypes
import ctypes.util
import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from .cache import cached
from .speech import RATE, Segment, Utterance

LIBRARIES = ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak-ng.1.dylib", "libespeak-ng.dylib", "libespeak-ng.dll")
SILENCE = "_"
# Speakers of espeak-ng: variants of its American English voice. Those of a split are heard in no other.
VOICES = {
    "train": ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3"),
    "validation": ("m6", "f4"),
    "test": ("m7", "f5"),
}
UTTERANCES = {"train": 320, "validation": 40, "test": 40}
WORDS = (
    "old young small heavy bright quiet strange wooden broken gentle narrow golden early foolish thirsty patient",
    "captain teacher garden window river mountain kitchen engine painter village thunder puzzle feather jacket orange "
    "chapel bottle sailor magician shepherd",
    "found watched carried followed painted measured opened forgot enjoyed washed pushed borrowed chased visited",
)
ENDINGS = ("today", "slowly", "at noon", "in March", "near the bridge", "beyond the valley", "with joy", "at home")
RETRIEVAL_SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT = 2, 0x0001, 0x8000
UTF8, END_PAUSE = 1, 0x1000
SPEED, PITCH = 1, 3  # parameters: words a minute, 0 … 100
EVENT_END, EVENT_PHONEME = 0, 7


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesizer:
    """espeak-ng's library; there can be one in a process."""

    def __init__(self) -> None:
        self.library = _open()
        self.rate = self.library.espeak_Initialize(RETRIEVAL_SYNCHRONOUS, 0, None, PHONEME_EVENTS | DONT_EXIT)
        if self.rate <= 0:
            raise UserError("espeak-ng's library is installed, but its data are not: install espeak-ng-data")
        self.audio: list[np.ndarray] = []
        self.starts: list[tuple[int, str]] = []
        self.callback = _CALLBACK(self._receive)  # kept: the library holds its address
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.audio.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != EVENT_END:
            if events[index].type == EVENT_PHONEME:
                self.starts.append((events[index].sample, events[index].id.string.decode("utf-8", "replace")))
            index += 1
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """16-bit samples (S,) at the library's rate, and the samples where phones begin."""
        self.audio, self.starts = [], []
        if self.library.espeak_SetVoiceByName(f"en-us+{voice}".encode()) != 0:
            raise UserError(f"espeak-ng has no voice en-us+{voice}: install espeak-ng-data")
        self.library.espeak_SetParameter(SPEED, speed, 0)
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, UTF8 | END_PAUSE, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.audio), self.starts


def _open() -> Any:
    """The library; `UserError` says how to get it."""
    found = ctypes.util.find_library("espeak-ng")
    for name in [*LIBRARIES, *([found] if found else [])]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UserError(
        "the default data of phonemes are spoken by espeak-ng, which is not installed: install it "
        "(apt install espeak-ng, or brew install espeak-ng), or pass --dataset FOLDER with TIMIT's layout"
    )


def library_version(library: Any) -> str:
    """The version that the library names."""
    library.espeak_Info.restype = ctypes.c_char_p
    return library.espeak_Info(None).decode().split()[0]


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """16-bit samples (S,) at `rate` as ones at 16 kHz, band-limited: by their spectrum."""
    if rate == RATE:
        return samples
    size = round(len(samples) * RATE / rate)
    spectrum = np.fft.rfft(samples.astype(np.float64))[: size // 2 + 1]
    return np.clip(np.rint(np.fft.irfft(spectrum, size) * (size / len(samples))), -32768, 32767).astype(np.int16)


def sentences(random: np.random.Generator, number: int) -> list[str]:
    """Different sentences of one pattern."""
    adjectives, nouns, verbs = (words.split() for words in WORDS)
    made: dict[str, None] = {}
    while len(made) < number:
        a, b = random.choice(adjectives, 2, replace=False)
        c, d = random.choice(nouns, 2, replace=False)
        made[f"The {a} {c} {random.choice(verbs)} a {b} {d} {random.choice(ENDINGS)}."] = None
    return list(made)


def load_espeak(seed: int = 0) -> tuple[dict[str, list[Utterance]], str]:
    """Spoken sentences by split, none in two of them, and espeak-ng's version: made once, then read from the cache."""
    version = library_version(_open())
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # sentences, voices, and how they are spoken

    def make() -> dict[str, list[Any]]:
        print(f"data: espeak-ng {version} speaks {sum(UTTERANCES.values())} sentences, once", flush=True)
        # What espeak-ng says depends on what it has said before: a process of its own makes the same speech anywhere.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(speak_all, seed).result()

    return unpack(cached(f"espeak-ng-{version}-{seed}-{code}", make)), version


def speak_all(seed: int) -> dict[str, list[Any]]:
    """All sentences as columns: split, name, samples, and the segments (start, end, phone)."""
    speaker = Synthesizer()
    random = np.random.default_rng(seed)
    texts = iter(sentences(random, sum(UTTERANCES.values())))
    rows = []
    for split, number in UTTERANCES.items():
        for index in range(number):
            voice = VOICES[split][index % len(VOICES[split])]
            text, speed, pitch = next(texts), int(random.integers(140, 200)), int(random.integers(30, 70))
            rows.append({"split": split, **asdict(spoken(speaker, f"{voice}/{index}", text, voice, speed, pitch))})
    return {name: [row[name] for row in rows] for name in rows[0]}


def unpack(columns: dict[str, list[Any]]) -> dict[str, list[Utterance]]:
    """The utterances by split from the columns of :func:`speak_all`."""
    found: dict[str, list[Utterance]] = {split: [] for split in UTTERANCES}
    for split, name, samples, segments in zip(*columns.values(), strict=True):
        found[split].append(Utterance(name, np.asarray(samples, np.int16), [Segment(**values) for values in segments]))
    return found


def spoken(speaker: Synthesizer, name: str, text: str, voice: str, speed: int, pitch: int) -> Utterance:
    """One utterance at 16 kHz; what has no phone is silence."""
    audio, starts = speaker.say(text, voice, speed, pitch)
    samples = resample(audio, speaker.rate)
    marks = [(round(start * RATE / speaker.rate), phone or SILENCE) for start, phone in starts]
    marks = [(0, SILENCE), *marks, (len(samples), SILENCE)]
    pairs = zip(marks, marks[1:])  # noqa: B905 (one shorter)
    return Utterance(name, samples, [Segment(a, b, phone) for (a, phone), (b, _) in pairs if b > a])
