"""Publishing and loading over real HTTP: the client libraries against the server of fake_hub.py, over loopback."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import Hub, client, module, python, served_hub
from finished_run import edit
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from kru_hf import KRUForCausalLM
from training.common.errors import UserError
from training.publish import main
from training.records.hub import check_tag
from training.records.publishing import auto_map, publish_folder

PROMPT = "The lazy fox "
# huggingface_hub's own way to send bytes, which its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(name="hub")
def hub_fixture():
    with served_hub() as server:
        yield server


@pytest.mark.slow
def test_the_snippet_of_a_published_card_runs_without_the_package(trained: Path, hub: Hub, tmp_path: Path) -> None:
    options = ["--model", str(trained), "--repo_id", "lab/kru", "--revision_tag", "v1", "--private"]
    done = module("training.publish", options, hub, tmp_path, HF_TOKEN="hf_me")
    assert done.returncode == 0, done.stdout + done.stderr
    repo, files = hub.repos[("model", "lab/kru")], hub.files("lab/kru")
    assert repo.private and any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert f'pin it with revision="{repo.tags["v1"]}"' in done.stdout
    assert f"address: {hub.url}/lab/kru" in done.stdout
    config = json.loads(files["config.json"])
    assert config["auto_map"] == auto_map(config)
    (snippet,) = re.findall(r"```python\n(.*?)```", ModelCard(files["README.md"].decode()).text, flags=re.DOTALL)
    assert 'revision = "v1"' in snippet

    model, tokenizer = KRUForCausalLM.from_pretrained(trained), PreTrainedTokenizerFast.from_pretrained(trained)
    greedy = {"max_new_tokens": 20, "do_sample": False}
    again = f"print(model.generate(**tokenizer({PROMPT!r}, return_tensors='pt'), **{greedy})[0].tolist())"
    alone = "import sys\nsys.modules['kru_hf'] = None  # import kru_hf fails from here on\n"
    said = python(f"{alone}{snippet}\n{again}", hub, tmp_path, HF_TOKEN="hf_me")
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), **greedy)[0].tolist()
    assert said.startswith("The ") and json.loads(said.splitlines()[-1]) == ids


# Once more, and other versions


def test_publishing_again_changes_nothing(trained: Path, hub: Hub) -> None:
    first = publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    again = publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    assert again.unchanged
    assert not first.unchanged
    assert (again.commit, again.tag) == (first.commit, "v1")
    assert len(hub.repos[("model", "me/kru")].commits) == 2  # the empty one of the creation, and ours


def test_new_version_replaces_its_own_files_alone_and_keeps_the_old_tag(folder: Path, hub: Hub) -> None:
    hub.add_repo("me/kru", {"special_tokens_map.json": b"{}", "composition.json": b"{}", "handler.py": b"mine"})
    first = publish_folder(folder, "me/kru", revision_tag="v1", api=client(hub))
    assert {"special_tokens_map.json", "composition.json"}.isdisjoint(hub.files("me/kru"))
    assert hub.files("me/kru")["handler.py"] == b"mine"
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="revision_tag='v1' already exists"):
        publish_folder(folder, "me/kru", revision_tag="v1", api=client(hub))
    second = publish_folder(folder, "me/kru", revision_tag="v2", api=client(hub))
    assert second.commit != first.commit
    assert hub.repos[("model", "me/kru")].tags == {"v1": first.commit, "v2": second.commit}
    # The first version is still there under its tag.
    assert hub.files("me/kru", "v1")["model.safetensors"] != (folder / "model.safetensors").read_bytes()


def test_pull_request_to_the_repository_of_someone_else(trained: Path, hub: Hub) -> None:
    hub.add_repo("other/kru", {"README.md": b"theirs"})
    done = publish_folder(trained, "other/kru", create_pr=True, api=client(hub))
    assert done.pull_request == f"{hub.url}/other/kru/discussions/1"
    assert hub.files("other/kru")["README.md"] == b"theirs"
    assert "model.safetensors" in hub.files("other/kru", "refs/pr/1")
    with pytest.raises(UserError, match="--revision_tag cannot be given with --create_pr"):
        publish_folder(trained, "other/kru", create_pr=True, revision_tag="v1", api=client(hub))
    with pytest.raises(UserError, match="needs an existing repository"):
        publish_folder(trained, "other/none", create_pr=True, api=client(hub))


def test_an_open_pull_request_is_used_again(folder: Path, hub: Hub) -> None:
    repo = hub.add_repo("other/kru", {"README.md": b"theirs"})
    repo.proposals[1] = ["me", "Something else", "open"]
    repo.refs["refs/pr/1"] = repo.refs["main"]
    first = publish_folder(folder, "other/kru", create_pr=True, api=client(hub))
    again = publish_folder(folder, "other/kru", create_pr=True, api=client(hub))
    assert again.unchanged
    assert again.pull_request == first.pull_request == f"{hub.url}/other/kru/discussions/2"
    edit(folder / "all_results.json", test_bpc=2.0)
    changed = publish_folder(folder, "other/kru", create_pr=True, api=client(hub))
    assert (changed.unchanged, changed.pull_request) == (False, first.pull_request)
    assert json.loads(hub.files("other/kru", "refs/pr/2")["all_results.json"])["test_bpc"] == 2.0
    assert hub.files("other/kru", "refs/pr/1") == hub.files("other/kru")  # one with another title is not ours
    # A pull request of someone else cannot be written to, and one that is closed is left alone.
    edit(folder / "all_results.json", test_bpc=1.9)
    other = publish_folder(folder, "other/kru", create_pr=True, api=client(hub, "hf_other"))
    assert other.pull_request == f"{hub.url}/other/kru/discussions/3"
    repo.proposals[2][2] = "closed"
    new = publish_folder(folder, "other/kru", create_pr=True, api=client(hub))
    assert new.pull_request == f"{hub.url}/other/kru/discussions/4"


def test_private_is_not_ignored_where_the_repository_is_public(trained: Path, hub: Hub) -> None:
    hub.add_repo("me/kru")
    with pytest.raises(UserError, match="a private repository was asked for, but 'me/kru' exists and is public"):
        publish_folder(trained, "me/kru", private=True, api=client(hub))


# Failures: a clear message, nothing half-published, the same command again finishes


@pytest.mark.parametrize(
    ("step", "status", "message"),
    [
        ("create", 503, "the Hub answered 503"),
        ("preupload", 400, "the Hub answered 400"),
        ("lfs_put", 507, "the upload was interrupted"),
        ("commit", 0, "the Hub cannot be reached"),
        ("commit", 500, "the Hub answered 500"),
        ("commit", 412, "changed by someone else"),
    ],
)
def test_interrupted_upload_publishes_nothing_and_the_next_run_finishes(
    trained: Path, hub: Hub, step: str, status: int, message: str
) -> None:
    hub.fail[step] = status
    with pytest.raises(UserError, match=message) as caught:
        publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    assert "again" in str(caught.value)
    repo = hub.repos.get(("model", "me/kru"))
    assert repo is None or (set(hub.files("me/kru")) == {".gitattributes"} and not repo.tags)
    assert not hub.fail
    done = publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    assert hub.repos[("model", "me/kru")].tags == {"v1": done.commit}
    assert "model.safetensors" in hub.files("me/kru", "v1")


@pytest.mark.parametrize("create_pr", [False, True])
def test_commit_whose_answer_was_lost_is_not_made_twice(trained: Path, hub: Hub, create_pr: bool) -> None:
    repo = hub.add_repo("me/kru")
    hub.fail["commit_answer"] = 0
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        publish_folder(trained, "me/kru", create_pr=create_pr, api=client(hub))
    assert publish_folder(trained, "me/kru", create_pr=create_pr, api=client(hub)).unchanged
    assert len(repo.commits) == 2
    assert len(repo.proposals) == create_pr


def test_interrupted_tag_is_set_by_the_next_run(trained: Path, hub: Hub) -> None:
    hub.fail["tag"] = 0
    with pytest.raises(UserError, match="tagging v1; the files are there already"):
        publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    commit = hub.repos[("model", "me/kru")].refs["main"]
    done = publish_folder(trained, "me/kru", revision_tag="v1", api=client(hub))
    assert (done.commit, hub.repos[("model", "me/kru")].tags) == (commit, {"v1": commit})


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "me/kru", "does not accept the token"),
        ("hf_read", "me/kru", "no permission to write"),
        ("hf_fine", "me/kru", "no permission to write"),
        ("hf_me", "other/kru", "is taken: it belongs to 'other', and you are 'me': choose me/kru, or .* --create_pr"),
        ("hf_me", "other/new", "is in the namespace of 'other', and you are 'me': choose me/new"),
        ("hf_me", "me/bert", "is taken: it holds a model of the type 'bert'"),
        ("hf_me", "kru", "must be ME/NAME"),
        ("hf_me", "me/k r u", "must be ME/NAME"),
    ],
)
def test_refusals_say_what_to_do(trained: Path, hub: Hub, token: str, repo_id: str, message: str) -> None:
    hub.add_repo("other/kru")
    hub.add_repo("me/bert", {"config.json": b'{"model_type": "bert"}'})
    before = {key: dict(repo.refs) for key, repo in hub.repos.items()}
    with pytest.raises(UserError, match=message):
        publish_folder(trained, repo_id, api=client(hub, token))
    assert {key: dict(repo.refs) for key, repo in hub.repos.items()} == before


def test_a_licence_that_the_hub_does_not_know(trained: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match=r'cannot publish \(uploading\).*"license" must be one of'):
        publish_folder(trained, "me/kru", license="openrail", api=client(hub))
    assert set(hub.files("me/kru")) == {".gitattributes"}


def test_without_a_token(trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        publish_folder(trained, "me/kru", api=client(hub, token=None))
    assert not hub.requests


def test_without_a_network(trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as gone:
        pass
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        publish_folder(trained, "me/kru", api=client(gone))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        publish_folder(trained, "me/kru", api=client(hub))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repo_id", "me/kru"], "model is missing: pass --model"),
        (["--model", "run", "--repo_id", "me/kru", "--dryrun"], "unknown option '--dryrun' (did you mean 'dry_run'?)"),
    ],
)
def test_options_that_are_not_right(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_dry_run_sends_nothing(trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(trained), "--repo_id", "me/kru", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "modeling_kru.py" in said
    assert f"{(trained / 'model.safetensors').stat().st_size:,}  model.safetensors" in said
    assert "dry run: nothing was sent" in said
    assert not hub.requests


# The folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "all_results.json").unlink(), "has no all_results.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors' is damaged"),
        (lambda f: edit(f / "config.json", state_size=16, factor_shapes=[[4, 4], [4, 4]], hidden_size=32), "do not"),
        (lambda f: edit(f / "config.json", model_type="kru_baseline"), "only 'kru' models"),
        (lambda f: edit(f / "all_results.json", num_parameters=None), "num_parameters"),
        (lambda f: edit(f / "run.json", data={"name": "mine"}), "--data_license"),
        (lambda f: (f / "run.json").write_text("{"), "run.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "without tokenizer.json"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_incomplete_folder_is_refused_before_anything_is_sent(folder: Path, hub: Hub, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        publish_folder(folder, "me/kru", api=client(hub))
    assert not hub.requests


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lm_head.bias": lambda old: torch.full_like(old, torch.nan)}, "not finite: lm_head.bias"),
        ({"lm_head.bias": lambda _: torch.zeros(3)}, r"model.safetensors.*lm_head.bias is \[3\], not \[\d+\]"),
        ({"lm_head.bias": None}, "missing keys: lm_head.bias"),
        *(
            ({"lm_head.bias": lambda old, dtype=dtype: old.to(dtype)}, "lm_head.bias is of the type")
            for dtype in (torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused(folder: Path, changed: dict, message: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, change in changed.items():
        old = weights.pop(name)
        weights |= {name: change(old)} if change else {}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        publish_folder(folder, "me/kru", dry_run=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "run.json", "recipe.yaml"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "folder"])
def test_links_are_not_followed(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Also where what they point to is what belongs there: a folder from somebody else must not pick files of mine."""
    path, outside = folder / name, tmp_path / "outside"
    path.rename(outside)
    target = {"absolute": outside, "relative": Path("..") / "outside", "folder": tmp_path}[kind]
    path.symlink_to(target, target_is_directory=kind == "folder")
    with pytest.raises(UserError, match=f"{name}' is a symbolic link|has no {name}"):
        publish_folder(folder, "me/kru", dry_run=True)


