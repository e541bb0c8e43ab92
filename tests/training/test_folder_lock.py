"""One run to a folder: the lock, and folders that no run may have."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from tiny_run import ENVIRONMENT, PROGRAMS, ROOT, options

from training.common import saving
from training.common.errors import UserError
from training.common.lock import NAME, locked
from training.common.run_folder import STATE
from training.report import main as report
from training.train import main

# Holds the lock of a folder, says so, and waits; a child that it forked outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from training.common.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder):
    """Another process that holds the lock of `folder`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, env=ENVIRONMENT, **pipes)
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead(text_file, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(options(text_file, folder, max_steps=2)) == 0
    temporary = folder / f"{saving.TEMPORARY}files-1"
    ways = [{"resume_from_checkpoint": "last"}, {"overwrite_output_dir": "true"}, {}]
    with holder(folder) as child:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for program in PROGRAMS.values():
            for way in ways:
                capsys.readouterr()
                assert program(options(text_file, folder, max_steps=2, **way)) == 1
                said = capsys.readouterr().err
                assert said.startswith(f"error: output_dir='{folder}' is in use by process {child.pid} on ")
                assert said.count("\n") == 1
        assert report(["--folder", str(folder)]) == 1
        assert f"error: folder='{folder}' is in use by process {child.pid}" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        child.kill()
        child.wait()  # its own child lives on
        assert (folder / NAME).read_text().startswith(f"process {child.pid} on ")
        assert main(options(text_file, folder, max_steps=2, resume_from_checkpoint="last")) == 0
    assert not list(folder.glob(".*"))


def test_a_lock_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "new" / "run"
    with pytest.raises(UserError, match="is in use by process"), locked(folder), locked(folder):
        pass
    assert not (tmp_path / "new").exists()
    with locked(folder):
        (folder / "kept").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_lock_follows_no_link(tmp_path):
    """A folder from somebody else would have any file emptied."""
    (tmp_path / "kept").write_text("x")
    (tmp_path / ".lock").symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match="cannot be locked: .lock in it is no file; remove it"), locked(tmp_path):
        pass
    assert (tmp_path / "kept").read_text() == "x" and (tmp_path / ".lock").is_symlink()


def test_what_cannot_be_replaced_is_named(tmp_path):
    (tmp_path / "all_results.json").mkdir()
    with pytest.raises(UserError, match=r"^could not save '.*all_results.json' \(Is a directory\); move what is there"):
        saving.write_json(tmp_path / "all_results.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["all_results.json"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_folders_that_no_run_may_have(text_file, tmp_path, capsys, program):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoint-5" / STATE).write_text(json.dumps({}))
    (tmp_path / "link").symlink_to(run / "checkpoint-5")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    own = f"belongs to a checkpoint, which goes when there are newer ones; pass --output_dir '{run}' for"
    for folder, expected in {
        "": "output_dir='' is not valid: it must be a path, or left out",
        run / "checkpoint-5": own,
        run / "checkpoint-5" / "deeper" / "run": own,
        tmp_path / "link": own,
        run / "checkpoint-99": own,
        run / ".tmp-mine": own,
        text_file: f"output_dir='{text_file}' cannot be a folder: '{text_file}' is a file",
        tmp_path / "circle" / "run": f"output_dir='{tmp_path}/circle/run' cannot be",
        tmp_path / ("x" * 300): f"output_dir='{tmp_path}/{'x' * 300}' cannot be a folder: ",
    }.items():
        for way in ({}, {"resume_from_checkpoint": "last"}, {"overwrite_output_dir": "true"}):
            assert PROGRAMS[program](options(text_file, folder, **way)) == 1
            said = capsys.readouterr().err
            assert expected in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert PROGRAMS[program](options(text_file, tmp_path / "new", resume_from_checkpoint="x" * 5000)) == 1
    assert "must be last or a checkpoint's folder" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["checkpoint-5"]
    assert [path.name for path in (run / "checkpoint-5").iterdir()] == [STATE]
