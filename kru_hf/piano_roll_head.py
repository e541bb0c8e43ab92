"""Piano rolls as sequences of binary frames: the head that predicts the next frame, and sampling from it."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .cache_kru import KRUCache, refuse_bidirectional
from .configuration_kru import KRUConfig
from .frame_heads import MOST_DRAWS, ONSET_SIZE, KeyChain, KeyOnsets, KeyWindows, chain_logits, draw_frame, draw_onsets
from .modeling_kru import KRUPreTrainedModel
from .scan import can_look_at

PIANO_KEYS = 88  # width of a frame where the config names none
SILENT_LOGIT = -3.0  # start of the output bias: about one key in twenty sounds
CHAIN_STD = 0.1  # start of what a chain reads of frames: four keys or so sound in one
logger = logging.getLogger(__name__)


@dataclass
class KRUPianoRollOutput(ModelOutput):
    """Output of :class:`KRUForPianoRoll`.

    loss: nats per scored frame, with λ · unitary_loss in training mode only; 0 if no frame is scored, None
    for a single frame without ``shift_labels``.
    logits: (B, T, width), row t for frame t+1. past_key_values: the state after the last frame.
    hidden_states: embeddings and each layer's output. unitary_loss: the penalty without λ, in
    training mode and beside a loss; else None.
    frame_context: what a frame is drawn from, (B, T, width + H + width) with a chain, and 16 more for onsets; else the
    logits.

    With onsets the width of frames and logits is twice the keys: what sounds, then what begins; an onset that follows
    from the rest of the frame has a logit of ±10,000.
    With a chain a logit is of a key given the lower keys of the target frame; in the last row, whose target is not
    known without ``shift_labels``, given that they are silent. In training only frames that are scored have logits, the
    others zeros, and there is no frame_context.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    unitary_loss: Tensor | None = None
    frame_context: Tensor | None = None


def frame_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over the keys: logits and targets (B, T, width) to (B, T)."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").sum(-1)


def check_frames(frames: Tensor, width: int) -> None:
    """A ValueError that names ``input_values`` unless it is (B, T, width) with T ≥ 1 and values in [0, 1]."""
    if frames.ndim != 3 or frames.shape[-1] != width or frames.shape[1] == 0:
        raise ValueError(f"input_values must have the shape (B, T, {width}) with T >= 1, got {tuple(frames.shape)}")
    if frames.device.type == "cpu" and frames.numel() and can_look_at(frames):
        low, high = (float(n) for n in frames.aminmax())
        if not (low >= 0 and high <= 1):  # written so that NaN is caught too
            raise ValueError(f"input_values must be in [0, 1], got values from {low} to {high}")


def check_targets(targets: Tensor) -> None:
    """A ValueError unless the frames that a chain scores hold zeros and ones; looked at on the CPU alone."""
    if targets.device.type == "cpu" and can_look_at(targets):
        rounded = (targets > 0.5).to(targets.dtype)  # (B, T, width)
        if not torch.equal(targets, rounded):
            wrong = float(targets[targets != rounded][0])
            raise ValueError(f"frames that a chain scores must hold 0 and 1 alone, got {wrong}")


def check_onsets(keys: Tensor, onsets: Tensor) -> None:
    """A ValueError for an onset of a key (B, T, width) that does not sound; looked at on the CPU alone."""
    if keys.device.type == "cpu" and can_look_at(keys) and bool((onsets > keys).any()):
        raise ValueError("onsets, the second half of a frame, must be 0 where the key, in the first half, is silent")


