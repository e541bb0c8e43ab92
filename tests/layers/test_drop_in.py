"""KRU, KRULSTM, KRUGRU and KRUJANET in place of torch's own layers: their numbers, their habits, their errors."""

import math

import pytest
import torch
from helpers import RELATIVE, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from kru_hf import KRU, KRUGRU, KRUJANET, KRULSTM
from kru_hf.kronecker import kron_dense, to_complex

FLOAT64_TOLERANCE = 1e-10
TWINS = {KRULSTM: torch.nn.LSTM, KRUGRU: torch.nn.GRU}
LAYERS = pytest.mark.parametrize("layer_class", [KRU, KRULSTM, KRUGRU, KRUJANET])


def matched(layer_class, **options):
    """A layer with one N×N factor and torch's own with the same weights, in float64."""
    torch.manual_seed(0)
    units, width = 4, 3
    ours = layer_class(width, units, factor_shapes=[[units, units]], dtype=torch.float64, **options)
    twin = TWINS[layer_class](width, units, dtype=torch.float64, **options)
    for index, (linear, cell) in enumerate(zip(ours.input_maps, ours.recurrences, strict=True)):
        layer, reverse = divmod(index, ours.num_directions)
        name = f"l{layer}" + ("_reverse" if reverse else "")
        with torch.no_grad():
            cell.bias.normal_()
            getattr(twin, f"weight_ih_{name}").copy_(linear.weight)
            getattr(twin, f"weight_hh_{name}").copy_(cell.factors[0].flatten(0, 1))
            recurrent = torch.zeros_like(cell.bias[: cell.cell.planes])
            if layer_class is KRUGRU:
                recurrent[2] = cell.bias[3]
            getattr(twin, f"bias_ih_{name}").copy_(cell.bias[: cell.cell.planes].flatten())
            getattr(twin, f"bias_hh_{name}").copy_(recurrent.flatten())
    return ours, twin


def tensors(result):
    """The tensors of (output, state), whatever their form."""
    output, state = result
    output = output.data if hasattr(output, "batch_sizes") else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


