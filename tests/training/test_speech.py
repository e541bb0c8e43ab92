"""Framewise phonemes: features, audio files, labels, TIMIT's layout and espeak-ng's speech."""

import shutil

import numpy as np
import pytest
import torch
from helpers import RELATIVE
from paper_data import make, tone, write_sphere, write_wav

from kru_hf import KRUConfig, KRUForTokenClassification
from training.common.errors import UserError
from training.data import espeak
from training.data.cache import cached
from training.data.speech import (
    CORE_SPEAKERS,
    PHONES_39,
    PHONES_61,
    RATE,
    Segment,
    derivatives,
    features,
    frame_labels,
    load_timit,
    phone_classes,
    read_audio,
    read_phn,
)
from training.data.splits import SPLITS
from training.tasks import Layout
from training.tasks.sequences import IGNORED


def plain_frame(window: np.ndarray) -> np.ndarray:
    """The 13 static features of 400 samples, by definition: sums over samples, triangles and cosines."""
    x = window.astype(float)
    emphasised = np.array([x[0] * (1 - 0.97), *(x[i] - 0.97 * x[i - 1] for i in range(1, 400))])
    n = np.arange(400)
    tapered = emphasised * (0.54 - 0.46 * np.cos(2 * np.pi * n / 399))
    bins = np.arange(257)
    power = np.abs(np.exp(-2j * np.pi * np.outer(bins, n) / 512) @ tapered) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28) / 2595) - 1)
    hertz = bins * RATE / 512
    logs = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        triangle = np.clip(np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)), 0, None)
        logs.append(np.log(max(1.0, triangle @ power)))
    cosine = [sum(logs[j] * np.cos(np.pi * i / 26 * (j + 0.5)) for j in range(26)) for i in range(1, 13)]
    return np.array([*(np.sqrt(2 / 26) * np.array(cosine)), np.log(max(1.0, np.sum(x * x)))])


def test_features_against_their_definition():
    samples = tone(2000)
    found = features(samples)
    assert found.shape == (11, 26) and found.dtype == np.float32
    static = np.array([plain_frame(samples[160 * t : 160 * t + 400]) for t in range(11)])
    np.testing.assert_allclose(found[:, :13], static, rtol=1e-4, atol=1e-3)
    slopes = [np.polyfit(np.arange(-2, 3), static[t - 2 : t + 3], 1)[0] for t in range(2, 9)]
    np.testing.assert_allclose(found[2:9, 13:], slopes, rtol=1e-3, atol=1e-3)
    edge = np.polyfit(np.arange(-2, 3), static[[0, 0, 0, 1, 2]], 1)[0]
    np.testing.assert_allclose(found[0, 13:], edge, rtol=1e-3, atol=1e-3)
    assert np.array_equal(derivatives(np.ones((1, 2))), np.zeros((1, 2)))
    assert np.isfinite(features(np.zeros(400, np.int16))).all()


def test_sphere_and_wav(tmp_path):
    samples = tone(900)
    for number, fields in enumerate(({}, {"sample_byte_format": "-s2 10"})):
        path = tmp_path / f"{number}.wav"
        write_sphere(path, samples, **fields)
        assert np.array_equal(read_audio(path), samples)
    write_wav(tmp_path / "riff.WAV", samples)
    assert np.array_equal(read_audio(tmp_path / "riff.WAV"), samples)
    for fields, message in (
        ({"sample_coding": "-s26 pcm,embedded-shorten-v2.00"}, "sph2pipe"),
        ({"channel_count": "-i 2"}, "must have channel_count 1, got 2"),
        ({"sample_count": "-i 901"}, "cut short"),
    ):
        write_sphere(path, samples, **fields)
        with pytest.raises(UserError, match=message):
            read_audio(path)
    write_wav(path, samples, 8000)
    with pytest.raises(UserError, match="1 channel of 2 bytes at 16000 Hz"):
        read_audio(path)
    write_wav(path, samples)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is cut short: it has 800 of 900 samples"):
        read_audio(path)
    for count in ("-5", "abc"):
        write_sphere(path, samples, sample_count=f"-i {count}")
        with pytest.raises(UserError, match="unknown sample_byte_format or sample_count"):
            read_audio(path)
    for damaged in (b"NIST_1A\n   many\nend_head\n", b"NIST_1A\n   1024\n"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="has a damaged SPHERE header"):
            read_audio(path)
    path.write_bytes(b"no sound")
    with pytest.raises(UserError, match="neither a SPHERE nor a PCM WAV"):
        read_audio(path)


