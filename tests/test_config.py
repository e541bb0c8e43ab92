"""Options of a model: defaults, validation, round trips."""

import warnings

import pytest
from helpers import tiny_config
from transformers import AutoConfig

from kru_hf import KRU, KRUConfig


def test_defaults_are_valid():
    config = KRUConfig()
    assert config.state_size == 504 and config.factor_shapes == [[7, 7], [8, 8], [9, 9]]
    assert config.layer_types == ["kru"] * config.num_hidden_layers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_size": 64, "factor_size": 2},
        {"factor_shapes": [(2, 3), (3, 2)], "wiring": "plain"},
        {"wiring": "plain", "io_rank": 4, "state_size": 12},
        {"activation": "identity", "train_factors": False, "unitary_loss_coef": 0},
    ],
)
def test_round_trip(options, tmp_path):
    config = KRUConfig(**options)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_plain_width_is_the_state():
    assert KRUConfig(wiring="plain", state_size=12).hidden_size == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 10, "factor_shapes": [[2, 2], [3, 3]]}, "state_size = 10"),
        ({"factor_shapes": [[2, 3]]}, "multiply to 2x3"),
        ({"factor_shapes": []}, "at least one pair"),
        ({"factor_shapes": [[2, 2, 2]]}, "pairs"),
        ({"factor_shapes": [[0, 2]]}, "positive integers"),
        ({"factor_shapes": [[2, 2]], "factor_size": 2}, "not both"),
        ({"state_size": -3}, "-3"),
        ({"state_size": 8, "factor_size": 1}, "factor_size"),
        ({"unitary_loss_coef": -0.1}, "unitary_loss_coef"),
        ({"unitary_loss_coef": float("nan")}, "unitary_loss_coef"),
        ({"cell_type": "gru"}, "cell_type"),
        ({"scan_backend": "numba"}, "scan_backend"),
        ({"scan_backend": "triton", "cell_type": "kru_gru"}, "scan_backend of a gated cell"),
        ({"wiring": "ring"}, "wiring"),
        ({"activation": "relu"}, "activation"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"io_rank": 0}, "io_rank"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"wiring": "plain", "intermediate_size": 8}, "intermediate_size must be None, got 8"),
        ({"kronecker_terms": 0}, "kronecker_terms must be at least 1, got 0"),
        ({"kronecker_terms": 5}, "kronecker_terms must divide hidden_size = 128, got 5"),
        ({"kronecker_terms": 4, "intermediate_size": 6}, "kronecker_terms must divide intermediate_size = 6, got 4"),
        ({"kronecker_terms": 4, "state_size": 9}, "kronecker_terms must divide the width of U x = 18, got 4"),
        (
            {"kronecker_terms": 4, "state_size": 9, "cell_type": "kru_lstm"},
            "kronecker_terms must divide the width of the states = 9, got 4",
        ),
        ({"kronecker_terms": 2, "io_rank": 8}, "give io_rank or kronecker_terms, not both: got 8 and 2"),
        ({"kronecker_terms": 2, "wiring": "plain"}, "kronecker_terms must be None, got 2"),
        ({"wiring": "plain", "hidden_dropout": 0.1}, "hidden_dropout must be 0, got 0.1"),
        ({"recurrent_init": "eye"}, "recurrent_init must be one of random, identity, got 'eye'"),
        ({"recurrent_init": "identity", "cell_type": "kru_gru"}, "recurrent_init of a gated cell must be 'random'"),
        ({"recurrent_init_max_phase": 0.0}, "recurrent_init_max_phase must be above 0 and at most π, got 0.0"),
        ({"recurrent_init_max_phase": 3.2}, "at most π, got 3.2"),
        ({"recurrent_init_max_phase": 1.0, "recurrent_init": "identity"}, "it must be None, got 1.0"),
        ({"recurrent_init_max_phase": 1.0, "factor_shapes": [[2, 3], [3, 2]]}, "needs square factors"),
        ({"recurrent_init_max_phase": 1.0, "cell_type": "kru_lstm"}, "of a gated cell must be None, got 1.0"),
        ({"bias_init": -0.2, "cell_type": "kru_gru"}, r"bias_init of a gated cell must stay -0.1 \(unused\), got -0.2"),
        ({"unitary_loss_coef": 1.0, "cell_type": "kru_lstm"}, "unitary_loss_coef of a gated cell must stay 0.1"),
        ({"chrono_max_length": 9}, "chrono_max_length of an ungated cell must be None, got 9"),
        ({"chrono_max_length": 2, "cell_type": "kru_gru"}, "chrono_max_length must be None or at least 3 steps, got 2"),
        ({"input_dropout": 1.0}, "input_dropout"),
        ({"recurrent_init_scale": 0.0}, "recurrent_init_scale"),
        ({"bias_init": float("inf")}, "bias_init"),
        ({"bias_init": 0.5, "activation": "identity"}, r"bias_init of activation 'identity' must stay -0.1"),
        ({"wiring": "plain", "num_hidden_layers": 2}, "one layer"),
        ({"wiring": "plain", "hidden_size": 7}, "hidden_size"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(Exception, match=message) as caught:
        KRUConfig(**options)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_wrong_type_is_named():
    with pytest.raises(Exception, match="vocab_size"):
        KRUConfig(vocab_size="many")


def test_misspelt_option_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'state_size'"):
        KRUConfig(statesize=64)


def test_zero_factor_size_is_not_the_default():
    with pytest.raises(ValueError, match="factor_size must be at least 2, got 0"):
        KRUConfig(state_size=8, factor_size=0)


def test_bad_value_set_later_is_not_saved(tmp_path):
    config = tiny_config()
    with pytest.raises(Exception, match="unitary_loss_coef"):
        config.unitary_loss_coef = -1.0
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_size_without_small_divisors_is_told():
    with pytest.warns(UserWarning, match="state_size = 503 has factors of 503 units, far from factor_size = 8"):
        KRUConfig(state_size=503)
    with pytest.warns(UserWarning, match="3·137 units"):
        KRU(4, 411, factor_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KRUConfig(state_size=480)
        KRUConfig(factor_shapes=[[503, 503]])
