"""A report made of an earlier one: rows of runs whose folders are gone stay, given runs take the place of their own."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from test_report import KRU, LSTM, line_of, report
from test_report import write_run as write_run_with_curve

from training.earlier_report import Line, output_dir
from training.paper_figures import PTB_SMALL
from training.report import main

CARDS = Path(__file__).parent.parent / "model_cards"
LABEL = "KRU 1100 (10^2·11)"
PICTURE = "results-penn-treebank-characters-120k-parameters.png"


def write_run(folder: Path, *words, **others) -> Path:
    """A run's folder without learning curve, which there is no picture of."""
    write_run_with_curve(folder, *words, **others)
    (folder / "log_history.json").unlink(missing_ok=True)
    return folder


def names(text: str, start: str = "") -> list[str]:
    """First cells of the own rows below the headings, in their order."""
    found = re.findall(r"^\| (.+?) \|", text.partition("\n## ")[2], re.MULTILINE)
    return [name.strip() for name in found if not re.match(r"model$|---|\*", name) and name.startswith(start)]


def commands(text: str) -> list[str]:
    """Folders of the commands, in their order."""
    return [output_dir(line) for line in text.splitlines() if line.startswith("accelerate launch")]


def again(*runs: Path, out: Path) -> str:
    """The report in `out` made anew from itself and the runs."""
    return report(out / "RESULTS.md", *runs, out)


def test_a_report_alone_makes_itself_again(tmp_path):
    for seed in (0, 1):
        write_run_with_curve(tmp_path / "runs" / str(seed), seed=seed, bpc=1.6 + seed / 9)
    write_run(tmp_path / "runs" / "lstm", config=LSTM, data="python_docs", bpc=0.0004)
    write_run(tmp_path / "runs" / "begun", config=LSTM, seed=3, results=False)
    text = report(tmp_path / "runs", tmp_path / "out")
    pictures = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    shutil.rmtree(tmp_path / "runs")
    assert again(out=tmp_path / "out") == text
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.png")} == pictures != {}


def test_the_committed_report_is_taken_over_whole(tmp_path):
    text = (CARDS / "RESULTS.md").read_text()
    written = report(CARDS / "RESULTS.md", tmp_path)
    assert names(written) == [re.sub(r"^\[(.+)\]\(.+/\)$", r"\1", name) for name in names(text)] != []
    assert commands(written) == commands(text) != []
    assert "![learning curves" not in written  # its pictures are not beside the new one


def test_published_figures_are_not_taken_over(tmp_path):
    text = report(write_run(tmp_path / "a"), tmp_path / "out")
    path = tmp_path / "out" / "RESULTS.md"
    path.write_text(text.replace("*LSTM 150* (paper", "*LSTM 151* (some paper"))
    assert again(out=tmp_path / "out") == text


def test_runs_take_the_place_of_their_rows(tmp_path):
    for size, bpc in ((100, 1.5), (150, 1.6), (200, 1.7)):
        write_run(tmp_path / "runs" / str(size), config={**LSTM, "state_size": size}, bpc=bpc)
    report(tmp_path / "runs", tmp_path / "out")
    shutil.rmtree(tmp_path / "runs")
    changed = write_run(tmp_path / "runs" / "150", config=LSTM, bpc=1.4)
    text = again(changed, write_run(tmp_path / "runs" / "kru", bpc=1.65), out=tmp_path / "out")
    assert names(text) == ["LSTM 150", "LSTM 100", LABEL, "LSTM 200"]
    assert line_of(text, "LSTM 150")[3:5] == ["1.450", "1.400"]
    assert commands(text) == ["150", "100", "kru", "200"]
    assert line_of(text, PTB_SMALL)[2:4] == [
        f"1.650 ({LABEL}; 113,000 parameters)",
        "1.400 (LSTM 150; 113,000 parameters)",
    ]
    assert again(changed, tmp_path / "runs" / "kru", out=tmp_path / "out") == text


