"""What people bring as data: parts of every spelling, tables, packed files, other encodings, names of other bytes."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from tiny_run import options

from training.common.errors import UserError
from training.data.corpora import load_corpus
from training.data.music_data import load_pieces
from training.data.pixels import load_pictures
from training.data.splits import SPLITS, assign, folder_parts
from training.data.tables import read_table
from training.options.data import DataOptions
from training.train import main

LINES = [f'line {i} "é"' for i in range(60)]


def corpus(path: Path, **more: str):
    return load_corpus(DataOptions(dataset=str(path), **more))


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "chosen", "unused"),
    [
        ("train validation test", "train validation test", ""),
        ("train valid test", "train valid test", ""),
        ("Training VAL Testing", "Training VAL Testing", ""),
        ("train dev", "train dev -", ""),
        ("train eval", "train eval -", ""),
        ("train held-out", "train held-out -", ""),
        ("train validation eval", "train validation eval", ""),
        ("train test evaluation", "train evaluation test", ""),
        ("train_data dev_set test_split", "train_data dev_set test_split", ""),
        ("train test unsupervised", "train - test", "unsupervised"),
        ("train validation dev test", "train validation test", "dev"),
        ("train_sft test_sft", "train_sft - test_sft", ""),
        ("train clean_test test_hard test", "train - test", "clean_test test_hard"),
        ("train latest contest", "train - -", "latest contest"),
    ],
)
def test_parts_are_found_by_what_the_data_call_them(names, chosen, unused):
    expected = {part: name for part, name in zip(SPLITS, chosen.split(), strict=True) if name != "-"}
    assert assign(names.split(), "it") == (expected, unused.split())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("valid test", "has no part 'train'; it has valid, test"),
        ("train valid dev", "it has valid, dev, and one of them alone can be validation"),
        ("train test_matched test_mismatched", "one of them alone can be test"),
        ("train eval heldout", "one of them alone can be validation"),
    ],
)
def test_names_that_do_not_tell_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        assign(names.split(), "it")


@pytest.mark.parametrize("name", ["test", "valid", "dev", "eval"])
def test_a_text_of_its_own_is_the_part_that_it_is_called(tmp_path, name):
    (tmp_path / "train.txt").write_text("training " * 100)
    (tmp_path / f"{name}.txt").write_text("held out")
    (tmp_path / "songs.txt").write_text("neither")
    own, other = ("test", "validation") if name == "test" else ("validation", "test")
    found = corpus(tmp_path)
    assert found.splits == {"train": ("training " * 100)[:855], own: "held out", other: ("training " * 100)[855:]}
    assert found.notes[-2:] == ["not used: songs.txt", f"the data have no {other} part: it is cut from train"]


def test_folders_and_shards_are_parts_and_what_lies_beside_them_is_said(tmp_path):
    for name in ("train/b.txt", "train/a.txt", "train/notes.md", "test/x.txt", "loose.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    for number in (0, 1):
        Dataset.from_dict({"text": [f"shard {number}\n"]}).to_parquet(tmp_path / f"dev-0000{number}-of-00002.parquet")
    found = corpus(tmp_path)
    assert found.splits == {
        "train": "train/a.txt\ntrain/b.txt\n",
        "validation": "shard 0\nshard 1\n",
        "test": "test/x.txt\n",
    }
    assert found.notes == ["validation is 'dev'", "not used: loose.txt, train/notes.md"]
    (tmp_path / "dev-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="has 1 of the 2 files 'dev-00000-of-00002.parquet'"):
        corpus(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.txt", "valid.txt.gz"], "'valid.txt.gz' of folder .* cannot be read: a part is "),
        (["train.txt", "test.docx"], "'test.docx' of folder .* cannot be read"),
        (["train.txt", "train.jsonl"], "has train.jsonl, train.txt: keep one of them"),
        (["book.txt"], "has no train.arrow, .*; it has book.txt"),
    ],
)
def test_a_folder_that_does_not_tell_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("a text " * 100)
    with pytest.raises(UserError, match=message):
        corpus(tmp_path)


def test_midi_anywhere_below_a_folder_without_parts_is_for_training(tmp_path):
    for name in ("Bach/1.mid", "Chopin/late/2.MID", "index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = folder_parts(tmp_path, ((".mid",), (".json",)), whole=(".mid",))
    assert found.found == {"train": [tmp_path / "Bach/1.mid", tmp_path / "Chopin/late/2.MID"]}
    assert found.notes == ["not used: index.json"]


# ---- tables ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path, columns: dict) -> None:
    """A table in the format of its ending."""
    table = Dataset.from_dict(columns)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.data.table.schema) as stream:
            stream.write_table(table.data.table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    elif path.suffix == ".tsv":
        table.to_csv(path, sep="\t", index=False)
    else:
        getattr(table, f"to_{path.suffix[1:]}")(str(path))


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv"])
def test_a_table_is_read_as_the_texts_of_its_column_and_read_anew(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    for number in (1, 2):  # of one size and one time stamp, as after `rsync --times` or from an archive
        rows = [f"{line} {number}\u2028" for line in LINES]
        write_rows(path, {"body": rows, "id": list(range(60))})
        os.utime(path, (10**9, 10**9))
        found = corpus(path, text_column="body")
        assert "".join(found.splits.values()) == "\n".join(rows)
        assert found.record()["name"] == path.name
    with pytest.raises(UserError, match=f"text_column='text' is not in rows{ending}; it has body, id"):
        corpus(path)
    with pytest.raises(UserError, match="text_column='id' of .* holds int64, not text; columns of text: body"):
        corpus(path, text_column="id")
    with pytest.raises(UserError, match="dataset_config='x' is for a data set of the Hub"):
        corpus(path, dataset_config="x")


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".json", ".jsonl"])
def test_tables_of_pieces_and_pictures_are_read_anew(tmp_path, ending):
    path = tmp_path / f"train{ending}"
    for shift in (0, 1):
        write_rows(path, {"notes": [[[60 + shift]] * 4] * 5})
        os.utime(path, (10**9, 10**9))
        pieces = load_pieces(DataOptions(dataset=str(tmp_path)), 1).splits["train"]
        assert np.flatnonzero(pieces[0].roll[0]) == [60 + shift - 21]
    for low in (10, 20):
        write_rows(path, {"pixels": [[low, 99]] * 40, "label": [0, 1] * 20})
        os.utime(path, (10**9, 10**9))
        assert (load_pictures(DataOptions(dataset=str(path))).pixels["train"] == [low, 99]).all()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1.5] * 99, "float64|double"), ([["a"]] * 99, "List"), ([None] * 99, "null"), ([True] * 99, "bool")],
)
def test_a_text_column_of_another_type_is_named(tmp_path, values, kind):
    write_rows(tmp_path / "rows.parquet", {"text": values, "title": ["a"] * 99})
    with pytest.raises(UserError, match=f"text_column='text' of rows.parquet holds ({kind}), not text; .*: title"):
        corpus(tmp_path / "rows.parquet")


def test_texts_that_are_not_utf8_are_named(tmp_path):
    texts = pa.array([b"caf\xe9"] * 60).view(pa.string())  # arrow does not look
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    with pytest.raises(
        UserError, match=r"^text_column='text' of rows.parquet is not UTF-8: .* byte 0xe9 in position 3"
    ):
        load_corpus(DataOptions(dataset=str(tmp_path / "rows.parquet")))


def test_categories_of_pandas_are_the_texts_that_they_stand_for(tmp_path):
    table = pa.table({"text": pa.array(LINES).dictionary_encode()})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "".join(corpus(tmp_path / "rows.parquet").splits.values()) == "\n".join(LINES)


def test_rows_without_a_text_are_left_out_and_said(tmp_path):
    write_rows(tmp_path / "rows.jsonl", {"text": [*LINES, None, None]})
    found = corpus(tmp_path / "rows.jsonl")
    assert "".join(found.splits.values()) == "\n".join(LINES)
    assert found.notes == ["2 of 62 rows of rows.jsonl hold no text and are left out"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "'.*a.jsonl' is damaged: JSON parse error: .* in row 1"),
        ("a.jsonl", '{"text": "a"}\n["b"]', "changed from object to array in row 1"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}', "/text. changed from string to number in row 1"),
        ("a.json", '"text"', "changed from object to string in row 0"),
        ("a.csv", 'text,id\na,1\n"b,2', "a.csv' is damaged: CSV parse error: Expected 2 columns, got 1"),
        ("a.csv", "text,id\na,1\nb\n", "Expected 2 columns, got 1: b"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", "", "a.csv' is damaged: Empty CSV file"),
        ("a.txt", "PAR1 and no more", "a.txt' is no text"),
        ("a.parquet", "PAR1 and no more", "a.parquet' is damaged: "),
        ("a.arrow", "ARROW1 and no more", "a.arrow' is damaged: "),
    ],
)
def test_a_damaged_table_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        corpus(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_csv_keeps_what_looks_like_nothing_and_long_documents(tmp_path):
    rows = ["NA", "null", "", "a" * 200_000, 'quoted "words",\nand lines']
    write_rows(tmp_path / "a.csv", {"text": rows})
    assert read_table(tmp_path / "a.csv")["text"][:] == rows


# ---- files ----------------------------------------------------------------------------------------------------------


def packed(kind: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("text.txt", content)
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            entry = tarfile.TarInfo("text.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    else:
        return {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(content)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "tar"])
def test_a_packed_file_gets_the_command_that_unpacks_it(tmp_path, kind):
    text, path = "\n".join(LINES).encode(), tmp_path / f"my text.{kind}"
    path.write_bytes(packed(kind, text))
    with pytest.raises(UserError, match="unpack it first: ") as error:
        corpus(path)
    command = str(error.value).split("unpack it first: ")[1]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [found.read_bytes() for found in tmp_path.glob("*.txt")] == [text]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a text.txt", "rows.csv"])
def test_another_encoding_gets_a_command_that_converts_it(tmp_path, encoding, name):
    letters = "text\n" + "naïve café\x81\n" * 50 if encoding == "latin-1" else "text\n" + "naïve “café”\n" * 50
    (tmp_path / name).write_bytes(letters.encode(encoding))
    with pytest.raises(UserError, match="is not UTF-8 text.*; convert it first: iconv -f ") as error:
        corpus(tmp_path / name)
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed")
    subprocess.run(re.split(": (?=iconv)|, with", str(error.value))[1], shell=True, check=True, cwd=tmp_path)
    (new,) = tmp_path.glob("*-utf8.*")
    assert new.read_text(encoding="utf-8-sig") == letters
    assert "café" in "".join(corpus(new).splits.values())


@pytest.mark.parametrize("content", [b"a text\0" * 99, b"PAR1" + b"\0\1" * 99, bytes(range(256)) * 9])
def test_what_is_no_text_is_said_to_be_none(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="is no text"):
        corpus(tmp_path / "a.txt")


@pytest.mark.parametrize("program", ["accelerate", "lightning"])
def test_names_that_are_not_utf8(tmp_path, capfd, program):
    if program == "lightning":
        pytest.importorskip("lightning")
        from training.train_lightning import main as run
    else:
        run = main
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    for name in ("train.txt", "dev.txt", os.fsdecode(b"rest\xe9.txt")):
        (folder / name).write_text("The state of a unit.\n" * 60)
    words = options(folder, tmp_path / "run", max_steps=2, save_steps=2, sample_length=0)
    assert run(words) == 0
    told = capfd.readouterr().out
    assert "note: not used: rest\\xe9.txt" in told and "data: caf\\xe9, " in told
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["name"] == "caf\\xe9"
    assert run(options(folder / "train.txt", folder / "run", max_steps=2)) == 1
    assert "output_dir=" in (last := capfd.readouterr().err.strip().splitlines()[-1]) and "must be UTF-8" in last
    assert not (folder / "run").exists()
