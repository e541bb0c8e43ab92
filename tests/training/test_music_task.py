"""The music task: its figure, its batches, its data, and composing from a trained folder."""

import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from kru_hf.music import FIGURES, frames_to_roll, quantise, read_midi, write_midi
from training import compose, evaluate, train
from training.common.errors import UserError
from training.common.run_folder import COMPANIONS
from training.data import music_data
from training.data.cache import cache_folder
from training.data.music_data import load_pieces, on_grid
from training.data.splits import SPLITS
from training.models.build import build_model, load_model
from training.options.data import DataOptions
from training.options.model import ModelOptions
from training.tasks import Layout, piano_roll
from training.tasks.piano_roll import TASK, PianoRollOptions, roll_batch

pytest.importorskip("symusic")

METERS = [("bwv10.7", (4, 4), 0), ("bwv121.6", (4, 4), 2), ("bwv227.7", (4, 4), 0), ("bwv28.6", (4, 4), 2)]
FLOAT32_TOLERANCE = 1e-4  # nats a frame, fp32 logits of a few hundred frames in batches of another size
SMALL = [
    "--block_type",
    "plain",
    "--state_size",
    "12",
    "--factor_size",
    "3",
    "--use_cpu",
    "true",
    "--report_to",
    "none",
]


def make_pieces(count: int, seed: int) -> list[list[list[int]]]:
    """Pieces of 3 to 40 frames that hold chords."""
    random = np.random.default_rng(seed)
    return [
        [sorted(random.choice(np.arange(40, 80), random.integers(0, 5), replace=False).tolist()) for _ in range(length)]
        for length in random.integers(3, 41, count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "songs"
    path.mkdir()
    for seed, (split, count) in enumerate((("train", 11), ("validation", 5), ("test", 7))):
        Dataset.from_dict({"notes": make_pieces(count, seed)}).to_parquet(path / f"{split}.parquet")
    return path


def make_task(folder, seed=0, **options):
    task = TASK(PianoRollOptions(**options), DataOptions(dataset=str(folder)), seed)
    task.load()
    return task


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    for architecture in ("kru", "lstm"):
        network = ["--state_size", "8", *SMALL[-4:]]  # with the chain, which is the default
        if architecture == "kru":
            network = [*SMALL, "--frame_head", "independent"]
        words = ["--task", "piano_roll", "--architecture", architecture, "--dataset", str(folder), "--eval_steps", "10"]
        words += ["--max_steps", "30", "--per_device_train_batch_size", "4", "--sequence_length", "16", *network]
        recipe = output / "empty.yaml"
        recipe.write_text("task: piano_roll\n")
        assert train.main([str(recipe), *words, "--output_dir", str(output / architecture)]) == 0
    return output


# ---- the figure ---------------------------------------------------------------------------------------------------


def test_figure_equals_a_dozen_lines_of_plain_torch(trained, folder):
    """The saved weights of a plain KRU, one piece after another, without any code of the package."""
    from safetensors.torch import load_file

    weights = load_file(trained / "kru" / "model.safetensors")
    planes = [v for k, v in sorted(weights.items()) if ".factors." in k]
    recurrent = torch.ones(1, 1, dtype=torch.complex128)
    for factor in planes:
        recurrent = torch.kron(recurrent, torch.complex(*factor.double()))
    bias = next(v for k, v in weights.items() if k.endswith("recurrence.bias")).double()
    input_map = torch.complex(*weights["model.input_map.weight"].double().unflatten(0, (2, -1)))
    readout, offset = weights["key_head.weight"].double(), weights["key_head.bias"].double()
    total, count = 0.0, 0
    for notes in make_pieces(7, 2):
        x = torch.from_numpy(frames_to_roll(notes)[0]).double()
        h = torch.zeros(len(bias), dtype=torch.complex128)
        for t in range(len(x) - 1):
            z = recurrent @ h + input_map @ x[t].to(h.dtype)
            h = torch.where(z.abs() > 0, z * (z.abs() + bias).clamp(min=0) / z.abs().clamp(min=1e-300), 0 * z)
            features = torch.cat([h.real, h.imag])
            logits = readout @ (features / (features.square().mean() + 1e-6).sqrt()) + offset
            p = logits.sigmoid()
            total -= float((x[t + 1] * p.log() + (1 - x[t + 1]) * (1 - p).log()).sum())
            count += 1
    results = json.loads((trained / "kru" / "all_results.json").read_text())
    assert abs(results["test_nll_per_frame"] - total / count) < FLOAT32_TOLERANCE
    assert results["test_loss"] == results["test_nll_per_frame"]


@pytest.mark.parametrize("architecture", ["kru", "lstm"])
def test_accuracy_and_f1_count_sounding_keys_and_evaluate_repeats_the_figures(trained, folder, architecture, capsys):
    model, _ = load_model(str(trained / architecture), "piano_roll")
    hits = errors = 0
    for notes in make_pieces(7, 2):
        x = torch.from_numpy(frames_to_roll(notes)[0]).float()[None]
        predicted, sounding = model.eval()(input_values=x).logits[:, :-1] > 0, x[:, 1:] > 0
        hits += int((predicted & sounding).sum())
        errors += int((predicted ^ sounding).sum())
    results = json.loads((trained / architecture / "all_results.json").read_text())
    assert results["test_accuracy"] == hits / (hits + errors)
    assert results["test_f1"] == 2 * hits / (2 * hits + errors)
    assert results["num_parameters"] == sum(p.numel() for p in model.parameters())
    words = ["--model", str(trained / architecture), "--dataset", str(folder), "--split", "test", "--use_cpu", "true"]
    assert evaluate.main(words) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {name: results[f"test_{name}"] for name in ("loss", "nll_per_frame", "accuracy", "f1")}


def test_metrics_of_known_sums():
    task = TASK(PianoRollOptions(), DataOptions())
    figures = task.metrics({"loss": 30.0, "count": 4.0, "hits": 6.0, "false_alarms": 2.0, "misses": 4.0})
    assert figures == {"loss": 7.5, "nll_per_frame": 7.5, "accuracy": 0.5, "f1": 12 / 18}
    silent = task.metrics({"loss": 0.0, "count": 1.0, "hits": 0.0, "false_alarms": 0.0, "misses": 0.0})
    assert silent["f1"] == silent["accuracy"] == 0.0


def test_training_learns(trained, folder):
    """The best model beats the start, where every key sounds with the same small probability."""
    results = json.loads((trained / "kru" / "all_results.json").read_text())
    p, sounding = 1 / (1 + np.exp(3.0)), np.mean([len(frame) for notes in make_pieces(5, 1) for frame in notes[1:]])
    start = -sounding * np.log(p) - (88 - sounding) * np.log(1 - p)
    assert results["validation_nll_per_frame"] < start - 0.5


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "window"), [(4, 8), (3, 64), (16, 5), (1, 1)])
def test_a_pass_has_every_target_once_and_never_mixes_pieces(folder, rows, window):
    task = make_task(folder, sequence_length=window)
    layout = Layout(rows)
    seen, history = [], [[] for _ in range(rows)]
    for index in range(task.num_batches(layout)):
        batch = task.train_batch(index, 0, layout)
        x, y, scored = (batch.inputs[k] for k in ("input_values", "shift_labels", "shift_mask"))
        assert x.shape[1] <= window
        for row in range(rows):
            if batch.reset_state and history[row]:
                seen.append(torch.stack(history[row]))
                history[row] = []
            for t in range(x.shape[1]):
                if scored[row, t]:
                    history[row] += [x[row, t]] if not history[row] else []
                    assert torch.equal(history[row][-1], x[row, t])
                    history[row].append(y[row, t])
    seen += [torch.stack(frames) for frames in history if frames]
    expected = [piece.roll.astype(np.float32).tobytes() for piece in task.dataset.splits["train"]]
    assert sorted(piece.numpy().tobytes() for piece in seen) == sorted(expected)