def test_a_command_gives_way_to_that_of_the_same_folder(tmp_path):
    run = write_run(tmp_path / "a", config=LSTM)
    report(run, write_run(tmp_path / "b"), tmp_path / "out")
    training = json.loads((run / "training.json").read_text())
    training["command"] = "accelerate launch -m training.train other --output_dir=a"
    (run / "training.json").write_text(json.dumps(training))
    text = again(run, out=tmp_path / "out")
    assert "training.train other --output_dir=a" in text
    assert sorted(commands(text)) == ["a", "b"]
    # Another folder is another run.
    training["command"] = "accelerate launch -m training.train other --output_dir=c"
    (run / "training.json").write_text(json.dumps(training))
    assert sorted(commands(again(run, out=tmp_path / "out"))) == ["a", "b", "c"]


def test_a_row_keeps_what_sets_it_apart_from_siblings_that_are_gone(tmp_path):
    for rate in (0.1, 0.2, 0.3):
        write_run(tmp_path / "runs" / str(rate), config=LSTM, bpc=1 + rate, options={"learning_rate": rate})
    before = report(tmp_path / "runs", tmp_path / "out")
    for rate in (0.1, 0.3):
        shutil.rmtree(tmp_path / "runs" / str(rate))
    assert again(tmp_path / "runs", out=tmp_path / "out") == before
    text = again(
        write_run(tmp_path / "new" / "0.2", config=LSTM, bpc=1.35, options={"learning_rate": 0.2}), out=tmp_path / "out"
    )
    assert names(text) == [f"LSTM 150, learning_rate={rate}" for rate in (0.1, 0.3, 0.2)]
    assert line_of(text, "LSTM 150, learning_rate=0.2")[4] == "1.350"
    other = write_run(tmp_path / "runs" / "0.4", config=LSTM, bpc=1.0, options={"learning_rate": 0.4})
    assert names(again(other, out=tmp_path / "out")) == ["LSTM 150", *names(text)]


def test_a_row_without_what_sets_it_apart_is_that_run_whose_figure_it_has(tmp_path):
    """It stood alone: its label names no rate, and of the runs that are given now one or none is it."""
    for rate in (0.1, 0.2, 0.3):
        write_run(tmp_path / "runs" / str(rate), config=LSTM, bpc=1 + rate, options={"learning_rate": rate})
    report(tmp_path / "runs" / "0.2", tmp_path / "out")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "out" / "RESULTS.md", tmp_path / "other")
    rates = [f"LSTM 150, learning_rate={rate}" for rate in (0.1, 0.2, 0.3)]
    assert names(again(tmp_path / "runs", out=tmp_path / "out")) == rates
    text = again(tmp_path / "runs" / "0.1", tmp_path / "runs" / "0.3", out=tmp_path / "other")
    assert names(text) == [rates[0], "LSTM 150", rates[2]]


def test_seeds_decide_which_of_two_rows_stays(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "runs" / str(seed), seed=seed, bpc=1.6 + seed / 10, steps=100 + seed)
    text = report(tmp_path / "runs", tmp_path / "out")
    # One of its runs is given, as a released model is: the row of all three stays, and so does the table of README.md.
    assert again(tmp_path / "runs" / "1", out=tmp_path / "out") == text
    # The same seed from another folder is another run.
    elsewhere = write_run(tmp_path / "elsewhere", seed=1, bpc=1.9, steps=101)
    text = again(elsewhere, out=tmp_path / "out")
    assert [line.split(" | ")[5] for line in text.splitlines() if line.startswith(f"| {LABEL}")] == [
        "3 (0, 1, 2)",
        "1 (1)",
    ]
    # All the seeds and one more: the earlier row is part of the new one.
    write_run(tmp_path / "runs" / "3", seed=3, bpc=1.9, steps=103)
    report(*(tmp_path / "runs" / str(seed) for seed in (0, 1)), tmp_path / "out")
    assert line_of(again(tmp_path / "runs", out=tmp_path / "out"), LABEL)[5] == "4 (0, 1, 2, 3)"
    # Other seeds: both.
    report(tmp_path / "runs" / "0", tmp_path / "out")
    other = write_run(tmp_path / "runs" / "4", seed=4)
    assert names(again(other, out=tmp_path / "out")) == [LABEL, LABEL]


