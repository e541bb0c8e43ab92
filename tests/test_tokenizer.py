"""The character tokenizer: one token a character, exactly, and back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from kru_hf import build_char_tokenizer
from training.tasks.char_lm import CharLM

ALPHABET = "ab z\n\r\t<>|unkpadbos_/é漢😀\u0301"
TOKENIZER = build_char_tokenizer(ALPHABET)
CARDS = Path(__file__).resolve().parent.parent / "model_cards"
RELEASED = sorted(path.parent for path in CARDS.glob("*/tokenizer.json"))


@given(st.text(ALPHABET, max_size=60))
@settings(max_examples=100, deadline=None)
def test_round_trip(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids


@pytest.mark.parametrize("text", ["<unk>", "<pad>", "<|pad|>", "<|unk|>", "a\r\nb\n\n", "\r", "  a ", " .", "<s>a</s>"])
def test_specials_never_match_text(text):
    tokenizer = build_char_tokenizer([text, "xy"])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and not set(ids) & {tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_character_is_one_token():
    ids = TOKENIZER("aXb😎")["input_ids"]
    unknown = TOKENIZER.unk_token_id
    assert [i == unknown for i in ids] == [False, True, False, True]


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast) and len(loaded) == len(TOKENIZER)
    for text in ("<|pad|>", "<|unk|>", "<unk> a\r\nb", "  é漢😀"):
        assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.padding_side == "left" and loaded.pad_token_id == 0


def test_pads_on_the_left():
    batch = TOKENIZER(["ab", "a"], padding=True)
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert batch["input_ids"][1][0] == TOKENIZER.pad_token_id
    assert set(batch) == {"input_ids", "attention_mask"}


def test_vocabulary_does_not_depend_on_order():
    assert build_char_tokenizer(["ba", "c"]).get_vocab() == build_char_tokenizer("cab").get_vocab()


@pytest.mark.parametrize("texts", ["", [], "aaaa"])
def test_too_small_a_corpus(texts):
    with pytest.raises(ValueError, match="at least two different characters"):
        build_char_tokenizer(texts)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, *RELEASED], ids=lambda t: getattr(t, "name", "new"))
def test_token_0_starts_and_ends_texts(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    end = tokenizer.eos_token
    assert {end, tokenizer.bos_token, tokenizer.pad_token} == {"␃"}
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} == {0}
    for options in ({}, {"split_special_tokens": False}, {"add_special_tokens": False}):
        assert tokenizer(f"ab{end}", **options)["input_ids"] == [*tokenizer("ab")["input_ids"], 0]
    assert tokenizer.decode(tokenizer(f"ab{end}")["input_ids"], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_released_models_name_the_end_token(folder):
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 0, 0)


def test_new_models_name_the_end_token():
    task = CharLM.__new__(CharLM)
    task.tokenizer = TOKENIZER
    expected = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(TOKENIZER)}
    assert task.model_kwargs() == expected


def test_the_end_token_is_none_of_the_alphabet():
    text = "a␃\ue000b"
    tokenizer = build_char_tokenizer(text)
    assert tokenizer.eos_token == "\ue001" and 0 not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text + tokenizer.eos_token)["input_ids"][-1] == 0
