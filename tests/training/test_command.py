"""The command as a user types it: what it says, and the options of a run that its record alone would not show."""

import pytest
import torch
from helpers import tiny_config
from tiny_run import STEPS, options

from kru_hf import KRUForCausalLM, scan, scan_triton
from kru_hf.cells import CELLS
from training.common.errors import UserError
from training.common.run_folder import remove_checkpoint
from training.evaluate import main as evaluate
from training.loop.arguments import parse_arguments
from training.models.build import build_model, using_backend
from training.options.fields import MAX_SEED
from training.records.run_record import read_options
from training.train import main


def test_recipe_and_last_lines(text_file, tmp_path, capsys):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text("learning_rate: 1e-2\nseed: 3\n")
    words = [str(recipe), *options(text_file, run, learning_rate=None, seed=4, report_to="tensorboard")]
    assert main(words) == 0
    said, errors = capsys.readouterr()
    lines = said.splitlines()
    assert lines[-1] == f"folder: {run}" and "sample:" in lines
    for split in ("validation", "test"):
        assert any(line.startswith(f"{split}: ") and "bpc" in line for line in lines)
    assert "characters/s" in errors and "BPC" in errors
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    record = read_options(run / "recipe.yaml")
    assert (record["learning_rate"], record["seed"]) == (0.01, 4)


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU the triton engine could use."""
    usable = scan.ENGINES["triton"]._replace(obstacle=lambda cell: None)
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
    missing = scan.ENGINES["triton"]._replace(obstacle=lambda cell: f"no GPU for the cell {cell.name}")
    monkeypatch.setitem(scan.ENGINES, "triton", missing)
    for cell in ("kru", "gru"):
        assert main(options(text_file, tmp_path / "run", backend="triton", cell_type=CELLS[cell].type)) == 1
        said = f"error: backend='triton' cannot run here: no GPU for the cell {cell}; 'auto' takes what can"
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_backend_and_the_largest_seed_are_those_of_the_run(text_file, tmp_path, monkeypatch):
    used, run = [], scan.scan_reference
    monkeypatch.setattr(scan, "scan_reference", lambda *args: used.append(scan._choice) or run(*args))
    assert main(options(text_file, tmp_path / "run", backend="reference", seed=MAX_SEED, max_steps=2)) == 0
    assert set(used) == {"reference"} and scan._choice == "auto"
    record = read_options(tmp_path / "run" / "recipe.yaml")
    assert (record["backend"], record["seed"]) == ("reference", MAX_SEED)


def test_frozen_factors_stay_where_they_start_also_in_a_run_that_resumes(text_file, tmp_path):
    words = [*options(text_file, tmp_path / "run"), "--freeze_factors"]
    last = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert main(words) == 0
    remove_checkpoint(last)
    assert main([*words, "--resume_from_checkpoint=last"]) == 0
    assert read_options(tmp_path / "run" / "recipe.yaml")["freeze_factors"] is True
    trained = KRUForCausalLM.from_pretrained(last)
    torch.manual_seed(0)
    start = build_model("causal_lm", parse_arguments(words).model, vocab_size=trained.config.vocab_size)
    for (name, begun), (_, ended) in zip(start.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(begun, ended) == (".factors." in name), name


def test_characters_that_the_vocabulary_lacks_are_reported(tmp_path, capsys):
    """A held-out part may have characters that training never saw: said, not passed over."""
    for split, text in {"train": "abc " * 100, "validation": "abc " * 20, "test": "abcXYX " * 20}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    assert main(options(tmp_path, tmp_path / "run", max_steps=2)) == 0
    note = "note: 60 of 140 characters of the test split are not in the vocabulary; they are read and scored"
    said = capsys.readouterr().out
    assert note in said and "validation split" not in said
    assert evaluate([f"--model={tmp_path / 'run'}", f"--dataset={tmp_path}", "--use_cpu"]) == 0
    assert note in capsys.readouterr().out
