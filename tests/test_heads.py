"""Heads: losses, targets that do not count, and configs and inputs that do not fit."""

import pytest
import torch
from helpers import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError

from kru_hf import (
    KRUForCausalLM,
    KRUForPianoRoll,
    KRUForSequenceClassification,
    KRUForTokenClassification,
)

HEADS = [KRUForSequenceClassification, KRUForTokenClassification]


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("head", HEADS)
def test_losses_are_torchs_and_training_adds_the_penalty(head, problem):
    torch.manual_seed(0)
    model = head(tiny_config(num_labels=3, problem_type=problem, unitary_loss_coef=0.5)).eval()
    ids = torch.randint(1, 11, (4, 5))
    lead = (4,) if head is KRUForSequenceClassification else (4, 5)
    if problem == "single_label_classification":
        labels = torch.randint(0, 3, lead)
        expected = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, -2), labels.flatten())
    elif problem == "regression":
        labels = torch.randn(*lead, 3)
        expected = torch.nn.functional.mse_loss(model(ids).logits, labels)
    else:
        labels = torch.randint(0, 2, (*lead, 3)).float()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(model(ids).logits, labels)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, expected)
    trained = model.train()(ids, labels=labels)
    torch.testing.assert_close(trained.loss, expected + 0.5 * trained.unitary_loss)
    trained.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    # Two halves of an optimizer step add up to the whole.
    count = labels.numel()
    halves = [model(ids[h], labels=labels[h], num_items_in_batch=count).loss for h in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves), trained.loss)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("head", [*HEADS, KRUForCausalLM])
def test_a_call_without_targets_costs_nothing(head, num_items):
    """As the last window of a text may be: a single character, alone in its optimizer step. 0 / 0 would be no error."""
    model = head(tiny_config(num_labels=3)).train()
    lead = (2,) if head is KRUForSequenceClassification else (2, 1)
    labels = torch.full(lead, -100)
    out = model(torch.tensor([[3], [4]]), labels=labels, num_items_in_batch=num_items)
    penalty = 0.0 if num_items is not None else model.config.unitary_loss_coef * out.unitary_loss.item()
    assert out.loss.item() == pytest.approx(penalty)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_minus_100_is_no_target_of_any_problem(problem_type):
    model = KRUForTokenClassification(tiny_config(num_labels=2, problem_type=problem_type)).eval()
    ids, labels = torch.randint(1, 11, (2, 6)), torch.randint(2, (2, 6, 2)).float()
    expected = model(ids[:, :3], labels=labels[:, :3]).loss
    labels[:, 3:] = -100
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    mask = (torch.arange(6) < 2).expand(2, 6)
    padded = model(ids, labels=labels, attention_mask=mask).loss
    torch.testing.assert_close(padded, model(ids[:, :2], labels=labels[:, :2]).loss)


def test_a_config_serves_several_heads():
    shared = tiny_config()
    assert KRUForPianoRoll(shared).config.input_size == 88
    assert shared.input_size is None
    KRUForCausalLM(shared)


def test_bad_arguments_are_named():
    with pytest.raises(StrictDataclassClassValidationError, match="hidden_size of .* must be 6, got 24"):
        tiny_config(cell_type="kru_lstm", block_type="plain", hidden_size=24)
    model = KRUForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(ValueError, match="input_values needs"):
        model(input_values=torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(torch.ones(2, 3, dtype=torch.long), labels=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="takes input_values"):
        KRUForTokenClassification(tiny_config(input_size=4))(torch.ones(2, 3, dtype=torch.long))


def test_a_model_without_tokens_has_no_embedding_to_resize():
    with pytest.raises(ValueError, match="input_size must be None, got 4"):
        KRUForSequenceClassification(tiny_config(input_size=4)).resize_token_embeddings(12)
