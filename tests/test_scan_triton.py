"""The Triton engine against the definition in float64: states, final state and every gradient.

TRITON_INTERPRET=1 must be set before the kernels are defined, so without a GPU one test runs this file again in a
process of its own, where Triton's interpreter executes the kernels on the CPU.
"""

import importlib
import math
import os
import subprocess
import sys
import types

import fuzz_native
import pytest
import torch

from kru_hf import scan_triton
from kru_hf.kronecker import kron_apply
from kru_hf.scan_reference import kru_scan_reference
from kru_hf.scan_triton import kru_scan_triton, plan_groups

pytest.importorskip("triton")

# Relative error in norm of float32 against the same computation in float64. Gradients at b > 0 contain the phase z/|z|
# of small |z|, which float32 knows less well.
STATE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE_POSITIVE_BIAS = 5e-4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not scan_triton.is_available(), reason="test_in_the_interpreter runs it in a process of its own"
)


def make_case(shapes, batch, length, *, bias_mean=-0.1, initial=True, mask=False, seed=0):
    """Double-precision tensors that are exact in float32; every third input is exactly zero, as blank pixels are."""
    generator = torch.Generator().manual_seed(seed)
    units = math.prod(rows for rows, _ in shapes)

    def randn(*size):
        return torch.randn(*size, generator=generator).double()

    inputs = randn(batch, length, 2, units)  # (B, T, 2, N)
    inputs[:, ::3] = 0
    return {
        "inputs": inputs,
        "factors": [(randn(2, p, q) * 0.9 / (2 * q) ** 0.5).float().double() for p, q in shapes],
        "bias": (0.1 * randn(units) + bias_mean).float().double(),  # (N,)
        "initial_state": randn(batch, 2, units) if initial else None,  # (B, 2, N)
        "mask": torch.rand(batch, length, generator=generator) > 0.3 if mask else None,  # (B, T)
        "d_states": randn(batch, length, 2, units),
        "d_final": randn(batch, 2, units),
    }


