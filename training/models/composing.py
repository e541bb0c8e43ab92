"""A piece that a trained model composes, with its files and its statistics beside those of the training pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kru_hf.music import MidiError, PianoRoll, bands, compare, continue_piece, sentence, write_piece

from ..common.errors import UserError


def compose_piece(
    model: Any,
    prime: PianoRoll,
    num_frames: int,
    path: Path,
    command: str,
    training: Sequence[PianoRoll] | None = None,
    **sampling: Any,
) -> tuple[list[str], dict[str, Any] | None]:
    """Continue a prime; write MIDI, picture, sound and score, and with training pieces the statistics (.json).

    Args:
        prime: named, or without frames. path: of the MIDI file. command: that makes the piece again.
        sampling: of `kru_hf.music.continue_piece`.

    Returns:
        what is to be said, line by line, and the statistics of what was composed.
    """
    given = len(prime.roll)
    try:
        piece = continue_piece(model, prime, num_frames, **sampling)
    except MidiError as error:
        raise UserError(f"num_frames={num_frames}, after {given} of the prime: {error}") from error
    figures, report = None, path.with_suffix(".json")
    if training is not None:
        figures = compare(piece.part(given, given + num_frames), *bands(training))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written, lines = write_piece(piece, path, given)
        if figures is not None:
            made = {"command": command, "prime": prime.name, "prime_frames": given, "num_frames": num_frames}
            lines.append(sentence(figures))
            report.write_text(json.dumps({**made, "sentence": lines[-1], "statistics": figures}, indent=2) + "\n")
            written.append(report.name)
    except (OSError, RuntimeError) as error:  # the libraries' are RuntimeErrors
        raise UserError(f"output={str(path)!r} cannot be written: {error}") from error
    begin = f"{given} frames of {prime.name}, then " if given else ""
    return [f"wrote {', '.join(written)} in {path.parent}: {begin}{num_frames} composed frames", *lines], figures
