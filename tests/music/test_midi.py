"""MIDI files of every container and kind, byte by byte: what sounds, or why it is refused."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf.music import MidiError, read_midi
from training.data.music_data import load_pieces
from training.options.data import DataOptions

C, E = 60, 64


def number(value: int) -> bytes:
    rest = [value & 0x7F]
    while value := value >> 7:
        rest.append(0x80 | value & 0x7F)
    return bytes(reversed(rest))


def track(*events: tuple[int, list[int]], end: bytes = b"\x00\xff\x2f\x00") -> bytes:
    """A chunk of (ticks since the last event, its bytes)."""
    data = b"".join(number(ticks) + bytes(event) for ticks, event in events) + end
    return b"MTrk" + struct.pack(">I", len(data)) + data


def midi(*tracks: bytes, kind: int = 1, division: int = 4, more: bytes = b"") -> bytes:
    """A file with four ticks in a quarter note, read on a grid of four frames: a tick is a frame."""
    return b"MThd" + struct.pack(">IHHH", 6 + len(more), kind, len(tracks), division) + more + b"".join(tracks)


def riff(content: bytes, form: bytes = b"RMID", before: bytes = b"") -> bytes:
    pad = b"\0" * (len(content) % 2)
    body = form + before + b"data" + struct.pack("<I", len(content)) + content + pad
    return b"RIFF" + struct.pack("<I", len(body)) + body


def on(pitch: int, channel: int = 0) -> list[int]:
    return [0x90 | channel, pitch, 80]


def off(pitch: int, channel: int = 0) -> list[int]:
    return [0x80 | channel, pitch, 64]


def control(which: int, value: int, channel: int = 0) -> list[int]:
    return [0xB0 | channel, which, value]


def tempo(microseconds: int) -> list[int]:
    return [0xFF, 0x51, 3, *microseconds.to_bytes(3, "big")]


ONE = track((0, on(C)), (4, off(C)))
TWO = track((0, on(E)), (4, off(E)))
LIST = b"LIST" + struct.pack("<I", 5) + b"INFO.\0"  # an odd length, padded

READ = {
    "type 0": (midi(ONE, kind=0), {C: range(4)}, {}),
    "other events": (midi(track((0, [0xF0, 2, 1, 0xF7]), (0, [0xC0, 1]), (0, on(C)), (4, off(C)))), {C: range(4)}, {}),
    "a longer header": (midi(ONE, more=b"\0\0"), {C: range(4)}, {}),
    "unknown chunks": (midi(ONE).replace(b"MTrk", b"XFIH\0\0\0\1.MTrk"), {C: range(4)}, {}),
    "bytes behind the end": (midi(ONE) + b"left by an editor", {C: range(4)}, {}),
    "RIFF": (riff(midi(ONE)), {C: range(4)}, {}),
    "RIFF with other chunks": (riff(midi(ONE), before=LIST), {C: range(4)}, {}),
    "SMPTE of 25": (midi(track((0, on(C)), (500, off(C))), division=0xE728), {C: range(4)}, {"smpte_time": 1}),
    "SMPTE of 24": (midi(track((0, on(C)), (48, off(C))), division=0xE804), {C: range(4)}, {"smpte_time": 1}),
    "SMPTE of 29.97": (midi(track((0, on(C)), (1499, off(C))), division=0xE364), {C: range(4)}, {"smpte_time": 1}),
    "SMPTE knows no tempo": (
        midi(track((0, tempo(1_000_000)), (0, on(C)), (15, off(C))), division=0xE201),
        {C: range(4)},
        {"smpte_time": 1},
    ),
    "type 2 of one piece": (midi(track((0, tempo(500_000))), ONE, kind=2), {C: range(4)}, {}),
    "two tracks": (midi(ONE, TWO), {C: range(4), E: range(4)}, {"merged_tracks": 2}),
    "a track too few": (midi(ONE).replace(b"\0\1\0\4", b"\0\3\0\4", 1), {C: range(4)}, {"missing_tracks": 2}),
    "running status, velocity 0": (
        midi(track((0, on(C)), (4, [C, 0]), (0, [E, 80]), (0, tempo(500_000)), (4, [E, 0]))),
        {C: range(4), E: range(4, 8)},
        {},
    ),
    "a note that ends in another track": (midi(track((0, on(C))), track((4, off(C)))), {C: range(4)}, {}),
    "no end of track": (midi(track((0, on(C)), (4, off(C)), end=b"")), {C: range(4)}, {}),
    "a key signature of nine sharps": (
        midi(track((0, [0xFF, 0x59, 2, 9, 0]), (0, on(C)), (4, off(C)))),
        {C: range(4)},
        {},
    ),
    "two channels, one inside the other": (
        midi(track((0, on(C)), (1, on(C, 1)), (1, off(C, 1)), (2, off(C)))),
        {C: range(4)},
        {},
    ),
    "struck again while down": (midi(track((0, on(C)), (2, on(C)), (1, off(C)), (3, off(C)))), {C: range(6)}, {}),
    "all notes off": (midi(track((0, on(C)), (0, on(E)), (4, control(123, 0)))), {C: range(4), E: range(4)}, {}),
    "mono, which ends all notes": (midi(track((0, on(C)), (4, control(126, 1)))), {C: range(4)}, {}),
    "left on": (midi(track((0, on(E)), (0, on(C)), (4, off(C)))), {C: range(4)}, {"unended_notes": 1}),
    "drums": (midi(track((0, on(C)), (0, on(C, 9)), (4, off(C)), (0, off(C, 9)))), {C: range(4)}, {"drum_notes": 1}),
    "sustain": (
        midi(track((0, control(64, 127)), (0, on(C)), (2, off(C)), (4, control(64, 63)), (0, on(E)), (1, off(E)))),
        {C: range(6), E: range(6, 7)},
        {"pedal_notes": 1},
    ),
    "sustain in another track": (
        midi(track((0, control(64, 64)), (6, control(64, 0))), track((0, on(C)), (2, off(C)))),
        {C: range(6)},
        {"pedal_notes": 1},
    ),
    "sustain of another channel": (midi(track((0, control(64, 127, 1)), (0, on(C)), (2, off(C)))), {C: range(2)}, {}),
    "sustain to the end": (
        midi(track((0, control(64, 127)), (0, on(C)), (2, off(C)), (2, on(E)), (2, off(E)))),
        {C: range(6), E: range(4, 6)},
        {"pedal_notes": 2},
    ),
    "controllers reset": (
        midi(track((0, control(64, 127)), (0, on(C)), (2, off(C)), (2, control(121, 0)), (3, control(64, 0)))),
        {C: range(4)},
        {"pedal_notes": 1},
    ),
    "sostenuto holds what was down before it": (
        midi(track((0, on(C)), (1, control(66, 127)), (0, on(E)), (1, off(E)), (0, off(C)), (3, control(66, 0)))),
        {C: range(5), E: range(1, 2)},
        {"pedal_notes": 1},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_sounds(name, tmp_path):
    data, expected, report = READ[name]
    (tmp_path / "a.mid").write_bytes(data)
    piece = read_midi(tmp_path / "a.mid", 4)
    sounding = {int(key) + 21: np.flatnonzero(piece.roll[:, key]).tolist() for key in np.flatnonzero(piece.roll.any(0))}
    assert sounding == {pitch: list(frames) for pitch, frames in expected.items()}
    assert piece.report == report
    assert piece.tempos == [(0, 120.0)]


LONG = track((0x0FFFFFFF, on(C)), (4, off(C)))
REFUSED = {
    "nothing": (b"", "is empty"),
    "a name": (b"MThd", "is damaged: its header MThd has 0 bytes instead of 6"),
    "no tracks": (midi(), "no note that a piano has"),
    "an empty track": (midi(track()), "no note that a piano has"),
    "a note left on": (midi(track((0, on(C)))), "no note that a piano has .*, 1 that never end, 0 outside"),
    "type 2": (midi(ONE, TWO, kind=2), "is of type 2, with 2 tracks that are pieces of their own"),
    "type 3": (midi(ONE, kind=3), "is of type 3, but there are the types 0, 1 and 2"),
    "a short header": (b"MThd\0\0\0\4\0\0\0\1" + ONE, "header MThd has 4 bytes instead of 6"),
    "no time": (midi(ONE, division=0), "0x0000, is neither ticks in a quarter note nor SMPTE"),
    "SMPTE of 7": (midi(ONE, division=0xF928), "0xf928, is neither"),
    "SMPTE without ticks": (midi(ONE, division=0xE700), "0xe700, is neither"),
    "a sound in RIFF": (riff(b"", form=b"WAVE"), "not a MIDI file"),
    "a cut track": (midi(ONE)[:-3], "its chunk MTrk has 9 of 12 bytes"),
    "RIFF, cut": (riff(midi(ONE))[:-3], "its chunk data has"),
    "a cut event": (midi(track((0, on(C)), (4, [0x80]), end=b"")), "a track ends within an event"),
    "a cut text": (midi(track((0, [0xFF, 1, 9]), end=b"")), "a track ends within an event"),
    "a status where data belongs": (midi(track((0, [0x90, C, 0xFF]))), "the data bytes 3c ff"),
    "data where a status belongs": (midi(track((0, [C, 80]))), "begins with the byte 0x3c"),
    "a system's real time": (midi(track((0, [0xF8]))), "begins with the byte 0xf8"),
    "an endless number": (midi(b"MTrk\0\0\0\5" + b"\xff" * 5), "a number of more than four bytes"),
    "a late note": (midi(LONG), "268435459 frames, more than 100000"),
    "a long note": (midi(track((0, on(C)), (0x0FFFFFFF, off(C)))), "268435455 frames, more than 100000"),
    "a pedal without end": (
        midi(track((0, control(64, 127)), (0, on(C)), (1, off(C)), (0x0FFFFFFF, control(7, 0)))),
        "268435456 frames, more than 100000",
    ),
    "nothing but drums": (midi(track((0, on(C, 9)), (4, off(C, 9)))), r"no note that a piano has \(1 notes of drums"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_file_is_refused(name, tmp_path):
    data, message = REFUSED[name]
    (tmp_path / "a.mid").write_bytes(data)
    with pytest.raises(MidiError, match=message) as caught:
        read_midi(tmp_path / "a.mid", 4)
    assert "a.mid" in str(caught.value) and "\n" not in str(caught.value)


def test_tempos_that_no_one_plays_are_counted(tmp_path):
    slow, none, usual = tempo(0xFFFFFF), tempo(0), tempo(1_000_000)
    (tmp_path / "a.mid").write_bytes(midi(track((0, slow), (0, none), (0, on(C)), (2, usual), (2, off(C)))))
    piece = read_midi(tmp_path / "a.mid", 4)
    assert piece.tempos == [(0, 120.0), (2, 60.0)]
    assert piece.report == {"absurd_tempos": 2}


def test_a_folder_says_how_many_files_have_what(tmp_path, capsys):
    pedal, changes = READ["sustain"][0], midi(track((0, on(C)), (2, tempo(1_000_000)), (2, off(C))))
    files = [pedal, pedal, READ["two tracks"][0], changes, REFUSED["type 2"][0]]
    for index, (data, ending) in enumerate(zip(files, (".mid", ".MID", ".kar", ".midi", ".mid"), strict=True)):
        (tmp_path / f"{index}{ending}").write_bytes(data)
    (tmp_path / "5.rmi").write_bytes(READ["RIFF"][0])
    pieces = load_pieces(DataOptions(dataset=str(tmp_path)), 4)
    assert pieces.notes[-1] == (
        "2 files with notes that a pedal holds on; 1 files with changes of tempo, which the grid leaves out; "
        "1 files whose tracks are laid over each other; 1 files left out"
    )
    assert "4.mid' is of type 2" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 60), position=st.integers(0, 60), value=st.integers(0, 255))
def test_any_damage_is_read_or_refused(cut, position, value, tmp_path_factory):
    data = bytearray(midi(track((0, tempo(500_000)), (0, on(C)), (480, off(C))), kind=0, division=480))
    data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.mid"
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        assert read_midi(path).roll.any()
    except MidiError as error:
        assert "damaged.mid" in str(error)
