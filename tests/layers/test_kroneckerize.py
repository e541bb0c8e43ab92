"""kroneckerize: torch's own RNNs with Kronecker recurrent weights."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from kru_hf.kronecker import factorings, kron_product
from kru_hf.layers.kroneckerize import (
    GATES,
    KroneckerWeight,
    dekroneckerize,
    kroneckerize,
    nearest_kronecker,
    plan_target_shapes,
    to_kru,
)

# Relative error in norm of a fit in float64 and of a forward pass of identical weights in float32.
FIT_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-6
CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
SHAPES = {
    "one": [(12, 12)],
    "two": [(3, 3), (4, 4)],
    "three": [(2, 2), (3, 3), (2, 2)],
    "rectangular": [(2, 6), (6, 2)],
    "four": [(2, 1), (2, 3), (1, 2), (3, 2)],
}


def relative(value, expected):
    value, expected = value.detach(), expected.detach()
    return float(torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected))


def random_factors(shapes, seed=0, gates=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(gates, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def dense_copy(module):
    """A plain module of the same kind that holds the dense weights of ``module``."""
    plain = type(module).__bases__[0](
        module.input_size, module.hidden_size, module.num_layers, bias=module.bias, bidirectional=module.bidirectional
    )
    with torch.no_grad():
        for name in module._flat_weights_names:
            getattr(plain, name).copy_(getattr(module, name))
    return plain


def hidden(state):
    return state if isinstance(state, tuple) else (state,)


def test_dense_product_is_torch_kron():
    factors = random_factors([(2, 3), (4, 1), (3, 5)], gates=3)
    for gate, dense in enumerate(kron_product(factors)):
        expected = torch.kron(torch.kron(factors[0][gate], factors[1][gate]), factors[2][gate])
        torch.testing.assert_close(dense, expected, rtol=0, atol=FIT_TOLERANCE)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_kronecker_weights_are_recovered(shapes):
    weight = kron_product(random_factors(shapes))[0]
    factors = nearest_kronecker(weight, shapes)
    assert [tuple(factor.shape) for factor in factors] == shapes
    assert relative(kron_product([factor[None] for factor in factors])[0], weight) < FIT_TOLERANCE
    norms = [float(factor.norm()) for factor in factors]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=FIT_TOLERANCE)


def test_two_factors_are_the_global_optimum():
    shapes = [(3, 2), (2, 4)]
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factors = [factor[None] for factor in nearest_kronecker(weight, shapes)]
    best = float((weight - kron_product(factors)[0]).square().sum())
    # Eckart-Young: what is left are the other singular values of the rearranged matrix, here built entry by entry.
    rearranged = torch.stack(
        [weight[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].flatten() for i in range(3) for j in range(2)]
    )
    assert best == pytest.approx(float(torch.linalg.svdvals(rearranged)[1:].square().sum()), rel=FIT_TOLERANCE)


def test_three_factors_are_a_stationary_point_and_beat_random_search():
    shapes = [(2, 2), (3, 3), (2, 2)]
    weight = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    factors = [factor[None].requires_grad_() for factor in nearest_kronecker(weight, shapes)]
    error = (weight - kron_product(factors)[0]).square().sum()
    candidates = kron_product(random_factors(shapes, seed=4, gates=2000))
    overlap = (candidates * weight).sum((1, 2)).square() / candidates.square().sum((1, 2))
    assert error.detach().item() < float(weight.square().sum() - overlap.max())
    gradients = torch.autograd.grad(error, factors)
    # The fit stops at a relative gain of 1e-9, which is quadratic in the gradient.
    assert max(float(gradient.norm()) for gradient in gradients) < 1e-3 * float(weight.norm())


def test_zero_weight_keeps_a_gradient():
    for shapes in SHAPES.values():
        factors = [factor[None].requires_grad_() for factor in nearest_kronecker(torch.zeros(12, 12), shapes)]
        dense = kron_product(factors)
        assert not dense.detach().any()
        gradients = torch.autograd.grad((dense * torch.randn(dense.shape)).sum(), factors)
        assert max(float(gradient.abs().max()) for gradient in gradients) > 0


@pytest.mark.parametrize("init", ["nearest", "fresh"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_are_those_of_the_dense_weights(cell, bidirectional, init):
    torch.manual_seed(0)
    module, report = kroneckerize(
        CELLS[cell](5, 12, num_layers=2, bidirectional=bidirectional), [(3, 3), (4, 4)], init=init
    )
    plain = dense_copy(module)
    x = torch.randn(7, 3, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    output, state = module(x)
    expected, expected_state = plain(y)
    for value, wanted in zip((output, *hidden(state)), (expected, *hidden(expected_state)), strict=True):
        assert relative(value, wanted) < FLOAT32_TOLERANCE
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent)
    assert relative(x.grad, y.grad) < FLOAT32_TOLERANCE
    names = [name for name in module._flat_weights_names if name.startswith("weight_hh")]
    assert len(names) == 2 * (1 + bidirectional)
    for name in names:
        stacks = [getattr(module.parametrizations[name], f"original{f}") for f in range(2)]
        wanted = torch.autograd.grad(kron_product(stacks).flatten(0, 1), stacks, getattr(plain, name).grad)
        for stack, gradient in zip(stacks, wanted, strict=True):
            assert float(gradient.norm()) > 0
            assert relative(stack.grad, gradient) < 10 * FLOAT32_TOLERANCE
    assert [(fit.weight, fit.gate) for fit in report.gates] == [(n, g) for n in names for g in GATES[module.mode]]


@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_loads_into_a_fresh_module(cell, tmp_path):
    torch.manual_seed(0)
    module, _ = kroneckerize(CELLS[cell](5, 12, 2, bidirectional=True), [(3, 3), (4, 4)])
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, tmp_path / "w.safetensors")
    fresh, _ = kroneckerize(CELLS[cell](5, 12, 2, bidirectional=True), [(3, 3), (4, 4)], init="fresh")
    x = torch.randn(7, 3, 5)
    assert not torch.equal(fresh(x)[0], module(x)[0])
    fresh.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(fresh(x)[0], module(x)[0])
    assert not any(name.startswith("weight_hh") for name in fresh.state_dict())


def test_report_counts_what_is_left():
    lstm = nn.LSTM(5, 12, 2)
    before = copy.deepcopy(lstm)
    total = sum(p.numel() for p in lstm.parameters())
    lstm, report = kroneckerize(lstm, [(3, 3), (4, 4)])
    assert report.parameters_before == 2 * 4 * 144
    assert report.parameters_after == 2 * 4 * 25
    assert sum(p.numel() for p in lstm.parameters()) == total - report.parameters_before + report.parameters_after
    assert report.compression == pytest.approx(144 / 25)
    for fit in report.gates:
        gate = GATES["LSTM"].index(fit.gate)
        old, new = (getattr(m, fit.weight).detach().chunk(4)[gate] for m in (before, lstm))
        assert fit.relative_error == pytest.approx(relative(new, old), rel=FLOAT32_TOLERANCE)
    text = str(report)
    assert "1,152 -> 200 (5.8x fewer)" in text
    assert text.count("\n") == 1 + 8
    assert "weight_hh_l1" in text and "forget" in text


def test_dekroneckerize_gives_a_plain_module_back():
    plain = nn.GRU(5, 12, 2, bidirectional=True)
    order = [name for name, _ in plain.named_parameters()]
    module, _ = kroneckerize(copy.deepcopy(plain), [(3, 3), (4, 4)])
    twin = copy.deepcopy(module)
    dekroneckerize(module)
    assert [name for name, _ in module.named_parameters()] == order
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(7, 3, 5)
    assert torch.equal(module(x)[0], plain(x)[0])
    # The copy shares nothing with the module that became plain.
    assert torch.equal(twin(x)[0], plain(x)[0])
    dekroneckerize(twin)
    assert torch.equal(twin(x)[0], plain(x)[0])


def test_frozen_weights_stay_frozen_parameters():
    lstm = nn.LSTM(5, 12)
    lstm.weight_hh_l0.requires_grad_(False)
    lstm, _ = kroneckerize(lstm, [(3, 3), (4, 4)])
    assert not any(p.requires_grad for name, p in lstm.named_parameters() if "parametrizations" in name)
    dekroneckerize(lstm)
    assert isinstance(lstm.weight_hh_l0, nn.Parameter) and not lstm.weight_hh_l0.requires_grad
    assert lstm.weight_ih_l0.requires_grad


def test_module_conversions_and_assignment():
    module, _ = kroneckerize(nn.LSTM(5, 12, batch_first=True, bias=False), [(3, 3), (4, 4)])
    x = torch.randn(3, 7, 5)
    output = module(x)[0]
    assert relative(module.double()(x.double())[0].float(), output) < FLOAT32_TOLERANCE
    module.float()
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 7, 7], batch_first=True)
    assert relative(module(packed)[0].data, nn.utils.rnn.pack_padded_sequence(output, [7] * 3, True).data) < (
        FLOAT32_TOLERANCE
    )
    doubled = {name: 2 * value for name, value in module.named_parameters()}
    functional = torch.func.functional_call(module, doubled, (x,))[0]
    module.load_state_dict(doubled)
    assert relative(functional, module(x)[0]) < FLOAT32_TOLERANCE
    dense = kron_product([f.float() for f in random_factors([(3, 3), (4, 4)], gates=4)]).flatten(0, 1)
    module.weight_hh_l0 = dense
    assert relative(module.weight_hh_l0, dense) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_fresh_factors_have_the_energy_of_torchs_init(cell):
    torch.manual_seed(0)
    module, report = kroneckerize(CELLS[cell](5, 12, num_layers=2), [(3, 3), (4, 4)], init="fresh")
    assert report.init == "fresh"
    for again in (False, True):
        if again:
            for parameter in module.parameters():
                nn.init.constant_(parameter, 7.0)
            module.reset_parameters()
        singular = torch.linalg.svdvals(module.weight_hh_l1.detach().double().unflatten(0, (-1, 12)))  # (G, N)
        torch.testing.assert_close(singular, torch.full_like(singular, 1 / math.sqrt(3)), rtol=1e-6, atol=0)
        for weight in (module.weight_ih_l0, module.bias_ih_l1):
            assert weight.std() > 0 and weight.abs().max() <= 1 / math.sqrt(12)


@settings(max_examples=15, deadline=None)
@given(
    cell=st.sampled_from(sorted(CELLS)),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    turn=st.integers(0, 2),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    init=st.sampled_from(["nearest", "fresh"]),
)
def test_any_shapes(cell, sizes, turn, layers, bidirectional, bias, init):
    columns = sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]
    shapes = list(zip(sizes, columns, strict=True))
    plain = CELLS[cell](3, math.prod(sizes), layers, bidirectional=bidirectional, bias=bias)
    names = [name for name, _ in plain.named_parameters()]
    module, report = kroneckerize(plain, shapes, init=init)
    x = torch.randn(4, 2, 3)
    output = module(x)[0]
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    if init == "nearest":
        # The best multiple of any direction leaves no more than the weight itself.
        assert all(fit.relative_error <= 1 + FLOAT32_TOLERANCE for fit in report.gates)
    with torch.no_grad():  # a stale list of weights would keep the outputs
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before, output = output, module(x)[0]
    assert relative(output, dense_copy(module)(x)[0]) < FLOAT32_TOLERANCE < relative(before, output)
    dekroneckerize(module)
    assert type(module) is CELLS[cell] and torch.equal(module(x)[0], output)
    assert [name for name, _ in module.named_parameters()] == names
    module, report = kroneckerize(module, shapes)  # Kronecker weights made dense and factored again
    assert max(fit.relative_error for fit in report.gates) < FLOAT32_TOLERANCE
    assert relative(module(x)[0], output) < FLOAT32_TOLERANCE


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 600), gates=st.integers(1, 16), share=st.floats(0.0, 1.0))
def test_target_is_an_upper_bound(size, gates, share):
    least = gates * min(sum(n * n for n in sizes) for sizes in factorings(size))
    target = least + int(share * (gates * size * size - least))
    shapes = plan_target_shapes(size, gates, target)
    assert math.prod(p for p, _ in shapes) == size
    assert least <= gates * sum(p * q for p, q in shapes) <= target
    with pytest.raises(ValueError, match=f"need {least} parameters"):
        plan_target_shapes(size, gates, least - 1)


def test_target_parameters_of_a_whole_module():
    _, report = kroneckerize(nn.LSTM(5, 24, 2), target_parameters=8 * (16 + 36), init="fresh")
    assert report.factor_shapes == ((4, 4), (6, 6))
    assert report.parameters_after == 8 * (16 + 36)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor_shapes": [(3, 3), (5, 5)]}, "multiply to 15x15; both must equal hidden_size = 12"),
        ({"factor_shapes": [(3, 2), 4]}, "multiply to 12x8"),
        ({"factor_shapes": []}, "factor_shapes must hold at least one pair"),
        ({"factor_shapes": [3, "4"]}, r"factor_shapes must hold pairs \[P, Q\] of positive integers, got '4'"),
        ({"factor_shapes": [(3, 3), (4, 4, 1)]}, r"must hold pairs \[P, Q\] of positive integers, got \(4, 4, 1\)"),
        ({"factor_shapes": [(3.0, 3), (4, 4)]}, r"of positive integers, got \(3.0, 3\)"),
        ({"factor_shapes": [(-3, -3), (-4, -4)]}, r"of positive integers, got \(-3, -3\)"),
        ({}, "either factor_shapes or target_parameters"),
        ({"factor_shapes": [(12, 12)], "target_parameters": 9}, "either factor_shapes or target_parameters"),
        ({"target_parameters": 67}, "target_parameters=67 is too small.*need 68 parameters"),
        ({"factor_shapes": [(12, 12)], "init": "svd"}, "init must be 'nearest' or 'fresh', got 'svd'"),
    ],
)
def test_bad_arguments_leave_the_module_alone(arguments, message):
    lstm = nn.LSTM(5, 12)
    with pytest.raises(ValueError, match=message):
        kroneckerize(lstm, **arguments)
    assert type(lstm) is nn.LSTM


def test_bad_modules():
    broken = nn.GRU(5, 12)
    nn.init.constant_(broken.weight_hh_l0, math.nan)
    shrunk, _ = kroneckerize(nn.GRU(5, 12), [12])
    for module, message in (
        (nn.LSTM(5, 12, proj_size=3), "proj_size=3"),
        (shrunk, "weight_hh_l0 is parametrized already"),
        (nn.utils.weight_norm(nn.GRU(5, 12), "weight_hh_l0"), "weight_hh_l0 is no parameter of the module"),
        (broken, "weight_hh_l0 has entries that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            kroneckerize(module, [12])
    with pytest.raises(TypeError, match="got Linear"):
        kroneckerize(nn.Linear(12, 12), [12])
    with pytest.raises(TypeError, match="got LSTMCell"):
        dekroneckerize(nn.LSTMCell(12, 12))
    with pytest.raises(ValueError, match="weight_hh_l0 is not kroneckerized"):
        dekroneckerize(nn.GRU(5, 12))


def test_without_gradients_weights_are_rebuilt_where_a_factor_has_changed(monkeypatch):
    built, forward = [], KroneckerWeight.forward
    monkeypatch.setattr(KroneckerWeight, "forward", lambda self, *factors: built.append(1) or forward(self, *factors))
    module, _ = kroneckerize(nn.LSTM(5, 12), [(3, 3), (4, 4)])
    x = torch.randn(7, 3, 5)
    built.clear()
    first = module(x)[0]
    assert len(built) == 1  # with gradients once a call
    with torch.no_grad():
        assert torch.equal(module(x)[0], first) and torch.equal(module(x)[0], first)
        assert len(built) == 2
        module.parametrizations.weight_hh_l0.original1.data.mul_(2)  # of which no version tells
        second = module(x)[0]
    assert len(built) == 3 and not torch.equal(second, first)
    assert torch.equal(module(x)[0], second)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_to_kru(cell, bias, bidirectional):
    torch.manual_seed(0)
    module = CELLS[cell](5, 12, num_layers=2, bias=bias, batch_first=True, bidirectional=bidirectional).double()
    module.weight_ih_l0.requires_grad_(False)
    module, report = kroneckerize(module, [(3, 3), (4, 4)])
    layer = to_kru(module.eval())
    assert type(layer).__name__ == f"KRU{cell.upper()}" and not layer.training
    x, state = torch.randn(3, 7, 5).double(), [torch.randn(2 * (1 + bidirectional), 3, 12).double() for _ in range(2)]
    hx = tuple(state) if cell == "lstm" else state[0]
    for start in (None, hx):
        output, final = layer(x, start)
        expected, expected_final = module(x, start)
        for value, wanted in zip((output, *hidden(final)), (expected, *hidden(expected_final)), strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)
    assert not layer.input_maps[0].weight.requires_grad and layer.input_maps[1].weight.requires_grad
    recurrent = sum(factor.numel() for recurrence in layer.recurrences for factor in recurrence.factors)
    assert recurrent == report.parameters_after


def test_to_kru_refuses():
    with pytest.raises(TypeError, match="must be a kroneckerized nn.LSTM or nn.GRU, got ParametrizedRNN"):
        to_kru(kroneckerize(nn.RNN(5, 12), [12])[0])
    with pytest.raises(ValueError, match="weight_hh_l0 is not kroneckerized"):
        to_kru(nn.LSTM(5, 12))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_converted_module_quantizes(cell):
    """The input maps, which hold most of its weights, in int8; the factors and the state stay as they are."""
    torch.manual_seed(0)
    layer = to_kru(kroneckerize(CELLS[cell](64, 64), [(8, 8), (8, 8)])[0]).eval()
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(20, 3, 64)
    with torch.no_grad():
        difference = relative(small(x)[0], layer(x)[0])
    assert 0 < difference < 0.05
    sizes = [len(pickle.dumps(model.state_dict())) for model in (small, layer)]
    assert sizes[0] < 0.4 * sizes[1]
