"""generate() in the modes that a recurrent language model has."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, tiny_model

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
