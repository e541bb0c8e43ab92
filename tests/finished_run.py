"""A finished run's folder for tests, with made-up results, and edits of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import kru_hf
from kru_hf import KRUConfig, KRUForCausalLM, build_char_tokenizer

TEXT = "The quick brown fox\njumps over the lazy dog. "


def make_run(folder: Path) -> Path:
    """Write what `training.train` leaves in its output folder."""
    torch.manual_seed(0)
    tokenizer = build_char_tokenizer(TEXT)
    config = KRUConfig(vocab_size=len(tokenizer), state_size=64, factor_size=4, block_type="plain", pad_token_id=0)
    model = KRUForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = {
        "validation_loss": 1.25,
        "validation_bpc": 1.75,
        "test_loss": 1.5,
        "test_bpc": 2.125,
        "num_parameters": model.num_parameters(),
        "num_recurrent_parameters": model.num_recurrent_parameters(),
        "train_runtime": 12.5,
        "train_tokens_per_second": 1000.0,
    }
    run = {
        "data": {"name": "python_docs", "sha256": "ab" * 32, "train_characters": 1000},
        "versions": {"kru_hf": kru_hf.__version__},
        "machines": [{"device": "cpu", "processor": "Some CPU", "threads": 2, "processes": 1}],
        "command": "accelerate launch -m training.train",
    }
    recipe = {"task": "char_lm", "seed": 0, "max_steps": 10, "learning_rate": 0.005, "model": None}
    for name, value in {"all_results": results, "run": run}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "history.csv").write_text("step,seconds,train_loss,learning_rate,validation_bpc\n5,1.5,2.5,0.1,1.75\n")
    return folder


def edit(path: Path, **values: object) -> None:
    """Change or (with None) remove fields of a JSON file or a recipe."""
    text = path.read_text()
    content = {**(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)), **values}
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, for tests that only read it."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
