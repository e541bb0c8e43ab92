"""A saved folder with its modelling files, in processes with and without the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import WIRINGS, tiny_model

from kru_hf import KRUConfig, KRUForCausalLM, build_char_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "abc"

WITHOUT_PACKAGE = """
import sys
sys.modules["kru_hf"] = None  # makes every import of it fail
from transformers import AutoModelForCausalLM, pipeline
text = pipeline("text-generation", sys.argv[1], trust_remote_code=True)("abc", max_new_tokens=6, do_sample=False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(repr(text[0]["generated_text"]))
"""
WITH_PACKAGE = """
import sys
import kru_hf
from transformers import pipeline
text = pipeline("text-generation", sys.argv[1])("abc", max_new_tokens=6, do_sample=False)
print(repr(text[0]["generated_text"]))
"""


@pytest.fixture
def registered():
    """Auto classes of the pushed code, taken back after the test: other tests save without files."""
    KRUConfig.register_for_auto_class()
    KRUForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    yield
    KRUConfig._auto_class = KRUForCausalLM._auto_class = None


def run(code, folder, cache, cwd):
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("wiring", [WIRINGS[0], WIRINGS[3]], ids=["residual", "plain-low-rank"])
def test_folder_with_its_code(wiring, registered, tmp_path):
    folder = tmp_path / "model"
    model, tokenizer = tiny_model(**wiring), build_char_tokenizer("abcdefghi")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "modeling_kru.py").exists() and (folder / "scan_torch.py").exists()
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=6)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)  # as the pipeline does
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(WITHOUT_PACKAGE, folder, tmp_path / "cache", elsewhere) == repr(expected)
    if wiring is WIRINGS[0]:
        assert run(WITH_PACKAGE, folder, tmp_path / "cache", ROOT) == repr(expected)
