"""generate() in the modes that a recurrent language model has, and the cache that it carries."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, tiny_model

from kru_hf import KRUCache

EVERY = pytest.mark.parametrize("options", BLOCKS + GATED, ids=lambda w: "-".join(map(str, w.values())))
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
NEW = {"max_new_tokens": 8, "do_sample": False}


def greedy_without_cache(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@EVERY
def test_greedy_with_and_without_cache(options):
    model = tiny_model(**options)
    expected = greedy_without_cache(model, IDS, 8)
    assert torch.equal(model.generate(IDS, **NEW), expected)
    assert torch.equal(model.generate(IDS, use_cache=False, **NEW), expected)
    assert torch.equal(model.generate(IDS, **NEW), expected), "a second call must not see the first one's state"


@EVERY
def test_left_padded_batch_equals_single_runs(options):
    model = tiny_model(**options)
    padded = torch.tensor([[0, 0, 0, 7, 2], [3, 1, 4, 1, 5]])
    mask = (padded != 0).long()
    batch = model.generate(padded, attention_mask=mask, **NEW)
    assert torch.equal(batch[:1, 3:], model.generate(padded[:1, 3:], **NEW))
    assert torch.equal(batch[1:], model.generate(padded[1:], **NEW))


@EVERY
def test_continue_from_a_returned_cache(options):
    model = tiny_model(**options)
    options = {"do_sample": False, "suppress_tokens": [0]}  # generate would take a padding token in its input for one
    first = model.generate(IDS, return_dict_in_generate=True, max_new_tokens=3, **options)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(rest, model.generate(IDS, max_new_tokens=8, **options))


@EVERY
def test_beams_rank_by_the_model(options):
    model = tiny_model(**options)
    output = model.generate(
        IDS, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **NEW
    )
    logp = model(output.sequences[:, :-1]).logits.log_softmax(-1)
    tokens = output.sequences[:, 1:, None]
    scores = logp.gather(-1, tokens)[:, IDS.shape[1] - 1 :, 0].mean(-1)
    assert_near(output.sequences_scores, scores, LOGITS)
    assert torch.equal(model.generate(IDS, num_beams=3, use_cache=False, **NEW), output.sequences[::3])


def test_sampling():
    model = tiny_model()
    torch.manual_seed(0)
    with_cache = model.generate(IDS, do_sample=True, num_return_sequences=2, max_new_tokens=6, top_k=5)
    torch.manual_seed(0)
    without = model.generate(IDS, do_sample=True, num_return_sequences=2, max_new_tokens=6, top_k=5, use_cache=False)
    assert with_cache.shape == (4, 12) and torch.equal(with_cache, without)


def test_chunked_prefill():
    model = tiny_model()
    assert torch.equal(model.generate(IDS, prefill_chunk_size=2, **NEW), model.generate(IDS, **NEW))


def test_generate_from_embeddings():
    model = tiny_model()
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embeds, **NEW), model.generate(IDS, **NEW)[:, 6:])


@pytest.mark.parametrize("options", [{"assistant_model": "itself"}, {"prompt_lookup_num_tokens": 2}])
def test_assisted_decoding_is_refused(options):
    model = tiny_model()
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model()}
    with pytest.raises(ValueError, match="stateful"):
        model.generate(IDS[:1], **options, **NEW)


def test_static_cache_is_refused():
    with pytest.raises(ValueError, match="cache_implementation must be unset or 'dynamic', got 'static'"):
        tiny_model().generate(IDS, cache_implementation="static", **NEW)


def test_a_state_cannot_be_cropped():
    cache = tiny_model()(IDS).past_key_values
    with pytest.raises(NotImplementedError, match="a recurrent state holds no single tokens to drop"):
        cache.crop(-1)


# ---- the cache ----

ROWS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5], [8, 9, 7, 9, 3]])
FIRST, LAST = ROWS[:, :3], ROWS[:, 3:]


def after_first(model, rows=slice(None)):
    """The state after the first tokens of these sequences."""
    return model(FIRST[rows], use_cache=True).past_key_values


@EVERY
def test_rows_of_a_state_go_where_they_are_sent(options):
    model = tiny_model(**options)
    rows = torch.tensor([2, 0])
    expected = model(ROWS).logits[:, 3:]
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
    assert_near(model(ROWS[:1], past_key_values=cache).logits, model(ROWS[:1]).logits, LOGITS)


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
    expected = model.generate(ROWS, max_new_tokens=4, do_sample=False)[:, FIRST.shape[1] :]
    state = KRUCache.from_states(after_first(model).states)
    assert torch.equal(model.generate(LAST, past_key_values=state, max_new_tokens=4, do_sample=False), expected)
    whole = torch.ones_like(ROWS)  # the other way to say that the text is new: a mask of the whole one
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
