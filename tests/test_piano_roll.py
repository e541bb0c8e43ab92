"""The piano-roll head, and MIDI files to rolls and back."""

import math
import struct
import wave

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import AutoModel

from kru_hf import KRUCache, KRUConfig, KRUForPianoRoll
from kru_hf.music import (
    MidiError,
    PianoRoll,
    draw_roll,
    frames_to_roll,
    quantise,
    read_midi,
    roll_to_frames,
    synthesize,
    write_midi,
    write_wav,
)
from kru_hf.piano_roll_head import draw_frame

symusic = pytest.importorskip("symusic")

FLOAT32_TOLERANCE = 1e-5  # nats a frame and states, fp32 sums over 88 keys in another order
BLOCKS = ({"block_type": "plain"}, {"block_type": "plain", "io_rank": 5}, {"block_type": "residual", "hidden_size": 12})


def small_model(**options) -> KRUForPianoRoll:
    torch.manual_seed(0)
    options = {"block_type": "plain", "vocab_size": 1, "factor_shapes": [[2, 2], [3, 3]], "input_size": 7, **options}
    return KRUForPianoRoll(KRUConfig(**options)).eval()


def random_roll(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.2).float()


# ---- the head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BLOCKS)
def test_loss_is_the_binary_cross_entropy_in_nats_per_scored_frame(options):
    model, x = small_model(**options), random_roll(2, 9, 7)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    out = model(input_values=x, attention_mask=mask)
    total, count = 0.0, 0
    for row, length in ((0, 6), (1, 9)):
        for t in range(length - 1):
            for key in range(7):
                p = 1 / (1 + math.exp(-out.logits[row, t, key].item()))
                total -= math.log(p if x[row, t + 1, key] else 1 - p)
            count += 1
    assert abs(out.loss.item() - total / count) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(options, side):
    model, x = small_model(**options), random_roll(1, 6, 7)
    pad = torch.ones(1, 3, 7)
    parts, mask = ([pad, x], [0] * 3 + [1] * 6) if side == "left" else ([x, pad], [1] * 6 + [0] * 3)
    alone = model(input_values=x, use_cache=True)
    padded = model(input_values=torch.cat(parts, 1), attention_mask=torch.tensor([mask]), use_cache=True)
    assert abs(alone.loss.item() - padded.loss.item()) < FLOAT32_TOLERANCE
    for ours, theirs in zip(padded.past_key_values.states, alone.past_key_values.states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


def test_padded_frames_are_not_scored_with_targets_of_their_own():
    model, x, targets = small_model(), random_roll(2, 6, 7), random_roll(2, 6, 7)
    mask, other = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]), targets.clone()
    other[1, 3:] = 1 - other[1, 3:]
    losses = [model(input_values=x, attention_mask=mask, shift_labels=y).loss.item() for y in (targets, other)]
    assert losses[0] == losses[1]
    both = model(input_values=x, attention_mask=mask, shift_labels=targets, shift_mask=torch.ones(2, 6)).loss
    assert both.item() == losses[0]


@pytest.mark.parametrize("options", BLOCKS)
def test_windows_with_carried_state_are_the_whole_piece(options):
    model, x = small_model(**options), random_roll(2, 11, 7)
    whole = model(input_values=x)
    state, nats = None, 0.0
    for start in range(0, 10, 4):
        end = min(start + 4, 10)
        out = model(
            input_values=x[:, start:end], shift_labels=x[:, start + 1 : end + 1], past_key_values=state, use_cache=True
        )
        state = KRUCache.from_states([s.detach() for s in out.past_key_values.states])
        nats += out.loss.item() * (end - start)
        torch.testing.assert_close(out.logits, whole.logits[:, start:end], atol=FLOAT32_TOLERANCE, rtol=0)
    assert abs(nats / 10 - whole.loss.item()) < FLOAT32_TOLERANCE