def test_slots_hold_the_rows_of_the_global_batch_and_weights_average_to_all_targets(folder):
    task = make_task(folder, sequence_length=8)
    for index in range(2 * task.num_batches(Layout(6))):
        whole = task.train_batch(index, 0, Layout(6))
        parts = [task.train_batch(index, slot, Layout(6, 3)) for slot in range(3)]
        for key in whole.inputs:
            assert torch.equal(whole.inputs[key], torch.cat([part.inputs[key] for part in parts]))
        counts = np.array([part.inputs["shift_mask"].sum() for part in parts])
        assert np.allclose([part.loss_weight for part in parts], counts * 3 / counts.sum())
        assert whole.loss_weight == 1
        assert {part.reset_state for part in parts} == {whole.reset_state}


def test_batches_are_a_function_of_index_and_seed(folder):
    first, again, other = (make_task(folder, seed=seed, transpose=3) for seed in (0, 0, 1))
    batches = [[task.train_batch(i, 0, Layout(4)).inputs["input_values"] for i in range(12)] for task in (first, other)]
    for index in reversed(range(12)):
        assert torch.equal(again.train_batch(index, 0, Layout(4)).inputs["input_values"], batches[0][index])
    assert not all(map(torch.equal, *batches))


def test_windows_with_carried_state_give_the_loss_of_the_whole_piece(folder, monkeypatch):
    """Evaluation figures do not depend on windows, batches or slots."""
    model = build_model("piano_roll", ModelOptions(state_size=12), vocab_size=1, input_size=88).eval()
    task = make_task(folder)
    figures = []
    for num_slots, window in ((1, 512), (3, 7)):
        sums = Counter()
        monkeypatch.setattr(piano_roll, "EVAL_WINDOW", window)
        for slot in range(num_slots):
            state = None
            for batch in task.eval_batches("test", slot, num_slots):
                out = task.forward(model, batch, None if batch.reset_state else state)
                state = out.state.detach()
                sums.update({name: float(value) for name, value in out.sums.items()})
        figures.append(task.metrics(sums))
        assert sums["count"] == sum(len(piece) - 1 for piece in make_pieces(7, 2))
    assert abs(figures[0]["loss"] - figures[1]["loss"]) < FLOAT32_TOLERANCE


