"""Write text: `python -m training.generate --model FOLDER_OR_ID --prompt TEXT --length N`.

The text appears while it is written, by the C runtime; on standard error stands how fast that was.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kru_hf.export import StreamingModel

from .common.errors import UserError
from .common.processes import run_command
from .options.fields import AT_LEAST_1, FINITE, SEED, Options, option, require
from .options.parser import parse_words


@dataclass
class GenerateOptions(Options):
    """What is written."""

    model: str | None = option(None, "Trained folder, Hub id, or weight file (model.kru) of a language model.")
    prompt: str | None = option(None, "Text that is continued.")
    length: int = option(500, "Tokens that are written.", allowed=AT_LEAST_1)
    temperature: float = option(
        1.0, "Below 1 the model plays it safe, above 1 it dares more; 0 is no chance at all.", allowed=FINITE
    )
    top_p: float = option(
        1.0,
        "Draw from the most probable tokens that have this much probability together.",
        allowed=("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    seed: int = option(0, "Seed of the draws: the same seed writes the same text.", allowed=SEED)
    dtype: Literal["fp32", "int8", "int4"] | None = option(
        None, "Precision of the weights; not given: fp32, or that of the weight file."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in (("model", "--model FOLDER or a Hub id"), ("prompt", "--prompt TEXT")):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: pass {wanted}")


def open_model(options: GenerateOptions) -> StreamingModel:
    """The model that the options name."""
    path = str(options.model)
    if not Path(path).is_file():
        return StreamingModel.from_pretrained(path, options.dtype or "fp32")
    require(options.dtype is None, "dtype", options.dtype, "not given beside a weight file, which has its own")
    return StreamingModel.load(path)


def run(argv: list[str]) -> str:
    """Write as the options say; returns the text that was written."""
    (options,) = parse_words([GenerateOptions], argv, "training.generate")
    written = []
    try:
        model = open_model(options)
        pieces = model.stream(options.prompt, options.length, options.temperature, options.top_p, options.seed)
        print(options.prompt, end="", flush=True)
        start = time.perf_counter()
        for piece in pieces:
            written.append(piece)
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    print()
    print(f"{options.length} tokens in {seconds:.2f} s, {options.length / seconds:,.0f} per second", file=sys.stderr)
    return "".join(written)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
