"""The native CPU engine against the definition in float64: states, final state and every gradient."""

import _thread
import copy
import math
import os
import pathlib
import sys
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf import scan_checks, scan_cpu, transforms
from kru_hf.scan_cpu import kru_scan_cpu
from kru_hf.scan_reference import kru_scan_reference

pytestmark = pytest.mark.skipif(
    not scan_cpu.is_available(), reason=f"the native CPU engine is not built: {scan_cpu.unavailable_reason()}"
)

# Relative error in norm of float32 against the same computation in float64. Gradients at b > 0 contain the phase z/|z|
# of small |z|, which float32 knows less well.
STATE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE_POSITIVE_BIAS = 5e-4

LANES = [lanes for lanes in (4, 8, 16) if scan_cpu.is_available() and lanes <= scan_cpu._library.kru_lanes()]


@pytest.fixture(params=LANES, ids=lambda lanes: f"lanes{lanes}")
def lanes(request, monkeypatch):
    """Every vector width that this processor has."""
    monkeypatch.setattr(scan_cpu, "_lanes", request.param)
    return request.param


def make_case(shapes, batch, length, *, bias_mean=-0.1, initial=True, mask=False, zeros=True, seed=0):
    """Double-precision tensors that are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    units = math.prod(rows for rows, _ in shapes)

    def randn(*size):
        return torch.randn(*size, generator=generator).double()

    inputs = randn(batch, length, 2, units)  # (B, T, 2, N)
    if zeros:
        inputs[:, ::3] = 0  # blank pixels: z is exactly zero where the state is too
    return {
        "inputs": inputs,
        "factors": [
            (randn(2, rows, columns) * 0.9 / (2 * columns) ** 0.5).float().double() for rows, columns in shapes
        ],
        "bias": (0.1 * randn(units) + bias_mean).float().double(),  # (N,)
        "initial_state": randn(batch, 2, units) if initial else None,  # (B, 2, N)
        "mask": torch.rand(batch, length, generator=generator) > 0.3 if mask else None,  # (B, T)
        "d_states": randn(batch, length, 2, units),
        "d_final": randn(batch, 2, units),
    }


def evaluate(engine, case, dtype, activation="modrelu"):
    """Outputs and gradients by name, for random cotangents on both outputs."""
    leaves = {
        name: None if case[name] is None else case[name].to(dtype).requires_grad_()
        for name in ("inputs", "bias", "initial_state")
    }
    factors = [factor.to(dtype).requires_grad_() for factor in case["factors"]]
    states, final_state = engine(
        leaves["inputs"], factors, leaves["bias"], leaves["initial_state"], case["mask"], activation=activation
    )
    loss = (states * case["d_states"].to(dtype)).sum() + (final_state * case["d_final"].to(dtype)).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    wanted |= {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
    return {"states": states.detach(), "final_state": final_state.detach()} | dict(zip(wanted, grads, strict=True))


def assert_equal(case, activation="modrelu", engine=kru_scan_cpu):
    expected = evaluate(kru_scan_reference, case, torch.float64, activation)
    actual = evaluate(engine, case, torch.float32, activation)
    positive = activation == "modrelu" and bool((case["bias"] > 0).any())
    for name, want in expected.items():
        tolerance = GRADIENT_TOLERANCE_POSITIVE_BIAS if positive else GRADIENT_TOLERANCE
        tolerance = STATE_TOLERANCE if name in ("states", "final_state") else tolerance
        error, scale = (actual[name].double() - want).norm().item(), want.norm().item()
        if name == "bias" and want.numel() == 1:
            # One number, a sum over steps that can cancel to less than the rounding of its terms, which are as large as
            # the gradients of the inputs.
            scale = max(scale, expected["inputs"].norm().item())
        assert error <= tolerance * (scale + 1e-3), f"{name}: error {error}, scale {scale}"


SHAPES = {
    "2x2 nine times": [(2, 2)] * 9,
    "7·8·9": [(7, 7), (8, 8), (9, 9)],
    "8·8·8": [(8, 8)] * 3,
    "16·32": [(16, 16), (32, 32)],
    "3·5·32": [(3, 3), (5, 5), (32, 32)],
    "10·11": [(10, 10), (11, 11)],
    "3·137": [(3, 3), (137, 137)],
    "137·3": [(137, 137), (3, 3)],
    "one dense": [(45, 45)],
    "rectangular": [(2, 3), (3, 2), (5, 5)],
    "rectangular, growing first": [(4, 2), (2, 4), (6, 3), (3, 6)],
    "with 1x1": [(1, 1), (5, 5), (1, 1)],
    "scalar": [(1, 1)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("bias_mean", [-0.1, 0.2], ids=["b<=0", "b>0"])
def test_equals_reference(shapes, bias_mean, lanes):
    case = make_case(shapes, 5, 6, bias_mean=bias_mean, mask=True)
    if bias_mean < 0:
        case["bias"].clamp_(max=0)
    assert_equal(case)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    swap=st.booleans(),
    batch=st.integers(1, 9),
    length=st.integers(1, 5),
    bias_mean=st.sampled_from([-0.3, -0.1, 0.0]),
    initial=st.booleans(),
    mask=st.booleans(),
    activation=st.sampled_from(["modrelu", "identity"]),
    lanes=st.sampled_from(LANES or [4]),
    seed=st.integers(0, 2**31),
)
def test_equals_reference_everywhere(sizes, swap, batch, length, bias_mean, initial, mask, activation, lanes, seed):
    columns = sizes[1:] + sizes[:1] if swap else sizes  # the same product: rectangular factors
    shapes = list(zip(sizes, columns, strict=True))
    case = make_case(shapes, batch, length, bias_mean=bias_mean, initial=initial, mask=mask, seed=seed)
    case["bias"].clamp_(max=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_cpu, "_lanes", lanes)
        assert_equal(case, activation)


def test_many_steps_stay_close():
    """T = 20,000 with ‖W‖ ≤ 1 and b ≤ 0: errors do not grow."""
    case = make_case([(2, 2)] * 4, 1, 20_000, zeros=False)
    case["factors"] = [factor / torch.linalg.matrix_norm(torch.complex(*factor), 2) for factor in case["factors"]]
    case["bias"] = -case["bias"].abs()
    arguments = [case["inputs"] * 0.1, case["factors"], case["bias"]]
    expected, _ = kru_scan_reference(*arguments)
    actual, _ = kru_scan_cpu(arguments[0].float(), [factor.float() for factor in arguments[1]], arguments[2].float())
    error = (actual - expected).norm() / expected.norm()
    assert error <= STATE_TOLERANCE


def test_final_state_is_a_copy_and_initial_state_is_untouched():
    case = make_case([(4, 4), (4, 4)], 2, 3)
    inputs, initial = case["inputs"].float(), case["initial_state"].float()
    kept = initial.clone()
    states, final = kru_scan_cpu(inputs, [f.float() for f in case["factors"]], case["bias"].float(), initial)
    assert torch.equal(final, states[:, -1])
    final.zero_()
    assert states[:, -1].abs().sum() > 0
    assert torch.equal(initial, kept)


def test_strided_arguments():
    """Inputs, factors, states' gradients that are views with other strides."""
    case = make_case([(3, 3), (6, 6)], 3, 4, mask=True)
    strided = copy.copy(case)
    strided["inputs"] = case["inputs"].transpose(0, 3).contiguous().transpose(0, 3)
    strided["factors"] = [factor.mT.contiguous().mT for factor in case["factors"]]
    strided["mask"] = case["mask"].T.contiguous().T
    expected, actual = (evaluate(kru_scan_cpu, c, torch.float32) for c in (case, strided))
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


