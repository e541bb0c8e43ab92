"""What the paper and later work report on the tasks here, for the results table; nothing of it was run by this project.

Kronecker Recurrent Units (Jose, Cissé, Fleuret): arXiv 1705.10142, ICML 2018 (PMLR 80:2380-2389).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

READ = "paper, arXiv v1"
RECALLED = "paper, ICML version, quoted from memory"
LATER = "later papers' tables"

# Settings, in the order of the report: the experiments of the paper, then those of this project's own data.
COPY, ADDING = "Copy memory, T = {}", "Adding, T = {}"
SEQUENTIAL, PERMUTED = "Pixel MNIST, in order", "Pixel MNIST, permuted"
PTB_SMALL, PTB_LARGE = "Penn Treebank characters, ≈120K parameters", "Penn Treebank characters, ≈420K parameters"
JSB, PIANO = "JSB Chorales", "Piano-midi.de"
PHONEMES = "TIMIT phonemes, frame by frame"


@dataclass(frozen=True)
class PaperFigure:
    """A published result: `value` in the setting's metric, or in words where the paper gives a curve only."""

    setting: str
    name: str
    value: float | str
    source: str
    num_parameters: int | None = None
    num_recurrent_parameters: int | None = None
    ours: bool = False  # a KRU


def copy_figures(length: int) -> list[PaperFigure]:
    """Copy memory: the others stay where a model without memory is, at 10 · ln 8 / (T + 20)."""
    setting = COPY.format(length)
    level = 10 * math.log(8) / (length + 20)
    return [
        PaperFigure(setting, "KRU 128, 2x2, frozen factors", "reaches 0", READ, 5_000, 56, ours=True),
        PaperFigure(setting, "LSTM 128", level, READ, 72_000),
        PaperFigure(setting, "uRNN 470", level, READ, 21_000),
        PaperFigure(setting, "RNN 128", level, READ, 19_000),
    ]


def adding_figures(length: int) -> list[PaperFigure]:
    """Adding: curves only."""
    setting = ADDING.format(length)
    return [
        PaperFigure(setting, "KRU 512, 2x2", "converges, fastest of all", READ, 3_000, 72, ours=True),
        PaperFigure(setting, "LSTM 128", "converges", READ, 67_000),
    ]


FIGURES: tuple[PaperFigure, ...] = (
    *(figure for length in (1000, 2000) for figure in copy_figures(length)),
    *(figure for length in (100, 200, 400, 750) for figure in adding_figures(length)),
    PaperFigure(SEQUENTIAL, "KRU 512, 2x2", 0.964, READ, 11_000, 72, ours=True),
    PaperFigure(SEQUENTIAL, "LSTM 128", 0.973, READ, 68_000),
    PaperFigure(SEQUENTIAL, "full-capacity uRNN 512", 0.969, READ, 270_000),
    PaperFigure(SEQUENTIAL, "AntisymmetricRNN", 0.980, LATER, 10_000),
    PaperFigure(PERMUTED, "KRU 512, 2x2", 0.945, READ, 11_000, 72, ours=True),
    PaperFigure(PERMUTED, "LSTM 128", 0.926, READ, 68_000),
    PaperFigure(PERMUTED, "full-capacity uRNN 512", 0.941, READ, 270_000),
    PaperFigure(PERMUTED, "AntisymmetricRNN", 0.958, LATER, 10_000),
    PaperFigure(PERMUTED, "expRNN 512", 0.966, LATER),
    PaperFigure(PTB_SMALL, "KRU 411", 1.60, RECALLED, 120_000, 38_000, ours=True),
    PaperFigure(PTB_SMALL, "LSTM 150", 1.59, RECALLED, 127_000),
    PaperFigure(PTB_LARGE, "KRU 993", 1.48, RECALLED, 418_000, ours=True),
    PaperFigure(PTB_LARGE, "LSTM 300", 1.45, RECALLED, 435_000),
    PaperFigure(PTB_LARGE, "RNN 600", 1.51, RECALLED, 420_000),
    PaperFigure(JSB, "KRU 100", "close to the LSTM", READ, 10_000, 58, ours=True),
    PaperFigure(JSB, "LSTM", 8.45, LATER, 300_000),
    PaperFigure(JSB, "GRU", 8.43, LATER, 300_000),
    PaperFigure(JSB, "TCN", 8.10, LATER, 300_000),
    PaperFigure(PIANO, "KRU 100", "close to the LSTM", READ, 10_000, 58, ours=True),
    PaperFigure(PIANO, "sigmoid RNN", 7.46, LATER),
    PaperFigure(PHONEMES, "KRU", "better than the baselines", READ, ours=True),
    PaperFigure(PHONEMES, "bidirectional LSTM", 0.702, RECALLED),
    PaperFigure(PHONEMES, "LSTM", 0.66, RECALLED),
)
# The metric of a setting: published figures need it where no run says it.
METRICS = {
    **dict.fromkeys((COPY.format(length) for length in (1000, 2000)), "loss"),
    **dict.fromkeys((ADDING.format(length) for length in (100, 200, 400, 750)), "mse"),
    **dict.fromkeys((SEQUENTIAL, PERMUTED, PHONEMES), "accuracy"),
    **dict.fromkeys((PTB_SMALL, PTB_LARGE), "bpc"),
    **dict.fromkeys((JSB, PIANO), "nll_per_frame"),
}
