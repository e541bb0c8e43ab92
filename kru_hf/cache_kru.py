"""What a call is given beside its inputs: the recurrent state, which steps count, and where documents begin.

The state is a transformers cache, between steps of ``generate()`` and between windows of truncated BPTT. Packed batches
put several documents into one row and mark where each begins: ``position_ids`` that start again, ``seq_idx``,
``cu_seq_lens_q``, or an attention mask that numbers its segments.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .scan import can_look_at, is_transformed

# Bounds of documents in a row, 0, n_0, n_0 + n_1, …, as the collators of transformers, trl and others name them.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
# At or below it a number of an additive mask leaves a step out: -inf, the least of a dtype, -1e9, -10000.
LEFT_OUT = -1000.0


class KRUCacheLayer(CacheLayerMixin):
    """State of one layer (B, S, N) and the number of tokens that it has seen; models return it in fp32 or fp64.

    The state is assigned, never written in place: gradients flow through it from one call to the next.
    """

    _layer_type = "kru"
    is_compileable = False
    is_croppable = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.state: Tensor | None = None
        self.seen_tokens = 0

    def store(self, state: Tensor, num_tokens: int) -> None:
        """Replace the state (B, S, N) by the one after ``num_tokens`` more tokens."""
        self.state = state
        self.seen_tokens += num_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a KRU layer keeps a state, not keys and values: use store()")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a KRU layer keeps a state, not keys and values: use store()")

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a recurrent state holds no single tokens to drop: keep the state of an earlier call")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def _map(self, function) -> None:
        if self.state is not None:
            self.state = function(self.state)

    def reset(self) -> None:
        self.state, self.seen_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state[indices])

    def offload(self) -> None:
        if self.state is not None:
            self.device = self.state.device
            self.state = self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.state is not None and hasattr(self, "device"):
            self.state = self.state.to(self.device, non_blocking=True)


class KRUCache(DynamicCache):
    """The states of all layers: what ``past_key_values`` holds.

    ``states`` reads them, :meth:`from_states` starts from given ones, :meth:`detach` cuts the gradient. A model reads
    every token that it is given; ``generate()`` takes the whole text so far and leaves out as many tokens as the cache
    has seen. To give it the new text alone, have it count from there: ``KRUCache.from_states(cache.states)``.
    """

    layers: list[KRUCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super(DynamicCache, self).__init__(layers=[KRUCacheLayer() for _ in range(num_layers)])

    @classmethod
    def from_states(cls, states: Sequence[Tensor]) -> "KRUCache":
        """A cache that starts from ``states``, one (B, S, N) per layer: (B, 2, N) for the complex cell."""
        cache = cls(len(states))
        for layer, state in zip(cache.layers, states, strict=True):
            layer.store(state, 0)
        return cache

    @property
    def states(self) -> list[Tensor]:
        """The state of each layer (B, S, N); empty before the first call."""
        return [layer.state for layer in self.layers if layer.state is not None]

    def detach(self) -> "KRUCache":
        """A new cache with the same states, cut from the graph."""
        cache = KRUCache(len(self.layers))
        for new, old in zip(cache.layers, self.layers, strict=True):
            if old.state is not None:
                new.store(old.state.detach(), old.seen_tokens)
        return cache


def check_cache(cache: object, num_layers: int) -> None:
    """A ValueError unless ``cache`` is None or holds a recurrent state for each of ``num_layers`` layers."""
    if cache is None:
        return
    layers: list[object] = getattr(cache, "layers", [])
    # By its mark, not its class: transformers makes every cache's layers of one class a mark, and two models that were
    # loaded from the Hub bring a class each.
    ours = all(getattr(layer, "_layer_type", None) == KRUCacheLayer._layer_type for layer in layers)
    if not ours or len(layers) != num_layers:
        found = f"{type(cache).__name__} with {len(layers)} layers"
        raise ValueError(
            f"past_key_values must be a KRUCache with {num_layers} layers, or what this model returned, got {found}"
        )


def initial_state(cache: DynamicCache | None, layer_index: int, shape: tuple[int, ...]) -> Tensor | None:
    """The state (B, S, N) that ``cache`` holds for a layer, or None; a batch that differs is a ValueError."""
    if cache is None:
        return None
    state = cast(KRUCacheLayer, cache.layers[layer_index]).state
    if state is not None and tuple(state.shape) != shape:
        repeats = shape[0] // max(state.shape[0], 1)
        fits = (repeats * state.shape[0], *state.shape[1:]) == shape
        hint = f": for {repeats} sequences each call its batch_repeat_interleave({repeats}) first" if fits else ""
        raise ValueError(
            f"past_key_values holds a state of the shape {tuple(state.shape)}, this call needs {shape}{hint}"
        )
    return state


def refuse_state(past_key_values: Any, use_cache: bool | None) -> None:
    """A ValueError that names the argument with which a bidirectional model is asked to carry or return a state."""
    name = "past_key_values" if past_key_values is not None else "use_cache=True" if use_cache else None
    if name is not None:
        raise ValueError(
            f"{name} needs a model with bidirectional = False: the reverse direction of this one begins at the end of "
            "the sequence, so there is no state to start from"
        )


def refuse_bidirectional(config: Any, what: str) -> None:
    """A ValueError that names the field if ``config.bidirectional``, for a head that predicts what comes next."""
    if config.bidirectional:
        raise ValueError(f"{what} must not read ahead: bidirectional must be False, got True")


def _require(condition: Tensor, message: str, result: Tensor, found: Tensor | None = None) -> Tensor:
    """``result``, or a ValueError unless ``condition`` () holds: at run time where code must not depend on values."""
    if is_transformed([condition]):
        condition = torch.func.debug_unwrap(condition).all()  # ()
    if not can_look_at(condition):
        if torch.jit.is_tracing():  # which leaves out what has no result
            return torch.ops.aten._functional_assert_async.msg(condition, message, result)
        torch._assert_async(condition, message)
    elif not bool(condition):
        if found is not None:
            low, high = (float(n) for n in torch.func.debug_unwrap(found).aminmax())
            message += f", got {low:.4g} to {high:.4g}"
        raise ValueError(message)
    return result


def read_mask(attention_mask: Tensor, batch: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """The last T steps of an attention mask (B, ≥T): which count (B, T) bool, and the segments' numbers (B, T).

    A mask holds 0 (padding) and 1, or numbers its documents 1, 2, …, or is additive, of floats: 0 for steps that count
    and very negative numbers elsewhere. None: all steps count, there are no numbers.

    Raises:
        ValueError: another shape, or other numbers; floats that are 0 throughout could mean either.
    """
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask must have the shape ({batch}, {length}) or be longer, got {shape}")
    steps = attention_mask[:, -length:]  # (B, T)
    numbers = None
    if steps.dtype == torch.bool:
        mask = steps  # (B, T)
    else:
        whole = attention_mask  # (B, ≥T): one that is additive may be 0 in a window
        allowed = (
            "attention_mask must hold 0 and 1, the numbers 1, 2, … of documents and 0, or additive floats, 0 and -inf"
        )
        if whole.is_floating_point():
            additive = ((whole == 0) | (whole <= LEFT_OUT)).all() & (whole < 0).any()  # ()
            counted = ((whole >= 0) & (whole == whole.round()) & whole.isfinite()).all() & (whole > 0).any()  # ()
            mask = torch.where(additive, steps == 0, steps > 0)  # (B, T)
            mask = _require(additive | counted, allowed, mask, whole)
            numbers = torch.where(additive, 0, steps)  # (B, T)
        else:
            mask, numbers = _require((whole >= 0).all(), allowed, steps > 0, whole), steps  # (B, T)
        if can_look_at(numbers) and bool((numbers <= 1).all()):
            numbers = None
    return (None if can_look_at(mask) and bool(mask.all()) else mask), numbers


def _begins(numbers: Tensor, mask: Tensor | None, step: int) -> Tensor:
    """Where ``numbers`` (B, T) do not continue, by ``step`` per column, the last step before that counts: (B, T)."""
    columns = torch.arange(numbers.shape[1], device=numbers.device)  # (T,)
    if mask is None:
        last = (columns - 1).expand_as(numbers)  # (B, T)
    else:
        last = torch.where(mask, columns, -1).cummax(1).values.roll(1, 1)  # (B, T)
        last = torch.where(columns == 0, -1, last)  # (B, T)
    before = numbers.gather(1, last.clamp(min=0))  # (B, T)
    continues = (numbers == before + step) | (numbers == before + step * (columns - last))  # (B, T)
    begins = (last >= 0) & ~continues  # (B, T)
    return begins if mask is None else begins & mask


def _numbers(name: str, value: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """The integers of ``name`` as numbers of steps or documents, (B, T), or (1, T) of ``BOUNDS`` 0 … T.

    Steps may be (B, ≥T), (1, ≥T) or (≥T,), of which the last T count.
    """
    tensor = torch.as_tensor(value, device=device)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    tensor, found = tensor.long(), tuple(tensor.shape)
    if name not in BOUNDS:
        rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] < length:
            raise ValueError(f"{name} must have the shape ({batch}, {length}), got {found}")
        return rows[:, -length:].expand(batch, length)
    if batch != 1 or tensor.dim() != 1:
        raise ValueError(
            f"{name} holds the bounds of documents in a single row: it must be 1-D and the batch (1, T), got "
            f"{found} and {(batch, length)}"
        )
    if can_look_at(tensor):
        bounds = tensor.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] > length or sorted(bounds) != bounds:
            raise ValueError(f"{name} must rise from 0 to at most T = {length}, got {bounds}")
    return (torch.arange(length, device=device)[:, None] >= tensor).sum(1)[None]  # (1, T)


def read_batch(
    attention_mask: Tensor | None, marks: dict[str, Any], batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Which steps count and at which a document begins, (B, T) bool each; None: all of them, and none.

    A document begins at a step t > 0 that counts and does not continue the last one before it that counts: neither
    the position nor the column of ``position_ids`` is the next one, or the number of ``seq_idx`` (of the segment in the
    mask, of the interval of ``cu_seq_lens_q``) is another. The first step of a row that counts begins none: it
    starts from the state that is carried, if there is one. So positions that only count up mark nothing.

    Args:
        attention_mask: see :func:`read_mask`. marks: what a model was called with beside its inputs; ``position_ids``,
            ``seq_idx``, ``cu_seq_lens_q`` and its like (a single row) are read, and ``document_starts`` (B, T), the
            result of an earlier call, is taken as it is.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    mask, numbers = None, None
    if attention_mask is not None:
        mask, numbers = read_mask(attention_mask.to(device), batch, length)
    if marks.get("document_starts") is not None:
        return mask, marks["document_starts"]
    found = [] if numbers is None else [_begins(numbers, mask, 0)]
    for name in ("position_ids", "seq_idx", *BOUNDS):
        if marks.get(name) is not None:
            numbers = _numbers(name, marks[name], batch, length, device)
            found.append(_begins(numbers, mask, int(name == "position_ids")))
    if not found:
        return mask, None
    starts = torch.stack(found).any(0)  # (B, T)
    return mask, None if can_look_at(starts) and not bool(starts.any()) else starts


def _by_document(x: Tensor, starts: Tensor) -> Tensor:
    """(B, T, …) to (documents, longest, …): each document is a row, zeros (False) pad shorter ones."""
    rows = [row.tensor_split(begins.nonzero()[:, 0].cpu()) for row, begins in zip(x, starts, strict=True)]
    return pad_sequence([document for row in rows for document in row], batch_first=True)


def per_document(features: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """features (B, T, D) and mask (B, T) by documents: (documents, longest, D) and (documents, longest).

    Raises:
        RuntimeError: a document begins where code must not depend on values (compiled, traced), when that is run: the
            number of rows would.
    """
    if starts is None:
        return features, mask
    if can_look_at(starts):
        counted = torch.ones_like(starts) if mask is None else mask  # (B, T)
        return _by_document(features, starts), _by_document(counted, starts)
    message = "packed documents cannot be compiled, traced or transformed: give each a row of its own"
    return _require(~starts.any(), message, features), mask
