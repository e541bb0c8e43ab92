"""Every released model in every format that fits it, and its figures by the C runtime beside those of PyTorch.

    python tests/benchmarks/exports.py [--models FOLDER …] [--formats c web torch onnx] [--dtypes fp32 int8]
        [--split test] [--data FOLDER]

For each model it prints the bytes of its files in each format, or why it has none, and what ``training.evaluate``
says of it in PyTorch and with each ``--dtype``. ``--data`` holds the data sets under their names. The exit code is 1 if
a figure in fp32 differs by more than 1e-4 from PyTorch's, with products in fp32, or if either has none.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `training` is part of the checkout, not of what is installed

from kru_hf.export.__main__ import FORMATS
from kru_hf.export.__main__ import main as export
from training.evaluate import main as evaluate

TOLERANCE = 1e-4
FIGURES = ("bpc", "nll_per_frame", "accuracy", "loss")  # the first that a task has is shown


def quietly(command, words: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = command(words)
    return code, out.getvalue(), error.getvalue()


def exported(model: Path, format: str, dtype: str) -> str:
    """The bytes of what is written, or the last line of why nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", str(model), "--format", format, "--output_dir", folder]
        code, _, error = quietly(export, words + (["--dtype", dtype] if format in ("c", "web") else []))
        if code:
            return error.strip().splitlines()[-1]
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        if format == "c":
            files = [path for path in files if path.suffix == ".kru"]
        return f"{sum(path.stat().st_size for path in files):,} bytes"


def figure(model: Path, data: Path, split: str, dtype: str | None) -> tuple[str, float] | str:
    """Name and value of the model's figure, or why it has none. PyTorch's products are fp32, as the runtime's."""
    precision = ["--mixed_precision", "no"] if dtype is None else ["--dtype", dtype]
    words = ["--model", str(model), "--dataset", str(data), "--split", split, "--use_cpu", "true", *precision]
    code, out, error = quietly(evaluate, words)
    if code:
        return error.strip().splitlines()[-1]
    found = json.loads(out.splitlines()[-1])
    name = next(name for name in FIGURES if name in found)
    return name, found[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=sorted(Path("model_cards").glob("*/config.json")))
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "int8", "int4"), default=["fp32", "int8"])
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--data", type=Path, help="folder with a folder or file for each data set, under its name")
    options = parser.parse_args()
    failed = False
    for model in options.models:
        folder = model.parent if model.name == "config.json" else model
        print(folder.name, flush=True)
        for format in options.formats:
            for dtype in options.dtypes if format in ("c", "web") else ["fp32"]:
                print(f"    {format:<6} {dtype}  {exported(folder, format, dtype)}", flush=True)
        name = json.loads((folder / "run.json").read_text())["data"]["name"]
        data = options.data / name if options.data and (options.data / name).exists() else Path(name)
        expected = figure(folder, data, options.split, None)
        print(f"    PyTorch      {expected}", flush=True)
        for dtype in options.dtypes:
            found = figure(folder, data, options.split, dtype)
            print(f"    runtime {dtype} {found}", flush=True)
            exact = (
                isinstance(found, tuple) and isinstance(expected, tuple) and abs(found[1] - expected[1]) <= TOLERANCE
            )
            failed |= dtype == "fp32" and not exact
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