NO_NAMES = ("me", "/x", "me/", "a/b/c", "me/a--b", "me/a..b", "me/.a", "me/a-", "me/a.git", "me/é", f"me/{'a' * 94}")
NO_TAGS = ("", "a b", "a~1", "a:b", "a\\b", "a..b", "a@{b", "-a", "a/.b", "a.", "a/", "/a", "a//b", "a.lock/b", "a\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({"repo_id": name}, "repo_id.*must be ME/NAME") for name in NO_NAMES),
        *(
            ({"revision_tag": tag}, "revision_tag")
            for tag in (*NO_TAGS, "\udc80", "main", "HEAD", "0" * 40, "refs/pr/1")
        ),
        ({"license": "Apache-2.0"}, "did you mean 'apache-2.0'"),
        ({"license": "mit\ntags: [x]"}, "license="),
        ({"revision_tag": "v1", "create_pr": True}, "--create_pr"),
    ],
)
def test_dry_run_refuses_what_the_hub_would(trained: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        publish_folder(trained, **{"repo_id": "me/kru", **values}, dry_run=True)


@pytest.mark.parametrize("tag", ["v1", "v1.0-rc.1", "release/2", "a_b+c", "é"])
def test_names_of_tags_that_git_allows(tag: str) -> None:
    check_tag(tag)


def test_recorded_commands_are_text(folder: Path) -> None:
    edit(folder / "run.json", command="training.train 'x")
    assert publish_folder(folder, "me/kru", dry_run=True).files["README.md"]