def test_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    case = make_case([(2, 2)] * 6, 13, 7, mask=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(evaluate(kru_scan_cpu, case, torch.float32))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, want in results[0].items():
            assert torch.equal(other[name], want), name


@pytest.mark.parametrize("possible", [0, 1])
@pytest.mark.parametrize("wait_from", [0, math.inf], ids=["the caller waits", "the caller takes part"])
def test_fewer_threads_than_wanted(possible, wait_from, monkeypatch):
    """The process may start no more threads: the call runs on those that there are."""
    case = make_case([(2, 2)] * 6, 13, 7, mask=True)
    expected = evaluate(kru_scan_cpu, case, torch.float32)
    start, started = _thread.start_new_thread, []

    def refuse(*arguments):
        if len(started) == possible:
            raise RuntimeError("can't start new thread")
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    monkeypatch.setattr(scan_cpu, "_workers", [])
    monkeypatch.setattr(scan_cpu, "_jobs", SimpleQueue())
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    monkeypatch.setattr(scan_cpu, "WAIT_FROM", wait_from)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = evaluate(kru_scan_cpu, case, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert len(started) == possible
    assert all(torch.equal(found[name], want) for name, want in expected.items())


def test_gradient_of_one_output_alone():
    case = make_case([(4, 4), (3, 3)], 2, 5)
    for name in ("d_states", "d_final"):
        one = dict(case, **{name: torch.zeros_like(case[name])})
        assert_equal(one)
    inputs = case["inputs"].float().requires_grad_()
    factors, bias = [f.float() for f in case["factors"]], case["bias"].float()
    _, final = kru_scan_cpu(inputs, factors, bias)
    (alone,) = torch.autograd.grad(final.sum(), inputs)
    reference = case["inputs"].clone().requires_grad_()
    _, final = kru_scan_reference(reference, case["factors"], case["bias"])
    (want,) = torch.autograd.grad(final.sum(), reference)
    assert (alone - want).norm() <= GRADIENT_TOLERANCE * want.norm()


def test_nan_in_gives_nan_out(lanes):
    case = make_case([(2, 2)] * 5, 2, 4)
    inputs = case["inputs"].float()
    inputs[0, 1, 0, 7] = float("nan")
    states, final = kru_scan_cpu(inputs, [f.float() for f in case["factors"]], case["bias"].float())
    assert states[0, 0].isfinite().all()
    assert states[0, 1, :, 7].isnan().all()
    assert final[0].isnan().all()
    assert states[1].isfinite().all()


def test_masked_steps_hide_a_nan():
    case = make_case([(2, 2)] * 5, 3, 4)
    case["mask"] = torch.tensor([[True, False, True, True]] * 3)
    case["inputs"][:, 1] = float("nan")
    actual = evaluate(kru_scan_cpu, case, torch.float32)
    for name, value in actual.items():
        assert value.isfinite().all(), name


def test_tiny_states_do_not_slow_down_or_break():
    """A decaying linear network ends in zeros, not in subnormal numbers."""
    factors = [torch.stack([0.5 * torch.eye(4), torch.zeros(4, 4)])] * 2
    inputs, initial = torch.zeros(1, 400, 2, 16), torch.ones(1, 2, 16)
    states, final = kru_scan_cpu(inputs, factors, torch.zeros(16), initial, activation="identity")
    assert final.abs().max() == 0
    assert states.isfinite().all()
    assert torch.tensor(1e-39) * 1 != 0  # the caller's own floating-point mode is as before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_the_scan_after_its_parent(monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    case = make_case([(2, 2)] * 5, 6, 5)
    expected = evaluate(kru_scan_cpu, case, torch.float32)
    assert scan_cpu._workers
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        inputs = case["inputs"].float()
        states, _ = kru_scan_cpu(
            inputs, [f.float() for f in case["factors"]], case["bias"].float(), case["initial_state"].float()
        )
        os._exit(0 if torch.equal(states, expected["states"]) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("initial", [False, True])
def test_opcheck(initial):
    case = make_case([(2, 2), (3, 3)], 2, 3, mask=initial, initial=initial)
    inputs, bias = case["inputs"].float().requires_grad_(), case["bias"].float().requires_grad_()
    factors = [factor.float().requires_grad_() for factor in case["factors"]]
    state = case["initial_state"].float().requires_grad_() if initial else None
    torch.library.opcheck(scan_cpu._scan_op, (inputs, factors, bias, state, case["mask"], True))


def test_compiles_without_a_break():
    case = make_case([(2, 2), (3, 3)], 2, 3, mask=True)
    compiled = torch.compile(kru_scan_cpu, backend="aot_eager", fullgraph=True)
    assert_equal(case, engine=compiled)


def test_supports_says_why_not():
    factors = [torch.zeros(2, 2, 2)]
    assert scan_cpu.supports(torch.zeros(1, 1, 2, 2), factors) is None
    assert "float64" in scan_cpu.supports(torch.zeros(1, 1, 2, 2, dtype=torch.float64), factors)
    assert "65 factors" in scan_cpu.supports(torch.zeros(1, 1, 2, 2), factors * 65)
    assert "meta" in scan_cpu.supports(torch.zeros(1, 1, 2, 2, device="meta"), factors)


def test_pushed_copy_registers_no_operator(tmp_path, monkeypatch):
    """A copy of the files outside the package finds the library, gives the same bits and leaves torch.ops alone."""
    folder = tmp_path / "pushed_model_code"
    folder.mkdir()
    for module in (scan_checks, scan_cpu, transforms):
        source = pathlib.Path(module.__file__)
        folder.joinpath(source.name).write_text(source.read_text())
    monkeypatch.syspath_prepend(str(folder.parent))
    import pushed_model_code.scan_cpu as pushed

    for name in ("scan_checks", "scan_cpu", "transforms"):
        monkeypatch.delitem(sys.modules, f"pushed_model_code.{name}")
    assert pushed.is_available()
    assert not hasattr(pushed, "_scan_op")
    case = make_case([(2, 2)] * 5, 2, 3, mask=True)
    expected = evaluate(kru_scan_cpu, case, torch.float32)
    for name, value in evaluate(pushed.kru_scan_cpu, case, torch.float32).items():
        assert torch.equal(value, expected[name]), name
