"""Batched transformers pipelines, and the stock Trainer on piano rolls."""

import pytest
import torch
from helpers import LOGITS, loud, tiny_config
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from kru_hf import (
    KRUForCausalLM,
    KRUForPianoRoll,
    KRUForSequenceClassification,
    KRUForTokenClassification,
    KRUModel,
    build_char_tokenizer,
)

TEXTS = ["abba", "c", "caddie", "deed", "a"]
PIPELINES = {
    "text-classification": KRUForSequenceClassification,
    "token-classification": KRUForTokenClassification,
    "feature-extraction": KRUModel,
    "text-generation": KRUForCausalLM,
}


def numbers(found):
    """The numbers in what a pipeline returns for one text; without the index of a token, which counts padding too."""
    if isinstance(found, dict):
        return [n for key, value in found.items() if key != "index" for n in numbers(value)]
    if isinstance(found, (list, tuple)):
        return [n for value in found for n in numbers(value)]
    return [] if isinstance(found, str) else [float(found)]


@pytest.mark.parametrize("task", PIPELINES)
def test_a_batch_gives_what_single_texts_give(task):
    torch.manual_seed(0)
    tokenizer = build_char_tokenizer("abcdei")
    model = loud(PIPELINES[task](tiny_config(vocab_size=len(tokenizer), num_labels=3))).eval()
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    call = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    single = [call(text, **options) for text in TEXTS]
    batched = call(TEXTS, batch_size=2, **options)
    assert len(batched) == len(TEXTS)
    for one, other, text in zip(single, batched, TEXTS, strict=True):
        if task == "text-generation":
            assert other == one
        if task == "feature-extraction":  # with the padding before the text, whose features are no part of it
            other = [other[0][-len(text) :]]
        assert numbers(other) == pytest.approx(numbers(one), abs=LOGITS)


class Rolls(Dataset):
    """Four pieces of five frames of seven keys."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_values": ((torch.arange(35) * (index + 2)) % 3 == 0).float().reshape(5, 7)}


def test_trainer_evaluates_piano_rolls(tmp_path):
    torch.manual_seed(0)
    model = KRUForPianoRoll(tiny_config(input_size=7, unitary_loss_coef=0.5))
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=Rolls(), eval_dataset=Rolls())
    trainer.train()
    rolls = torch.stack([Rolls()[index]["input_values"] for index in range(4)])
    with torch.no_grad():
        expected = model.eval()(rolls).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=LOGITS)
