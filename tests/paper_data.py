"""Small data sets in the formats of the published ones, and tasks on them."""

import wave
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from training.data.speech import RATE
from training.options.data import DataOptions
from training.tasks import get_task


def make(name: str, data: dict | None = None, seed: int = 0, **options):
    task_class = get_task(name)
    task = task_class(task_class.Options(**options), DataOptions(**(data or {})), seed)
    task.load()
    return task


def tone(samples: int, seed: int = 0) -> np.ndarray:
    """A rising tone with noise, 16 bits."""
    t = np.arange(samples) / RATE
    noise = np.random.default_rng(seed).normal(size=samples)
    return (6000 * np.sin(2 * np.pi * (300 + 900 * t) * t) + 200 * noise).astype(np.int16)


def write_sphere(path: Path, samples: np.ndarray, **fields: str) -> None:
    values = {"channel_count": "-i 1", "sample_count": f"-i {len(samples)}", "sample_rate": "-i 16000",
              "sample_n_bytes": "-i 2", "sample_byte_format": "-s2 01", **fields}  # fmt: skip
    header = "NIST_1A\n   1024\n" + "".join(f"{k} {v}\n" for k, v in values.items()) + "end_head\n"
    order = ">i2" if values["sample_byte_format"].endswith("10") else "<i2"
    path.write_bytes(header.encode().ljust(1024) + samples.astype(order).tobytes())


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(samples), "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
    """A folder like MNIST's: 36 and 12 pictures of 4x4 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, rows in (("train", 36), ("test", 12)):
        pixels = random.integers(0, 256, (rows, 16), dtype=np.uint8)
        table = Dataset.from_dict({"pixels": pixels.tolist(), "label": [i % 10 for i in range(rows)]})
        table.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def timit_folder(tmp_path_factory):
    """TIMIT's layout in small: 3 training speakers, a core and another test speaker, SPHERE and WAV."""
    root = tmp_path_factory.mktemp("speech") / "TIMIT"
    for part, region, speaker in (
        ("TRAIN", "DR1", "FAAA0"), ("TRAIN", "DR1", "MBBB0"), ("TRAIN", "DR2", "MCCC0"),
        ("TEST", "DR1", "MDAB0"), ("TEST", "DR2", "MZZZ0"),
    ):  # fmt: skip
        folder = root / part / region / speaker
        folder.mkdir(parents=True)
        for number, sentence in enumerate(("SA1", "SI2", "SX3")):
            length = 1600 + 320 * number
            (folder / f"{sentence}.PHN").write_text(f"0 400 h#\n400 1000 sh\n1000 {length - 200} iy\n")
            write = write_wav if speaker == "MBBB0" else write_sphere
            write(folder / f"{sentence}.WAV", tone(length, number))
    return root