def test_prediction_uses_no_later_frame():
    model, x = small_model(), random_roll(1, 8, 7)
    changed = x.clone()
    changed[:, 5:] = 1 - changed[:, 5:]
    assert torch.equal(model(input_values=x).logits[:, :5], model(input_values=changed).logits[:, :5])


def test_penalty_is_in_the_training_loss_only():
    model, x = small_model(unitary_loss_coef=0.5), random_roll(1, 8, 7)
    plain = model(input_values=x)
    trained = model.train()(input_values=x)
    expected = plain.loss + 0.5 * plain.unitary_loss
    torch.testing.assert_close(trained.loss, expected, atol=FLOAT32_TOLERANCE, rtol=0)


def test_dropout_keeps_the_expected_logits():
    """Normalising after dropout would shrink them by (1 - p)^(1/2) = 0.71."""
    model, x = small_model(factor_shapes=[[32, 32], [32, 32]], state_dropout=0.5), random_roll(1, 5, 7)
    with torch.no_grad():
        model.key_head.weight.copy_(
            model.model.layers[0]
            .recurrence(  # rows that point along the last state
                model.model.input_map(x).unflatten(-1, (2, -1)), None, None
            )[0][0, -1]
            .flatten()
            .expand(7, -1)
        )
        expected = model(input_values=x).logits[0, -1] - model.key_head.bias
        drawn = model.train()(input_values=x.expand(200, -1, -1)).logits[:, -1].mean(0) - model.key_head.bias
    ratio = drawn / expected
    assert (ratio - 1).abs().max() < 0.02  # 200 draws of 2048 units: a standard error of about 0.2 %


def test_every_parameter_gets_a_gradient():
    model = small_model(num_hidden_layers=2, block_type="residual", hidden_size=12).train()
    model(input_values=random_roll(2, 8, 7)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_saved_model_is_the_same_and_maps_automodel(tmp_path):
    model, x = small_model(), random_roll(1, 8, 7)
    KRUForPianoRoll.register_for_auto_class("AutoModel")
    KRUConfig.register_for_auto_class()
    model.save_pretrained(tmp_path)
    for loaded in (
        KRUForPianoRoll.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "KRUForPianoRoll"
        assert torch.equal(loaded(input_values=x).loss, model(input_values=x).loss)


def test_default_width_is_a_piano():
    assert small_model(input_size=None).config.input_size == 88


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(1, 3, 6), r"shape \(B, T, 7\)"),
        (torch.zeros(1, 0, 7), "T >= 1"),
        (torch.full((1, 2, 7), 60.0), r"in \[0, 1\].*60"),
        (torch.full((1, 2, 7), math.nan), "nan"),
    ],
)
def test_bad_frames_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        small_model()(input_values=values)


# ---- sampling -----------------------------------------------------------------------------------------------------


def test_generation_equals_feeding_everything_again():
    model = small_model()
    prime = random_roll(1, 4, 7)
    roll = model.generate_piano_roll(prime, num_frames=12, temperature=0)
    seen = prime
    for t in range(12):
        frame = (model(input_values=seen).logits[:, -1] > 0).float()
        assert torch.equal(roll[:, t], frame)
        seen = torch.cat([seen, frame[:, None]], 1)


def test_seed_voices_and_mode():
    model = small_model().train()
    with torch.no_grad():
        model.key_head.bias.fill_(1.0)
    first = model.generate_piano_roll(num_frames=20, seed=3, batch_size=2)
    assert torch.equal(first, model.generate_piano_roll(num_frames=20, seed=3, batch_size=2))
    assert not torch.equal(first, model.generate_piano_roll(num_frames=20, seed=4, batch_size=2))
    assert first.shape == (2, 20, 7)
    assert first.sum(-1).max() > 2
    assert model.generate_piano_roll(num_frames=20, seed=3, max_voices=2).sum(-1).max() == 2
    with torch.no_grad():
        model.key_head.bias.fill_(-2.0)
    few = model.generate_piano_roll(num_frames=20, seed=3).sum(-1)
    assert few.min() == 0 and few.max() > 3
    assert model.generate_piano_roll(num_frames=20, seed=3, min_voices=3, max_voices=3).sum(-1).unique().tolist() == [3]
    assert model.training


