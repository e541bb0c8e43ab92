"""Export a model: ``python -m kru_hf.export --model FOLDER_OR_ID --format c --dtype int8 --output_dir DIR``."""

import argparse
import sys
from pathlib import Path

import transformers

from .c import export_c
from .streaming import load_model
from .web import export_web
from .weight_file import DTYPES, weight_file

FORMATS = {
    "c": "the C runtime's sources, and weights for it",
    "web": "a page that runs the model in WebAssembly, for any static server",
}


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
    try:
        model, tokenizer = load_model(options.model)
        data = weight_file(model, tokenizer, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        if options.format == "web":
            paths = export_web(model, data, Path(options.model), dtype, folder)
            what_next = f"Serve the folder: python -m http.server --directory {folder}, and open http://localhost:8000"
        else:
            paths = export_c(data, folder)
            what_next = (
                "Compile kru_run.c beside your program, which includes kru_run.h and reads model.kru or includes "
                f"weights.h; in Python: kru_hf.export.StreamingModel.load({str(folder / 'model.kru')!r})"
            )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(f"A {type(model).__name__} of {model.num_parameters():,} parameters in {len(data):,} bytes. {what_next}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
