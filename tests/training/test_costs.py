"""Bytes and multiply-adds of models, against sums by hand."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model
from transformers import AutoConfig

import kru_hf
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
@pytest.mark.parametrize("terms", [None, 16])
def test_bytes_are_those_of_the_weight_file(cell_type, terms):
    """Wide enough that a scale for each row of each of 16 terms would show beside the rest of a file."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 256, "state_size": 256, "factor_size": 16}
    model = tiny_model(cell_type=cell_type, kronecker_terms=terms, factor_shapes=None, **sizes)
    tensors = len(list(model.parameters()))
    assert 0 <= len(weight_file(model, None, "int8")) - int8_bytes(model) < AROUND + 2 * WORD * tensors


CARDS = Path(__file__).parents[2] / "model_cards"
ROWS = map(json.loads, (CARDS / "runs.jsonl").open())
RELEASED = [row for row in ROWS if (CARDS / row["name"] / "config.json").exists()]


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: row["name"])
def test_recorded_sizes_of_released_models_are_theirs(row):
    config = AutoConfig.from_pretrained(CARDS / row["name"])
    with torch.device("meta"):
        model = getattr(kru_hf, config.architectures[0])(config)
    recorded = row["results"]
    assert recorded["num_parameters"] == model.num_parameters()
    assert recorded.get("int8_bytes", int8_bytes(model)) == int8_bytes(model)
    assert recorded.get("multiply_adds") == multiply_adds(model)
