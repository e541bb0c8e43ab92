"""The recurrent state as a transformers cache: between steps of ``generate()``, between windows of truncated BPTT."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache


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
        """A cache that starts from ``states``, one (B, S, N) a layer: (B, 2, N) for the complex cell."""
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
            "the sequence, so there is no state to go on from"
        )


def refuse_bidirectional(config: Any, what: str) -> None:
    """A ValueError that names the field if ``config.bidirectional``, for a head that predicts what comes next."""
    if config.bidirectional:
        raise ValueError(f"{what} must not read ahead: bidirectional must be False, got True")
