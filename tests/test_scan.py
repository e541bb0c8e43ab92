"""The recurrence: the torch engine against the definition, both against finite differences, and the contract."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import RELATIVE, assert_near, random_problem, run_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from kru_hf.scan_torch import kru_scan_torch

from kru_hf import kron_dense, kru_scan, random_unitary
from kru_hf.scan_reference import kru_scan_reference

ENGINES = pytest.mark.parametrize("engine", [kru_scan_reference, kru_scan_torch], ids=["reference", "torch"])
SHAPES = [
    [(2, 2)],
    [(3, 5), (5, 3)],
    [(2, 2), (3, 3), (2, 2)],
    [(7, 7)],
    [(1, 6), (2, 2), (6, 1)],
    [(2, 2)] * 4,
    [(1, 1)],
]
LONG = 20_000


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 5),
    st.sampled_from([1, 2, 15, 16, 17, 33]),
    st.booleans(),
    st.sampled_from(["modrelu", "identity"]),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_torch_engine_is_the_definition(shapes, batch, length, masked, activation, seed):
    problem = random_problem(shapes, batch, length, seed=seed, dtype=torch.float64, masked=masked)
    expected = run_engine(kru_scan_reference, problem, activation=activation)
    actual = run_engine(kru_scan_torch, problem, activation=activation)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, RELATIVE[torch.float64])


@pytest.mark.parametrize("shapes", SHAPES)
def test_float32_is_the_definition(shapes):
    problem = random_problem(shapes, 3, 20, masked=True)
    for a, b in zip(run_engine(kru_scan_torch, problem), run_engine(kru_scan_reference, problem), strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, RELATIVE[torch.float32])


def test_reference_by_hand():
    """One step with the dense matrix and the formula of modReLU, written out."""
    problem = random_problem([(3, 2), (2, 3)], 2, 1, dtype=torch.float64)
    dense = torch.complex(*kron_dense(problem.factors))
    h = torch.complex(problem.initial[:, 0], problem.initial[:, 1])
    z = h @ dense.mT + torch.complex(problem.inputs[:, 0, 0], problem.inputs[:, 0, 1])
    scale = torch.where(z.abs() > 0, (z.abs() + problem.bias).clamp(min=0) / z.abs(), 0)
    expected = scale * z
    states, final = kru_scan_reference(problem.inputs, problem.factors, problem.bias, problem.initial)
    assert_near(final, torch.stack((expected.real, expected.imag), 1), RELATIVE[torch.float64])
    assert torch.equal(states[:, 0], final)


@ENGINES
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(engine, masked):
    problem = random_problem([(2, 3), (3, 2)], 2, 4, seed=3, dtype=torch.float64, masked=masked)
    # Away from z = 0, where modReLU has a kink and finite differences mean nothing.
    with torch.no_grad():
        problem.inputs += 2
        problem.initial += 2

    def function(inputs, bias, initial, *factors):
        return engine(inputs, list(factors), bias, initial, problem.mask)

    assert torch.autograd.gradcheck(function, problem.leaves())


@ENGINES
def test_exact_zero_stays_zero_with_zero_gradient(engine):
    problem = random_problem([(2, 2), (2, 2)], 1, 3)
    with torch.no_grad():
        problem.inputs.zero_()
        problem.initial.zero_()
        problem.bias.fill_(0.5)  # positive: the scale would be infinite
    states, final, *grads = run_engine(engine, problem)
    assert not states.any() and not final.any()
    assert all(not grad.any() for grad in grads)


@ENGINES
def test_final_state_is_a_copy(engine):
    problem = random_problem([(2, 2)], 2, 3)
    states, final = engine(problem.inputs.detach(), problem.factors, problem.bias)
    before = final.detach().clone()
    states.detach().zero_()
    assert torch.equal(final, before)


@ENGINES
def test_nan_is_carried(engine):
    problem = random_problem([(2, 2)], 2, 4)
    with torch.no_grad():
        problem.inputs[1, 1, 0, 0] = math.nan
    states, final, *grads = run_engine(engine, problem)
    assert states[1, 1:].isnan().any(-1).any(-1).all() and final[1].isnan().any()
    assert not states[0].isnan().any()
    assert grads[-1].isnan().any()


@ENGINES
def test_masked_steps_hold_the_state_whatever_the_input(engine):
    problem = random_problem([(2, 2), (3, 3)], 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    garbage = torch.where(mask[..., None, None], problem.inputs, 1e30)
    states, final = engine(garbage, problem.factors, problem.bias, problem.initial, mask)
    alone, end = engine(problem.inputs[:1, mask[0]], problem.factors, problem.bias, problem.initial[:1])
    assert_near(final[:1], end, RELATIVE[torch.float32])
    assert torch.equal(states[0, 1], problem.initial[0]) and torch.equal(states[0, 4], states[0, 3])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_what_is_masked_has_no_gradient_and_spoils_none(backend):
    problem = random_problem([(2, 2), (3, 3)], 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]).bool()
    expected = run_engine(kru_scan, dataclasses.replace(problem, mask=mask), backend=backend)
    garbage = torch.where(mask[..., None, None], problem.inputs, torch.nan).detach().requires_grad_()
    found = run_engine(kru_scan, dataclasses.replace(problem, mask=mask, inputs=garbage), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-21, 1e-12])
def test_no_gradient_where_a_small_z_is_silenced(size, backend):
    """b / |z|² is beyond float32 there."""
    inputs = torch.full((1, 1, 2, 4), size, requires_grad=True)
    states, _ = kru_scan(inputs, [random_unitary(4, 4)], torch.full((4,), -0.1), backend=backend)
    states.sum().backward()
    assert not states.any() and torch.equal(inputs.grad, torch.zeros_like(inputs))


@ENGINES
def test_two_halves_are_the_whole(engine):
    problem = random_problem([(2, 2), (3, 3)], 2, 8)
    states, final = engine(problem.inputs, problem.factors, problem.bias, problem.initial)
    first, middle = engine(problem.inputs[:, :3], problem.factors, problem.bias, problem.initial)
    second, end = engine(problem.inputs[:, 3:], problem.factors, problem.bias, middle)
    assert_near(torch.cat((first, second), 1), states, RELATIVE[torch.float32])
    whole = torch.autograd.grad(final.sum(), problem.leaves())
    halves = torch.autograd.grad(end.sum(), problem.leaves())
    for a, b in zip(halves, whole, strict=True):
        assert_near(a, b, RELATIVE[torch.float32])


def test_long_sequence_stays_near_float64():
    """Norm ≤ 1 and b ≤ 0: no step expands, so that rounding errors add up at most."""
    torch.manual_seed(0)
    factors = [0.99 * random_unitary(2, 2), random_unitary(3, 3)]
    inputs, bias = 0.1 * torch.randn(1, LONG, 2, 6), -0.01 * torch.rand(6)
    with torch.no_grad():
        states, _ = kru_scan_torch(inputs, factors, bias)
        exact, _ = kru_scan_torch(inputs.double(), [f.double() for f in factors], bias.double())
    assert_near(states.double(), exact, RELATIVE[torch.float32])


def test_torch_engine_keeps_no_graph_over_time():
    """Nodes of the graph and the bytes saved for backward, beside inputs and states, do not grow with T."""

    def cost(length):
        problem = random_problem([(2, 2)] * 4, 2, length)
        saved = {}

        def pack(tensor):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states, _ = kru_scan_torch(problem.inputs, problem.factors, problem.bias, problem.initial)
        seen, todo = set(), [states.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen), sum(saved.values()) - 2 * problem.inputs.numel()

    assert cost(5) == cost(50)


def test_dispatch_agrees_and_inputs_stay():
    problem = random_problem([(2, 2), (3, 3)], 3, 5, masked=True)
    before = [tensor.detach().clone() for tensor in problem.leaves()]
    expected = run_engine(kru_scan_reference, problem)
    for backend in ("auto", "torch", "reference"):
        for a, b in zip(run_engine(kru_scan, problem, backend=backend), expected, strict=True):
            assert_near(a, b, RELATIVE[torch.float32])
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(problem.leaves(), before))


GOOD = {"inputs": (2, 3, 2, 6), "factors": [(2, 2, 2), (2, 3, 3)], "bias": (6,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": (2, 3, 6)}, r"inputs must have the shape"),
        ({"inputs": (2, 0, 2, 6)}, r"no empty axis"),
        ({"factors": [(2, 2, 2)]}, r"multiply to 2x2, but the inputs have N = 6"),
        ({"factors": [(2, 2)]}, r"factors\[0\] must have the shape"),
        ({"factors": []}, r"at least one"),
        ({"bias": (5,)}, r"bias must have the shape \(6,\), got \(5,\)"),
        ({"initial_state": (1, 2, 6)}, r"initial_state must have the shape"),
        ({"mask": (2, 3)}, r"mask must be a bool tensor"),
        ({"activation": "relu"}, r"activation must be one of"),
        ({"backend": "cuda"}, r"backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {}
    for name, value in (GOOD | change).items():
        if isinstance(value, list):
            arguments[name] = [torch.zeros(shape) for shape in value]
        else:
            arguments[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        kru_scan(**arguments)


def test_bad_dtype_is_named():
    with pytest.raises(TypeError, match="bfloat16"):
        kru_scan(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), [torch.zeros(2, 2, 2)], torch.zeros(2))
    with pytest.raises(TypeError, match="bias must be torch.float32"):
        kru_scan(torch.zeros(1, 1, 2, 2), [torch.zeros(2, 2, 2)], torch.zeros(2, dtype=torch.float64))