def test_transposition_moves_whole_pieces_within_the_keyboard(folder):
    task = make_task(folder, transpose=5)
    frames = task.frames["train"][0]
    shifts = set()
    for epoch in range(60):
        shift = task.shift(frames, epoch, 0)
        moved = roll_batch([frames, None], 1, 5, [shift, 0]).inputs["input_values"]
        assert np.array_equal(moved[0], np.roll(frames[1:6, 0], shift, 1)) and not moved[1].any()
        shifts.add(shift)
    assert shifts == set(range(-4, 6))
    edges = np.zeros((2, 1, 88), dtype=bool)
    edges[..., [0, 87]] = True
    assert task.shift(edges, 0, 0) == 0


def test_every_key_is_as_likely_where_pieces_move_by_up_to_six_semitones(folder):
    task = make_task(folder, transpose=6)
    shifts = [task.shift(np.eye(2, 88, 40, dtype=bool)[:, None], epoch, 0) for epoch in range(1200)]
    counts = np.bincount([shift % 12 for shift in shifts])
    assert set(shifts) == set(range(-5, 7)) and counts.min() > 60


# ---- data ---------------------------------------------------------------------------------------------------------


def test_record_names_the_data_without_its_path(folder):
    record = make_task(folder).dataset_record()
    assert record["name"] == "songs"
    assert record["train_pieces"] == 11
    assert str(folder.parent) not in json.dumps(record)
    assert record["sha256"] == make_task(folder).dataset_record()["sha256"]
    assert record["onsets"] is False


