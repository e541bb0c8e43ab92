"""Piano rolls: notes on the grid, MIDI files written and read again, pictures and sound."""

import math
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from kru_hf.music import (
    MidiError,
    PianoRoll,
    draw_roll,
    frames_to_roll,
    quantise,
    read_midi,
    roll_to_frames,
    sampled,
    synthesize,
    write_midi,
    write_wav,
)

pytest.importorskip("symusic")
NOTES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(21, 108)), min_size=1, max_size=25)


@settings(max_examples=25, deadline=None)
@given(notes=NOTES, grid=st.integers(1, 12), tempo=st.integers(30, 240))
def test_midi_round_trip_keeps_notes_onsets_and_tempo(notes, grid, tempo, tmp_path_factory):
    piece = quantise([(start / grid, length / grid, pitch) for start, length, pitch in notes], grid)
    piece.tempos = [(0, float(tempo))]
    path = tmp_path_factory.mktemp("midi") / "a.mid"
    write_midi(piece, path)
    again = read_midi(path, grid)
    assert again.notes() == piece.notes()
    assert np.array_equal(again.roll, piece.roll) and np.array_equal(again.onsets, piece.onsets)
    assert [(frame, round(found, 3)) for frame, found in again.tempos] == [(0, tempo)]  # whole microseconds per quarter
    assert not again.problems


def test_changes_of_tempo_do_not_move_notes(tmp_path):
    piece = quantise([(0, 1, 60), (4, 1, 62), (8, 1, 64)], 2)
    piece.tempos = [(0, 60.0), (8, 120.0)]
    write_midi(piece, tmp_path / "a.mid")
    again = read_midi(tmp_path / "a.mid", 2)
    assert again.notes() == [(0, 2, 60), (8, 2, 62), (16, 2, 64)]
    assert again.tempos == piece.tempos
    assert again.frame_seconds()[-1] == pytest.approx(4.0 + 2.5)


def test_what_is_dropped_or_changed_is_counted():
    notes = [(0, 1, 60), (0, 1, 12), (2, 0.02, 64), (2, 1, 120), (2.9, 1, 67), (3, 1, 67), (5, 0, 60)]
    piece = quantise(notes, 1)
    assert piece.notes() == [(0, 1, 60), (2, 1, 64), (3, 1, 67), (5, 1, 60)]
    assert piece.report == {
        "out_of_range_notes": 2, "short_notes": 1, "overlapping_notes": 1, "zero_length_notes": 1,
    }  # fmt: skip
    assert "2 notes outside the pitches 21..108" in piece.problems


def test_a_key_sounds_where_any_note_of_it_does():
    """Nested, in a row, of one start, and apart; the onsets tell them from one another."""
    piece = quantise([(0, 8, 60), (4, 1, 60), (5, 1, 60), (0, 8, 64), (0, 3, 64), (10, 1, 60)], 1)
    assert np.flatnonzero(piece.roll[:, 39]).tolist() == [*range(8), 10]
    assert np.flatnonzero(piece.onsets[:, 39]).tolist() == [0, 4, 5, 10]
    assert np.flatnonzero(piece.roll[:, 43]).tolist() == list(range(8))
    assert piece.notes() == [(0, 4, 60), (0, 8, 64), (4, 1, 60), (5, 3, 60), (10, 1, 60)]
    assert piece.report == {"overlapping_notes": 1}


@settings(max_examples=50, deadline=None)
@given(notes=NOTES)
def test_a_roll_is_the_union_of_its_notes(notes):
    piece = quantise(notes, 1)
    union, onsets = np.zeros_like(piece.roll), np.zeros_like(piece.roll)
    for start, length, pitch in notes:
        union[start : start + length, pitch - 21] = True
        onsets[start, pitch - 21] = True
    assert np.array_equal(piece.roll, union) and np.array_equal(piece.onsets, onsets)


