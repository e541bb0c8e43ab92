"""Music as piano rolls: MIDI files and scores to rolls and back, pictures of rolls, and their sound."""

from .midi import MidiError
from .render import draw_roll, synthesize, write_wav
from .rolls import PianoRoll, frames_to_roll, quantise, read_midi, roll_to_frames, write_midi

__all__ = [
    "MidiError",
    "PianoRoll",
    "draw_roll",
    "frames_to_roll",
    "quantise",
    "read_midi",
    "roll_to_frames",
    "synthesize",
    "write_midi",
    "write_wav",
]
