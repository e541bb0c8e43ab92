"""KRU, KRULSTM, KRUGRU and KRUJANET in code that was written for torch's layers."""

import pytest
import torch
from torch import nn

from kru_hf import KRU, KRUGRU, KRUJANET, KRULSTM

LAYERS = pytest.mark.parametrize("layer_class", [KRU, KRULSTM, KRUGRU, KRUJANET])
GATED = pytest.mark.parametrize("layer_class", [KRULSTM, KRUGRU, KRUJANET])


def states(state):
    """The tensors of a final state."""
    return state if isinstance(state, tuple) else (state,)


@LAYERS
def test_the_size_by_torchs_name(layer_class):
    layer = layer_class(input_size=3, hidden_size=8, num_layers=2)
    assert (layer.hidden_size, layer.state_size, layer.proj_size, layer.bias) == (8, 8, 0, True)
    assert layer(torch.randn(5, 2, 3))[0].shape[:2] == (5, 2)
    for sizes in ({}, {"state_size": 8, "hidden_size": 8}):
        with pytest.raises(TypeError, match="give state_size or hidden_size, one of the two"):
            layer_class(3, **sizes)


@LAYERS
def test_a_square_factor_is_a_number(layer_class):
    shapes = layer_class(3, 8, factor_shapes=[2, 4]).recurrences[0].factor_shapes
    assert shapes == [(2, 2), (4, 4)]


@LAYERS
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, "tanh", False, True), {}, "bias must be True or False, got 'tanh'"),
        ((2, True, 3), {}, "batch_first must be True or False, got 3"),
        ((2, True, True, 0.0, 2), {}, "bidirectional must be True or False, got 2"),
        ((2,), {"proj_size": 4}, "has no option 'proj_size'; it has .*init_scale"),
        ((2,), {"nonlinearity": "relu"}, "has no option 'nonlinearity'"),
    ],
)
def test_what_there_is_not_is_named(layer_class, arguments, options, message):
    with pytest.raises(TypeError, match=message):
        layer_class(3, 8, *arguments, **options)


@LAYERS
def test_dropout_is_no_flag(layer_class):
    with pytest.raises(ValueError, match="dropout must be a number in .0, 1., got True"):
        layer_class(3, 8, dropout=True)


def test_a_start_of_no_bias_is_an_error():
    with pytest.raises(ValueError, match="bias_init must be None without a bias, got -0.5"):
        KRU(3, 8, bias=False, bias_init=-0.5)


@LAYERS
@pytest.mark.parametrize("batch_first", [False, True])
def test_results_can_be_viewed_and_detached_in_place(layer_class, batch_first):
    output, state = layer_class(3, 8, num_layers=2, batch_first=batch_first)(torch.randn(5, 2, 3))
    output.view(10, -1)
    for tensor in states(state):
        tensor.view(-1)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor.detach_().requires_grad


@LAYERS
def test_reset_parameters_draws_the_whole_layer_anew(layer_class):
    torch.manual_seed(0)
    layer = layer_class(3, 8, num_layers=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(0)
    layer.reset_parameters()
    scale = layer.recurrences[0].init_scale
    for factor in (factor for cell in layer.recurrences for factor in cell.factors):
        assert 0 < float(torch.linalg.matrix_norm(factor, 2).max()) <= scale + 1e-5  # one factor: of W itself
    assert all(float(parameter.abs().max()) < 7 for parameter in layer.parameters())


@LAYERS
def test_without_bias_there_is_none_to_train(layer_class):
    layer = layer_class(3, 8, bias=False)
    layer.requires_grad_(False).requires_grad_(True)
    assert not any("bias" in name for name, _ in layer.named_parameters())
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert all(not cell.bias.any() for cell in layer.recurrences)
    layer_class(3, 8, bias=False).load_state_dict(layer.state_dict())


@GATED
def test_a_state_that_does_not_fit_is_named(layer_class):
    layer = layer_class(3, 8, num_layers=2)
    good, many = torch.zeros(2, 4, 8), torch.zeros(2, 5, 8)
    pair = layer_class is KRULSTM
    cases = {
        r"h_0 must be a tensor of the shape \(2, 4, 8\), got \(2, 5, 8\)": (many, good) if pair else many,
        r"h_0 must be a tensor of the shape \(2, 4, 8\), got (list|tuple)": ([], good) if pair else (good,),
    }
    if pair:
        cases[r"c_0 must be a tensor of the shape \(2, 4, 8\), got \(2, 5, 8\)"] = (good, many)
    packed = nn.utils.rnn.pack_sequence([torch.randn(length, 3) for length in (3, 2, 2, 1)])
    for message, state in cases.items():
        for data in (torch.randn(5, 4, 3), packed):
            with pytest.raises(ValueError, match=message):
                layer(data, state)
