"""Folders with their modelling files, as they are pushed: every head, in processes with and without the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BLOCKS, LOGITS, assert_near, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from kru_hf import KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification, build_char_tokenizer
from kru_hf.scan import unavailable_reason
from training.records.publishing import auto_map, code_files, published_config

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "abcdefghi"
PROMPT = "abc"
BY_TRANSFORMERS = "saved by transformers"
LANGUAGE_MODELS = {
    BY_TRANSFORMERS: {},
    "residual": BLOCKS[2],
    "plain-low-rank": BLOCKS[4],
    "kru_lstm": {"cell_type": "kru_lstm"},
    "kru_gru": {"cell_type": "kru_gru"},
    "kru_janet": {"cell_type": "kru_janet"},
}
CLASSIFIERS = {"sequence": KRUForSequenceClassification, "token": KRUForTokenClassification}
FRAMES = 6

# Arguments: the folder of the models, where the logits go, and whether the package may be found.
ELSEWHERE = """
import json, sys
from pathlib import Path
folder, answer, alone = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "alone"
sys.modules["triton"] = None  # makes every import of it fail
if alone:
    sys.modules["kru_hf"] = None
started, first = [], None
import torch, transformers  # which import packages that look for a library by a program
from safetensors.torch import load_file, save_file
sys.addaudithook(lambda event, args: started.append(args[0]) if event == "subprocess.Popen" else None)
inputs, logits, said, heads = load_file(folder / "inputs.safetensors"), {}, {}, {}
for path in sorted(p for p in folder.iterdir() if p.is_dir()):
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    trained = config.architectures[0]
    for auto in config.auto_map:
        if auto == "AutoConfig":
            continue
        model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        heads.setdefault(path.name, {})[auto] = type(model).__name__
        if type(model).__name__ != trained:
            continue
        values = inputs["frames"] if config.input_size else inputs["ids"]
        with torch.no_grad():
            logits[path.name] = model(**{model.main_input_name: values}).logits.contiguous()
        if trained == "KRUForCausalLM":
            first = first or model
            generate = transformers.pipeline("text-generation", str(path), trust_remote_code=True)
            said[path.name] = generate("abc", max_new_tokens=6, do_sample=False)[0]["generated_text"]
        if trained == "KRUForPianoRoll":
            said[path.name] = model.generate_piano_roll(inputs["frames"][0], num_frames=4, seed=0).int().tolist()
first.generate(inputs["ids"], max_new_tokens=2)  # each model has brought classes of the same names since
scan = sys.modules[type(model).__module__.rpartition(".")[0] + ".scan"]
save_file(logits, answer)
imported = sys.modules.get("kru_hf") is not None
report, programs = scan.backend_report(), [str(program) for program in started]
print(json.dumps({"said": said, "heads": heads, "report": report, "started": programs, "imported": imported}))
"""
WITH_PACKAGE = """
import sys
import kru_hf
from transformers import pipeline
text = pipeline("text-generation", sys.argv[1])("abc", max_new_tokens=6, do_sample=False)
print(repr(text[0]["generated_text"]))
"""


def save_with_code(model, folder: Path) -> None:
    """Save by transformers' own idiom, which finds the files of the code by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (type(model), type(model.config)):
            patch.setattr(cls, "_auto_class", None)  # and again when the context ends
        type(model.config).register_for_auto_class()
        type(model).register_for_auto_class("AutoModelForCausalLM")
        model.save_pretrained(folder)


def push(model, folder: Path) -> None:
    """Write what `training.publish` would put into the repository."""
    model.save_pretrained(folder)
    config = published_config(folder)
    (folder / "config.json").write_bytes(config)
    for path in code_files(auto_map(json.loads(config))):
        shutil.copy(path, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of pushed folders, the inputs beside them, and what the models make of them here."""
    folder = tmp_path_factory.mktemp("pushed")
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(1, 11, (2, 7)), "frames": (torch.rand(2, FRAMES, 88) < 0.1).float()}
    save_file(inputs, folder / "inputs.safetensors")
    tokenizer = build_char_tokenizer(LETTERS)
    logits, said = {}, {}
    for name, options in LANGUAGE_MODELS.items():
        model = tiny_model(**options)
        (save_with_code if name == BY_TRANSFORMERS else push)(model, folder / name)
        tokenizer.save_pretrained(folder / name)
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=6)[0]
        said[name] = tokenizer.decode(ids, skip_special_tokens=True)  # as the pipeline does
        logits[name] = model(input_ids=inputs["ids"]).logits.detach()
    for name, head in CLASSIFIERS.items():
        model = head(tiny_config(num_labels=3)).eval()
        push(model, folder / name)
        logits[name] = model(input_ids=inputs["ids"]).logits.detach()
    piano = KRUForPianoRoll(tiny_config(input_size=88, vocab_size=1, pad_token_id=None)).eval()
    push(piano, folder / "piano")
    logits["piano"] = piano(input_values=inputs["frames"]).logits.detach()
    said["piano"] = piano.generate_piano_roll(inputs["frames"][0], num_frames=4, seed=0).int().tolist()
    return folder, logits, said


def run(code: str, arguments: list[str], cache: Path, cwd: Path, **changes: str) -> str:
    """Last line of what a process of its own prints."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["alone", "package installed"])
def test_every_head_loads_and_generates_from_its_own_code(models, tmp_path, place):
    """Without the package, a compiler or Triton; and with the package at hand, for its native engine alone."""
    folder, logits, said = models
    path = {"PYTHONPATH": str(ROOT)} if place != "alone" else {}
    answer = tmp_path / "logits.safetensors"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = [str(folder), str(answer), place]
    seen = json.loads(run(ELSEWHERE, words, tmp_path / "cache", elsewhere, PATH="", CC="", **path))
    assert seen["said"] == said
    for name, expected in load_file(answer).items():
        assert_near(logits[name], expected, LOGITS)
    assert load_file(answer).keys() == logits.keys()
    assert not seen["started"], "a compiler or another program was started"
    assert not seen["imported"]
    assert "triton: not available" in seen["report"]
    assert ("cpu: available" in seen["report"]) == (place != "alone" and (unavailable_reason("cpu") is None))
    classifiers = {"AutoModelForSequenceClassification": "KRUForSequenceClassification"}
    classifiers |= {"AutoModelForTokenClassification": "KRUForTokenClassification", "AutoModel": "KRUModel"}
    for name in LANGUAGE_MODELS:
        others = {} if name == BY_TRANSFORMERS else classifiers  # transformers lists the head that was saved
        assert seen["heads"][name] == {**others, "AutoModelForCausalLM": "KRUForCausalLM"}
    for name in CLASSIFIERS:
        assert seen["heads"][name] == classifiers
    assert seen["heads"]["piano"] == {"AutoModel": "KRUForPianoRoll"}


@pytest.mark.slow
def test_the_package_loads_a_pushed_folder_without_its_code(models, tmp_path):
    folder, _, said = models
    assert run(WITH_PACKAGE, [str(folder / "residual")], tmp_path / "cache", ROOT) == repr(said["residual"])
