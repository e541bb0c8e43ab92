"""How often a model's continuations look like the data: `python -m training.continuations --model FOLDER_OR_ID`.

The openings of test pieces are continued, each with its own seed. Printed is the share of the continuations that
keep the 5-95 % band of the training pieces in each figure and in all, beside the share of the test pieces themselves
that do, and last a line of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from kru_hf.music import FIGURES, bands, compare, continue_piece, opening

from .common.processes import run_command
from .compose import load_data, load_music_model
from .options.data import DataOptions
from .options.fields import AT_LEAST_1, FINITE, REQUIRED, Options, option
from .options.parser import parse_words

KEPT = ("density", "lowest", "highest", "drones", "known_chords")  # the figures that count


@dataclass
class ContinuationOptions(Options):
    """Whose continuations, and how many."""

    model: str = option(REQUIRED, "Trained folder or Hub id of a piano-roll model.")
    seeds: int = option(24, "How many continuations: seed n continues test piece n.", allowed=AT_LEAST_1)
    num_frames: int = option(96, "Frames of each.", allowed=AT_LEAST_1)
    temperature: float = option(1.0, "As of training.compose.", allowed=FINITE)


def run(argv: list[str]) -> dict[str, Any]:
    """Compose as the options say; returns what the last line has."""
    options, data = parse_words([ContinuationOptions, DataOptions], argv, "training.continuations")
    model, record = load_music_model(options.model)
    found = load_data(data, record, record.options["frames_per_quarter"])
    known, within = bands(found.splits["train"])
    pieces = found.splits["test"]
    made = []
    for seed in tqdm(range(options.seeds), desc="composing", unit="piece", disable=not sys.stderr.isatty()):
        piece = pieces[seed % len(pieces)]
        prime = piece.part(0, opening(piece))
        whole = continue_piece(model, prime, options.num_frames, seed=seed, temperature=options.temperature)
        made.append(compare(whole.part(len(prime.roll), len(whole.roll)), known, within))
    real = [compare(piece, known, within) for piece in pieces]
    shares = {}
    for name, results in (("continuations", made), ("test_pieces", real)):
        shares[name] = {key: sum(one[f"{key}_within"] for one in results) / len(results) for key in FIGURES}
        kept = [all(one[f"{key}_within"] for key in KEPT) for one in results]
        shares[name]["all"] = sum(kept) / len(kept)
    for key in (*FIGURES, "all"):
        words = FIGURES.get(key, f"all but {' and '.join(FIGURES.keys() - KEPT)}")
        own, theirs = (shares[name][key] for name in ("continuations", "test_pieces"))
        print(f"{words:<70} {own:6.1%} of {len(made)}   {theirs:6.1%} of the test pieces")
    ratio = shares["continuations"]["all"] / shares["test_pieces"]["all"] if shares["test_pieces"]["all"] else None
    result = {"seeds": options.seeds, "num_frames": options.num_frames, "ratio": ratio, **shares}
    print(json.dumps(result))
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
