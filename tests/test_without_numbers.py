"""Models where there are no numbers to look at: the meta device, fake tensors, and code that is traced once and run."""

import contextlib

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, loud, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification

EVERY = pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
HEADS = {
    "language model": (KRUForCausalLM, {}),
    "sequence": (KRUForSequenceClassification, {}),
    "both directions": (KRUForSequenceClassification, {"bidirectional": True}),
    "steps of frames": (KRUForTokenClassification, {"input_size": 7}),
    "music": (KRUForPianoRoll, {"input_size": 7}),
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)
TRACED = [(head, BLOCKS[4]) for head in HEADS] + [("language model", options) for options in (BLOCKS[3], *GATED)]


def build(head, options):
    """A model and its input (2, 5), and what else it takes."""
    kind, more = HEADS[head]
    model = loud(kind(tiny_config(num_labels=3, **more, **options)))
    x = torch.ones(2, 5, 7) if "input_size" in more else torch.randint(1, 11, (2, 5))
    labels = torch.zeros((2,) if kind is KRUForSequenceClassification else (2, 5), dtype=torch.long)
    return model, x, {} if kind is KRUForPianoRoll else {"labels": labels}


def mask():
    return torch.ones(2, 5, dtype=torch.long)


@EVERY_HEAD
@EVERY
@pytest.mark.parametrize(("device", "mode"), [("meta", contextlib.nullcontext), ("cpu", FakeTensorMode)])
def test_shapes_and_gradients_without_numbers(head, options, device, mode):
    with mode(), torch.device(device):
        model, x, labels = build(head, options)
        plain = None
        for given in ({}, {"attention_mask": mask()}, {"attention_mask": mask().float()}, {"position_ids": mask()}):
            model.zero_grad()
            out = model.train()(**{model.main_input_name: x}, **labels, **given)
            out.loss.backward()
            assert out.loss.shape == () and out.logits.shape[0] == 2
            assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
            plain = plain or out.logits.shape
            assert out.logits.shape == plain


def run_with(model, labels):
    def run(x, attention_mask):
        out = model(**{model.main_input_name: x}, attention_mask=attention_mask, use_cache=False, **labels)
        return out.logits, out.loss

    return run


def masks():
    left, right = mask(), mask()
    left[0, :2], right[1, 3:] = 0, 0
    return mask(), left, right


def by_make_fx(model, run, x):
    return make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, mask())


def by_jit(model, run, x):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, attention_mask):
            return run(x, attention_mask)

    return torch.jit.trace(Wrapped(), (x, mask()), check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [by_make_fx, by_jit])
@pytest.mark.parametrize(("head", "options"), TRACED, ids=str)
def test_traces_keep_the_mask(head, options, trace):
    model, x, labels = build(head, options)
    run = run_with(model.eval().requires_grad_(False), labels)
    traced = trace(model, run, x)
    for other in masks():
        for found, expected in zip(traced(x, other), run(x, other), strict=True):
            assert_near(found, expected, LOGITS)
    packed = torch.tensor([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    if HEADS[head][0] is KRUForSequenceClassification:  # a row of logits a document: their number is not known
        with pytest.raises(RuntimeError, match="packed documents cannot be compiled, traced"):
            traced(x, packed)
    else:
        for found, expected in zip(traced(x, packed), run(x, packed), strict=True):
            assert_near(found, expected, LOGITS)
