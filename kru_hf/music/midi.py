"""Standard MIDI files as notes: which key of which channel sounds from when to when, pedals included.

The bytes are read here because no library does all of it: symusic drops the channels, without which a pedal in
one track cannot hold notes of another; mido refuses files with unknown chunks or odd key signatures; both refuse RIFF,
and neither knows time in seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

DEFAULT_TEMPO = 120.0  # quarter notes per minute, where the file has none
PERCUSSION = 9  # channel 10 as people count
SUSTAIN, SOSTENUTO, SOUND_OFF, RESET = 64, 66, 120, 121  # controllers that make notes longer or shorter
NOTES_OFF = range(123, 128)  # the changes of mode behind "all notes off" mean it too
TEMPO, METER = 0x51, 0x58  # events of the file itself
FRAME_RATES = {24: 24.0, 25: 25.0, 29: 30 / 1.001, 30: 30.0}  # of SMPTE, frames a second


class MidiError(ValueError):
    """A file that cannot be used as a piece; the message names the file and what is wrong with it."""


@dataclass
class Score:
    """What a file says, in its own ticks.

    Args:
        ticks_per_quarter: ticks in a quarter note.
        notes: (start, end, pitch) of every note that ends, without drums; a note held by a pedal ends with the pedal.
        tempos: (tick, quarter notes per minute).
        meters: (tick, beats in a bar, what part of a whole note a beat is).
        report: counts of what was changed or dropped, by the names of ``rolls.PROBLEMS``.
    """

    ticks_per_quarter: float
    notes: list[tuple[int, int, int]]
    tempos: list[tuple[int, float]]
    meters: list[tuple[int, int, int]]
    report: Counter[str]


@dataclass
class Channel:
    """The keys and pedals of a channel; ``notes`` are those that have ended: (start, end, pitch)."""

    notes: list[tuple[int, int, int]] = field(default_factory=list)
    keys: dict[int, deque[int]] = field(default_factory=lambda: defaultdict(deque))  # pitch to starts of notes, down
    held: list[tuple[int, int]] = field(default_factory=list)  # (start, pitch) whose key is up while a pedal holds it
    caught: set[tuple[int, int]] = field(default_factory=set)  # by the sostenuto pedal: keys that were down before it
    sustain: bool = False
    sostenuto: bool = False
    num_held: int = 0

    def play(self, tick: int, kind: int, first: int, second: int) -> None:
        """Take an event of the channel: its kind (upper half of the status byte) and its two data bytes."""
        if kind == 0x9 and second:
            self.keys[first].append(tick)
        elif kind in (0x8, 0x9):  # the oldest note of the pitch ends
            self.end(tick, first)
        elif kind == 0xB and first in (SUSTAIN, SOSTENUTO, SOUND_OFF, RESET, *NOTES_OFF):
            self.control(tick, first, second >= 64)

    def end(self, tick: int, pitch: int) -> None:
        """A key goes up."""
        if not self.keys[pitch]:
            return
        note = (self.keys[pitch].popleft(), pitch)
        if self.sustain or note in self.caught:
            self.held.append(note)
            self.num_held += 1
        else:
            self.notes.append((note[0], tick, pitch))

    def control(self, tick: int, number: int, down: bool) -> None:
        """A pedal moves, or all notes end."""
        if number in (SOUND_OFF, *NOTES_OFF):
            for pitch, starts in self.keys.items():
                for _ in range(len(starts)):
                    self.end(tick, pitch)
        if number == SUSTAIN:
            self.sustain = down
        elif number == SOSTENUTO:
            if down and not self.sostenuto:
                self.caught = {(start, pitch) for pitch, starts in self.keys.items() for start in starts}
            self.sostenuto = down
        elif number in (SOUND_OFF, RESET):
            self.sustain = self.sostenuto = False
        if not self.sostenuto:
            self.caught = set()
        if not self.sustain:
            still = [note for note in self.held if note in self.caught]
            self.notes += [(start, tick, pitch) for start, pitch in self.held if (start, pitch) not in self.caught]
            self.held = still


def read_score(data: bytes) -> Score:
    """The notes of a file's bytes, all tracks of its channels together.

    Time in seconds (SMPTE) is read at 120 quarter notes per minute.

    Raises:
        MidiError: the bytes are damaged, no MIDI file, or several pieces in one (type 2).
    """
    kind, num_tracks, division, tracks = split_tracks(data)
    report: Counter[str] = Counter(missing_tracks=max(0, num_tracks - len(tracks)))
    played = [list(track_events(track)) for track in tracks]
    voices = sum(any(0x90 <= code <= 0x9F and code != 0x90 + PERCUSSION for _, code, *_ in part) for part in played)
    if kind == 2 and voices > 1:
        raise MidiError(
            f"is of type 2, with {voices} tracks that are pieces of their own: split it into a file for each"
        )
    report["merged_tracks"] = voices if voices > 1 else 0
    ticks_per_quarter = float(division)
    if division & 0x8000:
        rate = FRAME_RATES.get(256 - (division >> 8), 0.0)
        ticks_per_quarter = rate * (division & 0xFF) * 60 / DEFAULT_TEMPO
        report["smpte_time"] = 1
    if not ticks_per_quarter:
        raise MidiError(f"is damaged: its unit of time, {division:#06x}, is neither ticks in a quarter note nor SMPTE")
    channels: dict[int, Channel] = defaultdict(Channel)
    tempos, meters, velocities, tick = [], [], set(), 0
    for tick, code, first, second in sorted((event for part in played for event in part), key=lambda event: event[0]):
        if code == TEMPO and not report["smpte_time"]:
            tempos.append((tick, 6e7 / first if first else float("inf")))
        elif code == METER and first and not report["smpte_time"]:
            meters.append((tick, first, 1 << second))
        elif code >= 0x80:
            channels[code & 0xF].play(tick, code >> 4, first, second)
            if code >> 4 == 0x9 and second and code & 0xF != PERCUSSION:
                velocities.add(second)
    for channel in channels.values():
        channel.control(tick, RESET, False)  # pedals that stay down hold until the last event
    drums = channels.pop(PERCUSSION, Channel())
    report["drum_notes"] = len(drums.notes) + sum(map(len, drums.keys.values()))
    report["unended_notes"] = sum(len(starts) for channel in channels.values() for starts in channel.keys.values())
    report["velocities"] = len(velocities) if len(velocities) > 1 else 0
    report["pedal_notes"] = sum(channel.num_held for channel in channels.values())
    notes = [note for channel in channels.values() for note in channel.notes]
    return Score(ticks_per_quarter, notes, tempos, meters, report)


def split_tracks(data: bytes) -> tuple[int, int, int, list[bytes]]:
    """Type, number of tracks and unit of time as the header has them, and the tracks found."""
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":
        data = next((content for name, content in chunks(data[12:], "little") if name == b"data"), b"RMID")
    if not data.startswith(b"MThd"):
        what = (
            "is empty" if not data else "is not a MIDI file: it does not begin with MThd, nor as RIFF of the form RMID"
        )
        raise MidiError(what)
    found = list(chunks(data, "big"))
    header = found[0][1] if found else b""
    if len(header) < 6:
        raise MidiError(f"is damaged: its header MThd has {len(header)} bytes instead of 6")
    kind, num_tracks, division = (int.from_bytes(header[place : place + 2], "big") for place in (0, 2, 4))
    if kind > 2:
        raise MidiError(f"is of type {kind}, but there are the types 0, 1 and 2")
    return kind, num_tracks, division, [content for name, content in found[1:] if name == b"MTrk"]


def chunks(data: bytes, order: str) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of the chunks of a MIDI file (big-endian) or RIFF (little-endian, padded to even lengths)."""
    place = 0
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], order)  # type: ignore[arg-type]
        content = data[place + 8 : place + 8 + size]
        if len(content) < size:
            if name not in (b"MThd", b"MTrk", b"data"):
                return  # what editors leave behind the last track
            raise MidiError(f"is damaged: its chunk {name.decode()} has {len(content):,} of {size:,} bytes")
        yield name, content
        place += 8 + size + (size % 2 if order == "little" else 0)


