"""Speech as frames of features with phone labels: SPHERE and WAV files, `.phn` files, TIMIT's folders and phone sets.

Features of a frame, as in Graves & Schmidhuber 2005 and Jose et al. 2018: 12 MFCC from 26 mel filters and the log
energy, and the first derivatives of these 13; windows of 25 ms (Hamming, pre-emphasis 0.97) every 10 ms, 16 kHz.
The filter bank is `transformers.audio_utils`, which the model library brings: no audio package for a 12x26 product.
"""

import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram

from ..common.errors import UserError
from .splits import IGNORED, SPLITS, Parts, assign, describe, spelling

RATE = 16_000  # Hz
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms, 10 ms
FILTERS, COEFFICIENTS = 26, 12
FEATURES = 2 * (COEFFICIENTS + 1)
PRE_EMPHASIS = 0.97
FLOOR = 1.0  # of filter and frame energies of 16-bit samples, before the logarithm
DELTA_SPAN = 2  # frames on either side that a first derivative is fitted to
SPHERE = b"NIST_1A\n"

# TIMIT's 61 phones, and the folding to 39 of Lee & Hon 1989: closures and pauses are silence, the glottal stop q is
# left out (its frames are not scored).
PHONES = (
    "aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy jh k kcl l "
    "m n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh"
)
PHONES_61 = PHONES.split()
FOLDS = {
    "aa": "ao", "ah": "ax ax-h", "er": "axr", "hh": "hv", "ih": "ix", "l": "el", "m": "em", "n": "en nx", "ng": "eng",
    "sh": "zh", "uw": "ux", "sil": "bcl dcl gcl pcl tcl kcl h# pau epi",
}  # fmt: skip
FOLDING = {phone: name for name, phones in FOLDS.items() for phone in phones.split()}
PHONES_39 = sorted({FOLDING.get(phone, phone) for phone in PHONES_61} - {"q"})
# Two men and a woman of each of the eight dialect regions: the 24 speakers of TIMIT's core test set.
CORE_TEST = (
    "mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 "
    "mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0"
)
CORE_SPEAKERS = frozenset(CORE_TEST.split())
VALIDATION_SPEAKERS = 23  # of the 462 training speakers: 184 of the 3,696 utterances, the number of Graves' work


@dataclass(frozen=True)
class Segment:
    """A phone from sample `start` up to sample `end`."""

    start: int
    end: int
    phone: str


@dataclass
class Utterance:
    """16-bit samples (S,) at 16 kHz and the phones in them."""

    name: str
    samples: np.ndarray
    segments: list[Segment]


# ---- files ----------------------------------------------------------------------------------------------------------


