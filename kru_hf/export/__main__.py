"""Export a model: ``python -m kru_hf.export --model FOLDER_OR_ID --format c --dtype int8 --output_dir DIR``."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import transformers

from .c import export_c
from .standard import check_libraries, export_standard
from .streaming import load_model
from .web import export_web
from .weight_file import DTYPES, weight_file

FORMATS = {
    "c": "the C runtime's sources, and weights for it",
    "web": "a page that runs the model in WebAssembly, for any static server",
    "torch": "one step and a whole sequence for torch.export.load, their state as input and output",
    "onnx": "the same for ONNX Runtime (extra export)",
}
TOLD = {
    "torch": "torch.export.load(PATH).module() takes the inputs in this order, without kru_hf",
    "onnx": "onnxruntime.InferenceSession(PATH).run(None, inputs) takes them by name",
}
STATE = "; the first state is zeros, next_state is the state of the next call"
KEYS = "; the keys of a frame are a chain: keys gives their logits from the context, given the lower ones that sound"


def write_runtime(model: Any, tokenizer: Any, source: str, format: str, dtype: str, folder: Path) -> str:
    """Formats c and web; returns what was written and what to do with it."""
    data = weight_file(model, tokenizer, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "web":
        paths = export_web(model, data, Path(source), dtype, folder)
        what_next = f"Serve the folder: python -m http.server --directory {folder}, and open http://localhost:8000"
    else:
        paths = export_c(data, folder)
        what_next = (
            "Compile kru_run.c beside your program, which includes kru_run.h and reads model.kru or includes "
            f"weights.h; in Python: kru_hf.export.StreamingModel.load({str(folder / 'model.kru')!r})"
        )
    lines = [f"{path}  {path.stat().st_size:,} bytes" for path in paths]
    size = f"{model.num_parameters():,} parameters in {len(data):,} bytes"
    return "\n".join([*lines, f"A {type(model).__name__} of {size}. {what_next}."])


def write_standard(model: Any, format: str, folder: Path) -> str:
    """Formats torch and onnx; returns what was written and what to do with it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of libraries that nothing here needs
    programs = export_standard(model, format, folder)
    lines = [f"{path}  {path.stat().st_size:,} bytes: {program}" for path, program in programs.items()]
    carried = any("state" in program.inputs for program in programs.values())
    told = TOLD[format] + STATE * carried + KEYS * any(program.name == "keys" for program in programs.values())
    return "\n".join([*lines, f"A {type(model).__name__} of {model.num_parameters():,} parameters. {told}."])


def main(words: list[str] | None = None) -> int:
    """Parse, export, and say what was written and what to do with it; 1 for what cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m kru_hf.export", description=__doc__)
    parser.add_argument("--model", required=True, help="trained folder or Hub id")
    parser.add_argument(
        "--format", choices=FORMATS, default="c", help="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: fp32; int8 for web)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write, made if it is not there")
    options = parser.parse_args(words)
    transformers.utils.logging.disable_progress_bar()
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"output_dir must be a folder, {options.output_dir} is a file")
    folder, dtype = options.output_dir, options.dtype or ("int8" if options.format == "web" else "fp32")
    if options.format in TOLD and dtype != "fp32":
        parser.error(f"dtype of format {options.format} must be fp32, got {dtype}")
    try:
        if options.format == "onnx":
            check_libraries()
        model, tokenizer = load_model(options.model)
        if options.format in TOLD:
            print(write_standard(model, options.format, folder))
        else:
            print(write_runtime(model, tokenizer, options.model, options.format, dtype, folder))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
