"""Bidirectional models: both directions by hand, padding, refusals, saving, training options."""

import pytest
import torch
from helpers import LOGITS, RELATIVE, assert_near, loud, tiny_config
from safetensors.torch import load_file

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification, KRUModel
from kru_hf.cells import BY_TYPE
from kru_hf.configuration_kru import CELL_TYPES
from kru_hf.maps import normed_linear
from training.common.errors import UserError
from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.options.model import ModelOptions

CELLS = list(CELL_TYPES)
# Width of the features of one direction: 2N or N with N = 6.
STATE_WIDTH = {name: 6 * cell.feature_planes for name, cell in BY_TYPE.items()}
EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def both_ways(head=KRUModel, seed=0, **options):
    """A bidirectional model in eval mode with states far from zero."""
    torch.manual_seed(seed)
    return loud(head(tiny_config(**({"bidirectional": True, "initializer_range": 0.5} | options)))).eval()


def one_way(model, reverse):
    """The unidirectional body with one direction of a plain bidirectional body's weights."""
    single = KRUModel(tiny_config(cell_type=model.config.cell_type, block_type="plain")).eval()
    both = model.layers[0].recurrence
    single.layers[0].recurrence = both.reverse_cell if reverse else both.forward_cell
    width = single.embed_tokens.embedding_dim
    embedding = model.embed_tokens.weight
    with torch.no_grad():
        single.embed_tokens.weight.copy_(embedding[:, width:] if reverse else embedding[:, :width])
    return single


@EVERY_CELL
def test_plain_model_equals_two_runs(cell):
    model = both_ways(cell_type=cell, block_type="plain")
    with torch.no_grad():
        ahead = one_way(model, reverse=False)(IDS).last_hidden_state
        behind = one_way(model, reverse=True)(IDS.flip(1)).last_hidden_state.flip(1)
        expected = torch.cat((ahead, behind), -1)
        assert expected.shape[-1] == model.config.hidden_size == 2 * STATE_WIDTH[cell]
        assert_near(model(IDS).last_hidden_state, expected, RELATIVE[torch.float32])
    assert (ahead - behind).abs().max() > LOGITS


@EVERY_CELL
def test_residual_layer_equals_two_runs(cell):
    layer = both_ways(cell_type=cell, block_type="residual").layers[0]
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [False, True, True, True, False]])
    half, units = layer.recurrence.forward_cell.input_shape
    with torch.no_grad():
        inputs = layer.in_proj(layer.norm(x)).unflatten(-1, (2 * half, units))
        ahead, _ = layer.recurrence.forward_cell(inputs[:, :, :half], None, mask)
        behind, _ = layer.recurrence.reverse_cell(inputs[:, :, half:].flip(1), None, mask.flip(1))
        features = torch.cat((ahead.flatten(-2), behind.flip(1).flatten(-2)), -1)
        expected = x + normed_linear(features, layer.out_proj, layer.epsilon)
        assert_near(layer(x, None, mask)[0], expected, RELATIVE[torch.float32])


@EVERY_CELL
def test_sequences_are_read_where_each_direction_ends(cell):
    model = both_ways(KRUForSequenceClassification, cell_type=cell, block_type="plain", num_labels=3)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    half = STATE_WIDTH[cell]
    assert model.score.in_features == 2 * half
    with torch.no_grad():
        found = model(IDS, attention_mask=mask).logits
        for row, piece in enumerate((IDS[:1, 1:5], IDS[1:])):
            ahead = one_way(model.model, reverse=False)(piece).last_hidden_state[:, -1]
            behind = one_way(model.model, reverse=True)(piece.flip(1)).last_hidden_state[:, -1]
            assert_near(found[row : row + 1], model.read(torch.cat((ahead, behind), 1), model.score), LOGITS)


def test_mixed_directions_are_read_at_both_ends():
    model = both_ways(KRUForSequenceClassification, block_type="residual", num_labels=3)
    features = model.model(IDS).last_hidden_state
    assert model.score.in_features == 2 * features.shape[-1]
    expected = model.score(torch.cat((features[:, -1], features[:, 0]), 1))
    assert_near(model(IDS).logits, expected, RELATIVE[torch.float32])