class KRUForPianoRoll(KRUPreTrainedModel):
    """Polyphonic music: frame t+1 from the frames up to t.

    The keys of a frame are independent given the state, or with ``frame_head="chain"`` a chain, each given the lower
    ones. The width of a frame is ``config.input_size``, 88 keys where it is None; with ``frame_onsets`` a second half
    says which of the keys begin to sound, and p(frame) = p(keys) · p(onsets | keys, frame before).

    Raises:
        ValueError: the config is ``bidirectional``, or has onsets and an odd width.
    """

    main_input_name = "input_values"

    def __init__(self, config: KRUConfig) -> None:
        refuse_bidirectional(config, "a model of piano rolls")
        if config.input_size is None:
            config = copy.deepcopy(config)  # the caller's may be for other heads, too
            config.input_size = PIANO_KEYS * (1 + config.frame_onsets)
        width, odd = divmod(config.input_size, 1 + config.frame_onsets)
        if odd:
            raise ValueError(f"input_size must be twice the keys with frame_onsets, got {config.input_size}")
        super().__init__(config)
        self.frame_width, self.width = config.input_size, width  # of frames; keys
        self.model = self.make_body(config)
        size = config.frame_head_size if config.frame_head == "chain" else 0  # H
        extra = ONSET_SIZE * config.frame_onsets
        self.key_head = nn.Linear(config.feature_size, self.width + size + extra)
        self.key_head.silent_keys = self.width  # type: ignore[assignment]
        self.chain = KeyChain(self.width, size, config.frame_head_channels, config.frame_head_dropout) if size else None
        self.onsets = KeyOnsets(self.width, config.frame_head_channels) if extra else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (keys := getattr(module, "silent_keys", None)) is not None:
            bias = cast(Tensor, module.bias)  # (width,) or (width + H,)
            init.copy_(bias, torch.where(torch.arange(len(bias), device=bias.device) < keys, SILENT_LOGIT, 0.0))
        if isinstance(module, KeyChain):
            init.normal_(module.before.weight, std=CHAIN_STD)  # (width + H, width)
            init.normal_(module.lower.weight, std=CHAIN_STD)  # (H, width)
            init.normal_(module.keys.weight, std=module.size**-0.5)  # (width, H)
        if isinstance(module, KeyOnsets):
            init.normal_(module.begun.weight, std=CHAIN_STD)  # (ONSET_SIZE, width)
        if isinstance(module, KeyWindows):
            init.normal_(module.near, std=2 * CHAIN_STD)  # (2, 25, C)
            init.normal_(module.out.weight, std=CHAIN_STD)  # (1, C)

    def read_frames(
        self, context: Tensor, input_values: Tensor, targets: Tensor, scored: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the targets and the context of each frame; of a chain in training those of scored frames alone.

        Args:
            context: from the features, (B, T, width + H), with onsets 16 wider; without a chain (B, T, width).
            input_values: the frames before the targets, both (B, T, width), with onsets twice as wide.
            scored: (B, T) bool.
        """
        if self.chain is None:
            return context, context
        check_targets(targets)
        if self.onsets is not None:
            check_onsets(targets[..., : self.width], targets[..., self.width :])
        rows = scored.flatten().nonzero().flatten() if self.training else None  # (M,)
        flat = [part.flatten(0, -2).to(context.dtype) for part in (context, input_values, targets)]  # (B·T, ·) each
        context, before, frames = flat if rows is None else [part.index_select(0, rows) for part in flat]  # (M, ·)
        context, hidden = context.tensor_split([self.width + self.chain.size], -1)  # (M, width + H), (M, 16 or 0)
        before = before[:, : self.width]  # (M, width)
        keys, onsets = frames.tensor_split([self.width], -1)  # (M, width), (M, width or 0)
        context = context + self.chain.before(before)  # (M, width + H)
        logits = chain_logits(self.chain, context, before, keys)  # (M, width)
        if self.onsets is not None:
            logits = torch.cat([logits, self.onsets(hidden, before, keys, onsets)], -1)  # (M, 2·width)
        if rows is not None:
            return logits.new_zeros(flat[2].shape).index_copy(0, rows, logits).view_as(targets), None
        return logits.view_as(targets), torch.cat([context, before, hidden], -1).unflatten(0, targets.shape[:2])

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        shift_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> KRUPianoRollOutput:
        """Frames (B, T, width) of zeros and ones to logits of the next frames, and the loss.

        Args:
            input_values: frames (B, T, width), the width being ``config.input_size`` here.
            attention_mask: (B, T), 0 for padding before or after a piece: the state holds, the frame is not scored.
            past_key_values: the state that an earlier call returned.
            shift_mask: (B, T), which rows of ``shift_labels`` are scored; None: all.
            use_cache: return the state. return_loss: False saves the loss.
            kwargs: ``shift_labels``, targets (B, T, width) already aligned with the logits, for windows of a longer
                piece; without them frame t is scored with input_values[:, t+1]. It is no named argument, or the
                ``Trainer`` would take it for labels that every batch must have.

        Returns:
            the loss is the mean over all scored frames of −log p(frame) in nats.

        Raises:
            ValueError: frames of another shape, outside [0, 1], or where a chain scores them neither 0 nor 1.
        """
        check_frames(input_values, self.frame_width)
        given, mask, starts = self.body_inputs(
            attention_mask, kwargs, input_values=input_values, past_key_values=past_key_values, use_cache=use_cache
        )
        outputs = self.model(**given)
        features = self.read(outputs.last_hidden_state, self.key_head)  # (B, T, width + H)
        shift_labels = kwargs.get("shift_labels")
        targets, scored = self.scored_frames(input_values, mask, shift_labels, shift_mask, starts)
        logits, context = self.read_frames(features, input_values, targets, scored)  # (B, T, width), (B, T, …)
        loss = None
        if return_loss and (shift_labels is not None or input_values.shape[1] > 1):
            loss = roll_loss(logits, targets, scored)
        loss, penalty = self.with_penalty(loss, outputs)
        return KRUPianoRollOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            unitary_loss=penalty,
            frame_context=context,
        )

    @staticmethod
    def scored_frames(
        input_values: Tensor,
        attention_mask: Tensor | None,
        shift_labels: Tensor | None,
        shift_mask: Tensor | None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Targets (B, T, width) aligned with the logits, and which of them count (B, T).

        Frame t+1 counts if it and frame t are frames of one piece: a piece's first frame is predicted from nothing.
        """
        real = torch.ones(input_values.shape[:2], dtype=torch.bool, device=input_values.device)  # (B, T)
        if attention_mask is not None:
            real = attention_mask[:, -input_values.shape[1] :].bool()  # (B, T)
        if shift_labels is not None:
            return shift_labels, real if shift_mask is None else real & shift_mask.bool()
        targets = torch.cat([input_values[:, 1:], torch.zeros_like(input_values[:, :1])], 1)  # (B, T, width)
        follows = real if starts is None else real & ~starts  # (B, T)
        last = torch.zeros_like(real[:, :1])  # (B, 1)
        return targets, real & torch.cat([follows[:, 1:], last], 1)  # (B, T)

    def stream_piano_roll(
        self,
        prime: Tensor | None = None,
        num_frames: int = 64,
        temperature: float = 1.0,
        max_voices: int | None = None,
        seed: int | None = None,
        batch_size: int = 1,
        min_voices: int = 0,
        top_p: float = 1.0,
    ) -> Iterator[Tensor]:
        """Sample frame after frame with the carried state: each step costs the same, however long the piece is.

        Args:
            prime: frames (T, width) or (B, T, width) that the piece begins with, of ``config.input_size``; None: a
                silent frame.
            num_frames: how many frames are yielded, after the prime.
            temperature: 1 draws what the model has learnt. Of a chain it divides the logarithms of the probabilities
                of which key sounds next, of independent keys their logits; 0: the most probable.
            max_voices: at most that many keys at once; None: no limit. Frames with more are drawn again, which is
                exact; where none of many draws will do, the draw itself is kept within the limits, and a warning of
                the log says how often.
            seed: of the draws, which are made on the CPU; None: torch's global generator.
            batch_size: pieces at once where there is no prime.
            min_voices: at least that many keys at once, met as ``max_voices`` is.
            top_p: of the keys that may sound next, the most probable ones that together have this share are drawn from.

        Yields:
            frames (B, width) of zeros and ones.

        Raises:
            ValueError: an argument outside what is allowed.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
        if max_voices is not None and max_voices < 1:
            raise ValueError(f"max_voices must be at least 1 or None, got {max_voices}")
        most = self.width if max_voices is None else min(max_voices, self.width)
        if not 0 <= min_voices <= most:
            raise ValueError(f"min_voices must be in [0, {most}], got {min_voices}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if prime is None:
            prime = torch.zeros(batch_size, 1, self.frame_width)  # (B, 1, width)
        prime = prime[None] if prime.ndim == 2 else prime  # (B, T, width)
        check_frames(prime, self.frame_width)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        heat = {"temperature": temperature, "generator": generator}
        draw = partial(draw_frame, **heat, top_p=top_p, voices=(min_voices, max_voices))  # type: ignore[arg-type]
        return self._stream(prime.float(), num_frames, draw, partial(draw_onsets, **heat))  # type: ignore[arg-type]

    @torch.no_grad()
    def _stream(
        self,
        frames: Tensor,
        num_frames: int,
        draw: Callable[..., tuple[Tensor, Tensor]],
        begin: Callable[..., Tensor],
    ) -> Iterator[Tensor]:
        device: torch.device = self.device
        device = torch.device("cpu") if device.type == "meta" else device  # weights that are brought in for each call
        training = self.training
        self.eval()
        try:
            state, limited = None, 0
            for _ in range(num_frames):
                out = self(input_values=frames.to(device), past_key_values=state, use_cache=True, return_loss=False)
                state = out.past_key_values
                context = out.frame_context[:, -1]  # (B, ·)
                if self.onsets is not None:
                    context, hidden = context.tensor_split([-ONSET_SIZE], -1)  # (B, ·), (B, 16)
                frame, forced = draw(context, self.chain)  # (B, keys), (B,)
                limited += int(forced.sum())
                if self.onsets is not None:
                    begun = begin(self.onsets, hidden, context[:, -self.width :], frame)  # (B, keys)
                    frame = torch.cat([frame, begun.to(frame)], -1)  # (B, 2·keys)
                yield frame
                frames = frame[:, None]  # (B, 1, width)
            if limited:
                logger.warning(
                    "min_voices and max_voices were held within the draw in %d frames: none of %d free draws met them",
                    limited,
                    MOST_DRAWS,
                )
        finally:
            self.train(training)

    def generate_piano_roll(
        self,
        prime: Tensor | None = None,
        num_frames: int = 64,
        temperature: float = 1.0,
        max_voices: int | None = None,
        seed: int | None = None,
        batch_size: int = 1,
        min_voices: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """The frames of :meth:`stream_piano_roll` as one roll (B, num_frames, width), without the prime."""
        frames = self.stream_piano_roll(prime, num_frames, temperature, max_voices, seed, batch_size, min_voices, top_p)
        return torch.stack(list(frames), 1)  # (B, num_frames, width)


def roll_loss(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Nats per scored frame: logits and targets (B, T, width), scored (B, T); zero where nothing is scored."""
    nats = frame_nats(logits, targets).masked_fill(~scored, 0.0)  # (B, T)
    return nats.sum() / scored.sum().clamp(min=1)