def test_phones_to_frames(tmp_path):
    path = tmp_path / "SX1.PHN"
    path.write_text("0 360 h#\n360 840 ix\n840 1200 q\n")
    segments = read_phn(path)
    assert segments == [Segment(0, 360, "h#"), Segment(360, 840, "ix"), Segment(840, 1200, "q")]
    names, classes = phone_classes(61)
    # Middles of the windows: 200, 360, 520, 680, 840, 1000, 1160, 1320
    labels = frame_labels(segments, 8, classes, "x")
    assert [names[i] if i != IGNORED else None for i in labels] == ["h#", *["ix"] * 3, *["q"] * 3, None]
    names, classes = phone_classes(39)
    labels = frame_labels(segments, 8, classes, "x")
    assert [names[i] if i != IGNORED else None for i in labels] == ["sil", *["ih"] * 3, *[None] * 4]
    with pytest.raises(UserError, match="has the phone 'xyz'"):
        frame_labels([Segment(0, 300, "xyz")], 1, classes, "x")
    path.write_text("0 360\n")
    with pytest.raises(UserError, match="line 1: must be START END PHONE"):
        read_phn(path)


def test_folding_of_61_phones_to_39():
    assert len(PHONES_61) == len(set(PHONES_61)) == 61 and len(PHONES_39) == 39 and len(CORE_SPEAKERS) == 24
    expected = {
        "aa": "aa ao", "ah": "ah ax ax-h", "er": "er axr", "hh": "hh hv", "ih": "ih ix", "l": "l el", "m": "m em",
        "n": "n en nx", "ng": "ng eng", "sh": "sh zh", "uw": "uw ux", "sil": "h# pau epi bcl dcl gcl pcl tcl kcl",
    }  # fmt: skip
    names, classes = phone_classes(39)
    for name, phones in expected.items():
        assert {p for p, i in classes.items() if i is not None and names[i] == name} == set(phones.split())
    assert [p for p, i in classes.items() if i is None] == ["q"]
    single = set(PHONES_61) - set(" ".join(expected.values()).split()) - {"q"}
    assert all(names[classes[p]] == p for p in single) and len(single) == 39 - len(expected)


def test_timit_folder(timit_folder, tmp_path):
    core, complete = (load_timit(timit_folder, split).found for split in ("core", "complete"))
    assert {split: len(core[split]) for split in SPLITS} == {"train": 4, "validation": 2, "test": 2}
    assert len(complete["test"]) == 4 and len(load_timit(timit_folder.parent, "core").found["train"]) == 4
    speakers = [{u.name.split("/")[0] for u in core[split]} for split in SPLITS]
    assert not speakers[0] & speakers[1] and speakers[2] == {"mdab0"}
    assert all("SA" not in u.name for split in SPLITS for u in complete[split])
    with pytest.raises(UserError, match="has not TIMIT's layout"):
        load_timit(tmp_path, "core")


def test_a_folder_of_its_own_is_the_part_that_it_is_called(timit_folder, tmp_path):
    """Speakers are held out of train for a part that is missing alone; folders without a part's name are not used."""
    root = tmp_path / "TIMIT"
    shutil.copytree(timit_folder, root)
    (root / "TRAIN" / "DR2").rename(root / "DEV")
    shutil.copytree(root / "DEV", root / "OTHER")
    found = load_timit(root, "complete")
    assert {split: {u.name.split("/")[0] for u in found.found[split]} for split in SPLITS} == {
        "train": {"faaa0", "mbbb0"}, "validation": {"mccc0"}, "test": {"mdab0", "mzzz0"},
    }  # fmt: skip
    assert found.notes == ["validation is 'DEV'", "not used: OTHER"]
    shutil.rmtree(root / "TEST")
    found = load_timit(root, "core")
    assert [len(found.found[split]) for split in SPLITS] == [2, 2, 2]
    assert found.notes[-1] == "the data have no test part: it is cut from train"


