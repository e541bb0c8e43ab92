"""A character tokenizer: one token a character, built from a corpus, a plain ``PreTrainedTokenizerFast``."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"


def build_char_tokenizer(texts: str | Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose alphabet is the set of characters (Unicode code points) of ``texts``, in code-point order.

    Ids: 0 is padding, 1 the unknown character, then the alphabet. Any text of the alphabet round-trips exactly; an
    unknown character becomes one unknown token. The special tokens never match text: they are split into characters
    like everything else (``split_special_tokens``), so the literal "<|pad|>" or "<unk>" is just characters.

    Raises:
        ValueError: no character at all, or one character only.
    """
    alphabet: set[str] = set()
    for text in [texts] if isinstance(texts, str) else texts:
        alphabet.update(text)
    if len(alphabet) < 2:
        raise ValueError(
            "a character tokenizer needs a corpus of at least two different characters, "
            + (f"got only {alphabet.pop()!r}" if alphabet else "got an empty one")
        )
    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, UNK_TOKEN, *sorted(alphabet)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",  # a recurrent model continues from the last position
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
