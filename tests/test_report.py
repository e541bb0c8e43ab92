"""The report: figures come from the runs' own files, seeds are averaged, what was not run stays blank."""

import json
import random
import statistics
from pathlib import Path

import pytest

from training.errors import UserError
from training.paper_figures import FIGURES, METRICS, PTB_LARGE, PTB_SMALL
from training.report import BEGIN, END, main
from training.results import Run, factors, find_runs, mean_and_spread, settings
from training.train import main as train

KRU = {"model_type": "kru", "state_size": 1100, "factor_shapes": [[10, 10], [10, 10], [11, 11]], "num_hidden_layers": 1}
LSTM = {"model_type": "kru_baseline", "cell": "lstm", "state_size": 150, "num_hidden_layers": 1}
OPTIONS = {"task": "char_lm", "architecture": "kru", "learning_rate": 0.003, "max_grad_norm": 1.0, "max_steps": 100}


def write_run(folder: Path, config=KRU, data="ptb_char", seed=0, results=True, bpc=1.6, options=None, **others) -> Path:
    """A run's folder as `training.train` leaves it, without weights."""
    folder.mkdir(parents=True)
    if results:
        figures = {
            "validation_bpc": bpc + 0.05,
            "test_bpc": bpc,
            "num_parameters": 113_000,
            "num_recurrent_parameters": 642,
            "train_runtime": 3600.0,
            "steps": 100,
        }
        (folder / "all_results.json").write_text(json.dumps({**figures, **others}))
        history = [{"step": 50, "train_loss": 1.2, "validation_bpc": 1.9}, {"step": 100, "validation_bpc": bpc + 0.05}]
        (folder / "log_history.json").write_text(json.dumps(history))
    (folder / "config.json").write_text(json.dumps(config))
    training = {
        "options": {**OPTIONS, "seed": seed, **(options or {})},
        "dataset": {"name": data, "sha256": "ab" * 32},
        "command": f"accelerate launch -m training.train ptb_char --seed {seed} --output_dir {folder.name}",
        "machine": {"device": "cpu", "processor": "Some CPU", "cores": 2, "threads": 2, "processes": 1},
    }
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def report(*words) -> str:
    """The text of a report that has been written."""
    output = Path(words[-1]) / "RESULTS.md"
    assert main([*map(str, words[:-1]), "--output", str(output)]) == 0
    return output.read_text()


