"""`training.train` and the Hub: data by Hub id, `--push_to_hub` at the end, and what is refused before the start."""

import json
import shlex
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from fake_hub import ROOT, Hub, client, module, python, served_hub
from finished_run import TEXT
from huggingface_hub import HfApi, ModelCard

from training.publish import main as publish
from training.records import publishing
from training.records.publishing import publish_folder
from training.train import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SMALL = ["--max_steps=2", "--state_size=16", "--per_device_train_batch_size=4", "--sequence_length=16"]
SMALL += ["--sample_length=0", "--report_to=none", "--use_cpu"]


@pytest.fixture(name="hub")
def hub_fixture():
    with served_hub() as server:
        lines = (TEXT * 60).encode()
        files = {"train.txt": lines * 2, "validation.txt": lines, "test.txt": lines}
        server.add_repo("other/corpus", files, kind="dataset")
        yield server


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 60)
    return path


def push(*words: str) -> list[str]:
    return ["--push_to_hub", "true", "--hub_model_id", "me/kru", *words]


@pytest.mark.slow
def test_train_on_a_hub_data_set_and_push(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "trained"
    words = [*SMALL, "--dataset", "other/corpus", "--output_dir", str(run)]
    words += push("--hub_private_repo", "true", "--data_license", "CC0-1.0")
    done = module("training.train", words, hub, tmp_path, HF_TOKEN="hf_me")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("/datasets/other/corpus/" in request for request in hub.requests)
    repo = hub.repos[("model", "me/kru")]
    assert repo.private
    assert f'pin it with revision="{repo.refs["main"]}"' in done.stdout
    files = hub.files("me/kru")
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["other/corpus"]
    results = json.loads((run / "all_results.json").read_text())
    bpc = {r.dataset_split: r.metric_value for r in card.data.eval_results if r.metric_type == "bpc"}
    assert bpc == {"validation": results["validation_bpc"], "test": results["test_bpc"]}
    assert f"{results['num_parameters']:,}" in card.text
    texts = [data.decode() for name, data in files.items() if name.endswith((".json", ".md"))]
    assert str(tmp_path) not in "".join(texts)
    # The same as training.publish does; the licence of the data is in the run's own record.
    assert publish_folder(run, "me/kru", api=client(hub)).unchanged


@pytest.mark.slow
def test_music_by_hub_id_there_and_back(hub: Hub, tmp_path: Path) -> None:
    """Trained on a data set of the Hub and published; then scored and composed with by its Hub id."""
    notes = [[[60 + i % 7, 64], [67]] * 6 for i in range(6)]
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"notes": notes}).to_parquet(tmp_path / f"{split}.parquet")
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    hub.add_repo("other/notes", files, kind="dataset")
    words = ["--task", "piano_roll", "--dataset", "other/notes", "--output_dir", str(tmp_path / "run"), *SMALL]
    words += ["--dataset_revision", "main", *push("--data_license", "CC0-1.0")]
    output = tmp_path / "new.mid"
    commands = {
        "train": words,
        "evaluate": ["--model", "me/kru", "--use_cpu"],
        "compose": ["--model", "me/kru", "--num_frames", "4", "--output", str(output)],
    }
    code = "".join(
        f"import training.{name}\nassert training.{name}.main({given!r}) == 0\nprint('done: {name}')\n"
        for name, given in commands.items()
    )
    said = python(code, hub, tmp_path, PYTHONPATH=str(ROOT), HF_TOKEN="hf_me").splitlines()
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert "| Version of the data | main |" in hub.files("me/kru")["README.md"].decode()
    scored = json.loads(said[said.index("done: evaluate") - 1])
    assert scored["nll_per_frame"] == results["test_nll_per_frame"]
    assert output.read_bytes().startswith(b"MThd")


@pytest.mark.slow
def test_parts_of_a_hub_data_set_are_what_they_are_called(hub: Hub, tmp_path: Path) -> None:
    """Whatever the spelling; only the missing part is cut from train, and what has no part's name is not used."""
    train, held = ({"text": [line] * rows} for line, rows in (("a line of training", 300), ("ZZZ held out ZZZ", 200)))
    for names in (("test",), ("dev",), ("heldout",), ("test", "other")):
        files = {}
        for name, rows in (("train", train), *((name, held) for name in names)):
            Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
            files[f"{name}.parquet"] = (tmp_path / "rows.parquet").read_bytes()
        hub.add_repo(f"other/{names[-1]}", files, kind="dataset")
    code = (
        "from training.data.corpora import load_corpus\nfrom training.options.data import DataOptions\n"
        "for name in ('test', 'dev', 'heldout', 'other'):\n"
        "    corpus = load_corpus(DataOptions(dataset=f'other/{name}'))\n"
        "    print([len(part) for part in corpus.splits.values()], {k: 'Z' in v for k, v in corpus.splits.items()})\n"
        "    print(corpus.notes)\n"
    )
    printed = python(code, hub, tmp_path, PYTHONPATH=str(ROOT))
    used, cut, notes = 17 * 200 - 1, int((19 * 300 - 1) * 0.05), "the data have no {} part: it is cut from train"
    lines = printed.splitlines()
    assert lines[0] == f"[{19 * 300 - 1 - cut}, {used}, {cut}] {{'train': False, 'test': True, 'validation': False}}"
    assert lines[1] == str([notes.format("validation")])
    assert f"{used}, {cut}] {{'train': False, 'validation': True, 'test': False}}" in lines[2]
    assert lines[4] == lines[2] and lines[5] == str(["validation is 'heldout'", notes.format("test")])
    assert lines[6:] == [lines[0], str(["not used: other.parquet", notes.format("validation")])]


def test_push_that_fails_at_the_end_names_the_command_that_finishes(
    hub: Hub, text_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.url, token="hf_me"))
    hub.fail["commit"] = 500
    words = [*SMALL, "--dataset", str(text_file), "--output_dir", str(tmp_path / "run"), *push("--data_license", "own")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "has not been published: cannot publish (uploading): the Hub answered 500" in said
    assert (tmp_path / "run" / "all_results.json").exists()
    assert set(hub.files("me/kru")) == {".gitattributes"}
    command = shlex.split(said.split("publish it with: ")[1].splitlines()[0])
    assert command[:3] == ["python", "-m", "training.publish"]
    assert publish(command[3:]) == 0
    assert "model.safetensors" in hub.files("me/kru")


@pytest.mark.parametrize(
    ("token", "repo_id", "words", "message"),
    [
        (None, "me/kru", (), "there is no Hub token"),
        ("hf_read", "me/kru", (), "no permission to write"),
        ("hf_me", "me/public", ("--hub_private_repo", "true"), "'me/public' exists and is public"),
        ("hf_me", "me/kru", ("--data_license", ""), "the card needs the licence of 'corpus.txt'; pass --data_license"),
        ("hf_me", "me/kru", ("--architecture", "lstm"), "models of the type 'kru_baseline' have no code to publish"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_before_the_start(
    hub: Hub, text_file: Path, tmp_path: Path, monkeypatch, capsys, token, repo_id, words, message
) -> None:
    hub.add_repo("me/public")
    before = {key: dict(repo.refs) for key, repo in hub.repos.items()}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.url, token=token))
    arguments = [*SMALL, "--dataset", str(text_file), "--output_dir", str(tmp_path / "run"), *push()]
    arguments += ["--hub_model_id", repo_id, "--data_license", "own", *words]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert {key: dict(repo.refs) for key, repo in hub.repos.items()} == before
