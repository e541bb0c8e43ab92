"""Probabilities over the keys of a frame, a chain or independent ones, and over their onsets; drawing a frame."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kronecker import check_choice

CHAIN_SIZE, CHAIN_CHANNELS = 64, 8  # hidden units of the chain, and of the windows at each key
OCTAVE = 12  # keys
WINDOW = 2 * OCTAVE + 1
BLOCK = 8  # keys that are computed together; no effect on what is computed
FRAME_HEADS = ("independent", "chain")
MOST_DRAWS = 64  # free draws of a frame before limits on its voices are built into the draw
ONSET_SIZE = 16  # hidden units of the context from which onsets are read
CERTAIN = 1e4  # logit of what follows from the rest of a frame: 0 nats exactly
SURE = 1e-4  # a temperature at which a key of independent ones is all but certain


def check_frame_head(config: Any) -> None:
    """A ValueError for a field of the frame head that is not allowed."""
    check_choice("frame_head", config.frame_head, FRAME_HEADS)
    for name in ("frame_head_size", "frame_head_channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.frame_head_dropout < 1:
        raise ValueError(f"frame_head_dropout must be in [0, 1), got {config.frame_head_dropout}")
    values = {"frame_head_size": CHAIN_SIZE, "frame_head_channels": CHAIN_CHANNELS, "frame_head_dropout": 0}
    for name, unused in values.items():
        if config.frame_onsets and config.frame_head != "chain":
            raise ValueError("frame_onsets needs frame_head='chain', got frame_head='independent'")
        if config.frame_head != "chain" and getattr(config, name) != unused:
            raise ValueError(f"{name} of independent keys must stay {unused} (unused), got {getattr(config, name)}")


class KeyWindows(nn.Module):
    """What all keys read in the same way: the frame before, an octave either side, and two octaves of lower keys.

    So a step, an interval and a chord are learnt once, not once a key.

    Args:
        size: H, width of the context. channels: C, hidden units of each key.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.near = nn.Parameter(torch.empty(2, WINDOW, channels))  # of the frame before, and of the frame
        self.context = nn.Linear(size, channels)
        self.out = nn.Linear(channels, 1, bias=False)

    def forward(self, hidden: Tensor, before: Tensor, frame: Tensor) -> Tensor:
        """What is added to the logit of each key i, of its own frame from the keys below i alone: (M, width).

        Args:
            hidden: c, (M, H). before, frame: the frame before and the frame itself, (M, width).
        """
        width, span = frame.shape[-1], WINDOW + BLOCK - 1
        blocks = -(-width // BLOCK)  # the keys of a block read one row of `span` keys, in which their windows overlap
        right = BLOCK * blocks + WINDOW - 1 - width
        around = F.pad(before, (OCTAVE, right - OCTAVE)).unfold(-1, span, BLOCK)  # (M, blocks, span)
        below = F.pad(frame.to(before.dtype), (WINDOW, right - WINDOW)).unfold(-1, span, BLOCK)  # (M, blocks, span)
        place = torch.arange(span, device=frame.device)[:, None] - torch.arange(BLOCK, device=frame.device)
        place = place.where((place >= 0) & (place < WINDOW), WINDOW)  # (span, BLOCK): in the window of each key
        table = F.pad(self.near, (0, 0, 0, 1))[:, place].flatten(0, 1).flatten(1)  # (2·span, BLOCK·C)
        shared = self.context(F.relu(hidden)).repeat(1, BLOCK)[:, None]  # (M, 1, BLOCK·C)
        units = F.relu(torch.cat([around, below], -1) @ table + shared)  # (M, blocks, BLOCK·C)
        return self.out(units.unflatten(-1, (BLOCK, -1))).flatten(1)[:, :width]  # (M, width)

    def at(self, hidden: Tensor, before: Tensor, frame: Tensor, keys: Tensor) -> Tensor:
        """What :meth:`forward` gives for one key of each row: ``keys`` (M,), for (M,)."""
        window = keys[:, None] + torch.arange(WINDOW, device=keys.device)  # (M, WINDOW): places in what is padded
        around = F.pad(before, (OCTAVE, OCTAVE)).gather(1, window)  # (M, WINDOW)
        below = F.pad(frame, (WINDOW, 0)).gather(1, window)  # (M, WINDOW)
        units = torch.cat([around, below], -1).to(hidden.dtype) @ self.near.flatten(0, 1)  # (M, C)
        return self.out(F.relu(units + self.context(F.relu(hidden)))).squeeze(-1)  # (M,)


class KeyChain(nn.Module):
    """Keys from low to high, each given the lower ones that sound (NADE, Larochelle & Murray 2011).

    Key i of a frame x sounds with the logit a_i + v_i · ReLU(c + Σ_{j<i} x_j w_j), and what :class:`KeyWindows` adds.
    The context (a, c) is read from the recurrent state and from the frame before: it, that frame and the lower keys are
    all that key i sees.

    Args:
        width: keys of a frame. size: H, width of c. channels: of the windows.
        dropout: on the hidden units, in training.
    """

    def __init__(self, width: int, size: int, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.before = nn.Linear(width, width + size, bias=False)  # of the frame before: its part of (a, c)
        self.windows = KeyWindows(size, channels)
        self.lower = nn.Linear(width, size, bias=False)  # w
        self.keys = nn.Linear(size, width, bias=False)  # v
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, lower: Tensor) -> Tensor:
        """What is added to a: (M, width) for all keys, were the keys of ``lower`` those that sound below each of them.

        Args:
            hidden: c, (M, H). lower: (M, width) bool.
        """
        hidden = F.relu(hidden + self.lower(lower.to(hidden.dtype)))  # (M, H)
        return self.keys(self.dropout(hidden))  # (M, width)


class KeyOnsets(nn.Module):
    """Which of the keys that sound already are struck again: from low to high, each given what begins below it.

    A key that sounds and did not before begins; one that is silent does not. Both are certain.

    Args:
        width: keys of a frame. channels: of the windows, which read the keys around each key and the lower onsets.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.begun = nn.Linear(width, ONSET_SIZE, bias=False)  # of the keys that begin to sound
        self.windows = KeyWindows(ONSET_SIZE, channels)

    def forward(self, hidden: Tensor, before: Tensor, keys: Tensor, onsets: Tensor) -> Tensor:
        """The logit of an onset of each key: (M, width).

        Args:
            hidden: (M, ONSET_SIZE), from the features. before, keys: the frame before and the frame, of zeros and ones,
                (M, width). onsets: of the frame, of which each key sees the lower ones, (M, width).
        """
        held = keys * before  # (M, width)
        begun = keys - held  # (M, width)
        row, key = held.nonzero(as_tuple=True)  # (S,) each: what is not certain
        hidden = (hidden + self.begun(begun)).index_select(0, row)  # (S, ONSET_SIZE)
        logits = self.windows.at(hidden, keys.index_select(0, row), onsets.index_select(0, row), key)  # (S,)
        return (CERTAIN * (2 * begun - 1)).to(logits.dtype).index_put((row, key), logits)


def draw_onsets(
    head: KeyOnsets,
    hidden: Tensor,
    before: Tensor,
    keys: Tensor,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Onsets (B, width) of zeros and ones of frames that are drawn already; arguments as of :class:`KeyOnsets`.

    Args:
        temperature: divides the logits; 0: the more probable.
    """
    before, keys = before.to(hidden.dtype), keys.to(hidden)  # (B, width)
    held = keys * before  # (B, width)
    onsets = keys - held  # (B, width)
    for key in held.any(0).nonzero().flatten().tolist():
        logits = head(hidden, before, keys, onsets)[:, key].float().cpu()  # (B,)
        chance = (logits / max(temperature, SURE)).sigmoid() if temperature else (logits > 0).float()  # (B,)
        drawn = torch.rand(len(chance), generator=generator) < chance  # (B,)
        onsets[:, key] = torch.where(held[:, key] > 0, drawn.to(onsets), onsets[:, key])
    return onsets


def chain_logits(chain: KeyChain, context: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Each key's logit given the lower keys of the same frame of targets, in one pass.

    What lies below a key changes only where a key sounds: a frame of k sounding keys is k + 1 rows of the chain,
    not ``width``.

    Args:
        context: (a, c) side by side, (M, width + H). before, targets: the frames before those of zeros and ones that
            are scored, and these, (M, width).

    Returns:
        logits (M, width).
    """
    own, hidden = context.split((chain.width, chain.size), -1)  # (M, width), (M, H)
    sounding = targets > 0.5  # (M, width)
    below = sounding.cumsum(-1, dtype=torch.int32) - sounding.int()  # (M, width): how many keys sound below a key
    counts = sounding.sum(-1) + 1  # (M,)
    frame = torch.repeat_interleave(counts)  # (R,): the frame of each row
    first = counts.cumsum(0) - counts  # (M,): the first row of each frame
    step = torch.arange(len(frame), device=frame.device) - first[frame]  # (R,)
    place = below.masked_fill(~sounding, chain.width)  # (M, width): of a key among those that sound
    lower = place.index_select(0, frame) < step[:, None]  # (R, width): the lowest `step` keys that sound
    added = chain(hidden.index_select(0, frame), lower)  # (R, width)
    return own + chain.windows(hidden, before, sounding) + added.gather(0, first[:, None] + below)  # (M, width)


def next_key(logits: Tensor, lowest: Tensor, temperature: float, top_p: float, allowed: Tensor) -> Tensor:
    """Probabilities (B, width + 1) of which key is the next to sound, or at the end that none is.

    Args:
        logits: (B, width) of each key, were all keys between silent. lowest: (B, 1), the first key that may sound.
        temperature: divides the logarithms of these probabilities; 0: the most probable alone.
        top_p: the most probable ones that together have this share are kept.
        allowed: (B, width + 1) bool.
    """
    keys = torch.arange(logits.shape[-1])  # (width,)
    logits = logits.masked_fill(keys < lowest, -torch.inf)  # (B, width)
    zero = torch.zeros_like(logits[:, :1])  # (B, 1)
    silent = torch.cat([zero, F.logsigmoid(-logits).cumsum(-1)], -1)  # (B, width + 1): all keys before are silent
    scores = torch.cat([F.logsigmoid(logits), zero], -1) + silent  # (B, width + 1)
    open_ = allowed & torch.cat([keys >= lowest, torch.ones_like(lowest, dtype=torch.bool)], -1)  # (B, width + 1)
    scores = scores.clamp(min=-1e30).masked_fill(~open_, -torch.inf)  # (B, width + 1)
    if temperature == 0:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()  # (B, width + 1)
    shares = (scores / temperature).softmax(-1)  # (B, width + 1)
    if top_p < 1:
        ranked, order = shares.sort(-1, descending=True)  # (B, width + 1)
        dropped = ranked.cumsum(-1) - ranked >= top_p  # (B, width + 1)
        shares = shares.masked_fill(dropped.scatter(-1, order, dropped), 0.0)  # (B, width + 1)
    return shares


def draw_keys(
    logits_of: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    temperature: float,
    top_p: float,
    voices: tuple[int, int],
    generator: torch.Generator | None,
) -> Tensor:
    """Frames (B, width) of zeros and ones from the lowest key to the highest, each with that few and many keys.

    Args:
        logits_of: the lower keys that sound (B, width) to logits (B, width). shape: (B, width).
    """
    batch, width = shape
    frame, lowest = torch.zeros(batch, width + 1), torch.zeros(batch, 1, dtype=torch.long)  # the last: no more keys
    places = torch.arange(width + 1)  # (width + 1,)
    while not frame[:, width].all():
        count = frame[:, :width].sum(-1, keepdim=True)  # (B, 1)
        missing = (voices[0] - count).clamp(min=0)  # (B, 1)
        allowed = torch.where(count < voices[1], places <= width - missing, places == width)  # (B, width + 1)
        shares = next_key(logits_of(frame[:, :width]), lowest, temperature, top_p, allowed)  # (B, width + 1)
        key = torch.multinomial(shares, 1, generator=generator)  # (B, 1)
        frame.scatter_(-1, key, 1.0)
        lowest = (key + 1).clamp(max=width)  # (B, 1)
    return frame[:, :width]


def draw_frame(
    context: Tensor,
    chain: KeyChain | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    voices: tuple[int, int | None] = (0, None),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A frame from its context (B, …): a, c and the frame before it side by side for a chain, else the logits.

    Frames with too few or too many voices are drawn again, which is exact. A row that has met no frame within the
    limits in ``MOST_DRAWS`` draws gets one whose keys are drawn within them.

    Args:
        temperature: of a chain divides the logarithms of the probabilities of which key sounds next; of independent
            keys their logits. 0: the most probable.
        top_p: share of the probability of the next key that is kept. voices: least and most (None: no limit).

    Returns:
        frames (B, width) of zeros and ones; which rows were drawn within the limits (B,) bool.
    """
    batch, width = context.shape[0], context.shape[-1] if chain is None else chain.width
    heat = temperature
    if chain is None:
        context, heat = context / max(temperature, SURE), min(temperature, 1.0) and 1.0
    most = width if voices[1] is None else voices[1]
    frame = torch.zeros(batch, width)  # (B, width)
    rows = torch.arange(batch)  # (B,): those that have no frame yet
    for attempt in range(MOST_DRAWS + 1):
        own, within = context[rows.to(context.device)], attempt == MOST_DRAWS  # (M, …)

        def logits_of(lower: Tensor, own: Tensor = own) -> Tensor:
            if chain is not None:
                lower = lower.to(own.device)  # (M, width)
                logits, hidden, before = own.split((width, chain.size, width), -1)  # (M, width), (M, H), (M, width)
                own = logits + chain.windows(hidden, before, lower) + chain(hidden, lower)  # (M, width)
            return own.float().cpu()

        limits = (voices[0], most) if within or temperature == 0 else (0, width)
        frame[rows] = draw_keys(logits_of, (len(rows), width), heat, top_p, limits, generator)
        count = frame[rows].sum(-1)  # (M,)
        rows = rows if within else rows[(count < voices[0]) | (count > most)]
        if not len(rows):
            break
    return frame, torch.zeros(batch, dtype=torch.bool).index_fill(0, rows, True)