def test_the_most_probable_keys_join_those_drawn():
    logits = torch.tensor([[40.0, -50.0, -30.0, -20.0]])  # (1, 4): the first key is drawn, no other is
    assert draw_frame(logits, 1.0, min_voices=2).tolist() == [[1, 0, 0, 1]]
    assert draw_frame(logits, 0, min_voices=3).tolist() == [[1, 0, 1, 1]]


def test_draws_have_the_models_probabilities():
    logits = torch.tensor([[-2.0, 0.0, 1.0]]).expand(40_000, 3)
    share = draw_frame(logits, 1.0, generator=torch.Generator().manual_seed(0)).mean(0)
    deviations = (share - logits[0].sigmoid()).abs() / (0.25 / 40_000) ** 0.5
    assert deviations.max() < 4  # standard errors


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"temperature": -1.0}, {"max_voices": 0}, {"min_voices": 8}])
def test_bad_sampling_options_name_themselves(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        small_model().generate_piano_roll(**options)


# ---- MIDI ---------------------------------------------------------------------------------------------------------

pieces = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(21, 108)), min_size=1, max_size=25).map(
    lambda notes: [(start, length, pitch) for start, length, pitch in notes]
)


@settings(max_examples=25, deadline=None)
@given(notes=pieces, grid=st.integers(1, 12), tempo=st.integers(30, 240))
def test_midi_round_trip_keeps_notes_onsets_and_tempo(notes, grid, tempo, tmp_path_factory):
    piece = quantise([(start / grid, length / grid, pitch) for start, length, pitch in notes], grid)
    piece.tempos = [(0, float(tempo))]
    path = tmp_path_factory.mktemp("midi") / "a.mid"
    write_midi(piece, path)
    again = read_midi(path, grid)
    assert again.notes() == piece.notes()
    assert np.array_equal(again.roll, piece.roll)
    assert np.array_equal(again.onsets, piece.onsets)
    assert again.tempos[0][0] == 0
    assert round(again.tempos[0][1], 3) == tempo  # a MIDI file holds whole microseconds a quarter
    assert not again.problems


def test_changes_of_tempo_do_not_move_notes(tmp_path):
    piece = quantise([(0, 1, 60), (4, 1, 62), (8, 1, 64)], 2)
    piece.tempos = [(0, 60.0), (8, 120.0)]
    write_midi(piece, tmp_path / "a.mid")
    again = read_midi(tmp_path / "a.mid", 2)
    assert again.notes() == [(0, 2, 60), (8, 2, 62), (16, 2, 64)]
    assert again.tempos == piece.tempos
    assert again.frame_seconds()[-1] == pytest.approx(4.0 + 2.5)


def test_what_is_dropped_or_changed_is_counted(tmp_path):
    score = symusic.Score(480)
    piano, drums = symusic.Track("p", 0, False), symusic.Track("d", 0, True)
    for time, duration, pitch in (
        (0, 480, 60),
        (0, 480, 12),
        (960, 10, 64),
        (960, 10, 120),
        (1400, 480, 67),
        (1440, 480, 67),
    ):
        piano.notes.append(symusic.Note(time, duration, pitch, 80))
    drums.notes.append(symusic.Note(0, 480, 40, 80))
    score.tracks.append(piano)
    score.tracks.append(drums)
    score.tempos.append(symusic.Tempo(0, 4.0))
    score.dump_midi(str(tmp_path / "a.mid"))
    piece = read_midi(tmp_path / "a.mid", 1)
    assert piece.notes() == [(0, 1, 60), (2, 1, 64), (3, 1, 67)]
    assert piece.report == {
        "out_of_range_notes": 2, "short_notes": 1, "overlapping_notes": 1, "drum_notes": 1, "absurd_tempos": 1,
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
@given(notes=pieces)
def test_a_roll_is_the_union_of_its_notes(notes):
    piece = quantise(notes, 1)
    union, onsets = np.zeros_like(piece.roll), np.zeros_like(piece.roll)
    for start, length, pitch in notes:
        union[start : start + length, pitch - 21] = True
        onsets[start, pitch - 21] = True
    assert np.array_equal(piece.roll, union) and np.array_equal(piece.onsets, onsets)


def test_notes_without_length_are_counted():
    piece = quantise([(0, 0, 60), (1, 1, 62)], 4)
    assert piece.report == {"zero_length_notes": 1}
    assert piece.notes() == [(0, 1, 60), (4, 4, 62)]


def midi_bytes(track: bytes, division: int = 480) -> bytes:
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, division) + b"MTrk" + struct.pack(">I", len(track)) + track


