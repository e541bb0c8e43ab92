"""A model and its tokenizer as evaluation and fine-tuning tools use them: figures against sums by hand."""

from pathlib import Path

import pytest
import torch
from helpers import LOGITS, loud, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, pipeline

from kru_hf import KRUForCausalLM, build_char_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "model_cards" / "kru-python-docs"


def by_hand(model, context, text):
    """Nats of ``text`` after ``context``, ids both: token by token, with the state carried along."""
    state, nats = None, 0.0
    for index, (token, target) in enumerate(zip([*context, *text], [*context[1:], *text], strict=False)):
        out = model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
        state = out.past_key_values
        if index >= len(context) - 1:
            nats -= out.logits[0, -1].double().log_softmax(-1)[target].item()
    return nats


@torch.no_grad()
def test_scores_of_texts_with_and_without_context():
    """As lm-eval scores: an empty context is the start token, a batch is padded on the right and without a mask."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)
    pairs = [("", "The for statement"), ("The for", " statement is used\n"), ("x", " = 1"), ("", "a")]
    rows = []
    for context, text in pairs:
        prefix = tokenizer(context, add_special_tokens=False)["input_ids"] if context else [tokenizer.bos_token_id]
        rows.append((prefix, tokenizer(text, add_special_tokens=False)["input_ids"]))
    longest = max(len(prefix) + len(text) - 1 for prefix, text in rows)
    batch = torch.tensor(
        [F.pad(torch.tensor(p + t)[:-1], (0, longest - len(p) - len(t) + 1)).tolist() for p, t in rows]
    )
    logits = model(batch).logits.log_softmax(-1)
    for (prefix, text), scores in zip(rows, logits, strict=True):
        of_text = scores[len(prefix) - 1 : len(prefix) + len(text) - 1]
        found = -of_text.gather(1, torch.tensor(text)[:, None]).sum().item()
        assert found == pytest.approx(by_hand(model, prefix, text), rel=LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"block_type": "plain"}, {"cell_type": "kru_lstm"}], ids=str)
def test_packed_texts_that_end_are_scored_to_their_ends(options):
    """As trl packs them: the end token behind each text, all of them in one row, each text's first token not scored."""
    tokenizer = build_char_tokenizer("abcdefghi")
    model = tiny_model(**options).eval()
    texts = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in ("abc", "ihg", "a", "deadbeef")]
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids} for ids in texts])
    assert (packed["labels"] == 0).sum() == len(texts), "every text's end is learned"
    expected = sum(by_hand(model, ids[:1], ids[1:]) for ids in texts) / sum(len(ids) - 1 for ids in texts)
    assert model(**packed).loss.item() == pytest.approx(expected, rel=LOGITS)


def stopping_model(alphabet):
    tokenizer = build_char_tokenizer(alphabet)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = loud(KRUForCausalLM(tiny_config(vocab_size=len(tokenizer), **ends))).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.bias[:2] = -40
    return model, tokenizer


@pytest.mark.parametrize("alphabet", ["xyz \n", "abcdefgh", "012345", "é漢😀 x"])
def test_generation_stops_at_strings_of_any_alphabet(alphabet):
    model, tokenizer = stopping_model(alphabet)
    inputs, options = tokenizer(alphabet[:3], return_tensors="pt"), {"max_new_tokens": 24, "do_sample": False}
    text = tokenizer.decode(model.generate(**inputs, **options)[0])
    stop = text[8:10]
    found = model.generate(**inputs, stop_strings=[stop, "never there"], tokenizer=tokenizer, **options)[0]
    assert tokenizer.decode(found) == text[: text.index(stop, 3) + 2]
    call = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    said = call(alphabet[:3], stop_strings=stop, tokenizer=tokenizer, **options)[0]["generated_text"]
    assert said == tokenizer.decode(found)
    with pytest.raises(ValueError, match="you must pass the model's tokenizer"):
        model.generate(**inputs, stop_strings=stop, **options)


@pytest.mark.parametrize("alphabet", ["xyz \n", "abcdefgh"])
def test_an_empty_prompt_starts_from_the_start_token(alphabet):
    model, tokenizer = stopping_model(alphabet)
    call = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    start = torch.tensor([[tokenizer.bos_token_id]])
    expected = tokenizer.decode(model.generate(start, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True)
    assert call("", max_new_tokens=6, do_sample=False)[0]["generated_text"] == expected != ""


def test_generation_ends_at_the_end_token():
    model, tokenizer = stopping_model("abc")
    with torch.no_grad():
        model.lm_head.bias[0] = 1e3
    assert model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=5)[0].tolist()[2:] == [0]
