"""Kronecker algebra against dense matrices."""

import math

import pytest
import torch
from helpers import RELATIVE, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf import kron_apply, kron_dense, plan_factor_shapes, random_unitary, unitary_penalty
from kru_hf.kronecker import apply_order, group_factors, slow_unitary, to_complex

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def random_factors(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, p, q, generator=g, dtype=torch.float64) for p, q in shapes]


@given(SHAPES, st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_apply_is_the_dense_product(shapes, batch):
    factors = random_factors(shapes)
    columns = math.prod(q for _, q in shapes)
    x = torch.randn(batch, 2, columns, dtype=torch.float64)
    dense = to_complex(kron_dense(factors), 0)
    expected = torch.complex(x[:, 0], x[:, 1]) @ dense.mT
    actual = kron_apply(factors, x)
    if batch:
        assert_near(actual, torch.stack((expected.real, expected.imag), 1), RELATIVE[torch.float64])
    assert sorted(apply_order(shapes)) == list(range(len(shapes)))


def test_factor_zero_is_the_slowest_index():
    identity = torch.stack((torch.eye(3), torch.zeros(3, 3)))
    swap = torch.zeros(2, 2, 2)
    swap[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    x = torch.zeros(2, 6)
    x[0] = torch.arange(6)
    assert kron_apply([swap, identity], x)[0].tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (1, 1)])
def test_random_unitary_has_no_penalty(shape):
    factor = random_unitary(*shape)
    assert factor.shape == (2, *shape) and factor.dtype == torch.float32
    assert unitary_penalty([factor]).item() < 1e-10


@given(st.integers(1, 6), st.floats(0.01, math.pi), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_slow_unitary_turns_no_faster_than_asked(size, max_phase, seed):
    factor = slow_unitary(size, max_phase, torch.Generator().manual_seed(seed))
    assert factor.shape == (2, size, size) and factor.dtype == torch.float32
    assert unitary_penalty([factor]).item() < 1e-10
    phases = torch.linalg.eigvals(to_complex(factor.double(), 0)).angle()  # (P,)
    assert phases.abs().max() <= max_phase + 1e-6


def test_phases_of_slow_unitaries_fill_their_range():
    factor = slow_unitary(400, 0.5, torch.Generator().manual_seed(0))
    phases = torch.linalg.eigvals(to_complex(factor.double(), 0)).angle()  # (P,)
    assert -0.5 <= phases.min() < -0.45 and 0.45 < phases.max() <= 0.5


def test_penalty_by_hand():
    factor = torch.zeros(2, 2, 2)
    factor[1] = 2 * torch.eye(2)  # W = 2i I: W^H W - I = 3 I
    assert unitary_penalty([factor, factor]).item() == 36


def test_wide_factor_has_the_gradient_of_the_definition():
    """For P < Q the penalty is that of W W^H: Q − P less than ‖W^H W − I‖², with the same gradient."""
    (factor,) = random_factors([(2, 5)])
    factor.requires_grad_()
    matrix = to_complex(factor, 0)
    residual = matrix.mH @ matrix - torch.eye(5)
    definition = torch.view_as_real(residual).square().sum()
    penalty = unitary_penalty([factor])
    assert_near(penalty + 3, definition, RELATIVE[torch.float64])
    (a,), (b,) = torch.autograd.grad(penalty, factor), torch.autograd.grad(definition, factor)
    assert_near(a, b, RELATIVE[torch.float64])


@given(st.integers(1, 3000), st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_planned_shapes_multiply_to_the_state(state_size, factor_size):
    shapes = plan_factor_shapes(state_size, factor_size)
    assert math.prod(p for p, _ in shapes) == state_size
    assert all(p == q for p, q in shapes)


def test_planned_shapes_known():
    assert plan_factor_shapes(512, 2) == [[2, 2]] * 9
    assert plan_factor_shapes(504, 8) == [[7, 7], [8, 8], [9, 9]]
    assert plan_factor_shapes(411, 3) == [[3, 3], [137, 137]]


@pytest.mark.parametrize("arguments", [(0, 2), (-4, 2), (8, 1)])
def test_plan_rejects(arguments):
    with pytest.raises(ValueError, match=r"must be at least \d, got"):
        plan_factor_shapes(*arguments)


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_groups_cover_all_factors(shapes):
    lengths = group_factors(shapes)
    assert sum(lengths) == len(shapes) and 1 <= len(lengths) <= 3 and min(lengths) >= 1