def test_the_same_seed_again_stays_a_row_of_its_own(tmp_path):
    for name, bpc in (("a", 1.6), ("b", 1.7)):
        write_run(tmp_path / "runs" / name, bpc=bpc)
    text = report(tmp_path / "runs", tmp_path / "out")
    assert again(tmp_path / "runs", out=tmp_path / "out") == text
    assert names(again(tmp_path / "runs" / "b", out=tmp_path / "out")) == names(text)
    assert names(text) == [LABEL, f"{LABEL}, same seed again (2)"]
    text = again(write_run(tmp_path / "c", bpc=1.8), out=tmp_path / "out")
    assert names(text) == [LABEL, f"{LABEL}, same seed again (2)", LABEL]


def test_rows_of_unfinished_runs_give_way_to_the_same_runs_alone(tmp_path):
    begun = write_run(tmp_path / "begun", config=LSTM, results=False)
    (begun / "config.json").unlink()
    text = report(begun, write_run(tmp_path / "other", config=LSTM, seed=1), tmp_path / "out")
    assert again(begun, out=tmp_path / "out") == text
    assert names(again(tmp_path / "other", out=tmp_path / "out"), "kru") == ["kru"]
    elsewhere = write_run(tmp_path / "elsewhere", config=LSTM, seed=2, results=False)
    (elsewhere / "config.json").unlink()
    text = again(elsewhere, out=tmp_path / "out")
    assert names(text) == ["LSTM 150", "kru", "kru"]
    shutil.rmtree(begun)
    shutil.rmtree(elsewhere)
    write_run(elsewhere, config=LSTM, seed=2)
    write_run(begun, config=LSTM)
    text = again(begun, tmp_path / "other", elsewhere, out=tmp_path / "out")
    assert names(text) == ["LSTM 150"]
    assert line_of(text, "LSTM 150")[5:7] == ["3 (0, 1, 2)", "100"]


def test_a_run_that_has_not_finished_takes_no_figures_away(tmp_path):
    report(write_run(tmp_path / "a", bpc=1.6), tmp_path / "out")
    text = again(write_run(tmp_path / "once more" / "a", results=False), out=tmp_path / "out")
    assert [line.split(" | ")[4] for line in text.splitlines() if line.startswith(f"| {LABEL}")] == ["1.600", ""]


def test_order_follows_the_metrics_direction(tmp_path):
    def pixels(name: str, **figures) -> Path:
        config = {**LSTM, "state_size": int(name)}
        figures = {"validation_accuracy": None, "test_accuracy": None, **figures}
        return write_run(tmp_path / name, config=config, data="digits", options={"task": "pixel_mnist"}, **figures)

    earlier = [
        pixels("1", validation_accuracy=0.9),
        pixels("2", test_accuracy=0.8),
        pixels("3"),
        pixels("4", validation_accuracy=0.70042),
        pixels("5", validation_accuracy=0.70041),  # printed as the one before: the two stay in their order
    ]
    report(*earlier, tmp_path / "out")
    new = [
        pixels("6", validation_accuracy=0.95),
        pixels("7", test_accuracy=0.85),
        pixels("8", validation_accuracy=0.5),
        pixels("9"),
    ]
    text = again(*new, earlier[3], out=tmp_path / "out")
    assert names(text) == [f"LSTM {size}" for size in (6, 1, 7, 2, 4, 5, 8, 3, 9)]
    assert "Accuracy, higher is better." in text
    assert line_of(text, "pixel_mnist on digits")[3] == "0.9500 validation (LSTM 6; 113,000 parameters)"