@pytest.mark.parametrize("cell", ["kru", "kru_lstm"])
def test_no_direction_reads_padding(timit_folder, cell):
    sums = []
    for size in (1, 2):
        task = make("phonemes", {"dataset": str(timit_folder)}, phone_set=39, eval_batch_size=size)
        torch.manual_seed(0)
        config = KRUConfig(state_size=8, cell_type=cell, bidirectional=True, **task.model_kwargs())
        model = KRUForTokenClassification(config).eval()
        batches = list(task.eval_batches("test", 0, 1))
        assert len(batches) == 2 / size
        sums.append(sum(float(task.forward(model, batch, None).sums["loss"]) for batch in batches))
    assert sums[0] == pytest.approx(sums[1], rel=RELATIVE[torch.float32])


def test_phoneme_batches(timit_folder):
    task = make("phonemes", {"dataset": str(timit_folder)}, phone_set=39)
    frames = np.concatenate([x for x, _ in task.dataset.splits["train"]])
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(frames[:, :13].std(0), 1, atol=1e-2)
    layout = Layout(2, 2)
    slots = [task.train_batch(0, slot, layout) for slot in (0, 1)]
    scored = [int((batch.inputs["labels"] != IGNORED).sum()) for batch in slots]
    assert [batch.loss_weight for batch in slots] == [pytest.approx(2 * n / sum(scored)) for n in scored]
    (batch,) = task.eval_batches("test", 0, 1)
    lengths = [len(task.dataset.splits["test"][i][0]) for i in task.eval_order("test")]
    assert batch.inputs["input_values"].shape == (2, max(lengths), 26) and batch.num_elements == sum(lengths)
    assert (batch.inputs["labels"][0, lengths[0] :] == IGNORED).all()
    with pytest.raises(UserError, match="phone_set=48 is not valid: it must be one of 61, 39"):
        make("phonemes", phone_set=48)
    with pytest.raises(UserError, match="is not a folder"):
        make("phonemes", {"dataset": "nowhere"})


def test_speech_is_kept_as_it_was_made(monkeypatch, tmp_path):
    class Speaker:
        rate = RATE

        def say(self, text, voice, speed, pitch):
            return tone(900, speed), [(100, "a"), (300, ""), (500, "b")]

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(espeak, "Synthesizer", Speaker)
    monkeypatch.setattr(espeak, "UTTERANCES", {"train": 3, "validation": 1, "test": 1})
    made, kept = (espeak.unpack(cached("speech", lambda: espeak.speak_all(0))) for _ in range(2))
    for split in SPLITS:
        for one, other in zip(made[split], kept[split], strict=True):
            assert (one.name, one.segments) == (other.name, other.segments)
            assert np.array_equal(one.samples, other.samples) and other.samples.dtype == np.int16
    bounds = [(0, 100, "_"), (100, 300, "a"), (300, 500, "_"), (500, 900, "b")]
    assert made["train"][2].name == "m3/2" and made["train"][2].segments == [Segment(*bound) for bound in bounds]


def test_without_espeak_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(espeak, "LIBRARIES", ("libnot-there.so",))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UserError, match="apt install espeak-ng.*--dataset FOLDER"):
        make("phonemes")


def test_espeak_says_where_its_phones_begin(monkeypatch, tmp_path):
    try:
        espeak.library_version(espeak._open())
    except UserError:
        pytest.skip("espeak-ng is not installed")
    monkeypatch.setattr(espeak, "UTTERANCES", {"train": 3, "validation": 1, "test": 1})
    utterances = espeak.unpack(espeak.speak_all(0))["train"]
    assert len(utterances) == 3
    for utterance in utterances:
        assert utterance.samples.dtype == np.int16 and np.abs(utterance.samples).max() > 1000
        bounds = [0, *(segment.end for segment in utterance.segments)]
        assert [segment.start for segment in utterance.segments] == bounds[:-1]
        assert bounds[-1] == len(utterance.samples) and len({s.phone for s in utterance.segments}) > 8
    waves = espeak.resample(tone(2205, 1), 22050)
    assert len(waves) == 1600
