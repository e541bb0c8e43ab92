"""The cache's operations on the batch, and the precision of the states that a model is given."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, tiny_model

from kru_hf import KRUCache

EVERY = pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5], [8, 9, 7, 9, 3]])
FIRST, LAST = IDS[:, :3], IDS[:, 3:]


def after_first(model, rows=slice(None)):
    """The state after the first tokens of these sequences."""
    return model(FIRST[rows], use_cache=True).past_key_values


@EVERY
def test_rows_of_a_state_go_where_they_are_sent(options):
    model = tiny_model(**options)
    rows = torch.tensor([2, 0])
    expected = model(IDS).logits[:, 3:]
    for method in ("batch_select_indices", "reorder_cache"):
        cache = after_first(model)
        getattr(cache, method)(rows)
        assert_near(model(LAST[rows], past_key_values=cache).logits, expected[rows], LOGITS)
    cache = after_first(model)
    cache.batch_repeat_interleave(2)
    twice = LAST.repeat_interleave(2, 0)
    assert_near(model(twice, past_key_values=cache).logits, expected.repeat_interleave(2, 0), LOGITS)


@EVERY
def test_a_reset_cache_is_an_empty_one(options):
    model = tiny_model(**options)
    cache = after_first(model)
    assert cache.get_seq_length() == FIRST.shape[1]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.states == []
    assert_near(model(IDS[:1], past_key_values=cache).logits, model(IDS[:1]).logits, LOGITS)


@EVERY
def test_given_states_are_carried_in_full_precision(options):
    """A state in bfloat16 is taken for what it says, and what is computed from it keeps all digits."""
    model = tiny_model(**options)
    states = [state.bfloat16() for state in after_first(model).states]
    expected = model(LAST, past_key_values=KRUCache.from_states([s.float() for s in states]), use_cache=True)
    found = model(LAST, past_key_values=KRUCache.from_states(states), use_cache=True)
    assert torch.equal(found.logits, expected.logits)
    assert [state.dtype for state in found.past_key_values.states] == [torch.float32] * len(states)


def test_a_cache_for_another_model_is_refused():
    model = tiny_model()
    states = after_first(model).states
    for given in (states[:1], [*states, states[0]]):
        with pytest.raises(
            ValueError, match=f"past_key_values must be a KRUCache with 2 layers.*with {len(given)} layers"
        ):
            model(LAST, past_key_values=KRUCache.from_states(given))
    with pytest.raises(ValueError, match="past_key_values must be a KRUCache with 2 layers.*got tuple with 0 layers"):
        model(LAST, past_key_values=tuple(states))


@EVERY
def test_generate_goes_on_with_new_text_alone(options):
    """The states without their count; with it the new text is taken for the whole one."""
    model = tiny_model(**options)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)[:, FIRST.shape[1] :]
    state = KRUCache.from_states(after_first(model).states)
    assert torch.equal(model.generate(LAST, past_key_values=state, max_new_tokens=4, do_sample=False), expected)
    whole = torch.ones_like(IDS)  # the other way to say that the text is new: a mask of the whole one
    found = model.generate(
        LAST, past_key_values=after_first(model), attention_mask=whole, max_new_tokens=4, do_sample=False
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="reads what comes after .* must be 1 or more, got -1"):
        model.generate(LAST, past_key_values=after_first(model), max_new_tokens=4, do_sample=False)


def test_a_state_for_fewer_sequences_says_how_it_serves_more():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"for 2 sequences each call its batch_repeat_interleave\(2\) first"):
        model(LAST.repeat_interleave(2, 0), past_key_values=after_first(model))
    states = after_first(model).states
    # Two rows for three sequences, none, and one row of another width.
    for given in ([s[:2] for s in states], [s[:0] for s in states], [s[:1, :, :5] for s in states]):
        with pytest.raises(ValueError, match=r"this call needs \(3, 2, 6\)$"):
            model(LAST, past_key_values=KRUCache.from_states(given))


def test_an_empty_cache_is_detached_too():
    assert KRUCache(2).detach().states == []
    cache = after_first(tiny_model())
    cache.reset()
    assert len(cache.detach().layers) == len(cache.layers)


def test_detaching_keeps_states_and_counts():
    cache = after_first(tiny_model().train())
    new = cache.detach()
    assert new.get_seq_length() == FIRST.shape[1]
    for state, old in zip(new.states, cache.states, strict=True):
        assert torch.equal(state, old) and old.requires_grad and not state.requires_grad
