"""A finished run's folder for tests, with made-up results: and edits of it."""

import json
from pathlib import Path

import torch

import kru_hf
from kru_hf import KRUConfig, KRUForCausalLM, build_char_tokenizer

TEXT = "The quick brown fox\njumps over the lazy dog. "


def make_run(folder: Path) -> Path:
    """Write what `training.train` leaves in its output folder."""
    torch.manual_seed(0)
    tokenizer = build_char_tokenizer(TEXT)
    config = KRUConfig(vocab_size=len(tokenizer), state_size=64, factor_size=4, wiring="plain", pad_token_id=0)
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
    training = {
        "options": {"task": "char_lm", "seed": 0, "max_steps": 10, "learning_rate": 0.005, "model": None},
        "dataset": {"name": "python_docs", "sha256": "ab" * 32, "train_characters": 1000},
        "versions": {"kru_hf": kru_hf.__version__},
    }
    for name, value in {"all_results": results, "training": training, "log_history": []}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def edit(path: Path, **values: object) -> None:
    """Change or (with None) remove fields of a JSON file."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
