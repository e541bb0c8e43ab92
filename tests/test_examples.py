"""Examples compute what the package computes, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import RELATIVE, assert_near

from kru_hf import KRUConfig, KRUForTokenClassification

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sizes", [[6], [2, 3], [2, 3, 4]])
def test_the_minimal_network_is_the_model(sizes):
    """Logits and every gradient, the penalty's included."""
    torch.manual_seed(0)
    minimal = load("kru_minimal").KRU(10, 9, sizes, bias=-0.05)
    config = KRUConfig(
        vocab_size=10, num_labels=9, factor_shapes=sizes, block_type="plain", readout_norm=False, unitary_loss_coef=1.0
    )
    model = KRUForTokenClassification(config).train()
    cell = model.model.layers[0].recurrence
    pairs = [(model.model.embed_tokens.weight, minimal.U.weight), (cell.bias, minimal.b)]
    pairs += [(model.score.weight, minimal.V.weight), (model.score.bias, minimal.V.bias)]
    pairs += list(zip(cell.factors, minimal.factors, strict=True))
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
    ids, labels = torch.randint(10, (3, 7)), torch.randint(9, (3, 7))
    out, logits = model(ids, labels=labels), minimal(ids)
    assert_near(logits, out.logits, RELATIVE[torch.float32])
    out.loss.backward()
    (torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + minimal.penalty()).backward()
    for ours, theirs in pairs:
        assert_near(theirs.grad, ours.grad, RELATIVE[torch.float32])


@pytest.mark.slow
def test_the_minimal_network_recalls():
    assert load("kru_minimal").train(steps=120, delay=5, batch=16) > 0.6


def test_products_of_a_group_are_followed_beyond_the_training_lengths():
    """A4 here, 12 elements, which takes seconds."""
    assert load("word_problem").train(steps=300, longest=24, things=4) > 0.95
