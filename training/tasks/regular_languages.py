"""Regular languages, as in the tests of state tracking (Delétang et al. 2023): what has been read, at every step.

- `parity`: whether the number of ones is odd.
- `even_pairs`: whether the number of 01 and 10 pairs is odd, that is, whether the last symbol differs from the first.
- `cycle_navigation`: the place on a cycle of 5 after steps of 0, +1 and -1.
- `modular_arithmetic`: the value modulo 5 of an expression such as 2+4*3-1, products first; read at its numbers.

Training sequences have 3 to 40 symbols. `accuracy_<L>` is the share of the positions beyond L / 2 that are right.
"""

from dataclasses import dataclass

import numpy as np

from ..data.splits import IGNORED
from ..options.fields import option
from .word_problem import TrackingOptions, TrackingTask

MODULUS = 5
PLUS, MINUS, TIMES = range(MODULUS, MODULUS + 3)
LANGUAGES = {  # tokens and classes
    "parity": (2, 2),
    "even_pairs": (2, 2),
    "cycle_navigation": (3, MODULUS),
    "modular_arithmetic": (MODULUS + 3, MODULUS),
}


@dataclass
class RegularLanguageOptions(TrackingOptions):
    """Options of the regular languages."""

    language: str = option(
        "parity",
        f"The language: {', '.join(LANGUAGES)}.",
        allowed=(f"one of {', '.join(LANGUAGES)}", LANGUAGES.__contains__),
    )
    sequence_length: int = option(40, "Length of the longest training sequences.", allowed=("2 or more", (2).__le__))
    start_length: int = option(3, "Length of the first training sequences.", allowed=("2 or more", (2).__le__))


class RegularLanguage(TrackingTask):
    """Random symbols; every prefix has its label."""

    name = default_dataset = "regular_languages"
    Options = RegularLanguageOptions

    def load(self, tokenizer: object = None) -> None:
        self.tokens, self.classes = LANGUAGES[self.options.language]
        super().load(tokenizer)

    def draw(self, random: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        if self.options.language == "modular_arithmetic":
            return _arithmetic(random, rows, length)
        tokens = random.integers(self.tokens, size=(rows, length))  # (B, T)
        if self.options.language == "parity":
            return tokens, tokens.cumsum(1) % 2
        if self.options.language == "even_pairs":
            return tokens, (tokens != tokens[:, :1]).astype(tokens.dtype)
        return tokens, np.array([0, 1, -1])[tokens].cumsum(1) % MODULUS


def _arithmetic(random: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers at even positions, operators between them; labels -100 at operators."""
    tokens = random.integers(MODULUS, size=(rows, length))  # (B, T)
    tokens[:, 1::2] = random.integers(PLUS, TIMES + 1, size=tokens[:, 1::2].shape)
    labels = np.full_like(tokens, IGNORED)
    done, term = np.zeros(rows, dtype=tokens.dtype), tokens[:, 0]  # the sum of what is closed, and the last product
    labels[:, 0] = term
    for t in range(2, length, 2):
        operator, number = tokens[:, t - 1], tokens[:, t]
        times = operator == TIMES
        done = np.where(times, done, done + term)
        term = np.where(times, term * number, np.where(operator == PLUS, number, -number)) % MODULUS
        labels[:, t] = (done + term) % MODULUS
    return tokens, labels


TASK = RegularLanguage