def test_a_folder_of_midi_files_is_split_by_piece_and_bad_files_are_counted(tmp_path, capsys):
    for index, notes in enumerate(make_pieces(20, 5)):
        events = [(t, 1, pitch) for t, frame in enumerate(notes) for pitch in frame]
        write_midi(quantise(events, 1), tmp_path / f"{index:02}.mid")
    (tmp_path / "damaged.mid").write_bytes(b"MThd\x00")
    (tmp_path / "empty.MID").write_bytes(b"")
    found = load_pieces(DataOptions(dataset=str(tmp_path)), 1)
    assert [len(found.splits[split]) for split in SPLITS] == [16, 2, 2]
    assert "damaged.mid" in capsys.readouterr().out
    assert found.notes == ["2 files left out"]
    assert found.sha256 == load_pieces(DataOptions(dataset=str(tmp_path)), 1).sha256


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", ["a", "b", "c"], "no column 'notes'"),
        ("notes", [1, 2, 3], "list of frames"),
        ("notes", [[[60.5], [61.0]]] * 4, "MIDI pitches, whole numbers"),
        ("notes", [[[]], [[]], [[]]], "usable pieces"),
        ("notes", [[[], []]] * 4, "no piece of two frames with notes"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path, column, values, message):
    Dataset.from_dict({column: values}).to_json(tmp_path / "train.json")
    with pytest.raises(UserError, match=message):
        load_pieces(DataOptions(dataset=str(tmp_path)), 1)


@pytest.mark.parametrize("name", ["test", "Valid"])
def test_folders_of_midi_files_are_the_parts_that_they_are_called(tmp_path, name):
    """Only the missing part is cut from train; a file beside the folders is not used, and said."""
    for place, low, count in (("train", 40, 10), (name, 70, 3)):
        for index in range(count):
            path = tmp_path / place / f"{index}.mid"
            path.parent.mkdir(exist_ok=True)
            write_midi(quantise([(0, 1, low + index), (1, 1, low)], 1), path)
    write_midi(quantise([(0, 1, 100), (1, 1, 100)], 1), tmp_path / "loose.mid")
    found = load_pieces(DataOptions(dataset=str(tmp_path)), 1)
    own = "test" if name == "test" else "validation"
    other = "validation" if name == "test" else "test"
    assert {split: len(rolls) for split, rolls in found.splits.items()} == {"train": 9, own: 3, other: 1}
    high = {split: sum(piece.roll[:, 70 - 21 :].any() for piece in pieces) for split, pieces in found.splits.items()}
    assert high == {"train": 0, own: 3, other: 0}
    assert "not used: loose.mid" in found.notes
    assert f"the data have no {other} part: it is cut from train" in found.notes


