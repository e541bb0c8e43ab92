"""Compose music: `python -m training.compose --model FOLDER_OR_ID [--prime PIECE] --num_frames 64 --output out.mid`.

Writes the MIDI file, and beside it a picture (.png), a sound (.wav), a score (.mxl) and, with `--statistics`, figures
of the piece beside those of the training pieces (.json) of the same name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kru_hf.music import MidiError, PianoRoll, opening, read_midi
from kru_hf.music.rolls import MAX_FRAMES, MAX_GRID, NUM_PITCHES

from .common.errors import UserError
from .common.files import check_fields, read_json
from .common.machine import shown_command
from .common.processes import run_command
from .common.run_folder import PRESENTED, RUN_FILES
from .data.music_data import MIDI_ENDINGS, load_pieces
from .data.splits import DataSet
from .evaluate import choose_data
from .models.build import load_model
from .models.composing import compose_piece
from .options.data import DataOptions
from .options.fields import AT_LEAST_0, FINITE, SEED, Is, Options, at_most, option, require
from .options.parser import parse_words
from .records.run_record import RECIPE, RunRecord, read_record

BESIDE = (".png", ".wav", ".mxl", ".json")


@dataclass
class ComposeOptions(Options):
    """What is composed, and where it is written."""

    model: str | None = option(None, "Trained folder or Hub id of a piano-roll model.")
    prime: str | None = option(
        None,
        "What the piece begins with: a MIDI file, or the name of a validation or test piece of the data; without it "
        "the model begins by itself.",
    )
    prime_frames: int = option(
        0,
        "How many frames of the prime are used; 0: all of a file, the first four bars of a piece of the data.",
        only={"prime": Is.ON},
        off=0,
        allowed=AT_LEAST_0,
    )
    num_frames: int = option(64, "Frames that are composed.", allowed=at_most(MAX_FRAMES))
    output: str | None = option(None, "MIDI file to write; .png, .wav and .mxl of the same name are written beside it.")
    temperature: float = option(
        1.0, "Below 1 the model plays it safe, above 1 it dares more; 0 is no chance at all.", allowed=FINITE
    )
    max_voices: int = option(0, "At most that many keys at once; 0: no limit.", allowed=at_most(NUM_PITCHES, 0))
    min_voices: int = option(
        0,
        "At least that many keys at once: frames with fewer are drawn again, as those with too many.",
        allowed=AT_LEAST_0,
    )
    top_p: float = option(
        1.0,
        "The next key is drawn from the most probable ones that together have this share.",
        allowed=("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    frames_per_quarter: int = option(
        0, "Grid of the piece; 0: that of the training data.", allowed=at_most(MAX_GRID, 0)
    )
    tempo: float = option(
        0.0,
        "Quarter notes a minute; 0: that of the prime, or 90.",
        allowed=("between 10 and 1000, or 0", lambda v: v == 0 or 10 <= v <= 1000),
    )
    seed: int = option(0, "Seed of the draws: the same seed gives the same files.", allowed=SEED)
    statistics: bool = option(
        False,
        "Compare density, range, drones, crossing voices and chords with the training data: a sentence and a .json.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in (("model", "--model FOLDER or a Hub id"), ("output", "--output FILE.mid")):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: pass {wanted}")
        self.output = str(self.output)
        midi = Path(self.output).suffix.lower() in (".mid", ".midi")
        require(midi, "output", self.output, "a file that ends in .mid or .midi")
        files = [Path(self.output).with_suffix(ending) for ending in BESIDE[: 3 + self.statistics]]
        free = not any(path.name in (*RUN_FILES, *PRESENTED) for path in files)
        require(free, "output", self.output, "another name, as a run keeps a file of its own there")
        own = self.prime is None or Path(self.prime).resolve() != Path(self.output).resolve()
        require(own, "output", self.output, "another file than prime")
        for path in (Path(self.output), *files):
            require(not path.is_dir(), "output", self.output, f"a file, and {path.name} is a folder")
        most = self.max_voices or NUM_PITCHES
        require(self.min_voices <= most, "min_voices", self.min_voices, f"at most {most}, the most voices allowed")


def load_music_model(name: str) -> tuple[Any, RunRecord]:
    """A model that has been trained on piano rolls of 88 keys, and its record."""
    record = read_record(name)
    if record.options.get("task") != "piano_roll":
        raise UserError(f"model={name!r} was trained for {record.options.get('task')!r}, not piano_roll")
    model, _ = load_model(name, "piano_roll")
    if model.width != NUM_PITCHES:
        raise UserError(f"model={name!r} has frames of {model.width} keys; music needs {NUM_PITCHES}")
    check_fields(RECIPE, record.options, {"frames_per_quarter": int}, required=True)
    return model.eval(), record


def load_data(data: DataOptions, record: RunRecord, frames_per_quarter: int) -> DataSet:
    """The data that the model was trained on, or those that are given; says so if they are others."""
    try:
        found = load_pieces(choose_data(data, record), frames_per_quarter)
    except UserError as error:
        if data.dataset is not None:
            raise
        raise UserError(
            f"the data that the model was trained on, {record.data.get('name')!r}, cannot be found here; pass "
            f"--dataset PATH_OR_ID: a named prime and --statistics need them ({error})"
        ) from error
    if found.sha256 != record.data.get("sha256"):
        print(f"note: the model was trained on other data than {found.name!r} as it is here", file=sys.stderr)
    return found


def held_out(name: str, found: DataSet) -> PianoRoll:
    """A validation or test piece by its name."""
    pieces = {piece.name: (piece, split) for split in ("test", "validation") for piece in found.splits[split]}
    if name not in pieces:
        some = ", ".join(list(pieces)[:3])
        raise UserError(f"prime={name!r} is neither a file nor a held-out piece of {found.name!r}, such as {some}")
    piece, split = pieces[name]
    return replace(piece, name=f"{name} ({split})")


def read_prime(options: ComposeOptions, frames_per_quarter: int, found: DataSet | None) -> PianoRoll:
    """The frames of the prime that are used, none without a prime; prints what was dropped from the file."""
    tempos = [(0, options.tempo or 90.0)]
    if options.prime is None:
        return PianoRoll(np.zeros((0, NUM_PITCHES)), None, frames_per_quarter, tempos)
    if found is not None and not is_file(options.prime):
        piece = held_out(options.prime, found)
        piece, end = replace(piece, tempos=tempos), opening(piece)
        require(
            piece.frames_per_quarter == frames_per_quarter,
            "frames_per_quarter",
            frames_per_quarter,
            f"{piece.frames_per_quarter}, the grid of the piece that prime names",
        )
    else:
        try:
            piece = read_midi(options.prime, frames_per_quarter)
        except MidiError as error:
            raise UserError(f"prime: {error}") from error
        if piece.problems:
            print(f"prime: {piece.problems}", file=sys.stderr)
        piece, end = replace(piece, name=Path(options.prime).stem), len(piece.roll)
        if options.tempo:
            piece.tempos = tempos
    if options.prime_frames > len(piece.roll):
        raise UserError(f"prime_frames={options.prime_frames} is more than the {len(piece.roll)} frames of prime")
    return piece.part(0, options.prime_frames or end)


def is_file(prime: str) -> bool:
    """Whether a prime is meant as a file, not as the name of a piece."""
    return Path(prime).exists() or Path(prime).suffix.lower() in MIDI_ENDINGS


def is_statistics(path: Path) -> bool:
    """Whether a file is what an earlier piece left, and not somebody's own."""
    try:
        found = read_json(path)
    except UserError:
        return False
    return {"command", "statistics"} <= set(found)


