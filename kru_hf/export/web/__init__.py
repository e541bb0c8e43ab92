"""``--format web``: a page in one folder for any static server, with the runtime as WebAssembly."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FLAGS = (
    *("--target=wasm32-wasi", "-mcpu=generic+simd128+bulk_memory", "-mexec-model=reactor", "-O2", "-s", "-g0"),
    *("-Wl,--export-dynamic", "-Wl,--export=__heap_base"),
)
PAGES = {
    "KRUForCausalLM": ("text.js",),
    "KRUForPianoRoll": ("music.js",),
    "KRUForSequenceClassification": ("digits.js",),
}


def compile_runtime(path: Path) -> None:
    """Write the runtime as WebAssembly, with the compiler of the package ``ziglang``.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("ziglang") is None:
        raise ImportError("the page needs a compiler for WebAssembly: pip install ziglang, or kru-hf[web]")
    command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, str(HERE.parent / "kru_run.c"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ziglang could not compile the runtime: {done.stderr.strip()}")


def settings(model: Any, source: Path, dtype: str) -> dict[str, Any]:
    """What the page shows, and what it has to know of the data: from the run's recipe, if there is one.

    Raises:
        ValueError: a model that there is no page for; the message says why.
    """
    kind, config = type(model).__name__, model.config
    if kind not in PAGES:
        raise ValueError(f"a page needs one of {', '.join(PAGES)}, got {kind}")
    recipe = source / "recipe.yaml"
    options = yaml.safe_load(recipe.read_text()) if recipe.is_file() else {}
    found: dict[str, Any] = {"name": source.name, "parameters": model.num_parameters(), "dtype": dtype}
    if kind == "KRUForCausalLM":
        return {**found, "prompt": "the "}
    if kind == "KRUForPianoRoll":
        if model.width != 88:
            raise ValueError(f"the page plays 88 keys, this model has {model.width}")
        least = 1 if config.frame_head == "chain" else 3
        return {**found, "framesPerQuarter": options.get("frames_per_quarter", 1), "leastVoices": least}
    if config.input_size != 1 or options.get("permuted"):
        raise ValueError("the page reads pictures pixel by pixel, row by row: a model with input_size 1, not permuted")
    return {**found, "side": 8 if options.get("dataset") == "digits" else 28}


def export_web(model: Any, data: bytes, source: Path, dtype: str, folder: Path) -> list[Path]:
    """Write the page of a model with the weight file ``data``; returns the paths of its files.

    Raises:
        ValueError: a model that there is no page for. ImportError: no compiler.
    """
    shown = settings(model, source, dtype)
    names = ("index.html", "runtime.js", *PAGES[type(model).__name__])
    compile_runtime(folder / "kru.wasm")
    for name in names:
        shutil.copyfile(HERE / name, folder / name)
    (folder / "model.kru").write_bytes(data)
    (folder / "settings.json").write_text(json.dumps(shown))
    return [folder / name for name in (*names, "settings.json", "kru.wasm", "model.kru")]