def test_a_sample_is_a_piece_in_the_folder_and_does_not_need_the_test_pieces(trained, folder, tmp_path):
    task = make_task(folder)
    task.dataset.splits["test"].clear()
    model, _ = load_model(str(trained / "kru"), "piano_roll")
    prime = task.dataset.splits["validation"][0]
    given = min(16, len(prime.roll) // 2)
    said = task.sample(model, 3, 0, tmp_path)
    assert f"{given} frames of validation-1 (validation), then 3 composed frames" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(COMPANIONS)
    piece = read_midi(tmp_path / "composition.mid", 4)
    assert np.array_equal(piece.roll[:given], prime.roll[:given]) and len(piece.roll) <= given + 3
    assert task.sample(model, 0, 0, tmp_path) is None


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_pieces(DataOptions(dataset=str(tmp_path / "none")), 1)
    with pytest.raises(UserError, match="has no train.arrow, .* or files .mid, "):
        load_pieces(DataOptions(dataset=str(tmp_path)), 1)


def test_chorales_are_parsed_once_for_every_grid_and_anew_when_what_decides_them_changes(tmp_path, monkeypatch):
    corpus = pytest.importorskip("music21.corpus")
    files = [Path(shutil.copy(path, tmp_path)) for path in sorted(corpus.getComposer("bach"), key=str)[:6]]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "getComposer", lambda name: files)
    parse, parsed = music_data.parse_chorale, []
    monkeypatch.setattr(music_data, "parse_chorale", lambda path: parsed.append(path) or parse(path))

    def again(grid=2):
        parsed.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return music_data.music21_chorales(grid), len(parsed)

    pieces, count = again()
    assert count == 6 and len(pieces) >= 3
    same, count = again()
    assert count == 0
    for one, other in zip(pieces, same, strict=True):
        assert np.array_equal(one.planes(True), other.planes(True))
        assert (one.name, one.meter, one.upbeat) == (other.name, other.meter, other.upbeat)
    finer, count = again(4)
    assert count == 0 and [len(piece.roll) for piece in finer] == [2 * len(piece.roll) for piece in pieces]
    monkeypatch.setattr(music_data.inspect, "getsource", lambda parser: "another parser")
    assert again()[1] == 6
    monkeypatch.setattr(music_data, "version", lambda name: "0")
    assert again()[1] == 6
    files.pop()
    assert again()[1] == 5
    shutil.copy(files[0], files[1])
    assert again()[1] == 5
    newest = max(cache_folder().iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    for damage in (content[:200] + bytes([content[200] ^ 1]) + content[201:], content[:-9], b"{}"):
        newest.write_bytes(damage)
        assert again()[1] == 5
    with pytest.raises(UserError, match="frames_per_quarter=481 is not valid"):
        again(481)


def test_chorales_are_what_the_released_model_was_trained_on():
    """Those in which one voice holds a key that another strikes."""
    corpus = pytest.importorskip("music21.corpus")
    names = ("bwv10.7.mxl", "bwv121.6.mxl", "bwv227.7.mxl", "bwv28.6.mxl")
    paths = [path for path in sorted(map(Path, corpus.getComposer("bach")), key=str) if path.name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pieces = [on_grid(music_data.parse_chorale(path), 2) for path in paths]
    assert [len(piece.roll) for piece in pieces] == [176, 130, 104, 96]
    assert [int(piece.roll.sum()) for piece in pieces] == [672, 504, 402, 372]
    assert [(piece.name, piece.meter, piece.upbeat) for piece in pieces] == METERS


@pytest.mark.parametrize("name", ["sequence_length", "frames_per_quarter", "transpose"])
def test_bad_options_name_themselves(name):
    with pytest.raises(UserError, match=f"{name}=-1"):
        PianoRollOptions(**{name: -1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 99_985}, "num_frames=99985 is not valid: it must be at most 99984 after this prime"),
        ({"num_frames": 2385, "tempo": 10.0}, "after 16 of the prime: a sound of 3,602 seconds is too long"),
    ],
)
def test_pieces_that_would_be_too_long_are_not_begun(trained, tmp_path, capsys, change, message):
    write_midi(quantise([(0, 4, 60)], 4), tmp_path / "prime.mid")
    words = ["--model", str(trained / "kru"), "--prime", str(tmp_path / "prime.mid")]
    words += ["--output", str(tmp_path / "a.mid"), *(f"--{name}={value}" for name, value in change.items())]
    assert compose.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.mid").exists()


