"""Compose music: `python -m training.compose --model FOLDER_OR_ID [--prime FILE.mid] --num_frames 64 --output out.mid`.

Writes the MIDI file, and beside it a picture (.png), a sound (.wav) and, with `--report`, the report and the command
(.json) of the same name.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kru_hf.music import MidiError, PianoRoll, draw_roll, read_midi, write_midi, write_wav
from kru_hf.music.render import check_length
from kru_hf.music.rolls import MAX_FRAMES, MAX_GRID, NUM_PITCHES

from .common.errors import UserError
from .common.files import check_fields, read_json
from .common.machine import shown_command
from .common.processes import run_command
from .common.run_folder import PRESENTED, RUN_FILES
from .data.music_data import piece_figures
from .models.build import load_model
from .options.fields import AT_LEAST_0, FINITE, SEED, Is, Options, at_most, option, require
from .options.parser import parse_words
from .records.run_record import RECIPE, RUN, read_record


@dataclass
class ComposeOptions(Options):
    """What is composed, and where it is written."""

    model: str | None = option(None, "Trained folder or Hub id of a piano-roll model.")
    prime: str | None = option(None, "MIDI file that the piece begins with; without it the model begins by itself.")
    prime_frames: int = option(
        0, "How many frames of the prime are used; 0: all.", only={"prime": Is.ON}, off=0, allowed=AT_LEAST_0
    )
    num_frames: int = option(64, "Frames that are composed.", allowed=at_most(MAX_FRAMES))
    output: str | None = option(None, "MIDI file to write; a .png and a .wav of the same name are written beside it.")
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
    report: bool = option(
        False, "Compare density and pitch range with the training data: one line of JSON, kept beside the MIDI."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in (("model", "--model FOLDER or a Hub id"), ("output", "--output FILE.mid")):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: pass {wanted}")
        self.output = str(self.output)
        midi = Path(self.output).suffix.lower() in (".mid", ".midi")
        require(midi, "output", self.output, "a file that ends in .mid or .midi")
        files = [Path(self.output).with_suffix(ending) for ending in (".png", ".wav", ".json")[: 2 + self.report]]
        free = not any(path.name in (*RUN_FILES, *PRESENTED) for path in files)
        require(free, "output", self.output, "another name, as a run keeps a file of its own there")
        own = self.prime is None or Path(self.prime).resolve() != Path(self.output).resolve()
        require(own, "output", self.output, "another file than prime")
        for path in (Path(self.output), *files):
            require(not path.is_dir(), "output", self.output, f"a file, and {path.name} is a folder")
        most = self.max_voices or NUM_PITCHES
        require(self.min_voices <= most, "min_voices", self.min_voices, f"at most {most}, the most voices allowed")


def read_prime(options: ComposeOptions, frames_per_quarter: int) -> PianoRoll | None:
    """The frames of the prime that are used; prints what was dropped from the file."""
    if options.prime is None:
        return None
    try:
        piece = read_midi(options.prime, frames_per_quarter)
    except MidiError as error:
        raise UserError(f"prime: {error}") from error
    if piece.problems:
        print(f"prime: {piece.problems}", file=sys.stderr)
    if options.prime_frames > len(piece.roll):
        raise UserError(f"prime_frames={options.prime_frames} is more than the {len(piece.roll)} frames of prime")
    end = options.prime_frames or len(piece.roll)
    assert piece.onsets is not None
    tempos = [(frame, tempo) for frame, tempo in piece.tempos if frame < end]
    return PianoRoll(piece.roll[:end], piece.onsets[:end], frames_per_quarter, tempos)


def compose(model: Any, prime: PianoRoll | None, options: ComposeOptions, frames_per_quarter: int) -> PianoRoll:
    """The prime and `num_frames` composed frames as one piece; notes start again where the model takes over.

    Raises:
        UserError: with the prime it would be too long, which is known before it is composed.
    """
    given = np.zeros((0, NUM_PITCHES), dtype=bool) if prime is None else prime.roll  # (T, 88)
    tempos = prime.tempos if prime is not None and not options.tempo else [(0, options.tempo or 90.0)]
    limit = MAX_FRAMES - len(given)
    require(options.num_frames <= limit, "num_frames", options.num_frames, f"at most {limit} after this prime")
    roll = np.concatenate([given, np.zeros((options.num_frames, NUM_PITCHES), dtype=bool)])  # (T + num_frames, 88)
    try:
        check_length(PianoRoll(roll, None, frames_per_quarter, tempos).frame_seconds()[-1])
    except MidiError as error:
        raise UserError(f"num_frames={options.num_frames}, after {len(given)} of the prime: {error}") from error
    start = None if prime is None else torch.from_numpy(prime.roll).float()  # (T, 88)
    most, least = options.max_voices or None, options.min_voices
    stream = model.stream_piano_roll(
        start,
        options.num_frames,
        options.temperature,
        most,
        options.seed,
        min_voices=least,
        top_p=options.top_p,
    )
    bar = tqdm(stream, total=options.num_frames, desc="composing", unit="frame", disable=not sys.stderr.isatty())
    roll[len(given) :] = np.stack([frame[0].numpy() for frame in bar]) > 0.5
    onsets = PianoRoll(roll[len(given) :]).onsets
    if prime is not None:
        assert prime.onsets is not None and onsets is not None
        onsets = np.concatenate([prime.onsets, onsets])  # (T + num_frames, 88)
    return PianoRoll(roll, onsets, frames_per_quarter, tempos)


def compare(continuation: np.ndarray, record: dict[str, Any]) -> dict[str, Any]:
    """Density and pitch range of a continuation (T, 88) beside the 5-95 % band of the training pieces."""
    figures: dict[str, Any] = {}
    for name, value in piece_figures(continuation).items():
        low, high = record[f"{name}_low"], record[f"{name}_high"]
        figures |= {name: None if np.isnan(value) else round(value, 4), f"{name}_band": [low, high]}
        figures[f"{name}_within"] = bool(low <= value <= high)
    figures["within"] = all(figures[f"{name}_within"] for name in ("density", "lowest", "highest"))
    return figures


def is_report(path: Path) -> bool:
    """Whether a file is what an earlier piece left, and not somebody's own."""
    try:
        found = read_json(path)
    except UserError:
        return False
    return {"command", "report"} <= set(found)


