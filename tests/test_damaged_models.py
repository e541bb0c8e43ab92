"""Damaged files of a run's or model's folder: each command names the file on one line, or takes no harm."""

import json
from pathlib import Path

import pytest

from training import evaluate, publish, report
from training.common.errors import UserError
from training.models.build import load_model

JSON_FILES = ("config", "generation_config", "tokenizer", "tokenizer_config", "all_results", "run")
NOT_JSON = (b"", b"{", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000)
OTHERS = (None, [], {}, "x", -3, True, [None], 10**30)


def commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What goes wrong in each command that reads the folder, on one line; nothing is an exception of another kind."""
    said = []
    for main, words in (
        (publish.main, ["--repo_id=me/x", "--dry_run", f"--model={folder}"]),
        (evaluate.main, ["--use_cpu", f"--model={folder}", "--dataset=nowhere.txt"]),
        (report.main, [str(folder), f"--folder={folder.parent / 'page'}"]),
    ):
        failed, text = main(words), capsys.readouterr().err.strip()
        said += [text] if failed else []
    try:
        load_model(str(folder), "causal_lm")
    except UserError as error:
        said.append(str(error))
    assert not [text for text in said if "\n" in text]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{name}.json" for name in JSON_FILES), "recipe.yaml"])
def test_files_that_are_not_json_are_named(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = folder / name
    for content in NOT_JSON:
        path.write_bytes(content)
        said = commands(folder, capsys)
        assert any(path.name in text for text in said), (content[:9], said)
    path.unlink()
    path.mkdir()
    assert any(path.name in text or "config.json" in text for text in commands(folder, capsys))


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
def test_fields_of_other_types_are_no_traceback(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = folder / f"{name}.json"
    whole = json.loads(path.read_text())
    places = [(whole, key) for key in whole] if isinstance(whole, dict) else []
    places += [(part, key) for part, key in places for part in [part[key]] if isinstance(part, dict) for key in part]
    for index, (part, key) in enumerate(places[:40]):
        kept, part[key] = part[key], OTHERS[index % len(OTHERS)]
        path.write_text(json.dumps(whole))
        commands(folder, capsys)
        part[key] = kept


def test_fields_that_are_wrong_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, field, value in (
        ("config", "architectures", ["kronecker"]),
        ("config", "factor_shapes", [[1]]),
        ("config", "cell_type", []),
        ("config", "num_heads", "two"),
        ("all_results", "test_bpc", "x | y"),
        ("all_results", "test_bpc", float("nan")),
        ("run", "command", 3),
        ("run", "versions", ["a"]),
        ("run", "data", {"name": ["x"]}),
        ("run", "machines", [{"threads": "two"}]),
        ("tokenizer_config", "auto_map", {"AutoTokenizer": ["a/b--c.D", None]}),
    ):
        path = folder / f"{name}.json"
        whole = path.read_text()
        path.write_text(json.dumps({**json.loads(whole), field: value}))
        assert path.name in commands(folder, capsys)[0], (field, value)
        path.write_text(whole)


def test_weights_that_are_no_weights_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"\0" * 99, b"\xff" * 99, whole[8:]):
        path.write_bytes(content)
        said = commands(folder, capsys)
        assert said and path.name in said[0] and path.name in said[-1]
