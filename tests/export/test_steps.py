"""Steps of ``generate()`` in the C runtime: as those of torch, and left to it where something watches them."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList

from kru_hf import KRUConfig, KRUForCausalLM, modeling_kru, use_backend
from kru_hf.export import StreamingModel, steps

TOLERANCE = 1e-5  # of the largest logit, in fp32
MODELS = {
    "kru, plain": {"block_type": "plain"},
    "lstm, terms": {"cell_type": "kru_lstm", "kronecker_terms": 4, "intermediate_size": 40, "num_hidden_layers": 2},
    "gru, low rank": {"cell_type": "kru_gru", "io_rank": 5},
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture
def taken(monkeypatch):
    """How many steps the runtime has taken, as the length of a list."""
    calls, step = [], StreamingModel.step_rows
    monkeypatch.setattr(StreamingModel, "step_rows", lambda self, *given: (calls.append(given), step(self, *given))[1])
    return calls


def build(**options):
    torch.manual_seed(0)
    width = {} if options.get("block_type") == "plain" else {"hidden_size": 20}
    model = KRUForCausalLM(KRUConfig(vocab_size=29, state_size=24, **width, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write(model, rows=2, **options):
    """Sequences and logits of a text that begins with padding in its second row."""
    torch.manual_seed(1)
    prompt, mask = torch.randint(1, 29, (rows, 7)), torch.ones(rows, 7, dtype=torch.long)
    if rows > 1:
        mask[1, :3] = 0
    shown = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True, **options}
    return model.generate(prompt, attention_mask=mask, eos_token_id=None, pad_token_id=0, **shown)


@contextlib.contextmanager
def by_torch():
    made = modeling_kru.STEPS.copy()
    modeling_kru.STEPS.clear()
    try:
        yield
    finally:
        modeling_kru.STEPS.update(made)


def same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs[theirs.isfinite()].abs().max()))
    for ours, theirs in zip(found.past_key_values.states, expected.past_key_values.states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", MODELS)
def test_generates_what_torch_does(options, way, taken):
    model = build(**MODELS[options])
    found = write(model, **WAYS[way])
    assert len(taken) == 11
    with by_torch():
        same(found, write(model, **WAYS[way]))
    assert len(taken) == 11


def test_goes_on_from_a_state(taken):
    model = build(**MODELS["lstm, terms"])
    whole = write(model, rows=1, max_new_tokens=9)
    first = write(model, rows=1, max_new_tokens=4)
    states = first.past_key_values.states
    kept = [state.clone() for state in states]
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(rest, whole.sequences) and len(taken) == 8 + 3 + 5
    assert all(map(torch.equal, states, kept)), "a state was written in place"


@pytest.mark.parametrize("edit", ["in place", "data", "load_state_dict", "replaced"])
def test_weights_changed_between_two_calls(edit, taken):
    model = build(**MODELS["lstm, terms"])
    write(model)
    head = model.lm_head
    if edit == "in place":
        with torch.no_grad():
            head.weight.mul_(-1)
    elif edit == "data":
        head.weight.data.mul_(-1)
    elif edit == "load_state_dict":
        model.load_state_dict({"lm_head.weight": -head.weight.detach()}, strict=False)
    else:
        head.weight = nn.Parameter(-head.weight.detach())
    found = write(model)
    assert len(taken) == 22
    with by_torch():
        same(found, write(model))


def test_weights_changed_between_two_steps(taken):
    """By what ``generate()`` calls at each of them."""
    model = build(**MODELS["lstm, terms"])

    def turn(tokens, scores):
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        return scores

    found = write(model, logits_processor=LogitsProcessorList([turn]))
    assert len(taken) == 11
    with by_torch():  # after an even number of turns
        same(found, write(model, logits_processor=LogitsProcessorList([turn])))


def hooked(model):
    seen = []
    model.model.layers[0].in_proj.register_forward_hook(lambda *_: seen.append(1))
    return lambda: len(seen) == 12


def replaced(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Doubled(20, 29)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


def with_own_forward(model):
    head = model.lm_head
    head.forward = lambda x: 2 * nn.functional.linear(x, head.weight)


LEFT_TO_TORCH = {
    "a hook": hooked,
    "a layer of another type": replaced,
    "a layer with a forward of its own": with_own_forward,
    "float64": lambda model: model.double() and None,
    "dropout": lambda model: model.train() and None,
    "a part in training mode": lambda model: model.model.layers[0].state_dropout.train() and None,
}


@pytest.mark.parametrize("what", LEFT_TO_TORCH)
def test_left_to_torch(what, taken):
    model = build(**MODELS["lstm, terms"], state_dropout=0.5 if what.startswith(("dropout", "a part")) else 0.0)
    seen = LEFT_TO_TORCH[what](model)
    found = write(model)
    assert not taken and (seen is None or seen())
    with by_torch():
        expected = write(model)
    assert torch.equal(found.sequences, expected.sequences)


def test_options_left_to_torch(taken):
    model = build(**MODELS["lstm, terms"])
    assert write(model, output_hidden_states=True).hidden_states
    with torch.autocast("cpu", torch.bfloat16):
        write(model)
    use_backend("reference")
    try:
        write(model)
    finally:
        use_backend("auto")
    write(model, use_cache=False)
    write(model, rows=steps.MOST_ROWS + 1)
    assert not taken
    tokens = torch.randint(29, (1, 1))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        model(tokens, past_key_values=cache)
    assert not taken, "outside generate() nobody says when the weights are the same"


def test_a_model_inside_another_models_generate(taken):
    """The steps belong to the model whose ``generate()`` it is."""
    model, other = build(**MODELS["lstm, terms"]), build(**MODELS["kru, plain"])

    def ask(tokens, scores):
        return scores + other(tokens[:, -1:]).logits[:, -1]

    found = write(model, logits_processor=LogitsProcessorList([ask]))
    assert len(taken) == 11
    with by_torch():
        same(found, write(model, logits_processor=LogitsProcessorList([ask])))
