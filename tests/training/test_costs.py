"""Bytes and multiply-adds of models, against sums by hand."""

import pytest
from helpers import tiny_config, tiny_model

from kru_hf import KRUForPianoRoll
from kru_hf.export.weight_file import weight_file
from training.models.baselines import BaselineConfig
from training.models.build import model_class
from training.models.costs import int8_bytes, multiply_adds

UNITS, SYMBOLS, WIDTH = 6, 11, 8
FACTORS = UNITS * (2 + 3)  # multiply-adds of (2x2) ⊗ (3x3) times a vector
# Of a file: its header, the factors' shapes, the slack at its end, and less than 4 bytes a tensor to fill words.
AROUND, WORD = 300, 4


def baseline(**options):
    config = BaselineConfig(vocab_size=SYMBOLS, state_size=UNITS, hidden_size=WIDTH, **options)
    return model_class("causal_lm", config)(config)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block_type": "plain"}, 4 * FACTORS + 2 * UNITS * SYMBOLS),
        (
            {"cell_type": "kru_lstm", "kronecker_terms": 2, "intermediate_size": 4},
            2 * (4 * FACTORS + WIDTH * 4 * UNITS + UNITS * WIDTH + WIDTH * 8 + 4 * WIDTH) + WIDTH * SYMBOLS,
        ),
        # Two terms cost as much as the dense matrix has entries, or more: that is what is computed.
        ({"block_type": "plain", "cell_type": "kru_gru", "recurrent_terms": 2}, 3 * UNITS**2 + UNITS * SYMBOLS),
        ({"cell_type": "kru_linear"}, None),
    ],
    ids=str,
)
def test_multiply_adds_of_a_step(options, expected):
    assert multiply_adds(tiny_model(**options)) == expected


def test_multiply_adds_of_baselines():
    inputs = UNITS * WIDTH
    assert multiply_adds(baseline(cell="lstm")) == 4 * (inputs + UNITS**2) + UNITS * SYMBOLS
    assert multiply_adds(baseline(cell="low_rank", recurrent_rank=2)) == inputs + 2 * 2 * UNITS + UNITS * SYMBOLS
    assert multiply_adds(baseline(cell="orthogonal")) == inputs + UNITS**2 + UNITS * SYMBOLS
    assert multiply_adds(KRUForPianoRoll(tiny_config(input_size=7, frame_head="chain"))) is None


@pytest.mark.parametrize("cell_type", ["kru", "kru_lstm"])
def test_bytes_are_those_of_the_weight_file(cell_type):
    model = tiny_model(cell_type=cell_type, kronecker_terms=2, intermediate_size=4)
    tensors = len(list(model.parameters()))
    assert 0 <= len(weight_file(model, None, "int8")) - int8_bytes(model) < AROUND + 2 * WORD * tensors