def test_a_missing_file_and_a_bad_length(tmp_path):
    with pytest.raises(MidiError, match="does not exist"):
        read_midi(tmp_path / "none.mid")
    with pytest.raises(MidiError, match="more than 100000"):
        quantise([(1e6, 1, 60)], 4)
    for start, length in ((-1, 2), (0, math.inf), (math.nan, 1), (3, -1)):
        with pytest.raises(MidiError, match="must be 0 or more, finite"):
            quantise([(start, length, 60)], 4)
    for grid in (0, 481):
        with pytest.raises(MidiError, match=f"frames_per_quarter={grid} is not valid: it must be between 1 and 480"):
            quantise([(0, 1, 60)], grid)
    with pytest.raises(MidiError, match="100001 frames, more than 100000"):
        frames_to_roll([[]] * 100_001)
    with (tmp_path / "large.mid").open("wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(MidiError, match="16,777,217 bytes; a MIDI file may have 16,777,216"):
        read_midi(tmp_path / "large.mid")


@pytest.mark.parametrize(("grid", "tempo", "frames"), [(1, 10.0, 601), (4, 10.0, 2401), (480, 1000.0, 100_000)])
def test_a_sound_is_at_most_an_hour_on_every_grid(grid, tempo, frames, tmp_path, monkeypatch):
    piece = PianoRoll(np.zeros((frames, 88)), None, grid, [(0, tempo)])
    if piece.frame_seconds()[-1] <= 3600:
        synthesize(piece, 100)
        piece.tempos = [(0, 1e-3)]
    with pytest.raises(MidiError, match="seconds is too long: it may have 3,600"):
        write_wav(piece, tmp_path / "a.wav")
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize("tempo", [0.0, -60.0, float("nan"), float("inf")])
def test_a_sound_has_a_tempo_and_a_rate(tempo, tmp_path):
    piece = PianoRoll(np.ones((4, 88)), None, 4, [(0, tempo)])
    with pytest.raises(MidiError, match=f"tempos has {tempo} at frame 0"):
        write_wav(piece, tmp_path / "a.wav")
    with pytest.raises(MidiError, match="sample_rate=0 is not valid"):
        write_wav(PianoRoll(np.ones((4, 88))), tmp_path / "a.wav", sample_rate=0)
    assert not (tmp_path / "a.wav").exists()


def test_a_held_string_rings_out():
    """What is left after ten seconds is below one step of 16 bits, so a longer note takes no more memory."""
    piece = PianoRoll(np.zeros((40, 88)), None, 1, [(0, 60.0)])
    piece.roll[:, 39] = piece.onsets[0, 39] = True
    sound = synthesize(piece, 8_000)
    assert np.abs(sound[9 * 8_000 : 10 * 8_000]).max() < 1 / 32_768
    assert len(sound) == int(40.3 * 8_000) + 1 and not sound[11 * 8_000 :].any()


@pytest.mark.parametrize("grid", [1, 68, 69, 480])
def test_every_grid_can_be_written(grid, tmp_path):
    piece = quantise([(0, 1, 60), (1, 1 / grid, 64)], grid)
    write_midi(piece, tmp_path / "a.mid")
    assert read_midi(tmp_path / "a.mid", grid).notes() == [(0, grid, 60), (grid, 1, 64)]


@given(frames=st.lists(st.sets(st.integers(21, 108)), min_size=1, max_size=20))
@settings(deadline=None)
def test_frames_and_rolls(frames):
    roll, outside = frames_to_roll([sorted(frame) for frame in frames])
    assert roll_to_frames(roll) == [sorted(frame) for frame in frames]
    assert outside == 0
    assert frames_to_roll([[20, 109, 60]])[1] == 2


def test_the_legend_of_a_picture_hides_no_note(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    draw_roll(quantise([(0, 1, 69), (3, 1, 72)], 2), tmp_path / "a.png", prime_frames=4)
    drawn[0].draw_without_rendering()
    (axes,), legends = drawn[0].axes, [*drawn[0].legends, *filter(None, [drawn[0].axes[0].get_legend()])]
    assert [text.get_text() for text in legends[0].get_texts()] == ["prime", "voice 1 (highest)"]
    assert not legends[0].get_window_extent().overlaps(axes.get_window_extent())


def test_picture_and_sound(tmp_path):
    piece = quantise([(0, 1, 69), (1, 1, 69), (2, 2, 72)], 2)
    draw_roll(piece, tmp_path / "a.png", prime_frames=4)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_wav(piece, tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        seconds = file.getnframes() / file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    assert seconds == pytest.approx(2.0 if sampled(piece) is not None else 2.3, abs=0.01)
    assert 20_000 < np.abs(samples).max() < 32_767
    spectrum = np.abs(np.fft.rfft(synthesize(piece)[:11_025]))  # the first half second: A at 440 Hz
    assert abs(int(spectrum.argmax()) * 2 - 440) <= 2
    silent = PianoRoll(np.zeros((4, 88)))
    assert not synthesize(silent).any()
    draw_roll(silent, tmp_path / "silent.png")
