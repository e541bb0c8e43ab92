"""Model cards, and the modelling files that are pushed beside them."""

import json
import re
import sys
from pathlib import Path

import pytest
from finished_run import edit
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_imports

from kru_hf.music import FIGURES as MUSIC_FIGURES
from training.records.cards import DATA_SOURCES, missing_fields, render_card
from training.records.paper_figures import FIGURES, PTB_SMALL
from training.records.publishing import auto_map, code_files
from training.report import main as report
from training.tasks import get_task, task_names

# What the pushed files may import beside Python's own library: what `from_pretrained` itself cannot do without.
ALLOWED_IMPORTS = {"torch", "transformers", "huggingface_hub"}


def test_card_of_a_baseline_has_no_word_of_kronecker_factors(folder: Path) -> None:
    edit(folder / "config.json", model_type="kru_baseline", architectures=["BaselineForCausalLM"], factor_shapes=None)
    text = ModelCard(render_card(folder)).text
    assert "A recurrent baseline trained on python_docs" in text
    assert "⊗" not in text
    assert "trust_remote_code" not in text


def test_card_has_the_results_of_the_run_and_no_invented_field(folder: Path) -> None:
    card = ModelCard(render_card(folder, repo_id="me/kru", revision="v1"))
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("validation", "loss"): 1.25,
        ("validation", "bpc"): 1.75,
        ("test", "loss"): 1.5,
        ("test", "bpc"): 2.125,
    }
    for part in ("4x4 ⊗ 4x4 ⊗ 4x4", "| of them recurrent | 96 |", "| Bits per character | 1.75 | 2.125 |", "PSF-2.0"):
        assert part in card.text
    assert "learning_curve.png" not in card.text
    (folder / "learning_curve.png").write_bytes(b"picture")
    assert "(learning_curve.png)" in render_card(folder)
    (folder / "composition.mid").write_bytes(b"piece")
    assert "composition" not in render_card(folder)  # a link to a picture that is not there
    (folder / "composition.png").write_bytes(b"picture")
    found = (
        {f"{name}_band": [3.5, 4.25] for name in MUSIC_FIGURES} | dict.fromkeys(MUSIC_FIGURES, 4.5) | {"within": False}
    )
    made = {"command": "python -m training.compose --seed 3", "prime": "bwv1.6 (test)", "prime_frames": 32}
    made |= {"num_frames": 96, "statistics": found}
    (folder / "composition.json").write_text(json.dumps(made))
    text = render_card(folder)
    assert (
        "](composition.png)" in text
        and "](composition.mid); the first 32 frames, the opening of bwv1.6 (test), were given. Made by" in text
    )
    assert "--seed 3" in text and "The composed 96 frames leave the" in text
    assert "| keys per frame | 4.5 | 3.5 | 4.25 |" in text

    (folder / "run.json").unlink()
    (folder / "recipe.yaml").unlink()
    edit(folder / "all_results.json", validation_bpc=None, train_runtime=None)
    bare = render_card(folder)
    assert "| Data |  |" in bare
    assert "| Bits per character |  | 2.125 |" in bare
    assert "None" not in bare
    assert "data.name (run.json)" in missing_fields(folder)


def test_card_of_a_gated_model_speaks_of_gates(folder: Path) -> None:
    edit(folder / "config.json", cell_type="kru_lstm")
    text = render_card(folder)
    assert "gates bound the state, so there is no unitary penalty" in text
    assert "unitary_loss_coef" not in text
    assert "activation" not in text


def test_card_of_music_has_its_sizes_figures_and_limits(folder: Path) -> None:
    edit(folder / "config.json", architectures=["KRUForPianoRoll"], input_size=88)
    data = {"name": "bach_chorales", "train_pieces": 294, "train_frames": 31596, "test_pieces": 37, "density_low": 3.7}
    edit(folder / "run.json", data=data)
    edit(folder / "all_results.json", test_nll_per_frame=8.5, test_f1=0.25)
    text = ModelCard(render_card(folder)).text
    assert "| Size | 294 train pieces, 31,596 train frames, 37 test pieces |" in text
    assert "| F1 |  | 0.25 |" in text
    assert "can repeat passages of the training pieces" in text
    assert "biases of that text" not in text


MARKUP = (
    "a | b\n\n# Heading\n---\n<img src=x> [l](javascript:x) `c` {{ 7 * 7 }} {% x %} https://x.example $$m$$ \u202e\0"
)
SHOWN = (
    r"a \| b # Heading --- &lt;img src=x&gt; \[l\](javascript:x) \`c\` \{\{ 7 \* 7 \}\} \{% x %\} https:\//x.example "
    r"\$\$m\$\$"
)