def test_overview_takes_figures_as_printed_and_tells_krus_by_name(tmp_path, capsys):
    settings = {"python_docs": "char_lm on python_docs", "other": "char_lm on other"}
    configs = [
        {**KRU, "cell_type": "kru_lstm"},
        {**KRU, "cell_type": "kru_gru"},
        {**KRU, "model_type": "kru_unitary"},
        LSTM,
    ]
    for index, config in enumerate(configs):
        write_run(tmp_path / "runs" / str(index), config=config, data="python_docs", bpc=1.5 + index / 10)
    for seed in (0, 1):
        options = {"learning_rate": 0.1}
        write_run(tmp_path / "runs" / f"s{seed}", data="other", seed=seed, bpc=1e-4 + 5e-5 * seed, options=options)
    write_run(tmp_path / "runs" / "sibling", data="other", bpc=2.0, test_bpc=None, config=LSTM)
    write_run(tmp_path / "runs" / "third", data="other", bpc=3.0)
    text = report(tmp_path / "runs", tmp_path / "out")
    shutil.rmtree(tmp_path / "runs")
    for heading in settings.values():
        assert line_of(again(out=tmp_path / "out"), heading) == line_of(text, heading)
    kron, strict = line_of(text, settings["python_docs"])[2:4]
    assert kron.startswith("1.500 (Kron-LSTM") and strict.startswith("1.700 (strictly unitary KRU")
    assert line_of(text, settings["other"])[2:4] == [
        f"0.00013 ± 4e-05 ({LABEL}; 113,000 parameters)",
        "2.050 validation (LSTM 150; 113,000 parameters)",
    ]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results -->\n<!-- /results -->\n")
    earlier = str(tmp_path / "out" / "RESULTS.md")
    assert main([earlier, "--readme", str(readme), "--only_runs"]) == 0
    capsys.readouterr()
    assert main([earlier, "--markdown", "--only_runs"]) == 0
    printed = capsys.readouterr().out.strip()
    assert readme.read_text() == f"<!-- results -->\n{printed}\n<!-- /results -->\n"
    assert printed.splitlines()[2:] == [line for line in text.splitlines() if line.startswith("| char_lm on")]
    assert main([earlier, "--only_runs"]) == 0
    assert names("\n" + capsys.readouterr().out) == names(text)


def test_links_to_released_models(tmp_path):
    model = write_run(tmp_path / "cards" / "model", config={**KRU, "factor_shapes": [[2, 2]]})
    text = report(model, write_run(tmp_path / "lstm", config=LSTM), tmp_path / "cards")
    link = "[KRU 1100 (2)](model/)"
    assert names(text, "[") == [link] and names(text, "LSTM") == ["LSTM 150"]
    assert again(out=tmp_path / "cards") == text
    assert again(model, out=tmp_path / "cards") == text
    assert names(report(tmp_path / "cards" / "RESULTS.md", tmp_path / "elsewhere"), "KRU") == ["KRU 1100 (2)"]
    shutil.rmtree(model)
    assert names(again(out=tmp_path / "cards"), "KRU") == ["KRU 1100 (2)"]


def test_a_folder_that_holds_another_model_by_now_is_the_new_rows(tmp_path):
    command = "accelerate launch -m training.train --output_dir runs/"
    for name, bpc in (("old", 1.6), ("new", 1.5)):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        model = write_run(tmp_path / "model", bpc=bpc)
        record = json.loads((model / "training.json").read_text())
        (model / "training.json").write_text(json.dumps({**record, "command": command + name}))
        text = again(model, out=tmp_path) if name == "new" else report(model, tmp_path)
    assert names(text) == [f"[{LABEL}](model/)", LABEL] and commands(text) == ["runs/new", "runs/old"]