@EVERY_CELL
def test_both_directions_count(cell):
    model = both_ways(KRUForTokenClassification, cell_type=cell, num_labels=3)
    single = KRUForTokenClassification(tiny_config(cell_type=cell, num_labels=3))
    assert model.num_recurrent_parameters() == 2 * single.num_recurrent_parameters()
    cells = [layer.recurrence for layer in model.model.layers]
    penalties = [each.penalty() for pair in cells for each in (pair.forward_cell, pair.reverse_cell)]
    assert_near(model.model.unitary_loss(), sum(penalties), RELATIVE[torch.float32])
    assert (sum(penalties) > 0) == (cell in ("kru", "kru_linear"))


def test_gradient_checkpointing_has_equal_gradients():
    model = both_ways(KRUForTokenClassification, num_labels=3).train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS % 3).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_near(again, plain, RELATIVE[torch.float32])


@pytest.mark.parametrize("head", [KRUModel, KRUForSequenceClassification, KRUForTokenClassification])
def test_state_is_refused_and_never_returned(head):
    model = both_ways(head)
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match="use_cache=True needs a model with bidirectional = False"):
        model(IDS, use_cache=True)
    carried = KRUModel(tiny_config())(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values needs a model with bidirectional = False"):
        model(IDS, past_key_values=carried)
    assert model(IDS).past_key_values is None
    model.config.use_cache = True  # a default of the config is no demand
    assert model(IDS).past_key_values is None


def test_what_a_reverse_direction_cannot_do_is_refused():
    for head in (KRUForCausalLM, KRUForPianoRoll):
        with pytest.raises(ValueError, match="bidirectional must be False"):
            head(tiny_config(bidirectional=True))
    with pytest.raises(ValueError, match="initial_state must be None"):
        both_ways().layers[0].recurrence(torch.zeros(1, 2, 4, 6), torch.zeros(1, 4, 6))


def test_one_direction_is_stored_as_before_the_option(tmp_path):
    """Its weights keep their names, and a config without the field loads; two directions have a name each."""
    model = KRUForTokenClassification(tiny_config(num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if "bidirectional" not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("\n".join(kept))
    loaded = KRUForTokenClassification.from_pretrained(tmp_path).eval()
    assert_near(loaded(IDS).logits, model(IDS).logits, RELATIVE[torch.float32])
    assert "model.layers.0.recurrence.factors.0" in load_file(tmp_path / "model.safetensors")
    names = dict(both_ways().named_parameters())
    assert {"layers.0.recurrence.forward_cell.bias", "layers.0.recurrence.reverse_cell.bias"} <= set(names)


@pytest.mark.parametrize(("architecture", "cell"), [*(("kru", cell) for cell in CELLS), ("unitary", None)])
def test_training_option(architecture, cell):
    given = {"cell_type": cell} if cell else {}
    options = ModelOptions(architecture=architecture, bidirectional=True, state_size=6, factor_size=2, **given)
    model = build_model("sequence_classification", options, vocab_size=11, num_labels=3)
    assert model.config.bidirectional and model(IDS).logits.shape == (2, 3)
    once = ModelOptions(architecture=architecture, state_size=6, factor_size=2, **given)
    single = build_model("sequence_classification", once, vocab_size=11, num_labels=3)
    assert model.num_recurrent_parameters() == 2 * single.num_recurrent_parameters()
    for head in ("causal_lm", "piano_roll"):
        with pytest.raises(UserError, match="bidirectional=True cannot be given"):
            build_model(head, options, vocab_size=11)


def test_training_option_is_of_kru_alone():
    arguments = parse_arguments(["--task", "pixel_mnist", "--bidirectional", "true"])
    assert arguments.model.bidirectional is True
    with pytest.raises(UserError, match="bidirectional=True has no effect here: it works with architecture kru"):
        build_model("sequence_classification", ModelOptions(architecture="lstm", bidirectional=True), vocab_size=11)
