"""Music as piano rolls: MIDI files and scores to rolls and back, pictures of rolls, and their sound."""

from .composition import continue_piece, opening, write_piece
from .figures import FIGURES, bands, compare, piece_figures, sentence
from .midi import MidiError
from .render import draw_roll, sampled, synthesize, write_wav
from .rolls import PianoRoll, frames_to_roll, quantise, read_midi, roll_to_frames, write_midi
from .score import write_score

__all__ = [
    "FIGURES",
    "MidiError",
    "PianoRoll",
    "bands",
    "compare",
    "continue_piece",
    "draw_roll",
    "frames_to_roll",
    "opening",
    "piece_figures",
    "quantise",
    "read_midi",
    "roll_to_frames",
    "sampled",
    "sentence",
    "synthesize",
    "write_midi",
    "write_piece",
    "write_score",
    "write_wav",
]
