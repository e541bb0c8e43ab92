"""What the paper and later work report on the tasks here, for the results table; nothing of it was run by this project.

Kronecker Recurrent Units (Jose, Cissé, Fleuret): arXiv 1705.10142, ICML 2018 (PMLR 80:2380-2389).
"""

import math
from typing import NamedTuple

READ = "paper, arXiv v1"
RECALLED = "paper, ICML version, quoted from memory"
LATER = "later papers' tables"

# Settings, in the order of the report: the experiments of the paper, then those of this project's own data.
COPY, ADDING = "Copy memory, T = {}", "Adding, T = {}"
SEQUENTIAL, PERMUTED = "Pixel MNIST, in order", "Pixel MNIST, permuted"
PTB_SMALL, PTB_LARGE = "Penn Treebank characters, ≈120K parameters", "Penn Treebank characters, ≈420K parameters"
JSB, PIANO = "JSB Chorales", "Piano-midi.de"
PHONEMES = "TIMIT phonemes, frame by frame"


class PaperFigure(NamedTuple):
    """A published result: `value` in the setting's metric, or in words where the paper gives a curve only."""

    name: str
    value: float | str
    source: str
    num_parameters: int | None = None
    num_recurrent_parameters: int | None = None

    @property
    def ours(self) -> bool:
        """Whether it is that of a KRU."""
        return self.name.startswith("KRU")


def copy_figures(length: int) -> list[PaperFigure]:
    """Copy memory: the others stay where a model without memory is, at 10 · ln 8 / (T + 20)."""
    level = 10 * math.log(8) / (length + 20)
    others = (("LSTM 128", 72_000), ("uRNN 470", 21_000), ("RNN 128", 19_000))
    return [
        PaperFigure("KRU 128, 2x2, frozen factors", "reaches 0", READ, 5_000, 56),
        *(PaperFigure(name, level, READ, size) for name, size in others),
    ]


ADDING_FIGURES = [  # curves only
    PaperFigure("KRU 512, 2x2", "converges, fastest of all", READ, 3_000, 72),
    PaperFigure("LSTM 128", "converges", READ, 67_000),
]
FIGURES: dict[str, list[PaperFigure]] = {
    **{COPY.format(length): copy_figures(length) for length in (1000, 2000)},
    **{ADDING.format(length): ADDING_FIGURES for length in (100, 200, 400, 750)},
    SEQUENTIAL: [
        PaperFigure("KRU 512, 2x2", 0.964, READ, 11_000, 72),
        PaperFigure("LSTM 128", 0.973, READ, 68_000),
        PaperFigure("full-capacity uRNN 512", 0.969, READ, 270_000),
        PaperFigure("AntisymmetricRNN", 0.980, LATER, 10_000),
    ],
    PERMUTED: [
        PaperFigure("KRU 512, 2x2", 0.945, READ, 11_000, 72),
        PaperFigure("LSTM 128", 0.926, READ, 68_000),
        PaperFigure("full-capacity uRNN 512", 0.941, READ, 270_000),
        PaperFigure("AntisymmetricRNN", 0.958, LATER, 10_000),
        PaperFigure("expRNN 512", 0.966, LATER),
    ],
    PTB_SMALL: [
        PaperFigure("KRU 411", 1.60, RECALLED, 120_000, 38_000),
        PaperFigure("LSTM 150", 1.59, RECALLED, 127_000),
    ],
    PTB_LARGE: [
        PaperFigure("KRU 993", 1.48, RECALLED, 418_000),
        PaperFigure("LSTM 300", 1.45, RECALLED, 435_000),
        PaperFigure("RNN 600", 1.51, RECALLED, 420_000),
    ],
    JSB: [
        PaperFigure("KRU 100", "close to the LSTM", READ, 10_000, 58),
        *(PaperFigure(name, value, LATER, 300_000) for name, value in (("LSTM", 8.45), ("GRU", 8.43), ("TCN", 8.10))),
    ],
    PIANO: [
        PaperFigure("KRU 100", "close to the LSTM", READ, 10_000, 58),
        PaperFigure("sigmoid RNN", 7.46, LATER),
    ],
    PHONEMES: [
        PaperFigure("KRU", "better than the baselines", READ),
        PaperFigure("bidirectional LSTM", 0.702, RECALLED),
        PaperFigure("LSTM", 0.66, RECALLED),
    ],
}


def metric_of(setting: str) -> str:
    """The metric of a setting of the paper, where no run says it."""
    kinds = {"Copy": "loss", "Adding": "mse", "Penn": "bpc", "JSB": "nll_per_frame", "Piano-midi.de": "nll_per_frame"}
    return kinds.get(setting.split()[0], "accuracy")
