"""The page of results: figures come from runs.jsonl, seeds are averaged, what was not run stays blank."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from training.common.errors import UserError
from training.records.paper_figures import FIGURES, PTB_LARGE, PTB_SMALL
from training.records.results_page import BEGIN, END, curve, overview, tables
from training.records.runs import entry_of, factors, find_runs, read_runs, settings
from training.report import main

ROOT = Path(__file__).parent.parent
KRU = {"model_type": "kru", "state_size": 1100, "factor_shapes": [[10, 10], [10, 10], [11, 11]], "num_hidden_layers": 1}
LSTM = {"model_type": "kru_baseline", "cell": "lstm", "state_size": 150, "num_hidden_layers": 1}
OPTIONS = {"task": "char_lm", "architecture": "kru", "learning_rate": 0.003, "max_grad_norm": 1.0, "max_steps": 100}
HISTORY = "step,seconds,train_loss,learning_rate,validation_bpc\n50,9.5,1.2,,1.9\n100,19.5,,,1.65\n"


def write_run(folder: Path, config=KRU, data="ptb_char", seed=0, results=True, bpc=1.6, options=None, **others) -> Path:
    """A run's folder as `training.train` leaves it, without weights."""
    folder.mkdir(parents=True)
    if results:
        sizes = {"num_parameters": 113_000, "num_recurrent_parameters": 642, "int8_bytes": 120_000}
        times = {"train_runtime": 3600.0, "processor_seconds": 2400.0}
        figures = {"validation_bpc": bpc + 0.05, "test_bpc": bpc, **sizes, **times, "steps": 100}
        (folder / "all_results.json").write_text(json.dumps({**figures, **others}))
        (folder / "history.csv").write_text(HISTORY)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**OPTIONS, "seed": seed, **(options or {})}))
    run = {
        "data": {"name": data, "sha256": "ab" * 32},
        "command": f"accelerate launch -m training.train ptb_char --seed {seed} --output_dir {folder.name}",
        "machines": [{"device": "cpu", "processor": "Some CPU", "cores": 2, "threads": 2, "processes": 1}],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def report(*words) -> str:
    """The page that has been written into the folder that is the last word."""
    assert main([*map(str, words[:-1]), f"--folder={words[-1]}"]) == 0
    return (Path(words[-1]) / "RESULTS.md").read_text()


def line_of(text: str, start: str) -> list[str]:
    """The cells of the only table line that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seeds_are_one_row_with_mean_and_spread_and_stay_when_the_folders_are_gone(tmp_path):
    values = [1.60, 1.62, 1.67]
    runs = [write_run(tmp_path / "runs" / str(seed), seed=seed, bpc=bpc) for seed, bpc in enumerate(values)]
    text = report(*runs[:2], tmp_path / "out")
    assert line_of(text, "KRU 1100 (10^2·11)")[7] == "2 (0, 1)"
    (tmp_path / "runs" / "0").rename(tmp_path / "gone")
    text = report(*runs[1:], tmp_path / "out")  # one of them again
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert line_of(text, "KRU 1100 (10^2·11)") == [
        "KRU 1100 (10^2·11)", "113,000", "642", "120,000", "", f"{mean + 0.05:.3f} ± {spread:.3f}",
        f"{mean:.3f} ± {spread:.3f}", "3 (0, 1, 2)", "100", "60 min", "40 min", "2 threads of Some CPU",
    ]  # fmt: skip
    for seed, entry in enumerate(read_runs(tmp_path / "out")):
        assert f"training.train ptb_char --seed {seed} " in entry.commands[0]
    picture = tmp_path / "out" / "results-penn-treebank-characters-120k-parameters.png"
    assert f"]({picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in text and str(tmp_path) not in (tmp_path / "out" / "runs.jsonl").read_text()
    assert report(tmp_path / "out") == text


def test_a_line_of_several_seeds_counts_its_released_run_once(tmp_path):
    line = {"name": "runs/kru", "setting": PTB_SMALL, "label": "KRU 1100 (10^2·11)", "metric": "bpc", "seeds": [0, 1]}
    line |= {"results": {"test_bpc": 1.61, "steps": [90, 100]}, "spread": {"test_bpc": 0.01}, "released": "kru"}
    line |= {"variant": "max_grad_norm=1.0"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    text = report(write_run(tmp_path / "kru"), tmp_path)
    cells = line_of(text, "[KRU 1100")
    assert cells[0] == "[KRU 1100 (10^2·11), max_grad_norm=1.0](kru/)"
    assert cells[6:9] == ["1.610 ± 0.010", "2 (0, 1)", "90 – 100"] and "![learning curves: " in text
    other = write_run(tmp_path / "kru-2", seed=7, bpc=1.5)
    assert line_of(report(other, tmp_path), "[KRU 1100 (10^2·11)](kru-2/)")[6] == "1.500"


def test_tasks_of_several_lengths_have_a_table_and_a_picture_of_them(tmp_path):
    config = {**KRU, "cell_type": "kru_linear", "factor_shapes": [[2, 2]], "state_size": 8, "num_heads": 4}
    options = {"task": "regular_languages", "language": "parity"}
    for seed, share in ((0, 1.0), (1, 0.5)):
        lengths = {"test_accuracy_64": 1.0, "test_accuracy_2048": share, "test_loss": 0.3}
        write_run(tmp_path / "runs" / str(seed), config, "regular_languages", seed, options=options, **lengths)
    text = report(tmp_path / "runs", tmp_path / "out")
    assert line_of(text, "length") == ["length", "parameters", "seeds", "64", "2,048"]
    shares = [line for line in text.splitlines() if line.startswith("| Linear-KRU 8 (2), 4 heads")][-1]
    assert shares == "| Linear-KRU 8 (2), 4 heads | 113,000 | 2 | 1.0000 | 0.7500 |"
    assert "| Accuracy ↑ | 0.7500 at 2,048 (Linear-KRU 8 (2), 4 heads; 113,000 parameters) |" in text
    picture = "results-regular-language-parity.png"
    assert f"![accuracy by length: Regular language: parity]({picture})" in text
    assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_what_differs_between_rows_is_named(tmp_path):
    for name, coefficient, bpc, clip in (("a", 0.1, 1.6, 1.0), ("b", 0.0, 1.9, 1.0), ("c", 0.0, 1.7, 0.0)):
        options = {"unitary_loss_coef": coefficient, "max_grad_norm": clip, "dropped": None, "kronecker_terms": 0}
        write_run(tmp_path / "runs" / name, bpc=bpc, options=options)
    text = report(tmp_path / "runs", tmp_path / "out")
    rows = [line for line in text.splitlines() if line.startswith("| KRU 1100")]
    assert [row.split("|")[1].split("), ")[1].strip() for row in rows] == [
        "max_grad_norm=1.0, unitary_loss_coef=0.1",
        "max_grad_norm=0.0, unitary_loss_coef=0.0",
        "max_grad_norm=1.0, unitary_loss_coef=0.0",
    ]
    write_run(tmp_path / "again", bpc=1.7, options={"unitary_loss_coef": 0.1})
    text = report(tmp_path / "again", tmp_path / "out")
    assert "KRU 1100 (10^2·11), max\\_grad_norm" not in text and ", same seed again (2) |" in text


def test_what_was_not_run_is_blank(tmp_path):
    run = write_run(tmp_path / "runs" / "a", config=LSTM)
    text = report(run, tmp_path / "out")
    assert line_of(text, "Penn Treebank characters, ≈120K")[2:4] == ["", "1.600 (LSTM 150; 113,000 parameters)"]
    for setting in FIGURES:
        assert f"## {setting}" in text
        if setting != PTB_SMALL:
            assert line_of(text, setting)[2:4] == ["", ""]
    for figure in FIGURES[PTB_LARGE]:
        assert line_of(text, f"*{figure.name}* (")[5] == ""
    assert PTB_LARGE not in report("--only_runs", tmp_path / "out")


def test_unfinished_runs_are_named_without_figures(tmp_path):
    write_run(tmp_path / "runs" / "a", seed=0)
    folder = write_run(tmp_path / "runs" / "b", seed=1, results=False)
    checkpoint = folder / "checkpoint-70"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(
        json.dumps({"step": 70, "history": [{"step": 60, "validation_bpc": 1.8}]})
    )
    text = report(tmp_path / "runs", tmp_path / "out")
    cells = line_of(text, "KRU 1100 (10^2·11)")
    assert cells[5:9] == ["1.650", "1.600", "1 (0)", "100; 1 not finished (last checkpoint at 70)"]
    assert [entry.history for entry in read_runs(tmp_path / "out")] == [[[50, 1.9], [100, 1.65]], [[60, 1.8]]]
    (folder / "config.json").unlink()
    assert entry_of(folder, tmp_path).label == "kru "


def test_settings_come_from_task_data_and_options(tmp_path):
    cases = {
        "Copy memory, T = 1000": ({"task": "copy_memory", "sequence_length": 1000}, "copy_memory"),
        "Adding, T = 750": ({"task": "adding", "sequence_length": 750}, "adding"),
        "Pixel MNIST, permuted": ({"task": "pixel_mnist", "permuted": True}, "mnist"),
        "Pixel MNIST, in order": ({"task": "pixel_mnist", "permuted": False}, "ylecun/mnist"),
        "pixel_mnist on digits": ({"task": "pixel_mnist", "permuted": False}, "digits"),
        "pixel_mnist on zalando/fashion_mnist": ({"task": "pixel_mnist"}, "zalando/fashion_mnist"),
        "JSB Chorales": ({"task": "piano_roll", "transpose": 0}, "jsb_chorales"),
        "JSB Chorales, transposed training pieces": ({"task": "piano_roll", "transpose": 5}, "jsb_chorales"),
        "TIMIT phonemes, frame by frame": ({"task": "phonemes", "phone_set": 61}, "TIMIT"),
        "TIMIT phonemes, frame by frame, 39 classes": ({"task": "phonemes", "phone_set": 39}, "TIMIT"),
        "piano_roll on bach_chorales": ({"task": "piano_roll"}, "bach_chorales"),
        PTB_SMALL: ({"task": "char_lm"}, "ptb_char"),
        "task not recorded on data not recorded": ({"task": ""}, ""),
    }
    for index, (options, data) in enumerate(cases.values()):
        write_run(tmp_path / f"{index:02}", data=data, options=options)
    assert [entry_of(run, tmp_path / "x").setting for run in find_runs([tmp_path])] == list(cases)
    large = write_run(tmp_path / "large", num_parameters=418_000)
    assert entry_of(large, tmp_path).setting == PTB_LARGE


def test_order_follows_the_metrics_direction(tmp_path):
    for index, accuracy in enumerate((0.9, 0.95, 0.93)):
        figures = {"validation_bpc": None, "test_bpc": None, "validation_accuracy": accuracy, "validation_loss": 1.0}
        config = {**LSTM, "state_size": index}
        write_run(tmp_path / str(index), config=config, data="x", options={"task": "unheard of"}, **figures)
    (rows,) = settings(entry_of(run, tmp_path / "x") for run in find_runs([tmp_path])).values()
    assert [row.label for row in rows] == ["LSTM 1", "LSTM 2", "LSTM 0"]


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({**KRU, "io_rank": 24}, "KRU 1100 (10^2·11), rank-24 maps"),
        ({**KRU, "intermediate_size": 96}, "KRU 1100 (10^2·11), feed-forward 96"),
        ({**KRU, "kronecker_terms": 8}, "KRU 1100 (10^2·11), maps of 8 terms"),
        ({**KRU, "model_type": "kru_unitary"}, "strictly unitary KRU 1100 (10^2·11)"),
        ({**KRU, "cell_type": "kru_lstm", "num_hidden_layers": 2}, "Kron-LSTM 1100 (10^2·11), 2 layers"),
        ({**LSTM, "cell": "low_rank", "recurrent_rank": 16}, "low-rank RNN 150, rank 16"),
    ],
)
def test_labels(tmp_path, config, label):
    assert entry_of(write_run(tmp_path / "run", config=config), tmp_path / "x").label == label
    assert factors([[2, 2]] * 9) == "2^9" and factors([[3, 4], [4, 3]]) == "3x4·4x3"


def test_readme_table_is_replaced_between_its_markers(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    for _ in range(2):
        assert main([str(run), f"--folder={tmp_path / 'page'}", "--only_runs"]) == 0
        text = readme.read_text()
        assert text.startswith(f"# Title\n\n{BEGIN}\n| task | metric |") and text.endswith(f"|\n{END}\n\nrest\n")
        assert capsys.readouterr().out.strip() == text.split(BEGIN)[1].split(END)[0].strip()
    for broken in (f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", BEGIN):
        readme.write_text(broken)
        assert main([f"--folder={tmp_path / 'page'}"]) == 1
        assert "each once" in capsys.readouterr().err
        assert readme.read_text() == broken


def test_this_repositorys_tables_are_those_of_its_runs():
    text = overview(tables(read_runs(ROOT / "model_cards")))
    for page in (ROOT / "README.md", ROOT / "model_cards" / "RESULTS.md"):
        assert f"\n{text}\n" in page.read_text(), f"{page.name}: run python -m training.report"


def test_what_is_no_run_and_no_line_is_named(tmp_path, capsys):
    page = f"--folder={tmp_path / 'page'}"
    for words, message in (([tmp_path / "nowhere"], "is not a folder"), ([], "has no runs.jsonl: name a RUN")):
        assert main([*map(str, words), page]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])
    folder = write_run(tmp_path / "runs" / "a")
    assert len(find_runs([folder, tmp_path, folder / ".." / "a"])) == 1
    assert main([str(folder), page]) == 0
    path = tmp_path / "page" / "runs.jsonl"
    whole = path.read_text()
    line = json.loads(whole)
    wrong = [{"metric": "x"}, {"results": {"test_bpc": "1"}}, {"history": [[1]]}, {"seeds": ["a"]}, {"unheard": 1}]
    for text in ["{", "[]", "3", "{}", *(json.dumps({**line, **change}) for change in wrong)]:
        path.write_text(f"{whole}{text}\n")
        capsys.readouterr()
        assert main([page]) == 1
        said = capsys.readouterr().err
        assert "runs.jsonl, line 2" in said and said.count("\n") == 1, text


def test_pictures_go_over_steps_or_minutes(tmp_path):
    """3,600 seconds for 100 steps; a run whose time was not recorded has no curve over it."""
    known, unknown = (
        entry_of(write_run(tmp_path / name, **more), tmp_path)
        for name, more in (("a", {}), ("b", {"train_runtime": None}))
    )
    assert [curve(entry, "step") for entry in (known, unknown)] == [[[50, 1.9], [100, 1.65]]] * 2
    assert curve(known, "minute") == [[30, 1.9], [60, 1.65]] and curve(unknown, "minute") is None
    pictures = []
    for over in ("step", "minute"):
        report(tmp_path / "a", f"--over={over}", tmp_path / "out")
        pictures.append(next((tmp_path / "out").glob("results-*.png")).read_bytes())
    assert pictures[0] != pictures[1]