END = b"\x00\xff\x2f\x00"
SYSEX, PROGRAM, UNENDED = b"\x00\xf0\x02\x01\xf7", b"\x00\xc0\x01", b"\x00\x90\x40\x50"
ONE_NOTE = b"\x00\x90\x3c\x50\x83\x60\x80\x3c\x00" + END


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"RIFF....WAVEfmt ", "not a MIDI file"),
        (b"MThd", "damaged"),
        (midi_bytes(ONE_NOTE)[:20], "damaged|no note"),
        (midi_bytes(END), "no note that a piano has"),
        (midi_bytes(ONE_NOTE, division=0), "damaged"),
    ],
)
def test_damaged_and_empty_files_say_what_is_wrong(tmp_path, data, message):
    path = tmp_path / "bad.mid"
    path.write_bytes(data)
    with pytest.raises(MidiError, match=message) as caught:
        read_midi(path)
    assert "bad.mid" in str(caught.value)


def test_notes_that_never_end_are_counted(tmp_path):
    """Among other events, and with a running status after them."""
    path = tmp_path / "a.mid"
    running = b"\x83\x60\x43\x50\x83\x60\x43\x00"
    path.write_bytes(midi_bytes(SYSEX + PROGRAM + ONE_NOTE.removesuffix(END) + UNENDED + running + END))
    piece = read_midi(path)
    assert piece.notes() == [(0, 4, 60), (8, 4, 67)]
    assert piece.problems == "1 notes that never end dropped"
    path.write_bytes(midi_bytes(UNENDED + END))
    with pytest.raises(MidiError, match="1 that never end"):
        read_midi(path)
    path.write_bytes(midi_bytes(ONE_NOTE))
    assert not read_midi(path).problems


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


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 60), position=st.integers(0, 60), value=st.integers(0, 255))
def test_any_damage_is_read_or_refused_with_midierror(cut, position, value, tmp_path_factory):
    data = bytearray(midi_bytes(b"\x00\xff\x51\x03\x07\xa1\x20" + ONE_NOTE))
    data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.mid"
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        piece = read_midi(path)
    except MidiError as error:
        assert "damaged.mid" in str(error)
    else:
        assert piece.roll.any()


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
    assert [text.get_text() for text in legends[0].get_texts()] == ["prime", "continuation"]
    assert not legends[0].get_window_extent().overlaps(axes.get_window_extent())


def test_picture_and_sound(tmp_path):
    piece = quantise([(0, 1, 69), (1, 1, 69), (2, 2, 72)], 2)
    draw_roll(piece, tmp_path / "a.png", prime_frames=4)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_wav(piece, tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        seconds = file.getnframes() / file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    assert seconds == pytest.approx(2.3, abs=0.01)
    assert 20_000 < np.abs(samples).max() < 32_767
    spectrum = np.abs(np.fft.rfft(synthesize(piece)[:11_025]))  # the first half second: A at 440 Hz
    assert abs(int(spectrum.argmax()) * 2 - 440) <= 2
    silent = PianoRoll(np.zeros((4, 88)))
    assert not synthesize(silent).any()
    draw_roll(silent, tmp_path / "silent.png")