def track_events(track: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tick, status byte, first and second data byte) of a track's channel events, and its tempos and meters.

    Those are (tick, TEMPO, microseconds of a quarter, 0) and (tick, METER, beats in a bar, 2 for quarters, 3 eighths).
    """
    place = tick = status = 0
    try:
        while place < len(track):
            delta, place = variable_number(track, place)
            tick += delta
            code = status
            if track[place] >= 0x80:
                code, place = track[place], place + 1
            kind = size = 0
            if 0x80 <= code < 0xF0:
                status, size = code, 1 if code >> 4 in (0xC, 0xD) else 2
            elif code in (0xF0, 0xF7, 0xFF):  # a system's own, or text, tempo and the like; the running status stays
                kind = track[place] if code == 0xFF else 0
                size, place = variable_number(track, place + (code == 0xFF))
            else:
                raise MidiError(f"is damaged: an event of a track begins with the byte {code or track[place]:#04x}")
            content, place = track[place : place + size], place + size
            if kind == 0x2F:
                return
            if place > len(track):
                raise IndexError
            if code < 0xF0:
                if max(content) >= 0x80:
                    raise MidiError(f"is damaged: an event of a track has the data bytes {content.hex(' ')}")
                yield tick, code, content[0], content[-1]
            elif kind == TEMPO and size == 3:
                yield tick, kind, int.from_bytes(content, "big"), 0
            elif kind == METER and size >= 2 and content[1] < 8:
                yield tick, kind, content[0], content[1]
    except IndexError as error:
        raise MidiError("is damaged: a track ends within an event") from error


def variable_number(data: bytes, place: int) -> tuple[int, int]:
    """A number of at most four bytes, seven bits in each, and the place after it."""
    number = 0
    for index in range(place, place + 4):
        number = number << 7 | data[index] & 0x7F
        if data[index] < 0x80:
            return number, index + 1
    raise MidiError("is damaged: a track has a number of more than four bytes")
