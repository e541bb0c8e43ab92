"""Options of a model: defaults, validation, round trips."""

import json
import logging
import re
import warnings
from functools import partial

import pytest
import torch
from helpers import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from kru_hf import KRU, KRUConfig, KRUModel
from kru_hf.cells import GATED_START
from kru_hf.configuration_kru import REMOVED
from training.common.errors import UserError
from training.loop.arguments import parse_arguments


def test_defaults_are_valid():
    config = KRUConfig()
    assert config.state_size == 504 and config.factor_shapes == [[7, 7], [8, 8], [9, 9]]
    assert config.layer_types == ["kru"] * config.num_hidden_layers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_size": 64, "factor_size": 2},
        {"factor_shapes": [(2, 3), (3, 2)], "block_type": "plain"},
        {"activation": "identity", "unitary_loss_coef": 0},
    ],
)
def test_round_trip(options, tmp_path):
    config = KRUConfig(**options)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_plain_width_is_the_state():
    assert KRUConfig(block_type="plain", state_size=12).hidden_size == 24


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
        ({"recurrent_terms": 0}, "recurrent_terms must be at least 1, got 0"),
        (
            {"recurrent_terms": 2, "recurrent_init": "identity"},
            "'identity' makes all terms alike: there must be 1, got 2",
        ),
        ({"block_type": "ring"}, "block_type"),
        ({"activation": "relu"}, "activation"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"io_rank": 0}, "io_rank"),
        ({"intermediate_size": 0}, "intermediate_size"),
        (
            {"block_type": "plain", "intermediate_size": 8},
            "intermediate_size of block_type 'plain'.* be None",
        ),
        ({"block_type": "plain", "io_rank": 3}, "io_rank of .* must be None, got 3"),
        ({"block_type": "plain", "kronecker_terms": 2}, "kronecker_terms of .* must be None, got 2"),
        ({"block_type": "plain", "hidden_dropout": 0.1}, "hidden_dropout of .* must be 0, got 0.1"),
        ({"block_type": "plain", "num_hidden_layers": 2}, "num_hidden_layers of .* must be 1, got 2"),
        ({"block_type": "plain", "hidden_size": 7}, "hidden_size of .* must be 1008, got 7"),
        ({"kronecker_terms": 0}, "kronecker_terms must be at least 1, got 0"),
        ({"kronecker_terms": 5}, "kronecker_terms must divide hidden_size = 128, got 5"),
        ({"kronecker_terms": 4, "intermediate_size": 6}, "kronecker_terms must divide intermediate_size = 6, got 4"),
        ({"kronecker_terms": 4, "state_size": 9}, "kronecker_terms must divide the width of U x = 18, got 4"),
        (
            {"kronecker_terms": 4, "state_size": 9, "cell_type": "kru_lstm"},
            "kronecker_terms must divide the width of the states = 9, got 4",
        ),
        ({"kronecker_terms": 2, "io_rank": 8}, "give io_rank or kronecker_terms, not both: got 8 and 2"),
        ({"recurrent_init": "eye"}, "recurrent_init of the cell 'kru' must be one of random, unitary, .*, got 'eye'"),
        (
            {"recurrent_init": "identity", "cell_type": "kru_gru"},
            "of the cell 'gru' must be one of random, got 'id",
        ),
        ({"recurrent_init": "slow", "factor_shapes": [[2, 3], [3, 2]]}, "needs square factors"),
        ({"bias_init": -0.2, "cell_type": "kru_gru"}, "bias_init of a gated cell must be -0.1, got -0.2"),
        ({"unitary_loss_coef": 1.0, "cell_type": "kru_lstm"}, "unitary_loss_coef of a gated cell must be 0.1, got 1.0"),
        ({"chrono_max_length": 9}, "chrono_max_length of an ungated cell must be None, got 9"),
        ({"chrono_max_length": 2, "cell_type": "kru_gru"}, "chrono_max_length must be None or at least 3 steps, got 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"bias_init": float("inf")}, "bias_init"),
        ({"bias_init": 0.5, "activation": "identity"}, "bias_init of activation 'identity' must be -0.1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4,096, got 1,000,000,000"),
        ({"hidden_size": 10**12}, "hidden_size must be at most 67,108,864, got 1,000,000,000,000"),
        ({"state_size": 10**18 + 9}, "state_size must be at most 16,777,216"),
        ({"state_size": 16777213}, "must have at most 268,435,456 entries, got 16777213x16777213"),
        ({"factor_shapes": [[2**30, 1], [1, 2**30]]}, "at most 268,435,456 entries, got 1073741824x1"),
        ({"factor_shapes": [[1, 1]] * 10**6}, "factor_shapes must hold at most 64 pairs, got 1,000,000"),
        ({"intermediate_size": 2**31}, "intermediate_size must be at most"),
        ({"vocab_size": 2**40}, "vocab_size must be at most"),
        ({"vocab_size": 11, "pad_token_id": 11}, "pad_token_id must be at least 0 and below vocab_size = 11, got 11"),
        ({"vocab_size": 11, "pad_token_id": -1}, "below vocab_size = 11, got -1"),
        ({"vocab_size": 11, "eos_token_id": [3, 99]}, "eos_token_id must be at least 0 and below vocab_size = 11, got"),
        ({"vocab_size": 11, "bos_token_id": 50256}, "bos_token_id must be at least 0 and below vocab_size = 11, got"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(Exception, match=message) as caught:
        KRUConfig(**options)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_wrong_type_is_named():
    with pytest.raises(Exception, match="vocab_size"):
        KRUConfig(vocab_size="many")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("statesize", "state_size"),
        ("num_layers", "num_hidden_layers"),
        ("dropout", "state_dropout"),
        ("pad_tokn_id", "pad_token_id"),
    ],
)
def test_misspelt_option_names_the_nearest(name, nearest):
    with pytest.raises(TypeError, match=f"no option '{name}'; did you mean '{nearest}'"):
        KRUConfig(**{name: 3})
    with pytest.raises(TypeError, match=f"no option '{name}'; did you mean '{nearest}'"):
        AutoConfig.for_model("kru", **{name: 3})


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_is_refused_wherever_it_is_given(name, tmp_path):
    message = f"KRUConfig has no {name} any more: {re.escape(REMOVED[name])}"
    KRUConfig().save_pretrained(tmp_path)
    for load in (KRUConfig, partial(AutoConfig.from_pretrained, tmp_path)):
        with pytest.raises(TypeError, match=message):
            load(**{name: None})
    path, recipe = tmp_path / "config.json", tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: None}))
    for load in (AutoConfig.from_pretrained, KRUConfig.from_pretrained):
        with pytest.raises(TypeError, match=message):
            load(tmp_path)
    recipe.write_text(f"{name}: 1\n")
    for words, start in ((["--task=char_lm", f"--{name}=1"], "unknown option"), ([str(recipe)], ".*unknown key")):
        with pytest.raises(UserError, match=f"{start} '.*{name}.*': {re.escape(REMOVED[name])}"):
            parse_arguments(words)


