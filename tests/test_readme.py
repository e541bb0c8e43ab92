"""Snippets run: the Python of README.md and of the cards, and the options that their commands name."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from kru_hf import KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification
from kru_hf.configuration_kru import KRUConfig
from training.evaluate import EvaluateOptions
from training.loop.arguments import parse_arguments
from training.options.data import DataOptions
from training.options.parser import parse_words
from training.records.cards import render_card
from training.records.publishing import PublishOptions

ROOT = Path(__file__).parent.parent
LEARNT = 0.3  # nats a character that the fine-tune of README.md gains on a text of few words, at the least
README = ROOT / "README.md"
RELEASED = sorted((ROOT / "model_cards").glob("*/README.md"))
TEXTS = [README, *sorted((ROOT / "training").rglob("*.md")), *RELEASED]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(code: str, cwd: Path, home: Path) -> str:
    """Run a snippet as a reader would: in a process of its own, from that folder, with no network."""
    changes = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **changes}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def score(folder: Path, text: str) -> float:
    """Nats a character of a trained folder."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]  # (1, L)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.slow
def test_python_of_the_readme(tmp_path):
    """All blocks in their order in one process: a later one may use what an earlier one made."""
    released = ROOT / "model_cards" / "kru-python-docs"
    if not (released / "model.safetensors").exists():
        released = make_run(tmp_path / "released")
    place = tmp_path / "checkout"
    (place / "model_cards").mkdir(parents=True)
    (place / "model_cards" / "kru-python-docs").symlink_to(released)
    text = "The fox jumps over the lazy dog.\n" * 100
    (place / "my_text.txt").write_text(text)
    found = blocks(README.read_text(), "python")
    assert found
    assert run("\n".join(found), place, tmp_path / "home").strip()
    assert score(place / "runs" / "fine-tuned", text) < score(released, text) - LEARNT


@pytest.mark.slow
def test_python_of_the_released_cards(tmp_path):
    """In one process, to be quick."""
    code = [f"print('# {path.parent.name}')\n{blocks(path.read_text(), 'python')[0]}" for path in RELEASED]
    said = run("\n".join(code), ROOT, tmp_path).split("# ")[1:]
    assert len(said) == len(RELEASED) and all(len(text.splitlines()) > 1 for text in said)


HEADS = {
    "token ids": (KRUForSequenceClassification, {"vocab_size": 9}),
    "frames": (KRUForTokenClassification, {"vocab_size": 1, "input_size": 3}),
    "piano roll": (KRUForPianoRoll, {"vocab_size": 1, "input_size": 88}),
}


@pytest.mark.slow
def test_python_of_rendered_cards(tmp_path):
    """The card that a run leaves in its folder, for every head; in one process, to be quick."""
    code = []
    language = make_run(tmp_path / "language")
    for name, (head, options) in HEADS.items():
        folder = Path(shutil.copytree(language, tmp_path / name.replace(" ", "-")))
        head(KRUConfig(state_size=16, factor_size=4, hidden_size=8, num_labels=3, **options)).save_pretrained(folder)
    for folder in sorted(path for path in tmp_path.iterdir()):
        (snippet,) = blocks(render_card(folder), "python")
        assert f'repo = "./{folder.name}"' in snippet
        assert str(tmp_path) not in snippet
        code.append(snippet)
    said = run("\n".join(["import kru_hf", *code]), tmp_path, tmp_path.parent / "home")
    assert "The " in said
    assert said.count("tensor(") == 2


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_options_that_exist(path):
    """`-m training.…` in texts: a renamed option would leave them behind."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    for name, rest in re.findall(r"-m training\.(train_lightning|train|evaluate|publish)\b([^`\n…#|]*)", text):
        words = [re.sub(r"[()\[\]]", "", word) for word in shlex.split(rest.split("…")[0])]
        words = [word for word in words if word not in ("", "--help")]
        if name.startswith("train"):
            parse_arguments(words)
        else:
            options = {"evaluate": [EvaluateOptions, DataOptions], "publish": [PublishOptions]}[name]
            parse_words(options, words, f"training.{name}") if words else None
