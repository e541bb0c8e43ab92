"""Music as piano rolls: MIDI files and scores to rolls and back, pictures of rolls, and their sound."""

from .midi import MidiError
from .render import (
    MAX_SECONDS,
    SAMPLE_RATE,
    check_length,
    draw_roll,
    synthesize,
    write_wav,
)
from .rolls import (
    LOWEST_PITCH,
    MAX_FRAMES,
    MAX_GRID,
    NUM_PITCHES,
    PROBLEMS,
    PianoRoll,
    check_grid,
    frames_to_roll,
    quantise,
    read_midi,
    roll_to_frames,
    write_midi,
)

__all__ = [
    "LOWEST_PITCH",
    "MAX_FRAMES",
    "MAX_GRID",
    "MAX_SECONDS",
    "MidiError",
    "NUM_PITCHES",
    "PROBLEMS",
    "PianoRoll",
    "SAMPLE_RATE",
    "check_grid",
    "check_length",
    "draw_roll",
    "frames_to_roll",
    "quantise",
    "read_midi",
    "roll_to_frames",
    "synthesize",
    "write_midi",
    "write_wav",
]
