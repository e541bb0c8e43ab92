"""A character tokenizer: one token per character, built from a corpus, a plain ``PreTrainedTokenizerFast``."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_TOKEN = "\u2403"  # ␃, the symbol for the end of a text
UNK_TOKEN = "<|unk|>"
PRIVATE = range(0xE000, 0xF900)  # code points without a meaning of their own


def build_char_tokenizer(texts: str | Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose alphabet is the set of characters (Unicode code points) of ``texts``, in code-point order.

    Ids: 0 stands between texts, 1 is the unknown character, then the alphabet. Any text of the alphabet round-trips
    exactly; an unknown character becomes one unknown token.

    Token 0 is the start of a text (``bos_token``), its end (``eos_token``) and padding: a single character, "␃", or one
    of a private area where the alphabet holds that. Nothing adds it by itself. A model that is trained on one long text
    never reads it: it starts from the zero state and does not end by itself until it is fine-tuned on texts that do.
    Special tokens are split into characters like everything else (``split_special_tokens``), so the literal "<|unk|>"
    is just characters, and a text that ends in "␃" ends in token 0.

    Raises:
        ValueError: fewer than two different characters.
    """
    alphabet: set[str] = set()
    for text in [texts] if isinstance(texts, str) else texts:
        alphabet.update(text)
    if len(alphabet) < 2:
        raise ValueError(
            "a character tokenizer needs a corpus of at least two different characters, "
            + (f"got only {alphabet.pop()!r}" if alphabet else "got an empty one")
        )
    end = next(token for token in (END_TOKEN, *map(chr, PRIVATE)) if token not in alphabet)
    vocabulary = {token: index for index, token in enumerate([end, UNK_TOKEN, *sorted(alphabet)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        unk_token=UNK_TOKEN,
        padding_side="left",  # a recurrent model continues from the last position
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
