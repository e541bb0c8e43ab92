"""Options given while a config is loaded, what follows from them, and what other tools leave in a config.json."""

import json
import logging

import pytest
import torch
from helpers import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kru_hf import KRUConfig, KRUModel
from kru_hf.cells import GATED_START


@pytest.fixture
def folder(tmp_path):
    KRUConfig(vocab_size=20, state_size=12, hidden_size=16).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"factor_size": 2}, {"state_size": 12, "factor_shapes": [[2, 2], [2, 2], [3, 3]], "factor_size": None}),
        ({"state_size": 24}, {"state_size": 24, "factor_shapes": [[4, 4], [6, 6]]}),
        ({"factor_shapes": [5, 2]}, {"state_size": 10, "factor_shapes": [[5, 5], [2, 2]]}),
        ({"cell_type": "kru_lstm"}, {"recurrent_init": "random", "hidden_size": 16}),
        ({"block_type": "plain", "hidden_size": None}, {"num_hidden_layers": 1, "hidden_size": 24}),
        ({"num_labels": 3, "use_cache": False}, {"num_labels": 3, "use_cache": False, "factor_shapes": [[12, 12]]}),
    ],
)
def test_what_follows_from_an_option_follows_again(folder, given, expected, tmp_path_factory):
    config = AutoConfig.from_pretrained(folder, **given)
    assert {name: getattr(config, name) for name in expected} == expected
    AutoModel.from_config(config)(torch.tensor([[1, 2, 3]]))
    again = tmp_path_factory.mktemp("again")
    config.save_pretrained(again)
    assert AutoConfig.from_pretrained(again).factor_shapes == config.factor_shapes


def test_shapes_that_were_chosen_stay(tmp_path):
    KRUConfig(factor_shapes=[[3, 3], [2, 2], [2, 2]]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, state_size=12).factor_shapes == [[3, 3], [2, 2], [2, 2]]


def test_values_that_were_chosen_stay(tmp_path):
    KRUConfig(bias_init=-0.1, num_hidden_layers=3).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, cell_type="kru_gru")
    assert (config.num_hidden_layers, config.start) == (3, GATED_START)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cell_type": "bogus"}, "cell_type must be one of"),
        ({"unitary_loss_coef": -1.0}, "unitary_loss_coef must be non-negative"),
        ({"block_type": "plain"}, "hidden_size of block_type 'plain'.* must be 24, got 16"),
        ({"state_sise": 3}, "no option 'state_sise'; did you mean 'state_size'"),
    ],
)
def test_bad_options_are_named_before_a_model_is_built(folder, given, message):
    with pytest.raises(Exception, match=message):
        KRUConfig.from_pretrained(folder, **given)


def test_an_option_in_place_of_the_stored_one_reaches_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, state_dropout=0.5)
    assert model.config.state_dropout == model.model.layers[0].state_dropout.p == 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state_size", 24, "both must equal state_size = 24"),
        ("factor_size", 2, "factor_size is read at construction"),
        ("cell_type", "bogus", "cell_type must be one of"),
    ],
)
def test_a_value_set_later_is_checked_before_a_model_is_built(name, value, message):
    config = tiny_config()
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        KRUModel(config)


def test_notes_of_other_tools_are_kept_with_a_warning(tmp_path, caplog):
    model = tiny_model()
    model.config.my_note = {"by": "another tool"}
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "kru_hf.configuration_kru"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.my_note == {"by": "another tool"}
    assert "KRUConfig has no option 'my_note': kept, but no KRU model reads it" in caplog.text


def test_a_misspelt_option_in_a_file_is_an_error(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state_sizes": 3}))
    with pytest.raises(TypeError, match="no option 'state_sizes'; did you mean 'state_size'"):
        AutoConfig.from_pretrained(folder)
