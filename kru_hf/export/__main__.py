"""Export a model: ``python -m kru_hf.export --model FOLDER_OR_ID --format c --dtype int8 --output_dir DIR``."""

import argparse
import sys
from pathlib import Path

import transformers

from .c import export_c
from .streaming import load_model
from .weight_file import DTYPES, weight_file

FORMATS = ("c",)


def main(words: list[str] | None = None) -> int:
    """Parse, export, and say what was written and what to do with it; 1 for what cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m kru_hf.export", description=__doc__)
    parser.add_argument("--model", required=True, help="trained folder or Hub id")
    parser.add_argument("--format", choices=FORMATS, default="c", help="c: the C runtime's sources and weights for it")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write, made if it is not there")
    options = parser.parse_args(words)
    transformers.utils.logging.disable_progress_bar()
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"output_dir must be a folder, {options.output_dir} is a file")
    try:
        model, tokenizer = load_model(options.model)
        data = weight_file(model, tokenizer, options.dtype)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for path in export_c(data, options.output_dir):
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(
        f"A {type(model).__name__} of {model.num_parameters():,} parameters in {len(data):,} bytes. "
        f"Compile kru_run.c beside your program, which includes kru_run.h and reads model.kru or includes weights.h; "
        f"in Python: kru_hf.export.StreamingModel.load({str(options.output_dir / 'model.kru')!r})."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
