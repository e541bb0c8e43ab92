"""Numbers at the ends of float32, infinities and NaN: every engine and vector width as the definition has it."""

import math

import fuzz_native
import pytest
import torch
from helpers import assert_near
from problems import CASES, problem, run

from kru_hf import kron_scan, scan_cpu
from kru_hf.cells import CELLS
from kru_hf.scan import unavailable_reason

ENGINES = ["reference", "portable", *(f"cpu {width}" for width in fuzz_native.WIDTHS)]
EYE = [torch.stack((torch.eye(n), torch.zeros(n, n))) for n in (4, 5)]  # W = I with N = 20
UNIT = torch.tensor([0.6, -0.8])  # a phase, exactly 1 long


@pytest.fixture(params=ENGINES)
def backend(request, monkeypatch):
    """Each engine, the native one at each vector width."""
    name, _, width = request.param.partition(" ")
    if width:
        monkeypatch.setattr(scan_cpu, "_lanes", int(width))
    return name


def step(size, b, backend):
    """h, dz and db of one step from zero with z = size · (0.6 − 0.8i) in every unit and the gradient 1 − 2i of h."""
    z = (size * UNIT.double()).float()[None, None, :, None].repeat(1, 1, 1, 20).requires_grad_()
    bias = torch.full((20,), b, requires_grad=True)
    states, _ = kron_scan(z, EYE, bias, backend=backend)
    states.backward(torch.tensor([1.0, -2.0])[:, None].expand_as(states))
    for tensor in (states, z.grad, bias.grad):
        # Units that fill a vector and those that do not.
        torch.testing.assert_close(tensor, tensor[..., :1].expand_as(tensor), rtol=0, atol=0, equal_nan=True)
    return states[0, 0, :, 0].detach().double(), z.grad[0, 0, :, 0].double(), bias.grad[0].double()


@pytest.mark.parametrize(
    ("size", "b"),
    [
        *((size, b) for size in (1e15, 1.7e19, 1.9e19, 1e25, 3.3e38) for b in (0.0, -0.1, 0.5)),
        *((size, -size / 2) for size in (1e-30, 1e-21, 1e15, 1e25, 3.3e38)),
        *((size, size) for size in (1e-30, 1e-21, 1e15, 1e25, 1.6e38)),
        *((size, 0.0) for size in (1e-36, 1e-30, 1e-21, 1e-12)),
    ],
)
def test_modrelu_over_the_whole_range(size, b, backend):
    state, d_z, d_b = step(size, b, backend)
    unit = UNIT.double()
    assert_near(state / (size + b), unit, 1e-5)
    along = unit[0] - 2 * unit[1]
    tangent = torch.tensor([1.0, -2.0]).double() - along * unit
    assert_near(d_z, along * unit + (1 + b / size) * tangent, 1e-5)
    assert_near(d_b, along, 1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e-21, 1e-18])
def test_a_small_z_is_lifted_to_the_bias(size, backend):
    """b > 0: h is b long in the direction of z, and the gradient is b/|z| across it."""
    state, d_z, d_b = step(size, 0.5, backend)
    unit = UNIT.double()
    assert_near(state, 0.5 * unit, 1e-5)
    along = unit[0] - 2 * unit[1]
    assert_near(d_z * size, 0.5 * (torch.tensor([1.0, -2.0]).double() - along * unit), 1e-5)
    assert_near(d_b, along, 1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_a_bias_that_is_no_number_gives_none(size, backend):
    state, _, _ = step(size, math.nan, backend)
    assert state.isnan().all()
    assert step(size, -math.inf, backend)[0].tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_what_is_beyond_float32_is_nan_in_both_planes(value, backend):
    """For 3.4e38 in both planes it is |z| that is."""
    inputs = torch.ones(1, 1, 2, 20)
    inputs[0, 0, 0, 7] = value
    inputs[0, 0, 1, 7] = 3.4e38 if value == 3.4e38 else 1
    states, _ = kron_scan(inputs, EYE, torch.zeros(20), backend=backend)
    expected = torch.zeros(20, dtype=torch.bool)
    expected[7] = True
    assert torch.equal(states.isnan()[0, 0], expected.expand(2, -1)) and states[..., ~expected].isfinite().all()


@pytest.mark.parametrize("argument", ["inputs", "bias", "initial_state", "factors[0]", "factors[1]"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("cell", "activation"), CASES)
def test_one_number_that_is_none(cell, activation, value, argument, backend):
    """In each argument: states NaN, infinite and finite in the places of the definition, gradients finite in them."""
    if activation == "identity" and argument == "bias":
        return
    if unavailable_reason(backend, CELLS[cell]) is not None:
        pytest.skip("the engine has not this cell")
    p = problem(cell, [(3, 2), (4, 6)], 3, 4, activation=activation, seed=1)
    p = p.but(mask=torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]]).bool())
    given = vars(p) | {f"factors[{index}]": factor for index, factor in enumerate(p.factors)}
    given[argument].view(-1)[5] = value
    assert not fuzz_native.faults(run(p, backend, torch.float32), run(p, "reference", torch.float32))


@pytest.mark.parametrize("seed", range(0, 200, 40))
def test_drawn_calls(seed):
    """A small part of what ``tests/fuzz_native.py`` runs."""
    assert not {s: faults for s in range(seed, seed + 40) if (faults := fuzz_native.check(s))}


@pytest.mark.parametrize(
    "seed",
    [
        6860,  # held steps and factors that are not finite
        4919,  # held steps and a bias that is infinite, of the cell with peepholes
        3247,  # a gate closed by an infinite cell: 0 times infinity is NaN
        7180,  # the same by an infinite bias
    ],
)
def test_drawn_calls_that_once_failed(seed):
    assert fuzz_native.check(seed) == []
