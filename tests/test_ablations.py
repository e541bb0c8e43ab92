"""The ablation scripts: every command that they give is one that training accepts, and the report comes at the end."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.records.runs import entry_of, find_runs, settings

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "training" / "ablations").glob("*.sh") if path.name != "common.sh")
# Stands where `accelerate` would be found: notes its arguments, and leaves the record that a finished run leaves.
RECORDER = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "clip-0-1" in folder.name:
    sys.exit(1)
folder.mkdir(parents=True)
seed = words[words.index("--seed") + 1] if "--seed" in words else "0"
options = {{"task": "char_lm", "seed": int(seed), "name": folder.name.removesuffix("-" + seed)}}
(folder / "recipe.yaml").write_text("".join(f"{{name}}: {{value}}\\n" for name, value in options.items()))
(folder / "run.json").write_text(json.dumps({{"data": {{"name": "text"}}}}))
(folder / "all_results.json").write_text(json.dumps({{"validation_bpc": 2.0 + int(seed)}}))
"""
# Stands where `python` would be found: notes the words of the report that comes at the end.
REPORTER = """#!/bin/sh
echo "$*" > report.txt
"""


def tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def call(script: str, checkout: Path, *words: str) -> list[list[str]]:
    """Run an ablation in a checkout that holds the scripts alone; the commands that it gave, of all calls so far."""
    tools, copies = checkout / "tools", checkout / "training" / "ablations"
    if not tools.exists():
        tools.mkdir()
        shutil.copytree(ROOT / "training" / "ablations", copies)
        tool(tools / "accelerate", RECORDER.format(python=sys.executable))
        tool(tools / "python", REPORTER)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(copies / script), *words]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (checkout / "calls.jsonl").read_text().splitlines()]


def name_of(words: list[str]) -> str:
    return words[words.index("--output_dir") + 1].rsplit("/", 1)[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_is_accepted(script, tmp_path):
    calls = call(script.name, tmp_path, "--max_steps", "7")
    assert len({name_of(words) for words in calls}) == len(calls) > 2
    for words in calls:
        assert words[:4] == ["launch", "-m", "training.train", "training/recipes/char_lm.yaml"]
        arguments = parse_arguments([str(ROOT / words[3]), *words[4:]])
        assert (arguments.run.max_steps, arguments.run.evaluate_test) == (7, False)
        if arguments.run.seed == 0:
            model = build_model("causal_lm", arguments.model, vocab_size=99, pad_token_id=0)
            assert model.num_parameters() <= (arguments.model.parameter_budget or math.inf)
    out = f"runs/ablations/{script.stem}-char_lm-max_steps-7"
    expected = f"-m training.report {out} --only_runs --folder {out}"
    assert (tmp_path / "report.txt").read_text().strip() == expected


@pytest.mark.slow
def test_finished_runs_are_not_made_again_and_failed_ones_do_not_stop_the_rest(tmp_path):
    assert len(call("clipping.sh", tmp_path)) == 18
    again = call("clipping.sh", tmp_path)[18:]
    assert [name_of(words) for words in again] == ["soft-0-clip-0-1", "soft-0.1-clip-0-1"]


def test_another_recipe_and_options_for_every_run(tmp_path):
    words = call("readout_norm.sh", tmp_path, "training/recipes/ptb_char.yaml", "--dataset", "my data")[0]
    assert words[3] == "training/recipes/ptb_char.yaml"
    assert "runs/ablations/readout_norm-ptb_char-dataset-my-data/norm-true-0" in words
    arguments = parse_arguments([str(ROOT / "training" / "recipes" / "ptb_char.yaml"), *words[4:]])
    assert (arguments.data.dataset, arguments.model.readout_norm) == ("my data", True)


def test_folders_of_long_options_are_names_and_differ(tmp_path):
    folders = set()
    for last in ("a", "b"):
        words = call("readout_norm.sh", tmp_path, "--dataset", f"{'x' * 300}{last}")[-1]
        folders.add(words[words.index("--output_dir") + 1].split("/")[2])
    assert len(folders) == 2 and all(len(name) < 256 for name in folders)


def test_runs_of_an_ablation_are_rows_of_three_seeds(tmp_path):
    call("carried_state.sh", tmp_path)
    runs = find_runs([tmp_path / "runs" / "ablations" / "carried_state-char_lm"])
    ((first, second),) = settings(entry_of(run, tmp_path) for run in runs).values()
    assert len(first.entries) == len(second.entries) == 3
    assert {first.label.split(", ")[-1], second.label.split(", ")[-1]} == {"name=carry-true", "name=carry-false"}