def read_audio(path: Path) -> np.ndarray:
    """16-bit samples (S,) of a one-channel PCM file at 16 kHz, SPHERE or WAV, whatever its ending says.

    Raises:
        UserError: not such a file, another rate, several channels, compressed, or cut short.
    """
    content = path.read_bytes()
    if content.startswith(SPHERE):
        return read_sphere(content, path.name)
    try:
        with wave.open(str(path)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            count, content = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UserError(f"dataset: {path.name} is neither a SPHERE nor a PCM WAV file ({error})") from error
    if form != (1, 2, RATE):
        raise UserError(f"dataset: {path.name} must have 1 channel of 2 bytes at {RATE} Hz, got {form}")
    if len(content) != 2 * count:
        raise UserError(f"dataset: {path.name} is cut short: it has {len(content) // 2} of {count} samples")
    return np.frombuffer(content, dtype="<i2")


def read_sphere(content: bytes, name: str) -> np.ndarray:
    """Samples (S,) of the bytes of a NIST SPHERE file: a header of `name -type value` lines, then the samples."""
    head, end, _ = content.partition(b"end_head")
    size = int(content[8:16]) if content[8:16].strip().isdigit() else 0
    if not end or size < len(head):
        raise UserError(f"dataset: {name} has a damaged SPHERE header")
    fields = dict(re.findall(r"(?m)^(\S+) +-\S+ +(.*)$", head.decode("latin-1")))
    coding = fields.get("sample_coding", "pcm")
    if coding != "pcm":
        raise UserError(f"dataset: {name} has sample_coding {coding!r}; unpack it first, for example with sph2pipe -p")
    for key, value in {"channel_count": "1", "sample_n_bytes": "2", "sample_rate": str(RATE)}.items():
        if fields.get(key, value) != value:
            raise UserError(f"dataset: {name} must have {key} {value}, got {fields[key]}")
    order = {"01": "<i2", "10": ">i2"}.get(fields.get("sample_byte_format", "01"))
    text = fields.get("sample_count", str((len(content) - size) // 2))
    count = int(text) if text.isdigit() else -1
    if order is None or count < 0 or len(content) < size + 2 * count:
        raise UserError(f"dataset: {name} is cut short or has an unknown sample_byte_format or sample_count")
    return np.frombuffer(content, dtype=order, count=count, offset=size).astype(np.int16)


def read_phn(path: Path) -> list[Segment]:
    """The segments of a `.phn` file: lines of first sample, sample after the last, phone."""
    segments = []
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or not (words[0].isdigit() and words[1].isdigit()) or int(words[0]) > int(words[1]):
            raise UserError(f"dataset: {path.name}, line {number}: must be START END PHONE, got {line!r}")
        segments.append(Segment(int(words[0]), int(words[1]), words[2]))
    return segments


# ---- features and labels --------------------------------------------------------------------------------------------


def num_frames(samples: int) -> int:
    """Whole windows in that many samples."""
    return max(0, 1 + (samples - WINDOW) // HOP)


@cache
def filter_bank() -> np.ndarray:
    """The 26 triangular mel filters (257, 26) from 0 Hz to half the rate."""
    return mel_filter_bank(FFT // 2 + 1, FILTERS, 0.0, RATE / 2, RATE, norm=None, mel_scale="htk")


@cache
def cosines() -> np.ndarray:
    """Rows 1 … 12 of the type-II cosine transform (12, 26), scaled by √(2/26) as HTK does."""
    orders, bands = np.arange(1, COEFFICIENTS + 1)[:, None], np.arange(FILTERS)[None] + 0.5
    return np.sqrt(2 / FILTERS) * np.cos(np.pi / FILTERS * orders * bands)


def features(samples: np.ndarray) -> np.ndarray:
    """The 26 features (T, 26) float32 of 16-bit samples (S,): 12 MFCC, log energy, and the derivatives of the 13."""
    samples = samples.astype(np.float64)
    mels = spectrogram(
        samples,
        np.hamming(WINDOW),
        WINDOW,
        HOP,
        FFT,
        power=2.0,
        center=False,
        preemphasis=PRE_EMPHASIS,
        mel_filters=filter_bank(),
        mel_floor=FLOOR,
        log_mel="log",
        dtype=np.dtype(np.float64),
    ).T  # (T, 26)
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]  # (T, 400)
    energy = np.log(np.maximum(np.square(frames).sum(1), FLOOR))  # (T,)
    static = np.column_stack([mels @ cosines().T, energy])  # (T, 13)
    return np.column_stack([static, derivatives(static)]).astype(np.float32)


def derivatives(static: np.ndarray) -> np.ndarray:
    """Slopes (T, ·) of least-squares lines through five frames; the first and last frame are repeated at the ends."""
    length = len(static)
    padded = np.pad(static, ((DELTA_SPAN, DELTA_SPAN), (0, 0)), mode="edge")  # (T + 4, ·)
    spans = range(1, DELTA_SPAN + 1)
    rise = sum(n * (padded[DELTA_SPAN + n :][:length] - padded[DELTA_SPAN - n :][:length]) for n in spans)  # (T, ·)
    return np.asarray(rise) / (2 * sum(n * n for n in spans))


def frame_labels(segments: Sequence[Segment], frames: int, classes: dict[str, int | None], name: str) -> np.ndarray:
    """The class (T,) of each frame: that of the phone at the middle of its window, -100 where none is or it has none.

    Raises:
        UserError: a phone that is not in `classes`.
    """
    labels = np.full(frames, IGNORED, dtype=np.int64)  # (T,)
    middles = np.arange(frames) * HOP + WINDOW // 2  # (T,)
    for segment in segments:
        if segment.phone not in classes:
            raise UserError(f"dataset: {name} has the phone {segment.phone!r}; allowed: {' '.join(classes)}")
        label = classes[segment.phone]
        first, end = np.searchsorted(middles, (segment.start, segment.end))
        labels[first:end] = IGNORED if label is None else label
    return labels


def phone_classes(number: int) -> tuple[list[str], dict[str, int | None]]:
    """Names of the 61 or 39 classes, and the class of each of TIMIT's phones (None: not scored)."""
    names = PHONES_61 if number == 61 else PHONES_39
    folded = {phone: phone if number == 61 else FOLDING.get(phone, phone) for phone in PHONES_61}
    return names, {phone: names.index(name) if name in names else None for phone, name in folded.items()}


# ---- TIMIT's folders ------------------------------------------------------------------------------------------------


def timit_parts(root: Path) -> Parts:
    """The folders of the parts below `root`, `root/timit` or `root/data`, in capitals or not: `train` and `test`."""
    for _ in range(3):
        below = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."}
        spoken = [name for name, path in below.items() if any(p.suffix.lower() == ".phn" for p in path.rglob("*"))]
        if any(spelling(name) for name in spoken):
            chosen, unused = assign(spoken, f"folder {root.name!r}")
            return Parts(root.name, {part: below[name] for part, name in chosen.items()}, describe(chosen, unused))
        inner = next((path for name, path in below.items() if name.lower() in ("timit", "data")), None)
        if inner is None:
            break
        root = inner
    raise UserError(
        f"dataset: folder {root.name!r} has not TIMIT's layout: TRAIN and TEST, with DRn/SPEAKER/*.PHN below"
    )


def timit_utterances(folder: Path) -> list[tuple[str, Path, Path]]:
    """(speaker, audio file, `.phn` file) of the SI and SX sentences; SA sentences, which all speakers read, are not."""
    found = []
    for phn in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".phn"):
        stem = phn.stem.lower()
        if stem.startswith("sa"):
            continue
        beside = [p for p in phn.parent.iterdir() if p.name.lower().split(".")[0] == stem]
        audio = [p for p in beside if p.suffix.lower() in (".wav", ".sph")]
        if not audio:
            raise UserError(f"dataset: {phn.parent.name}/{phn.name} has no audio file beside it")
        # Some copies hold the SPHERE file SX1.WAV and a RIFF copy SX1.WAV.wav: either will do.
        found.append((phn.parent.name.lower(), min(audio, key=lambda p: len(p.name)), phn))
    return found


def load_timit(root: Path, test_split: str) -> Parts:
    """TIMIT's utterances by split; whole speakers of train are held out for each part that is missing."""
    parts = timit_parts(root)
    entries = {part: timit_utterances(folder) for part, folder in parts.found.items()}
    if "test" in entries and test_split == "core":
        entries["test"] = [entry for entry in entries["test"] if entry[0] in CORE_SPEAKERS]
    speakers = sorted({entry[0] for entry in entries["train"]})
    test = len(entries.get("test", speakers))
    if len(speakers) <= len(parts.missing) or not test:
        raise UserError(
            f"dataset: {root.name!r} has {len(speakers)} training speakers and {test} {test_split} test "
            f"utterances; at least {len(parts.missing) + 1} and 1 are needed"
        )
    if parts.missing:
        order = np.random.RandomState(0).permutation(len(speakers))[::-1]  # a generator whose stream is frozen
        places = parts.cuts(len(speakers), min(VALIDATION_SPEAKERS, max(1, len(speakers) // 10)))
        whose = {speakers[i]: part for part, place in places.items() for i in order[place]}
        entries |= {part: [entry for entry in entries["train"] if whose[entry[0]] == part] for part in places}
    utterances = {
        split: [Utterance(f"{who}/{phn.name}", read_audio(audio), read_phn(phn)) for who, audio, phn in entries[split]]
        for split in SPLITS
    }
    return Parts(parts.name, utterances, parts.notes)
