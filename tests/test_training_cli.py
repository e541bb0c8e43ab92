"""The commands as a user types them: a trained folder, its evaluation, a run that starts from it, and bad input."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_run import edit
from helpers import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from kru_hf import KRUForCausalLM, scan, scan_triton
from kru_hf.cells import CELLS
from training.common.errors import UserError
from training.evaluate import main as evaluate
from training.loop.arguments import parse_arguments
from training.models.build import build_model, using_backend
from training.options.fields import MAX_SEED
from training.records.run_record import read_options
from training.train import main

ROOT = Path(__file__).parent.parent
TINY = ["--state_size=24", "--factor_shapes=4x4,6x6", "--block_type=plain", "--max_steps=6", "--eval_steps=3"]
TINY += ["--save_steps=3", "--per_device_train_batch_size=2", "--sequence_length=16", "--sample_length=30", "--use_cpu"]


def corpus(path: Path, words: list[str], seed: int = 0) -> Path:
    path.write_text("".join(random.Random(seed).choices(words, k=400)))
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data") / "corpus.txt", ["the ", "state ", "of a ", "unit.\n"])


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([f"--dataset={text_file}", f"--output_dir={folder}", *TINY, "--report_to=none"]) == 0
    return folder


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def command(module: list[str], words: list[str], **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *module, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_launcher_recipe_and_last_lines(text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: {text_file}\nlearning_rate: 1e-2\n")
    words = [str(recipe), *TINY, f"--output_dir={tmp_path / 'run'}", "--state_size=36", "--factor_shapes=6x6,6x6"]
    done = command(["-m", "accelerate.commands.launch", "--cpu", "-m", "training.train"], words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"folder: {tmp_path / 'run'}"
    assert any(line.startswith("validation: ") and "bpc" in line for line in lines)
    assert any(line.startswith("test: ") and "bpc" in line for line in lines)
    assert "sample:" in lines
    assert "characters/s" in done.stderr
    assert "BPC" in done.stderr
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    record = read_options(tmp_path / "run" / "recipe.yaml")
    assert (record["state_size"], record["learning_rate"]) == (36, 0.01)


@pytest.mark.slow
def test_unknown_option_ends_with_one_line():
    done = command(["-m", "training.train"], ["--lerning_rate", "1"])
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1] == "error: unknown option '--lerning_rate' (did you mean 'learning_rate'?)"
    )
    assert "Traceback" not in done.stderr


def test_the_largest_seed_trains(text_file, tmp_path):
    words = [f"--dataset={text_file}", f"--output_dir={tmp_path / 'run'}", *TINY, f"--seed={MAX_SEED}"]
    assert main(words) == 0
    assert read_options(tmp_path / "run" / "recipe.yaml")["seed"] == MAX_SEED


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU the triton engine could use."""
    usable = scan.ENGINES["triton"]._replace(unavailable_reason=lambda cell: None)
    monkeypatch.setitem(scan.ENGINES, "triton", usable)
    monkeypatch.setattr(scan_triton, "is_interpreted", lambda: False)


@pytest.mark.parametrize(("engine", "device"), [("cpu", "cuda"), ("triton", "cpu")])
def test_an_engine_runs_on_its_own_device_alone(engine, device, gpu):
    model = KRUForCausalLM(tiny_config())
    with (
        pytest.raises(UserError, match=f"backend='{engine}' cannot run on the device '{device}'"),
        using_backend(engine, model, torch.device(device)),
    ):
        pass
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    with using_backend(engine, model, torch.device(other)):
        assert scan._choice == engine
    with using_backend("auto", model, torch.device(device)):
        assert scan._choice == "auto"


def test_an_engine_that_cannot_run_is_refused_before_anything_is_written(text_file, tmp_path, capsys, monkeypatch):
    missing = scan.ENGINES["triton"]._replace(unavailable_reason=lambda cell: f"no GPU for the cell {cell.name}")
    monkeypatch.setitem(scan.ENGINES, "triton", missing)
    words = [f"--dataset={text_file}", f"--output_dir={tmp_path / 'run'}", *TINY, "--backend=triton"]
    for cell in ("kru", "gru"):
        assert main([*words, f"--cell_type={CELLS[cell].type}"]) == 1
        said = f"error: backend='triton' cannot run here: no GPU for the cell {cell}; 'auto' takes what can"
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_backend_is_that_of_the_run(text_file, tmp_path, capsys, monkeypatch):
    used = []
    run = scan.scan_reference
    monkeypatch.setattr(scan, "scan_reference", lambda *args: used.append(scan._choice) or run(*args))
    words = [f"--dataset={text_file}", f"--output_dir={tmp_path / 'run'}", *TINY, "--backend=reference"]
    assert main(words) == 0
    assert set(used) == {"reference"} and scan._choice == "auto"
    assert read_options(tmp_path / "run" / "recipe.yaml")["backend"] == "reference"