def test_a_picture_stays_as_long_as_no_row_is_new(tmp_path):
    """It has the curves of rows whose runs are gone, which cannot be drawn again."""
    for name, bpc in (("a", 1.5), ("b", 1.6)):
        write_run_with_curve(tmp_path / name, config=LSTM, bpc=bpc)
    report(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    both = (tmp_path / "out" / PICTURE).read_bytes()
    assert f"]({PICTURE})" in again(tmp_path / "a", out=tmp_path / "out")
    assert (tmp_path / "out" / PICTURE).read_bytes() == both
    shutil.rmtree(tmp_path / "a")
    write_run_with_curve(tmp_path / "a", config=LSTM, bpc=1.4)
    again(tmp_path / "a", out=tmp_path / "out")
    assert (tmp_path / "out" / PICTURE).read_bytes() != both


def test_pictures(tmp_path):
    report(write_run_with_curve(tmp_path / "a"), tmp_path / "out")
    picture = tmp_path / "out" / PICTURE
    drawn = picture.read_bytes()
    assert f"]({PICTURE})" in again(out=tmp_path / "out")
    assert picture.read_bytes() == drawn
    assert f"]({PICTURE})" in again(write_run_with_curve(tmp_path / "b", config=LSTM), out=tmp_path / "out")
    other = picture.read_bytes()
    assert other != drawn
    assert f"]({PICTURE})" in again(write_run(tmp_path / "c", config={**LSTM, "state_size": 1}), out=tmp_path / "out")
    assert picture.read_bytes() == other
    picture.unlink()
    assert "![learning curves" not in again(out=tmp_path / "out")


def test_two_reports_and_a_row_that_both_have(tmp_path):
    runs = [write_run(tmp_path / str(size), config={**LSTM, "state_size": size}) for size in (1, 2, 3)]
    report(*runs[:2], tmp_path / "a")
    report(*runs[1:], tmp_path / "b")
    text = report(tmp_path / "a" / "RESULTS.md", tmp_path / "b" / "RESULTS.md", tmp_path / "out")
    assert names(text) == ["LSTM 1", "LSTM 2", "LSTM 3"]
    assert commands(text) == ["1", "2", "3"]


def test_what_training_report_did_not_write_is_refused(tmp_path, capsys):
    report(write_run(tmp_path / "a"), tmp_path / "out")
    path = tmp_path / "out" / "RESULTS.md"
    text = path.read_text()
    own = text.partition(f"## {PTB_SMALL}")[2]
    head = (own, own.replace("| model | parameters", "| model | size", 1))
    broken = {
        "does not begin with '# Results": text.removeprefix("# Results"),
        f"section {PTB_SMALL!r}: the head of its table is": text.replace(*head),
        "is better": text.replace("Bits per character, lower is better.", ""),
        "a row of 8 cells, not 9": text.replace(f"| {LABEL} | 113,000", f"| {LABEL}"),
        "is no number": text.replace("| 1.600 |", "| good |"),
        "not one block of commands": text.replace("\n```\n", "\n", 1),
        "cannot be read": None,
    }
    for message, words in broken.items():
        path.write_bytes(b"\xff\xfe" if words is None else words.encode())
        before = path.read_bytes()
        assert main([str(path), "--output", str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error and repr(str(path)) in error
        assert path.read_bytes() == before
    path.unlink()
    assert main([str(path)]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_rows_of_which_the_command_is_not_known(tmp_path):
    """There are more commands than runs: a row gives way to one with its very figures, and all commands stay."""
    runs = [write_run(tmp_path / name, config=LSTM, bpc=bpc) for name, bpc in (("a", 1.5), ("b", 1.6))]
    text = report(*runs, tmp_path / "out")
    more = text.replace("```bash\n", "```bash\naccelerate launch -m training.train --output_dir c\n")
    (tmp_path / "out" / "RESULTS.md").write_text(more)
    training = json.loads((runs[0] / "training.json").read_text())
    training["command"] = "accelerate launch -m training.train other --output_dir=a"
    (runs[0] / "training.json").write_text(json.dumps(training))
    text = again(runs[0], write_run(tmp_path / "d", config=LSTM, bpc=1.7), out=tmp_path / "out")
    assert re.findall(r"^\| LSTM 150.*(1\.\d00) \| 1 \(0\)", text, re.MULTILINE) == ["1.500", "1.600", "1.700"]
    assert sorted(commands(text)) == ["a", "b", "c", "d"]


def test_cells_of_a_row(tmp_path):
    label = r"model 8, data=a\|b, shape=[[2, 2], [3, 3]], same seed again (2)"
    words = ("x --output_dir=a", "x --output_dir 'b c'", "x --output_dir '")
    line = Line(
        label, "1", "1", "", "1e-05 ± 2e-06", "2 (0, -1)", "2,639 – 3,480; 1 not finished", "", "", False, words
    )
    assert (line.plain, line.number_of_runs, line.folders) == ("model 8", 3, {"a", "b c"})
    assert replace(line, model="model 8, same seed again (2)").plain == "model 8"
    assert line.order(True) == (False, -1e-05)
    report(write_run(tmp_path / "a", options={"wiring": "p|q"}), write_run(tmp_path / "c"), tmp_path)
    assert again(out=tmp_path) == again(tmp_path / "a", out=tmp_path)
