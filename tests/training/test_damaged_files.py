"""Damaged files: an error of one line that names the file."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from training.common.errors import UserError
from training.common.files import read_json, read_tensors, read_torch

READERS = {"values.json": read_json, "tensors.safetensors": read_tensors, "state.pt": read_torch}


def write(folder):
    """A whole file for each reader."""
    (folder / "values.json").write_text(json.dumps({"step": 4, "history": [{"step": 3, "loss": 0.5}]}))
    save_file({"0": torch.ones(3, 3)}, folder / "tensors.safetensors")
    torch.save({"state": {0: {"step": torch.tensor(4.0)}}, "scaler": None}, folder / "state.pt")


def damages(content: bytes, chance: random.Random):
    """Cut, empty, random, and with some bytes changed."""
    yield from (b"", content[: len(content) // 2], content[:-1], chance.randbytes(64), b"\0" * 64)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(chance.randrange(1, 5)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("name", READERS)
def test_readers_name_the_file_on_one_line(tmp_path, name):
    write(tmp_path)
    path = tmp_path / name
    READERS[name](path)
    refused = 0
    for content in damages(path.read_bytes(), random.Random(name)):
        path.write_bytes(content)
        try:
            READERS[name](path)
        except UserError as error:
            refused += 1
            assert re.fullmatch(f"'{re.escape(str(path))}' is damaged: [^\n\x1b]+", str(error))
            assert "weights_only" not in str(error)  # no advice to run the code in it
    assert refused >= 5
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"'{path}' is missing")):
        READERS[name](path)
    path.mkdir()
    with pytest.raises(UserError, match=re.escape(f"'{path}' cannot be read")):
        READERS[name](path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "NaN", "[" * 100_000])
def test_json_of_another_kind(tmp_path, text):
    path = tmp_path / "values.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"'{path}' is damaged: ")):
        read_json(path)