def evaluate(engine, case, dtype, activation, device="cpu"):
    """Outputs and gradients by name, for random cotangents on both outputs."""
    leaves = {
        name: None if case[name] is None else case[name].to(device, dtype).requires_grad_()
        for name in ("inputs", "bias", "initial_state")
    }
    factors = [factor.to(device, dtype).requires_grad_() for factor in case["factors"]]
    mask = None if case["mask"] is None else case["mask"].to(device)
    states, final = engine(
        leaves["inputs"], factors, leaves["bias"], leaves["initial_state"], mask, activation=activation
    )
    loss = (states * case["d_states"].to(states)).sum() + (final * case["d_final"].to(final)).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    wanted |= {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
    return {"states": states.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def assert_equal(case, activation="modrelu"):
    expected = evaluate(kru_scan_reference, case, torch.float64, activation)
    actual = evaluate(kru_scan_triton, case, torch.float32, activation, DEVICE)
    positive = activation == "modrelu" and bool((case["bias"] > 0).any())
    for name, want in expected.items():
        tolerance = GRADIENT_TOLERANCE_POSITIVE_BIAS if positive else GRADIENT_TOLERANCE
        tolerance = STATE_TOLERANCE if name in ("states", "final_state") else tolerance
        error = (actual[name].cpu().double() - want).norm().item()
        assert error <= tolerance * (want.norm().item() + 1e-3), f"{name}: error {error}, norm {want.norm()}"


@pytest.mark.skipif(scan_triton.is_available(), reason="the kernels run in this process")
def test_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", os.path.abspath(__file__)],
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.skipif(scan_triton.is_available(), reason="the kernels run in this process")
def test_says_why_it_cannot_run():
    assert "no GPU" in scan_triton.unavailable_reason()
    with pytest.raises(RuntimeError, match="no GPU"):
        kru_scan_triton(torch.zeros(1, 1, 2, 4), [torch.zeros(2, 4, 4)], torch.zeros(4))


SHAPES = {
    "2x2 nine times": [(2, 2)] * 9,
    "7·8·9": [(7, 7), (8, 8), (9, 9)],
    "3·5": [(3, 3), (5, 5)],
    "one dense": [(45, 45)],
    "rectangular": [(2, 3), (3, 2), (5, 5)],
    "rectangular, growing first": [(4, 2), (2, 4), (6, 3), (1, 2)],
    "with 1x1": [(1, 1), (5, 5), (1, 1)],
    "scalar": [(1, 1)],
}


@runs_kernels
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("bias_mean", [-0.1, 0.2], ids=["b<=0", "b>0"])
def test_equals_reference(shapes, bias_mean):
    case = make_case(shapes, 3, 5, bias_mean=bias_mean, mask=True)
    if bias_mean < 0:
        case["bias"].clamp_(max=0)
    assert_equal(case)


@runs_kernels
@pytest.mark.parametrize("activation", ["modrelu", "identity"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_options(activation, length, initial, mask):
    assert_equal(make_case([(3, 3), (4, 4)], 2, length, initial=initial, mask=mask, seed=1), activation)


@runs_kernels
def test_strided_inputs_and_repeatable():
    case = make_case([(3, 3), (4, 4)], 2, 5)
    case["inputs"] = case["inputs"].transpose(2, 3).contiguous().transpose(2, 3)
    assert_equal(case)
    first, second = (evaluate(kru_scan_triton, case, torch.float32, "modrelu", DEVICE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@runs_kernels
def test_nan_stays_in_its_sample():
    case = make_case([(3, 3), (4, 4)], 2, 5)
    case["inputs"][1, 2, 0, 3] = math.nan
    result = evaluate(kru_scan_triton, case, torch.float32, "modrelu", DEVICE)
    assert result["states"][1, 3:].isnan().all()
    assert not result["states"][0].isnan().any()
    assert result["bias"].isnan().any() or result["factors[0]"].isnan().any()


@runs_kernels
def test_a_state_whose_square_is_beyond_float32_is_not_silenced():
    """A run that diverges has to be seen to: a zero with the gradient zero would look like one that goes on."""
    inputs = torch.full((1, 1, 2, 12), 1e30, device=DEVICE, requires_grad=True)
    factors = [torch.zeros(2, 3, 3, device=DEVICE), torch.zeros(2, 4, 4, device=DEVICE)]
    states, _ = kru_scan_triton(inputs, factors, torch.full((12,), -0.1, device=DEVICE))
    states.sum().backward()
    assert states.all() and inputs.grad.all()


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="draws calls on the CPU")
def test_drawn_calls():
    """Numbers of every size, infinities, NaN and layouts, against the definition: see ``fuzz_native``."""
    assert not {seed: faults for seed in range(40) if (faults := fuzz_native.check(seed))}


@runs_kernels
def test_operator_is_registered_correctly():
    case = make_case([(3, 3), (4, 4)], 2, 3, mask=True)
    tensors = [case["inputs"], *case["factors"], case["bias"], case["initial_state"]]
    arguments = [tensor.to(DEVICE, torch.float32).requires_grad_() for tensor in tensors]
    torch.library.opcheck(scan_triton._scan_op, (*arguments, case["mask"].to(DEVICE), True, True, "fp32"))


@runs_kernels
def test_code_loaded_from_a_model_repository(monkeypatch):
    """Under another package name, nothing is registered with torch and the gradients are the same."""
    package = types.ModuleType("pushed")
    package.__path__ = [os.path.dirname(scan_triton.__file__)]
    monkeypatch.setitem(sys.modules, "pushed", package)
    pushed = importlib.import_module("pushed.scan_triton")
    assert not hasattr(pushed, "_scan_op")
    case = make_case([(3, 3), (4, 4)], 2, 3, mask=True)
    here = evaluate(kru_scan_triton, case, torch.float32, "modrelu", DEVICE)
    there = evaluate(pushed.kru_scan_triton, case, torch.float32, "modrelu", DEVICE)
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(("batch", "length"), [(3, 7), (1, 1), (4, 300)])
def test_gradients_of_the_groups_by_torch(batch, length):
    """dA and dC of groups too large for a kernel: dW = Σ dZ h_{t-1}^H, contracted with each group by autograd."""
    rows, columns = 3, 4
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    group_a, group_c = randn(2, rows, rows).requires_grad_(), randn(2, columns, columns).requires_grad_()
    d_inputs, states = randn(batch, length, 2, 12), randn(batch, length, 2, 12)
    initial = randn(batch, 2, 12)
    before = torch.cat((initial[:, None], states[:, :-1]), 1)  # (B, T, 2, N)
    product = kron_apply([group_a, group_c], before.flatten(0, 1))  # (B·T, 2, N)
    expected = torch.autograd.grad((product * d_inputs.flatten(0, 1)).sum(), [group_a, group_c])
    actual = scan_triton.group_gradients(d_inputs, states, initial, group_a.detach(), group_c.detach())
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@runs_kernels
def test_refuses_what_does_not_fit():
    factors = [torch.zeros(2, 3, 3, device=DEVICE), torch.zeros(2, 137, 137, device=DEVICE)]
    inputs = torch.zeros(1, 1, 2, 411, device=DEVICE)
    assert "411" in scan_triton.supports(inputs, factors)
    assert "float64" in scan_triton.supports(inputs.double(), factors)
    with pytest.raises(RuntimeError, match="137x137"):
        kru_scan_triton(inputs, factors, torch.zeros(411, device=DEVICE))
    with pytest.raises(ValueError, match="bf16"):
        kru_scan_triton(inputs, factors, torch.zeros(411, device=DEVICE), precision="bf16")


@pytest.mark.parametrize(
    ("shapes", "plan"),
    [
        ([(2, 2)] * 9, (4, 16, 32)),
        ([(7, 7), (8, 8), (9, 9)], (2, 56, 9)),
        ([(16, 16), (32, 32)], (1, 16, 32)),
        ([(2, 3), (3, 2), (5, 5)], (2, 6, 5)),
        ([(4, 2), (2, 4)], (0, 1, 8)),
        ([(3, 3), (137, 137)], None),
        ([(2, 2)] * 11, (5, 32, 64)),
        ([(2, 2)] * 12, None),
    ],
)
def test_plan(shapes, plan):
    assert plan_groups(shapes) == plan