@pytest.mark.parametrize("name", ["embedding_size", "gated", "directions"])
def test_what_follows_from_options_is_no_option(name):
    with pytest.raises(TypeError, match=f"{name} of a KRUConfig follows from its options"):
        KRUConfig(**{name: 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_class", "PreTrainedTokenizerFast"),
        ("task_specific_params", {"text-generation": {"max_length": 50}}),
        ("prefix", "once"),
        ("sep_token_id", 3),
        ("mask_token_id", 4),
        ("decoder_start_token_id", 1),
        ("is_decoder", True),
        ("finetuning_task", "sst2"),
        ("problem_type", "regression"),
        ("id2label", {0: "a", 1: "b", 2: "c"}),
        ("return_dict", False),
        ("output_hidden_states", True),
    ],
)
def test_takes_what_every_config_takes(name, value, tmp_path):
    for config in (KRUConfig(**{name: value}), AutoConfig.for_model("kru", **{name: value})):
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), name) == value


def test_takes_every_field_of_the_base_config():
    """Also those that a later transformers adds."""
    for name in PreTrainedConfig.__dataclass_fields__:
        KRUConfig(**{name: getattr(PreTrainedConfig(), name)})
    # generate() takes them from its own config, as for every model
    assert not hasattr(KRUConfig(temperature=0.5, max_length=9), "temperature")


def test_a_layer_of_a_huge_size_is_refused_at_once():
    with pytest.raises(ValueError, match="state_size must be at most 16,777,216, got 1,000,000,000,000,000,003"):
        KRU(4, 10**18 + 3)


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


# ---- options given while a config is loaded, and what other tools leave in a config.json ----


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