# ---- composing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["kru", "lstm"])
def test_compose_writes_midi_picture_and_sound_the_same_every_time(trained, tmp_path, architecture, capsys):
    write_midi(quantise([(0, 1, 60), (1, 1, 64), (2, 2, 67)], 4), tmp_path / "prime.mid")
    words = ["--model", str(trained / architecture), "--prime", str(tmp_path / "prime.mid"), "--num_frames", "12"]
    for name in ("a", "b"):
        assert compose.main([*words, "--output", str(tmp_path / f"{name}.mid"), "--statistics"]) == 0
    for ending in (".mid", ".wav"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 1000
    made = json.loads((tmp_path / "a.json").read_text())
    assert made["sentence"] == capsys.readouterr().out.splitlines()[-1]
    found = made["statistics"]
    assert found["within"] == all(found[f"{name}_within"] for name in FIGURES)
    assert (made["prime"], made["prime_frames"], made["num_frames"]) == ("prime", 16, 12)
    assert "training.compose" in made["command"] and "--num_frames 12" in made["command"]
    piece = read_midi(tmp_path / "a.mid", 4)
    assert piece.notes()[:3] == [(0, 4, 60), (4, 4, 64), (8, 8, 67)]
    assert len(piece.roll) <= 16 + 12
    assert compose.main([*words, "--seed", "1", "--output", str(tmp_path / "c.mid")]) == 0
    assert (tmp_path / "a.mid").read_bytes() != (tmp_path / "c.mid").read_bytes()
    assert compose.main([*words, "--seed", "1", "--output", str(tmp_path / "a.mid")]) == 0
    assert not (tmp_path / "a.json").exists()  # it told of another piece
    (tmp_path / "c.json").write_text("mine, and no JSON")
    assert compose.main([*words, "--output", str(tmp_path / "c.mid")]) == 0
    assert (tmp_path / "c.json").read_text() == "mine, and no JSON"
    assert compose.main([*words, "--prime_frames", "17", "--output", str(tmp_path / "d.mid")]) == 1
    assert "prime_frames=17 is more than the 16 frames of prime" in capsys.readouterr().err
    assert (
        compose.main([*words[:2], "--prime", "test-2", "--num_frames", "5", "--output", str(tmp_path / "e.mid")]) == 0
    )
    assert "of test-2 (test), then 5 composed frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is missing"),
        (["--model", "MODEL"], "output is missing"),
        (["--model", "MODEL", "--output", "a.wav"], "must be a file that ends in .mid"),
        (["--model", "MODEL", "--output", "a.mid", "--num_frames", "0"], "num_frames=0"),
        (["--model", "MODEL", "--output", "a.mid", "--prime", "none.mid"], "none.mid' does not exist"),
        (["--model", "MODEL", "--output", "run.mid", "--statistics"], "output='run.mid' is not valid"),
        (["--model", "MODEL", "--output", "a.mid", "--prime", "bwv1"], "prime='bwv1' is neither a file nor a held-out"),
        pytest.param(  # it is looked for on the Hub
            ["--model", "MODEL", "--output", "a.mid", "--dataset", "gone", "--statistics"],
            "gone",
            marks=pytest.mark.slow,
        ),
        (["--model", "MODEL", "--output", "learning_curve.mid"], "output='learning_curve.mid' is not valid"),
        (["--model", "MODEL", "--output", "p.mid", "--prime", "p.mid"], "must be another file than prime"),
        (["--model", "MODEL", "--output", "a.mid", "--prime_frames", "3"], "has no effect here: it works with prime"),
        (["--model", "MODEL", "--output", "a.mid", "--max_voices", "89"], "must be at most 88"),
        (["--model", "EMPTY", "--output", "a.mid"], "recipe.yaml"),
        (["--model", "MODEL", "--output", "a.mid", "--num_frame", "3"], "did you mean 'num_frames'"),
    ],
)
def test_compose_says_what_is_wrong(trained, tmp_path, capsys, words, message):
    folders = {"MODEL": str(trained / "kru"), "EMPTY": str(tmp_path)}
    words = [folders.get(word, word) for word in words]
    assert compose.main(words) == 1
    assert message in capsys.readouterr().err


def test_tables_need_no_midi_library(folder):
    code = (
        "import sys; sys.modules['symusic'] = sys.modules['music21'] = sys.modules['pretty_midi'] = None\n"
        "from training.tasks import get_task\nfrom training.options.data import DataOptions\n"
        "task = get_task('piano_roll'); task = task(task.Options(), DataOptions(dataset=sys.argv[1])); task.load()\n"
        "print(task.dataset_record()['train_pieces'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "11", done.stderr