@settings(max_examples=25, deadline=None)
@given(
    layer_class=st.sampled_from([KRULSTM, KRUGRU]),
    layers=st.integers(1, 3),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    form=st.sampled_from(["batch", "single", "packed", "packed_sorted"]),
    initial=st.booleans(),
)
def test_one_dense_factor_is_torchs_layer(layer_class, layers, batch_first, bidirectional, form, initial):
    ours, twin = matched(layer_class, num_layers=layers, batch_first=batch_first, bidirectional=bidirectional)
    batch, rows = 3, layers * (2 if bidirectional else 1)
    x = torch.randn(batch, 5, 3, dtype=torch.float64, requires_grad=True)
    hx = None
    if initial:
        shape = (rows, 4) if form == "single" else (rows, batch, 4)
        h, c = torch.randn(2, *shape, dtype=torch.float64)
        hx = (h, c) if layer_class is KRULSTM else h
    if form == "batch":
        given = x if batch_first else x.transpose(0, 1)
    elif form == "single":
        given = x[0]
    else:
        lengths = (5, 3, 1) if form == "packed_sorted" else (2, 5, 3)
        pieces = [x[b, :length] for b, length in enumerate(lengths)]
        given = pack_sequence(pieces, enforce_sorted=form == "packed_sorted")
    weights = [ours.recurrences[0].factors[0]], [twin.weight_hh_l0]
    results = []
    for layer, weight in zip((ours, twin), weights, strict=True):
        found = tensors(layer(given, hx))
        loss = sum((tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum() for tensor in found)
        grads = torch.autograd.grad(loss, [x, *weight], retain_graph=True)  # both share the packing
        results.append([*found, grads[0], grads[1].reshape(-1, 4)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)


@LAYERS
def test_widths_and_carried_state(layer_class):
    layer = layer_class(3, 12, num_layers=2, factor_size=3, batch_first=True, dtype=torch.float64)
    layer.flatten_parameters()  # as callers of torch's layers do
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    whole = layer(x)
    assert whole[0].shape == (2, 7, 24 if layer_class is KRU else 12)
    first, state = layer(x[:, :4])
    second, final = layer(x[:, 4:], state)
    for found, expected in zip(tensors((torch.cat([first, second], 1), final)), tensors(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("layer_class", [KRU, KRUJANET])
def test_layers_without_a_twin_packed_and_bidirectional(layer_class):
    layer = layer_class(3, 6, bidirectional=True, batch_first=True, dtype=torch.float64)
    pieces = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 5, 3)]
    _, state = layer(pack_sequence(pieces, enforce_sorted=False))
    for index, piece in enumerate(pieces):
        torch.testing.assert_close(state[:, index], layer(piece)[1], rtol=0, atol=FLOAT64_TOLERANCE)


@LAYERS
def test_what_torchs_layers_take_is_taken(layer_class):
    layer = layer_class(input_size=3, hidden_size=8, num_layers=2, factor_shapes=[2, 4])
    assert (layer.hidden_size, layer.state_size, layer.proj_size, layer.bias) == (8, 8, 0, True)
    assert layer(torch.randn(5, 2, 3))[0].shape[:2] == (5, 2)
    assert layer.recurrences[0].factor_shapes == [(2, 2), (4, 4)]


def test_the_state_of_an_lstm_may_be_a_list():
    layer, pair, x = KRULSTM(3, 4), [torch.randn(1, 2, 4), torch.randn(1, 2, 4)], torch.randn(2, 2, 3)
    assert torch.equal(layer(x, pair)[0], layer(x, tuple(pair))[0])


EVERY_LAYER = [
    ({}, "give state_size or hidden_size, one of the two"),
    ({"state_size": 8, "hidden_size": 8}, "give state_size or hidden_size, one of the two"),
    ({"state_size": 8, "bias": "tanh"}, "bias must be True or False, got 'tanh'"),
    ({"state_size": 8, "batch_first": 3}, "batch_first must be True or False, got 3"),
    ({"state_size": 8, "bidirectional": 2}, "bidirectional must be True or False, got 2"),
    ({"state_size": 8, "proj_size": 4}, "has no option 'proj_size'; it has .*init_scale"),
    ({"state_size": 8, "nonlinearity": "relu"}, "has no option 'nonlinearity'"),
    ({"state_size": 8, "dropout": True}, "dropout must be a number in .0, 1., got True"),
    ({"state_size": 8, "num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"state_size": 5, "factor_shapes": [[2, 2]]}, "multiply to 2x2; both must equal state_size = 5"),
    ({"state_size": 8, "factor_shapes": []}, "factor_shapes must hold at least one pair"),
    ({"state_size": 504, "factor_shapes": [[7, 8], [8, 9], [9, 8]]}, "multiply to 504x576"),
    ({"state_size": 504, "factor_size": 0}, "factor_size must be at least 2, got 0"),
    ({"state_size": 8, "factor_shapes": [8], "factor_size": 2}, "give factor_shapes or factor_size, not both"),
    ({"state_size": 4, "backend": "cuda"}, "must be one of auto, reference, portable, cpu, triton, got 'cuda'"),
    ({"state_size": 4, "init_scale": -1.0}, "init_scale must be positive and finite, got -1.0"),
    ({"state_size": 4, "init_scale": math.nan}, "init_scale must be positive and finite, got nan"),
]


@LAYERS
@pytest.mark.parametrize(("options", "message"), EVERY_LAYER)
def test_bad_arguments_are_named(layer_class, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer_class(3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of modrelu, identity, got 'tanh'"),
        ({"bias_init": math.nan}, "bias_init must be finite, got nan"),
        ({"bias": False, "bias_init": -0.5}, "bias_init must be None without a bias, got -0.5"),
        ({"activation": "identity", "bias_init": 0.5}, "bias_init must be None without a bias"),
        ({"init": "eye"}, "init of the cell 'kru' must be one of random, unitary, slow, .*, got 'eye'"),
        ({"factor_shapes": [[2, 3], [3, 2]], "init": "slow"}, "init 'slow' needs square factors"),
    ],
)
def test_bad_arguments_of_the_complex_cell(options, message):
    with pytest.raises(ValueError, match=message):
        KRU(3, 6, **options)


@LAYERS
def test_inputs_and_states_that_do_not_fit_are_named(layer_class):
    layer = layer_class(3, 8, num_layers=2)
    width = 16 if layer_class is KRU else 8
    good, many, pair = torch.zeros(2, 4, width), torch.zeros(2, 5, width), layer_class is KRULSTM
    shape = rf"must be a tensor of the shape \(2, 4, {width}\), got"
    cases = {
        rf"h_0 {shape} \(2, 5, {width}\)": (many, good) if pair else many,
        rf"h_0 {shape} (list|tuple)": ([], good) if pair else (good,),
    }
    if pair:
        cases |= {rf"c_0 {shape} \(2, 5, 8\)": (good, many), r"is a pair \(h_0, c_0\), got Tensor": good}
    packed = pack_sequence([torch.randn(length, 3) for length in (3, 2, 2, 1)])
    for message, state in cases.items():
        for data in (torch.randn(5, 4, 3), packed):
            with pytest.raises(ValueError, match=message):
                layer(data, state)
    with pytest.raises(ValueError, match="input must be 2-D or 3-D, not empty and 3 wide"):
        layer(torch.zeros(2, 2, 5))


def test_an_engine_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: .* no kernel for the cell 'lstm'"):
        KRULSTM(3, 8, backend="triton")(torch.zeros(2, 1, 3))


def test_identity_keeps_what_it_reads_where_it_is():
    layer = KRU(3, 12, factor_shapes=[[3, 3], [2, 4], [2, 1]], init="identity", init_scale=0.9)
    shares = [0.9 ** (1 / 3) * torch.eye(p, q) for p, q in ((3, 3), (2, 4), (2, 1))]
    for factor, share in zip(layer.recurrences[0].factors, shares, strict=True):
        assert torch.equal(factor[0], share) and not factor[1].any()
    summing = KRU(3, 12, factor_size=2, init="identity", init_scale=1.0, bias_init=0.0, batch_first=True)
    x = torch.randn(2, 5, 3)
    assert_near(summing(x)[0][:, -1], summing.input_maps[0](x).sum(1), RELATIVE[torch.float32])


def test_the_phases_of_the_product_are_those_asked_for():
    torch.manual_seed(0)
    slow = KRU(3, 512, factor_size=8, init="slow", init_scale=0.9).recurrences[0]
    phases = torch.cat([torch.linalg.eigvals(to_complex(f.detach(), 0)).angle() for f in slow.factors])  # (F·P,)
    assert 0.2 < phases.abs().max() < 0.3001  # three factors share 0.9
    matrix = to_complex(kron_dense([f.detach() for f in slow.factors]), 0)  # (N, N)
    values = torch.linalg.eigvals(matrix)  # (N,)
    assert 0.6 < values.angle().abs().max() < 0.9001
    assert_near(values.abs(), torch.full((512,), 0.9), RELATIVE[torch.float32])


@LAYERS
def test_a_trace_of_frozen_layers_computes_what_they_do(layer_class):
    layer, x = layer_class(4, 8).eval().requires_grad_(False), torch.randn(5, 3, 4)
    traced = torch.jit.trace(layer, (torch.randn(5, 3, 4),), check_trace=False)
    assert_near(traced(x)[0], layer(x)[0], RELATIVE[torch.float32])


def test_factors_that_are_no_numbers_have_no_norm_to_hold():
    """Raising here would hide from a training loop that its loss is not a number."""
    cell = KRU(3, 12, factor_size=2, init_scale=3.0).recurrences[0]
    finite = [factor.clone() for factor in cell.factors]
    cell.factors[1].data[0, 0, 0] = torch.nan
    cell.bound_norm(1.0)
    assert torch.equal(cell.factors[0], finite[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norm_and_penalty_of_factors_in_any_dtype(dtype):
    layer = KRU(3, 12, factor_size=2, init_scale=3.0)
    expected = layer.penalty()
    layer = layer.to(dtype)
    penalty = layer.penalty()
    assert penalty.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(penalty.float(), expected, RELATIVE.get(dtype, RELATIVE[torch.bfloat16]))
    cell = layer.recurrences[0]
    cell.bound_norm(1.0)
    norm = math.prod(torch.linalg.matrix_norm(to_complex(f.double(), 0), 2).item() for f in cell.factors)
    assert norm == pytest.approx(1.0, rel=len(cell.factors) * torch.finfo(dtype).eps)


@LAYERS
@pytest.mark.parametrize("batch_first", [False, True])
def test_results_can_be_viewed_and_detached_in_place(layer_class, batch_first):
    output, *state = tensors(layer_class(3, 8, num_layers=2, batch_first=batch_first)(torch.randn(5, 2, 3)))
    output.view(10, -1)
    for tensor in state:
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
    layer.reset_parameters()
    scale = layer.recurrences[0].init_scale
    for factor in (factor for cell in layer.recurrences for factor in cell.factors):
        assert 0 < float(torch.linalg.matrix_norm(factor, 2).max()) <= scale + 1e-5  # one factor: of W itself
    assert all(float(parameter.abs().max()) < 7 for parameter in layer.parameters())


@LAYERS
def test_bias_false_and_frozen_factors_stay_so(layer_class):
    layer = layer_class(3, 6, num_layers=2, bias=0, train_factors=False)  # torch's layers take 0 for False
    assert not any(factor.requires_grad for cell in layer.recurrences for factor in cell.factors)
    layer.reset_parameters()
    layer.requires_grad_(False).requires_grad_(True)
    assert not any("bias" in name for name, _ in layer.named_parameters())
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert all(not cell.bias.any() for cell in layer.recurrences)
    layer_class(3, 6, num_layers=2, bias=False).load_state_dict(layer.state_dict())
    assert not KRU(3, 6, activation="identity").recurrences[0].bias.requires_grad  # the linear network has none
    assert all(cell.bias.any() and cell.bias.requires_grad for cell in KRU(3, 6).recurrences)


@LAYERS
def test_dropout_acts_between_layers_in_training_only(layer_class):
    layer, x = layer_class(3, 6, num_layers=2, dropout=1.0), torch.randn(4, 2, 3)
    alone = layer_class(3, 6, num_layers=2)
    alone.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x)[0], alone(x)[0])
    dropped = layer.train()(x)[0]
    assert torch.equal(dropped, layer(torch.randn(4, 2, 3))[0])  # the second layer saw nothing of either input
    assert not torch.equal(dropped, alone(x)[0])
