"""Model cards, and the modelling files that are pushed beside them."""

import json
import re
import sys
from pathlib import Path

import pytest
from finished_run import edit, make_run
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_imports

from training.cards import missing_fields, render_card
from training.publish import auto_map, code_files

# What the pushed files may import beside Python's own library: what `from_pretrained` itself cannot do without.
ALLOWED_IMPORTS = {"torch", "transformers", "huggingface_hub"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder."""
    return make_run(tmp_path / "run")


def test_card_of_a_baseline_has_no_word_of_kronecker_factors(folder: Path) -> None:
    edit(folder / "config.json", model_type="kru_baseline", architectures=["BaselineForCausalLM"], factor_shapes=None)
    text = ModelCard(render_card(folder)).text
    assert "A recurrent baseline trained on python_docs" in text
    assert "⊗" not in text
    assert "trust_remote_code" not in text


def test_card_has_the_results_of_the_run_and_no_invented_field(folder: Path) -> None:
    (folder / "comparison.json").write_text(
        json.dumps({"metric": "bpc", "rows": [{"name": "LSTM", "value": 1.9, "num_parameters": 127_000}]})
    )
    card = ModelCard(render_card(folder, repo_id="me/kru", revision="v1"))
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("validation", "loss"): 1.25,
        ("validation", "bpc"): 1.75,
        ("test", "loss"): 1.5,
        ("test", "bpc"): 2.125,
    }
    for part in ("4x4 ⊗ 4x4 ⊗ 4x4", "| of them recurrent | 96 |", "| **this model** | 2.125 |", "127,000", "PSF-2.0"):
        assert part in card.text
    assert "learning_curve.png" not in card.text
    (folder / "learning_curve.png").write_bytes(b"picture")
    assert "(learning_curve.png)" in render_card(folder)

    (folder / "training.json").unlink()
    (folder / "comparison.json").unlink()
    edit(folder / "all_results.json", validation_bpc=None, train_runtime=None)
    bare = render_card(folder)
    assert "| Data |  |" in bare
    assert "| Bits per character |  | 2.125 |" in bare
    assert "None" not in bare
    assert "dataset.name (training.json)" in missing_fields(folder)


@pytest.mark.parametrize("head", ["KRUForCausalLM", "KRUForPianoRoll"])
def test_pushed_files_import_each_other_and_what_every_user_has(head: str) -> None:
    entries = auto_map({"architectures": [head]})
    assert head in {reference.split(".")[1] for reference in entries.values()}
    names = {path.stem for path in code_files(entries)}
    assert {"modeling_kru", "configuration_kru", "scan", "scan_torch"} <= names
    for path in code_files(entries):
        foreign = set(get_imports(path)) - set(sys.stdlib_module_names) - ALLOWED_IMPORTS
        assert not foreign, path.name
        assert "kru_hf" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE), path.name