@pytest.mark.parametrize("key", [MARKUP, "name"])
def test_text_of_a_record_stays_text(folder: Path, key: str) -> None:
    """In every field that a card shows, and in the names of those that it lists; also in the rows beside it."""
    options = ("task", "data_license", "learning_rate", "carry_state", "model")
    text = "".join(c for c in MARKUP if c not in "\u202e\0")  # YAML has no way to write these
    edit(folder / "recipe.yaml", **dict.fromkeys(options, text))
    data = {**dict.fromkeys(("name", "sha256", "dataset_config", "dataset_revision"), MARKUP), f"train_{key}": MARKUP}
    edit(folder / "run.json", data=data, versions={key: MARKUP}, command=f"```\n{MARKUP}")
    edit(folder / "config.json", block_type=MARKUP, recurrent_init=MARKUP, architectures=[f"{MARKUP}ForCausalLM"])
    own = {"name": folder.name, "setting": MARKUP, "label": MARKUP, "metric": "bpc", "released": folder.name}
    other = {**own, "released": None, "variant": MARKUP, "results": {"test_bpc": 1.0}, "commands": [f"```\n{MARKUP}"]}
    (folder.parent / "runs.jsonl").write_text(json.dumps(own) + "\n" + json.dumps(other) + "\n")
    assert report(["--folder", str(folder.parent)]) == 0
    page = (folder.parent / "RESULTS.md").read_text()
    for place in (None, "me/kru"):
        card = ModelCard(render_card(folder, repo_id=place, revision='v"1\n```\n# Heading' if place else None))
        for body in (card.text, page):
            body = re.sub(r"^    .*$|^```(?:python|bash)\n.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
            assert body.count(SHOWN) >= 5
            rest = body.replace(SHOWN, "")
            for part in ("# Heading", "<img", "[l]", "`c`", "7 * 7", "{%", "://x", "\u202e", "\0"):
                assert part not in rest, part
            assert len(re.findall("^# ", body, flags=re.MULTILINE)) == 1
        assert len(re.findall("^# ", card.text, flags=re.MULTILINE)) == 1
        (code,) = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
        compile(code, "snippet", "exec")
        assert (r'revision = "v\"1\n```\n# Heading"' in code) == (place is not None)
        assert card.data.datasets is None and card.data.base_model is None
        assert {result.dataset_name for result in card.data.eval_results} == {" ".join(MARKUP[:-2].split())}


@pytest.mark.parametrize("task", task_names())
def test_the_data_that_come_with_a_task_have_their_licence_in_the_card(task: str) -> None:
    source = DATA_SOURCES[get_task(task).default_dataset]
    assert source.description and source.license


def test_card_shows_the_options_that_had_an_effect(folder: Path) -> None:
    options = {"num_train_epochs": 20.0, "lr_scheduler_type": "plateau", "plateau_factor": 0.3}
    edit(folder / "recipe.yaml", **options, min_learning_rate_ratio=0.02, data_license="CC0-1.0")
    edit(folder / "run.json", data={"name": "me/own"}, machines=[{"processes": 4}])
    text = render_card(folder)
    for part in ("seed 0, max_steps 10, ", "plateau_factor 0.3", "processes 4", "| CC0-1.0 |"):
        assert part in text, part
    assert "num_train_epochs" not in text
    assert "min_learning_rate_ratio" not in text
    edit(folder / "recipe.yaml", max_steps=-1)
    assert "seed 0, num_train_epochs 20, " in render_card(folder)


def test_a_released_model_has_other_runs_and_the_paper_beside_it(folder: Path) -> None:
    edit(folder / "run.json", data={"name": "ptb_char", "sha256": "cd" * 32})
    other = {"name": "runs/lstm", "setting": PTB_SMALL, "label": "LSTM 150", "metric": "bpc"}
    figures = {"validation_bpc": 2.75, "test_bpc": 2.5, "num_parameters": 127_000}
    (folder.parent / "runs.jsonl").write_text(json.dumps({**other, "results": figures}) + "\n")
    assert report([str(folder), "--folder", str(folder.parent)]) == 0
    text = (folder / "README.md").read_text()
    assert "| LSTM 150 | 2.500 | 127,000 |" in text and "KRU 64" not in text
    for figure in FIGURES[PTB_SMALL]:
        assert f"| *{figure.name}* ({figure.source}) | {figure.value:.2f} | ≈{figure.num_parameters:,} |" in text


@pytest.mark.parametrize("head", ["KRUForCausalLM", "KRUForPianoRoll"])
def test_pushed_files_import_each_other_and_what_every_user_has(head: str) -> None:
    entries = auto_map({"architectures": [head]})
    assert head in {reference.split(".")[1] for reference in entries.values()}
    names = {path.stem for path in code_files(entries)}
    assert {"modeling_kru", "configuration_kru", "scan", "scan_portable"} <= names
    for path in code_files(entries):
        foreign = set(get_imports(path)) - set(sys.stdlib_module_names) - ALLOWED_IMPORTS
        assert not foreign, path.name
        assert "kru_hf" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE), path.name


def test_card_loads_by_the_code_that_is_there(folder: Path) -> None:
    # save_pretrained brings it or not, by whether an earlier test of this process has registered the class for that.
    (folder / "modeling_kru.py").unlink(missing_ok=True)
    text = render_card(folder)
    assert "trust_remote_code" not in text and "import kru_hf  # registers" in text
    assert "trust_remote_code=True" in render_card(folder, repo_id="me/name")  # what is published brings its code
    (folder / "modeling_kru.py").touch()
    assert "trust_remote_code=True" in render_card(folder)
