"""The definition against oracles of their own: torch's LSTM and GRU, and formulas, with the dense W."""

import math

import pytest
import torch
from problems import CASES, assert_close, problem, run
from torch import nn

from kru_hf.kronecker import kron_dense, spectral_norm, unitary_penalty

SHAPES = [(3, 2), (2, 3)]
DENSE_TOLERANCE = 1e-10


def dense_matrix(p, factors):
    """W of every gate (K, N, N), or (2, N, N) of the complex cell, by ``torch.kron`` and a sum over the terms."""
    terms = [factor if factor.dim() == 4 else factor[None] for factor in factors]
    total = 0
    for r in range(len(terms[0])):
        one = [torch.complex(f[r, 0], f[r, 1])[None] if p.cell == "kru" else f[r] for f in terms]
        total = total + torch.stack([torch.kron(*(w[k] for w in one)) for k in range(len(one[0]))])
    return torch.stack((total[0].real, total[0].imag)) if p.cell == "kru" else total


def torch_module(p, weight, bias):
    """nn.LSTM or nn.GRU that reads U x as it is; b_hh holds what a GRU's reset gate multiplies."""
    gates, units = weight.shape[:2]
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[p.cell](gates * units, units, batch_first=True).double()
    inner = torch.zeros(gates, units).double()
    if p.cell == "gru":
        inner[2] = bias[3]
    values = (torch.eye(gates * units), weight.flatten(0, 1), bias[:gates].flatten(), inner.flatten())
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)
    return module


def by_formula(p, weight, bias, u, state):
    """The state after a sample's step u (K, N), written out."""
    if p.cell == "kru":
        z = torch.complex(*weight) @ torch.complex(*state) + torch.complex(*u)
        if p.activation == "modrelu":
            z = torch.where(z == 0, 0, (z.abs() + bias).clamp(min=0) * z / z.abs().where(z != 0, 1))
        return torch.stack((z.real, z.imag))
    if p.cell == "peephole":
        a, c = weight @ state[0] + u + bias[:4], state[1]
        i, f, g = (a[0] + bias[4] * c).sigmoid(), (a[1] + bias[5] * c).sigmoid(), a[2].tanh()
        c = f * c + i * g
        return torch.stack(((a[3] + bias[6] * c).sigmoid() * c.tanh(), c))
    a = weight @ state[0] + u + bias  # JANET
    return (a[0].sigmoid() * state[0] + (1 - (a[0] - 1).sigmoid()) * a[1].tanh())[None]


def oracle(p):
    """Every document of every sample alone, without the steps that are held: outputs and gradients by name."""
    leaves = {"inputs": p.inputs, "bias": p.bias, "initial_state": p.initial_state}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    factors = [factor.clone().requires_grad_() for factor in p.factors]
    weight, bias = dense_matrix(p, factors), leaves["bias"]
    module = torch_module(p, weight, bias) if p.cell in ("lstm", "gru") else None
    states, finals = [], []
    for b in range(len(p.inputs)):
        state, rows = leaves["initial_state"][b], []
        for t in range(p.inputs.shape[1]):
            if p.starts[b, t]:
                state = torch.zeros_like(state)
            if p.mask[b, t]:
                u = leaves["inputs"][b, t]
                if module is None:
                    state = by_formula(p, weight, bias, u, state)
                else:
                    given = tuple(state[:, None, None]) if p.cell == "lstm" else state[:, None]
                    _, last = module(u.view(1, 1, -1), given)
                    state = torch.cat(last if p.cell == "lstm" else (last,))[:, 0]
            rows.append(state if p.cell == "kru" else state[0])
        states.append(torch.stack(rows))
        finals.append(state)
    outputs = {"states": torch.stack(states), "final_state": torch.stack(finals)}
    loss = (outputs["states"] * p.d_states).sum() + (outputs["final_state"] * p.d_final).sum()
    wanted = leaves | {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    found = {name: value.detach() for name, value in outputs.items()}
    if module is None:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        return found | dict(zip(wanted, grads, strict=True))
    grads = torch.autograd.grad(loss, [leaves["inputs"], leaves["initial_state"], *module.parameters()])
    _, d_weight, d_bias, d_inner = grads[2:]
    d_bias = d_bias.view(weight.shape[:2])
    if p.cell == "gru":
        d_bias = torch.cat((d_bias, d_inner.view(3, -1)[2:]))
    by_factor = torch.autograd.grad(weight, factors, d_weight.view_as(weight))
    found |= {"inputs": grads[0], "initial_state": grads[1], "bias": d_bias}
    return found | {f"factors[{index}]": grad for index, grad in enumerate(by_factor)}


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("cell", "activation"), CASES)
def test_the_definition_is_the_dense_cell(cell, activation, terms):
    p = problem(cell, SHAPES, 3, 6, terms=terms, masked=True, starts=True, activation=activation, seed=5)
    expected = oracle(p)
    for engine in ("reference", "portable"):
        assert_close(run(p, engine), expected)


@pytest.mark.parametrize("terms", [2, 3])
def test_the_penalty_of_a_sum_is_that_of_the_dense_matrix(terms):
    p = problem("kru", [(3, 3), (2, 2), (4, 4)], terms=terms)
    factors = [factor.requires_grad_() for factor in p.factors]
    dense = torch.complex(*kron_dense(factors))
    residual = dense.mH @ dense - torch.eye(24)
    expected = residual.abs().square().sum()
    found = unitary_penalty(factors)
    assert math.isclose(found.item(), expected.item(), rel_tol=DENSE_TOLERANCE)
    for a, b in zip(torch.autograd.grad(found, factors), torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(a, b, rtol=DENSE_TOLERANCE, atol=DENSE_TOLERANCE)


@pytest.mark.parametrize("terms", [1, 3])
def test_the_spectral_norm_is_that_of_the_dense_matrix(terms):
    factors = problem("kru", [(3, 3), (4, 4)], terms=terms).factors
    expected = torch.linalg.matrix_norm(torch.complex(*kron_dense(factors)), 2)
    assert spectral_norm(factors).item() == pytest.approx(expected.item(), rel=1e-3)  # by iteration for a sum