def line_of(text: str, start: str) -> list[str]:
    """The cells of the only table line that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seeds_are_one_row_with_mean_and_spread(tmp_path):
    values = [1.60, 1.62, 1.67]
    runs = [write_run(tmp_path / "runs" / str(seed), seed=seed, bpc=bpc) for seed, bpc in enumerate(values)]
    text = report(*runs, tmp_path / "out")
    cells = line_of(text, "KRU 1100 (10^2·11)")
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert cells == [
        "KRU 1100 (10^2·11)", "113,000", "642", f"{mean + 0.05:.3f} ± {spread:.3f}", f"{mean:.3f} ± {spread:.3f}",
        "3 (0, 1, 2)", "100", "60 min", "2 threads of Some CPU",
    ]  # fmt: skip
    for seed in range(3):
        assert f"training.train ptb_char --seed {seed} " in text
    assert mean_and_spread([1.0]) == (1.0, None)


def test_what_differs_between_rows_is_named(tmp_path):
    write_run(tmp_path / "runs" / "a", config={**KRU, "unitary_loss_coef": 0.1})
    write_run(tmp_path / "runs" / "b", config={**KRU, "unitary_loss_coef": 0.0}, bpc=1.9)
    write_run(
        tmp_path / "runs" / "c", config={**KRU, "unitary_loss_coef": 0.0}, bpc=1.7, options={"max_grad_norm": 0.0}
    )
    text = report(tmp_path / "runs", tmp_path / "out")
    rows = [line for line in text.splitlines() if line.startswith("| KRU 1100")]
    assert [row.split("|")[1].split("), ")[1].strip() for row in rows] == [
        "max_grad_norm=1.0, unitary_loss_coef=0.1",
        "max_grad_norm=0.0, unitary_loss_coef=0.0",
        "max_grad_norm=1.0, unitary_loss_coef=0.0",
    ]


def test_the_same_seed_again_is_no_second_seed(tmp_path):
    for name, bpc in (("a", 1.6), ("b", 1.7)):
        write_run(tmp_path / "runs" / name, bpc=bpc)
    text = report(tmp_path / "runs", tmp_path / "out")
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert line_of(text, "KRU 1100 (10^2·11), same seed again (2)")[5] == "1 (0)"


def test_what_was_not_run_is_blank(tmp_path):
    run = write_run(tmp_path / "runs" / "a", config=LSTM)
    text = report(run, tmp_path / "out")
    assert line_of(text, "Penn Treebank characters, ≈120K")[2:4] == ["", "1.600 (LSTM 150; 113,000 parameters)"]
    for setting in METRICS:
        assert f"## {setting}" in text
        if setting != PTB_SMALL:
            assert line_of(text, setting)[2:4] == ["", ""]
    published = [figure for figure in FIGURES if figure.setting == PTB_LARGE]
    for figure in published:
        assert line_of(text, f"*{figure.name}* (")[3] == ""
    assert {figure.setting for figure in FIGURES} == set(METRICS)
    only = tmp_path / "only"
    assert main([str(run), "--output", str(only / "RESULTS.md"), "--only_runs"]) == 0
    assert PTB_LARGE not in (only / "RESULTS.md").read_text()
    assert [p.name for p in only.glob("*.png")] == ["results-penn-treebank-characters-120k-parameters.png"]


def test_unfinished_runs_are_named_without_figures(tmp_path):
    write_run(tmp_path / "runs" / "a", seed=0)
    write_run(tmp_path / "runs" / "b", seed=1, results=False)
    state = {"step": 70, "history": [{"step": 60, "validation_bpc": 1.8}]}
    checkpoint = tmp_path / "runs" / "b" / "checkpoint-70"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "config.json").write_text(json.dumps(KRU))
    text = report(tmp_path / "runs", tmp_path / "out")
    cells = line_of(text, "KRU 1100 (10^2·11)")
    assert cells[3:7] == ["1.650", "1.600", "1 (0)", "100; 1 not finished (last checkpoint at 70)"]
    (tmp_path / "runs" / "b" / "config.json").unlink()
    (tmp_path / "runs" / "b" / "checkpoint-70" / "trainer_state.json").unlink()
    assert Run.read(tmp_path / "runs" / "b").label == "kru "
    assert line_of(report(tmp_path / "runs", tmp_path / "out"), "kru")[1:7] == ["", "", "", "", "", "1 not finished"]


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
        "char_lm on python_docs": ({"task": "char_lm"}, "python_docs"),
        PTB_SMALL: ({"task": "char_lm"}, "ptb_char"),
        "task not recorded on data not recorded": ({"task": ""}, ""),
    }
    for index, (options, data) in enumerate(cases.values()):
        write_run(tmp_path / f"{index:02}", data=data, options=options)
    assert [run.setting for run in find_runs([tmp_path])] == list(cases)
    large = write_run(tmp_path / "large", num_parameters=418_000)
    assert Run.read(large).setting == PTB_LARGE


def test_seeds_of_before_and_after_a_new_option_are_one_row(tmp_path):
    write_run(tmp_path / "0", config=KRU, options={"task": "char_lm", "seed": 0})
    write_run(tmp_path / "1", config={**KRU, "recurrent_init": "random"}, options={"task": "char_lm", "seed": 1})
    (rows,) = settings(find_runs([tmp_path])).values()
    assert [len(row.runs) for row in rows] == [2]


def test_order_follows_the_metrics_direction(tmp_path):
    for index, accuracy in enumerate((0.9, 0.95, 0.93)):
        results = {"validation_nll_per_frame": 9.0 - accuracy, "validation_accuracy": accuracy}
        config = {**LSTM, "state_size": index}
        write_run(tmp_path / str(index), config=config, data="jsb", options={"task": "unheard of"}, **results)
    (rows,) = settings(find_runs([tmp_path])).values()
    assert [row.label for row in rows] == ["LSTM 0", "LSTM 1", "LSTM 2"]  # an unknown task is judged by its bpc
    assert rows[0].runs[0].metric == ("bpc", False)


def test_labels(tmp_path):
    cases = [
        ({**KRU, "io_rank": 24, "train_factors": False}, "KRU 1100 (10^2·11), rank-24 maps, frozen factors"),
        ({**KRU, "intermediate_size": 96}, "KRU 1100 (10^2·11), feed-forward 96"),
        ({**KRU, "kronecker_terms": 8}, "KRU 1100 (10^2·11), maps of 8 terms"),
        ({**KRU, "model_type": "kru_unitary"}, "strictly unitary KRU 1100 (10^2·11)"),
        ({**KRU, "cell_type": "kru_lstm", "num_hidden_layers": 2}, "Kron-LSTM 1100 (10^2·11), 2 layers"),
        ({**KRU, "cell_type": "kru_janet"}, "Kron-JANET 1100 (10^2·11)"),
        ({**LSTM, "cell": "low_rank", "recurrent_rank": 18}, "low-rank RNN 150, rank 18"),
        ({**LSTM, "recurrent_factor_shapes": [[10, 10], [15, 15]]}, "LSTM 150 (10·15)"),
    ]
    for index, (config, label) in enumerate(cases):
        assert Run.read(write_run(tmp_path / str(index), config=config)).label == label
    assert factors([[2, 2]] * 9) == "2^9"
    assert factors([[3, 4], [4, 3]]) == "3x4·4x3"


def test_output_and_readme_are_files_of_text(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main([str(run), "--output", str(tmp_path)]) == 1
    assert f"output='{tmp_path}' is a folder" in capsys.readouterr().err
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert main([str(run), "--readme", str(tmp_path / "README.md")]) == 1
    assert "README.md' cannot be read: 'utf-8' codec" in capsys.readouterr().err


def test_readme_table_is_replaced_between_its_markers(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    assert main([str(run), "--readme", str(readme), "--only_runs"]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n| task | metric |") and text.endswith(f"|\n{END}\n\nrest\n")
    assert "old" not in text
    assert main([str(run), "--readme", str(readme), "--only_runs"]) == 0
    assert readme.read_text() == text
    capsys.readouterr()
    assert main([str(run), "--markdown", "--only_runs"]) == 0
    assert capsys.readouterr().out.strip() == text.split(BEGIN)[1].split(END)[0].strip()
    for broken in ("no markers", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"):
        readme.write_text(broken)
        assert main([str(run), "--readme", str(readme)]) == 1
        assert "each once" in capsys.readouterr().err
        assert readme.read_text() == broken


def test_paths_that_hold_no_run(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])
    folder = write_run(tmp_path / "runs" / "a")
    assert len(find_runs([folder, tmp_path, folder / ".." / "a"])) == 1
    (folder / "all_results.json").write_text("{")
    assert main([str(folder)]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_released_model_is_a_run_and_is_linked(tmp_path):
    model = write_run(tmp_path / "model_cards" / "kru-ptb-char-120k")
    text = report(model, tmp_path / "model_cards")
    assert line_of(text, "[KRU 1100")[0] == "[KRU 1100 (10^2·11)](kru-ptb-char-120k/)"
    assert "![learning curves: " in text
    text = report(model, write_run(tmp_path / "runs" / "other", seed=1), tmp_path / "model_cards")
    cells = line_of(text, "[KRU 1100")
    assert cells[0].endswith("](kru-ptb-char-120k/)") and cells[5] == "2 (0, 1)"


TINY = ["--max_steps=6", "--eval_steps=3", "--save_steps=3", "--per_device_train_batch_size=2", "--sequence_length=16"]
TINY += ["--sample_length=5", "--report_to=none", "--use_cpu", "--task=char_lm", "--num_threads=1"]


def test_real_runs_without_their_weights(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices(["the ", "state ", "of a ", "unit.\n"], k=400)))
    for seed in (0, 1):
        words = [f"--dataset={text}", f"--output_dir={tmp_path / 'runs' / f's{seed}'}", f"--seed={seed}"]
        assert train([*words, "--architecture=lstm", "--state_size=8", *TINY]) == 0
    figures = [
        json.loads((tmp_path / "runs" / f"s{seed}" / "all_results.json").read_text())["test_bpc"] for seed in (0, 1)
    ]
    for path in tmp_path.glob("runs/*/model.safetensors"):
        path.unlink()
    written = report(tmp_path / "runs", tmp_path / "out")
    cells = line_of(written, "LSTM 8")
    assert cells[4] == f"{statistics.fmean(figures):.3f} ± {statistics.stdev(figures):.3f}"
    assert cells[5:7] == ["2 (0, 1)", "6"]
    assert cells[8]
    assert (
        "accelerate launch -m training.train --dataset=text.txt --output_dir=s1 --seed=1 --architecture=lstm" in written
    )
    assert str(tmp_path) not in written
    assert (tmp_path / "out" / "results-char-lm-on-text-txt.png").read_bytes().startswith(b"\x89PNG")