def run(argv: list[str]) -> dict[str, Any] | None:
    """Compose as the options say; returns the report if one was asked for."""
    (options,) = parse_words([ComposeOptions], argv, "training.compose")
    output = Path(options.output)
    record = read_record(options.model)
    if record.options.get("task") != "piano_roll":
        raise UserError(f"model={options.model!r} was trained for {record.options.get('task')!r}, not piano_roll")
    model, _ = load_model(options.model, "piano_roll")
    if model.width != NUM_PITCHES:
        raise UserError(f"model={options.model!r} has frames of {model.width} keys; music needs {NUM_PITCHES}")
    check_fields(RECIPE, record.options, {"frames_per_quarter": int}, required=True)
    if options.report:
        bands = [f"{name}_{end}" for name in ("density", "lowest", "highest") for end in ("low", "high")]
        check_fields(f"{RUN}: data", record.data, dict.fromkeys(bands, float), required=True)
    frames_per_quarter = options.frames_per_quarter or record.options["frames_per_quarter"]
    require(frames_per_quarter >= 1, "frames_per_quarter", frames_per_quarter, "1 or more, in recipe.yaml as well")
    prime = read_prime(options, frames_per_quarter)
    prime_frames = 0 if prime is None else len(prime.roll)
    piece = compose(model.eval(), prime, options, frames_per_quarter)
    pictures, sound = output.with_suffix(".png"), output.with_suffix(".wav")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_midi(piece, output)
        draw_roll(piece, pictures, prime_frames, output.stem)
        write_wav(piece, sound)
        figures = compare(piece.roll[prime_frames:], record.data) if options.report else None
        report = output.with_suffix(".json")
        if figures is None and is_report(report):
            report.unlink()  # of an earlier piece of this name
        if figures is not None:
            frames = {"prime_frames": prime_frames, "num_frames": options.num_frames}
            made = {"command": shown_command(argv, "training.compose"), **frames, "report": figures}
            report.write_text(json.dumps(made, indent=2) + "\n")
    except (OSError, RuntimeError, MidiError) as error:  # libsndfile's are RuntimeErrors
        raise UserError(f"output={options.output!r} cannot be written: {error}") from error
    reported = "" if figures is None else f", {report.name}"
    print(f"wrote {output}{reported}, {pictures.name} and {sound.name}: {prime_frames} + {options.num_frames} frames")
    if figures is not None:
        print(json.dumps(figures))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