def run(argv: list[str]) -> dict[str, Any] | None:
    """Compose as the options say; returns the statistics if they were asked for."""
    options, data = parse_words([ComposeOptions, DataOptions], argv, "training.compose")
    output = Path(options.output)
    model, record = load_music_model(str(options.model))
    own = record.options["frames_per_quarter"]
    frames_per_quarter = options.frames_per_quarter or own
    require(frames_per_quarter >= 1, "frames_per_quarter", frames_per_quarter, "1 or more, in recipe.yaml as well")
    named = options.prime is not None and not is_file(options.prime)
    found = load_data(data, record, own) if named or options.statistics else None
    prime = read_prime(options, frames_per_quarter, found)
    limit = MAX_FRAMES - len(prime.roll)
    require(options.num_frames <= limit, "num_frames", options.num_frames, f"at most {limit} after this prime")
    report = output.with_suffix(".json")
    if not options.statistics and is_statistics(report):
        report.unlink()  # of an earlier piece of this name
    bar = partial(tqdm, total=options.num_frames, desc="composing", unit="frame", disable=not sys.stderr.isatty())
    lines, figures = compose_piece(
        model,
        prime,
        options.num_frames,
        output,
        shown_command(argv, "training.compose"),
        found.splits["train"] if found is not None and options.statistics else None,
        progress=bar,
        temperature=options.temperature,
        max_voices=options.max_voices or None,
        min_voices=options.min_voices,
        top_p=options.top_p,
        seed=options.seed,
    )
    print("\n".join(lines))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