def test_frozen_factors_stay_where_they_start_also_in_a_run_that_resumes(text_file, tmp_path):
    words = [f"--dataset={text_file}", f"--output_dir={tmp_path / 'run'}", *TINY, "--freeze_factors"]
    assert main([*words, "--save_steps=3"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert main([*words, "--resume_from_checkpoint=last"]) == 0
    assert read_options(tmp_path / "run" / "recipe.yaml")["freeze_factors"] is True
    trained = KRUForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    torch.manual_seed(0)
    start = build_model("causal_lm", parse_arguments(words).model, vocab_size=trained.config.vocab_size)
    for (name, begun), (_, ended) in zip(start.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(begun, ended) == (".factors." in name), name


def test_evaluate_prints_the_runs_own_figures(trained, text_file, capsys):
    results = json.loads((trained / "all_results.json").read_text())
    for split in ("test", "validation"):
        assert evaluate([f"--model={trained}", f"--dataset={text_file}", f"--split={split}", "--use_cpu"]) == 0
        figures = last_json(capsys.readouterr().out)
        assert figures == {"loss": results[f"{split}_loss"], "bpc": results[f"{split}_bpc"]}


def test_evaluate_without_the_data_says_what_to_pass(trained, tmp_path, capsys):
    assert evaluate([f"--model={trained}", "--use_cpu"]) == 0  # by the path in its recipe
    capsys.readouterr()
    shutil.copytree(trained, tmp_path / "run")
    edit(tmp_path / "run" / "recipe.yaml", dataset=None)
    assert evaluate([f"--model={tmp_path / 'run'}", "--use_cpu"]) == 1
    said = capsys.readouterr().err
    assert "'corpus.txt', cannot be found here; pass --dataset" in said


def test_evaluate_on_changed_data(trained, tmp_path, capsys):
    changed = corpus(tmp_path / "corpus.txt", ["the ", "state ", "of a ", "unit.\n"], seed=1)
    assert evaluate([f"--model={trained}", f"--dataset={changed}", "--use_cpu"]) == 1
    assert "differs from what the model was trained on: SHA-256" in capsys.readouterr().err
    words = [f"--model={trained}", f"--dataset={changed}", "--use_cpu", "--allow_other_dataset", "true"]
    assert evaluate(words) == 0
    assert last_json(capsys.readouterr().out)["bpc"] > 0


def test_evaluate_bad_input(trained, tmp_path, capsys):
    for words, message in (
        ([], "model is missing"),
        ([f"--model={tmp_path}"], "has no readable recipe.yaml and run.json"),
        ([f"--model={trained}", "--splt=test"], "did you mean 'split'"),
        ([f"--model={trained}", "--split=train"], "invalid choice: 'train'"),
        ([f"--model={trained}", "--dataset_revision=v1"], "dataset_revision='v1' has no effect here: it works with"),
        ([f"--model={trained}", "--dataset-config", "en"], "dataset_config='en' has no effect here"),
        ([f"--model={trained}", "--text_column=text"], "works with dataset; remove text_column"),
    ):
        assert evaluate(words) == 1
        assert message in capsys.readouterr().err


def test_a_run_that_starts_from_a_trained_folder(trained, text_file, tmp_path, capsys):
    words = ["--max_steps=3", "--eval_steps=3", "--per_device_train_batch_size=2", "--sequence_length=16"]
    words += [f"--model={trained}", "--report_to=none", "--use_cpu", "--sample_length=5"]
    assert main([*words, f"--dataset={text_file}", f"--output_dir={tmp_path / 'more'}"]) == 0
    before = json.loads((trained / "all_results.json").read_text())["test_bpc"]
    after = json.loads((tmp_path / "more" / "all_results.json").read_text())["test_bpc"]
    assert after != before
    assert after < before + 0.5
    capsys.readouterr()
    other = corpus(tmp_path / "other.txt", ["Zürich ", "Ωmega "])
    assert main([*words, f"--dataset={other}", f"--output_dir={tmp_path / 'other'}"]) == 1
    assert "vocabulary mismatch: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*words, "--state_size=5", f"--output_dir={tmp_path / 'other'}"]) == 1
    assert "brings its own configuration; remove state_size" in capsys.readouterr().err


def test_damaged_model_folder(trained, text_file, tmp_path, capsys):
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert evaluate([f"--model={tmp_path}", f"--dataset={text_file}", "--use_cpu"]) == 1
    assert "model.safetensors' is damaged" in capsys.readouterr().err
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Ω"] = config["vocab_size"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert evaluate([f"--model={tmp_path}", f"--dataset={text_file}", "--use_cpu"]) == 1
    assert "the tokenizer has" in capsys.readouterr().err


def test_folder_loads_with_auto_classes_and_pipeline(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.vocab_size == len(tokenizer)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("the state", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text.startswith("the state")
    assert len(text) == len("the state") + 20


def test_characters_that_the_vocabulary_lacks_are_reported(tmp_path, capsys):
    """A held-out part may have characters that training never saw: said, not passed over."""
    for split, text in {"train": "abc " * 100, "validation": "abc " * 20, "test": "abcXYX " * 20}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    words = [*TINY, f"--dataset={tmp_path}", f"--output_dir={tmp_path / 'run'}", "--report_to=none"]
    assert main(words) == 0
    note = "note: 60 of 140 characters of the test split are not in the vocabulary; they are read and scored"
    said = capsys.readouterr().out
    assert note in said
    assert "validation split" not in said
    assert evaluate([f"--model={tmp_path / 'run'}", f"--dataset={tmp_path}", "--use_cpu"]) == 0
    assert note in capsys.readouterr().out


def test_folder_holds_no_code(trained):
    """It comes to a model when it is published."""
    assert not list(Path(trained).rglob("*.py"))
