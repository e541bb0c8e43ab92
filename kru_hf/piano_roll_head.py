"""Piano rolls as sequences of binary frames: the head that predicts the next frame, and sampling from it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .cache_kru import KRUCache, refuse_bidirectional
from .configuration_kru import KRUConfig
from .modeling_kru import KRUPreTrainedModel
from .transforms import can_look_at

PIANO_KEYS = 88  # width of a frame where the config names none
SILENT_LOGIT = -3.0  # start of the output bias: about one key in twenty sounds


@dataclass
class KRUPianoRollOutput(ModelOutput):
    """Output of :class:`KRUForPianoRoll`.

    loss: nats per scored frame, with λ · unitary_loss in training mode only; 0 if no frame is scored, None
    for a single frame without ``shift_labels``.
    logits: (B, T, width), row t for frame t+1. past_key_values: the state after the last frame.
    hidden_states: embeddings and each layer's output. unitary_loss: the penalty without λ, in
    training mode and beside a loss; else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    unitary_loss: Tensor | None = None


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


class PianoRollMixin:
    """Loss and sampling, shared by every model whose forward is that of :class:`KRUForPianoRoll`."""

    main_input_name = "input_values"
    width: int
    key_head: nn.Linear

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if getattr(module, "starts_silent", False):
            init.constant_(cast(Tensor, module.bias), SILENT_LOGIT)  # (width,)

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
    ) -> Iterator[Tensor]:
        """Sample frame after frame with the carried state: each step costs the same, however long the piece is.

        Args:
            prime: frames (T, width) or (B, T, width) that the piece begins with; None: a silent frame.
            num_frames: how many frames are yielded, after the prime.
            temperature: divides the logits; 0 sounds the keys above a probability of one half.
            max_voices: at most that many keys at once, the most probable of those drawn; None: no limit.
            seed: of the draws, which are made on the CPU; None: torch's global generator.
            batch_size: pieces at once where there is no prime.
            min_voices: at least that many keys at once: the most probable ones join those drawn. Keys are drawn
                independently, so now and then hardly one sounds, which the training music may never have shown.

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
        if prime is None:
            prime = torch.zeros(batch_size, 1, self.width)  # (B, 1, width)
        prime = prime[None] if prime.ndim == 2 else prime  # (B, T, width)
        check_frames(prime, self.width)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self._stream(prime.float(), num_frames, temperature, (min_voices, max_voices), generator)

    @torch.no_grad()
    def _stream(
        self,
        frames: Tensor,
        num_frames: int,
        temperature: float,
        voices: tuple[int, int | None],
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        device: torch.device = self.device  # type: ignore[attr-defined]
        device = torch.device("cpu") if device.type == "meta" else device  # weights that are brought in for each call
        training = self.training  # type: ignore[attr-defined]
        self.eval()  # type: ignore[attr-defined]
        try:
            state = None
            for _ in range(num_frames):
                out = self(  # type: ignore[operator]
                    input_values=frames.to(device), past_key_values=state, use_cache=True, return_loss=False
                )
                state = out.past_key_values
                frame = draw_frame(out.logits[:, -1].float().cpu(), temperature, *voices, generator)  # (B, width)
                yield frame
                frames = frame[:, None]  # (B, 1, width)
        finally:
            self.train(training)  # type: ignore[attr-defined]

    def generate_piano_roll(
        self,
        prime: Tensor | None = None,
        num_frames: int = 64,
        temperature: float = 1.0,
        max_voices: int | None = None,
        seed: int | None = None,
        batch_size: int = 1,
        min_voices: int = 0,
    ) -> Tensor:
        """The frames of :meth:`stream_piano_roll` as one roll (B, num_frames, width), without the prime."""
        frames = self.stream_piano_roll(prime, num_frames, temperature, max_voices, seed, batch_size, min_voices)
        return torch.stack(list(frames), 1)  # (B, num_frames, width)


def draw_frame(
    logits: Tensor,
    temperature: float,
    min_voices: int = 0,
    max_voices: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent Bernoulli draws of a frame: logits (B, width) to zeros and ones (B, width)."""
    if temperature == 0:
        sounding = logits > 0  # (B, width)
    else:
        sounding = torch.rand(logits.shape, generator=generator) < (logits / temperature).sigmoid()  # (B, width)
    if min_voices:
        ranked = logits.masked_fill(sounding, torch.inf)  # (B, width): those drawn come first
        sounding = sounding.scatter(-1, ranked.topk(min_voices).indices, True)  # (B, width)
    if max_voices is not None and max_voices < logits.shape[-1]:
        ranked = logits.masked_fill(~sounding, -torch.inf)  # (B, width)
        kept = torch.zeros_like(sounding).scatter(-1, ranked.topk(max_voices).indices, True)  # (B, width)
        sounding = sounding & kept  # (B, width)
    return sounding.float()


class KRUForPianoRoll(PianoRollMixin, KRUPreTrainedModel):
    """Polyphonic music: frame t+1 from the frames up to t, with independent Bernoulli outputs for the keys.

    The width of a frame is ``config.input_size``, 88 keys where it is None.

    Raises:
        ValueError: the config is ``bidirectional``.
    """

    def __init__(self, config: KRUConfig) -> None:
        refuse_bidirectional(config, "a model of piano rolls")
        if config.input_size is None:
            config = copy.deepcopy(config)  # the caller's may be for other heads, too
            config.input_size = PIANO_KEYS
        super().__init__(config)
        self.width = config.input_size
        self.model = self.make_body(config)
        self.key_head = nn.Linear(config.feature_size, self.width)
        self.key_head.starts_silent = True  # type: ignore[assignment]
        self.post_init()

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
            input_values: frames (B, T, width).
            attention_mask: (B, T), 0 for padding before or after a piece: the state holds, the frame is not scored.
            past_key_values: the state that an earlier call returned.
            shift_mask: (B, T), which rows of ``shift_labels`` are scored; None: all.
            use_cache: return the state. return_loss: False saves the loss.
            kwargs: ``shift_labels``, targets (B, T, width) already aligned with the logits, for windows of a longer
                piece; without them frame t is scored with input_values[:, t+1]. It is no named argument, or the
                ``Trainer`` would take it for labels that every batch must have.

        Returns:
            the loss is the mean over all scored frames of the binary cross-entropy summed over the keys, in nats.
        """
        check_frames(input_values, self.width)
        mask, starts = self.read_batch(attention_mask, kwargs, input_values)  # (B, T) each
        outputs = self.model(
            input_values=input_values,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            document_starts=starts,
            **{name: value for name, value in kwargs.items() if name.startswith("output_")},
        )
        logits = self.read(outputs.last_hidden_state, self.key_head)  # (B, T, width)
        loss, shift_labels = None, kwargs.get("shift_labels")
        if return_loss and (shift_labels is not None or input_values.shape[1] > 1):
            loss = roll_loss(logits, *self.scored_frames(input_values, mask, shift_labels, shift_mask, starts))
        loss, penalty = self.with_penalty(loss, outputs)
        return KRUPianoRollOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            unitary_loss=penalty,
        )


def roll_loss(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Nats per scored frame: logits and targets (B, T, width), scored (B, T); zero where nothing is scored."""
    nats = frame_nats(logits, targets).masked_fill(~scored, 0.0)  # (B, T)
    return nats.sum() / scored.sum().clamp(min=1)
