"""Gated cells: the analytic engine against the definition, and both against torch's own LSTM and GRU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kru_hf.gated_cells import GATED_RECURRENCES
from kru_hf.scan_gated import GATED_CELLS, kru_gated_scan

from kru_hf.configuration_kru import GATED_TYPES

# Largest absolute difference, with values and gradients of the order of 1 to 100.
FLOAT64_TOLERANCE = 1e-10
FLOAT32_RELATIVE = 1e-5  # of the norm

SHAPES = st.sampled_from([[(1, 1)], [(5, 5)], [(2, 3), (3, 2)], [(3, 3), (2, 2)], [(2, 2)] * 5, [(4, 2), (2, 4)]])


def make_case(cell, shapes, batch, length, initial, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    gates, rows, planes = GATED_CELLS[cell]
    units = math.prod(p for p, _ in shapes)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "inputs": randn(batch, length, gates, units),
        "factors": [randn(gates, p, q) / q**0.5 for p, q in shapes],
        "bias": randn(rows, units),
        "initial_state": randn(batch, planes, units) if initial else None,
        "mask": torch.rand(batch, length, generator=generator) > 0.3 if masked else None,
        "d_states": randn(batch, length, units),
        "d_final": randn(batch, planes, units),
    }


def evaluate(case, cell, backend, dtype=torch.float64):
    """Outputs and gradients by name, for random cotangents on both outputs."""
    leaves = {
        name: case[name].to(dtype, copy=True).requires_grad_()
        for name in ("inputs", "bias", "initial_state")
        if case[name] is not None
    }
    factors = [factor.to(dtype, copy=True).requires_grad_() for factor in case["factors"]]
    states, final = kru_gated_scan(
        leaves["inputs"], factors, leaves["bias"], leaves.get("initial_state"), case["mask"], cell=cell, backend=backend
    )
    loss = (states * case["d_states"].to(dtype)).sum() + (final * case["d_final"].to(dtype)).sum()
    wanted = leaves | {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"states": states.detach(), "final": final.detach()} | dict(zip(wanted, grads, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(list(GATED_CELLS)),
    shapes=SHAPES,
    batch=st.integers(1, 4),
    length=st.sampled_from([1, 2, 5, 16, 17, 35]),
    initial=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_analytic_backward_equals_the_definition(cell, shapes, batch, length, initial, masked, seed):
    case = make_case(cell, shapes, batch, length, initial, masked, seed)
    expected, found = evaluate(case, cell, "reference"), evaluate(case, cell, "torch")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=FLOAT64_TOLERANCE, msg=name)


@pytest.mark.parametrize("cell", GATED_CELLS)
def test_float32_is_near_float64(cell):
    case = make_case(cell, [(2, 2), (3, 3), (4, 4)], 3, 33, True, True, 0)
    expected, found = evaluate(case, cell, "reference"), evaluate(case, cell, "auto", torch.float32)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() <= FLOAT32_RELATIVE * value.norm(), name


@pytest.mark.parametrize("cell", GATED_CELLS)
def test_a_held_step_lets_nothing_through(cell):
    case = make_case(cell, [(2, 2), (3, 3)], 2, 6, True, False, 0)
    mask = torch.tensor([[True, False, True, True, False, False], [False, True, False, True, True, True]])
    case["mask"] = mask
    expected = evaluate(case, cell, "torch")
    case["inputs"][~mask] = torch.nan
    found = evaluate(case, cell, "torch")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(found["inputs"][~mask], torch.zeros_like(found["inputs"][~mask]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_one_dense_factor_is_torchs_own_cell(cell, backend):
    batch, length, units, features = 3, 20, 6, 5
    torch.manual_seed(0)
    gates, _, _ = GATED_CELLS[cell]
    module = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(features, units, batch_first=True).double()
    x = torch.randn(batch, length, features, dtype=torch.float64)
    cotangent = torch.randn(batch, length, units, dtype=torch.float64)
    expected, last = module(x)
    (expected * cotangent).sum().backward()

    weight = module.weight_hh_l0.detach().view(gates, units, units).clone().requires_grad_()
    b_ih, b_hh = (b.detach().view(gates, units) for b in (module.bias_ih_l0, module.bias_hh_l0))
    bias = b_ih + b_hh
    if cell == "gru":
        bias = torch.cat([bias[:2], b_ih[2:], b_hh[2:]])
    bias = bias.requires_grad_()
    inputs = (x @ module.weight_ih_l0.detach().mT).unflatten(-1, (gates, units))  # (B, T, G, N)
    states, final = kru_gated_scan(inputs, [weight], bias, cell=cell, backend=backend)
    (states * cotangent).sum().backward()

    torch.testing.assert_close(states, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    planes = torch.stack([s[0] for s in last], 1) if cell == "lstm" else last[0].unsqueeze(1)
    torch.testing.assert_close(final, planes, rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(weight.grad.flatten(0, 1), module.weight_hh_l0.grad, rtol=0, atol=FLOAT64_TOLERANCE)
    own = module.bias_hh_l0.grad.view(gates, units)
    if cell == "gru":
        own = torch.cat([own[:2], module.bias_ih_l0.grad.view(gates, units)[2:], own[2:]])
    torch.testing.assert_close(bias.grad, own, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_janet_is_the_published_equation(backend):
    """Step by step with dense matrices, as van der Westhuizen and Lasenby write it."""
    case = make_case("janet", [(2, 2), (3, 3)], 3, 8, True, False, 0)
    states, _ = kru_gated_scan(
        case["inputs"], case["factors"], case["bias"], case["initial_state"], cell="janet", backend=backend
    )
    u_f, u_c = (torch.kron(*(factor[gate] for factor in case["factors"])) for gate in (0, 1))  # (N, N)
    (w_f, w_c), (b_f, b_c) = case["inputs"].unbind(2), case["bias"]  # (B, T, N), (N,)
    c, beta = case["initial_state"][:, 0], 1  # (B, N)
    for t in range(8):
        s = c @ u_f.mT + w_f[:, t] + b_f  # (B, N)
        candidate = torch.tanh(c @ u_c.mT + w_c[:, t] + b_c)  # (B, N)
        c = torch.sigmoid(s) * c + (1 - torch.sigmoid(s - beta)) * candidate  # (B, N)
        torch.testing.assert_close(states[:, t], c, rtol=0, atol=FLOAT64_TOLERANCE)


def test_bad_arguments_are_named():
    case = make_case("lstm", [(2, 2)], 2, 3, True, False, 0)
    good = [case["inputs"], case["factors"], case["bias"], case["initial_state"]]
    with pytest.raises(ValueError, match="cell must be one of lstm, gru, janet, got 'rnn'"):
        kru_gated_scan(*good, cell="rnn")
    with pytest.raises(ValueError, match="inputs must have the shape"):
        kru_gated_scan(*good, cell="gru")
    with pytest.raises(ValueError, match="backend of a gated cell"):
        kru_gated_scan(*good, cell="lstm", backend="cuda")
    with pytest.raises(ValueError, match="initial_state must have the shape"):
        kru_gated_scan(*good[:3], case["initial_state"][:1], cell="lstm")
    with pytest.raises(TypeError, match="bias must be torch.float64"):
        kru_gated_scan(*good[:2], case["bias"].float(), cell="lstm")


def test_start_of_the_cells():
    lstm, gru, janet = (GATED_RECURRENCES[name]([(2, 2), (3, 3)]) for name in GATED_TYPES)
    assert torch.equal(lstm.bias[1], torch.ones(6))
    assert lstm.bias.sum() == 6 and gru.bias.abs().sum() == 0
    assert torch.equal(janet.bias, torch.tensor([[1.0], [0.0]]).expand(2, 6))
    for cell in (lstm, gru, janet):
        for gate in range(cell.input_planes):
            matrix = torch.kron(cell.factors[0][gate], cell.factors[1][gate])
            torch.testing.assert_close(matrix @ matrix.mT, 0.49 * torch.eye(6))
