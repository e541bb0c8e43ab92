"""The native engine of the gated cells against the definition in float64: states, final state and every gradient."""

import copy
import ctypes
import math
import os
import pathlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kru_hf import kronecker, scan_backend_report, scan_checks, scan_cpu, scan_gated_cpu, transforms
from kru_hf.scan_gated import GATED_CELLS, choose_gated_backend, kru_gated_scan, kru_gated_scan_reference
from kru_hf.scan_gated_cpu import kru_gated_scan_cpu

pytestmark = pytest.mark.skipif(
    not scan_gated_cpu.is_available(), reason=f"no native gated engine: {scan_gated_cpu.unavailable_reason()}"
)

# Relative error in norm of float32 against the same computation in float64.
STATE_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 5e-6
# Added to the norm of what is wanted. Drawn cases can be so small that a whole gradient is what cancellation among
# numbers of order 1 leaves, as in 1 - g² of a saturated gate: there the error is held as one of numbers of order 1.
FLOOR, FLOOR_OF_DRAWN = 1e-3, 1.0
# Largest relative error of sigmoid and tanh at a single argument, in units of float32's epsilon.
FUNCTION_ULPS = 3.0

CELLS = list(GATED_CELLS)
LANES = [n for n in (4, 8, 16) if scan_gated_cpu.is_available() and n <= scan_cpu._library.kru_lanes()]


@pytest.fixture(params=LANES, ids=lambda lanes: f"lanes{lanes}")
def lanes(request, monkeypatch):
    """Every vector width that this processor has."""
    monkeypatch.setattr(scan_gated_cpu, "_lanes", request.param)
    return request.param


def make_case(cell, shapes, batch, length, *, initial=True, mask=False, zeros=True, seed=0):
    """Double-precision tensors that are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    gates, rows, planes = GATED_CELLS[cell]
    units = math.prod(p for p, _ in shapes)

    def randn(*size):
        return torch.randn(*size, generator=generator).double()

    inputs = randn(batch, length, gates, units)  # (B, T, G, N)
    if zeros:
        inputs[:, ::3] = 0
    return {
        "inputs": inputs,
        "factors": [(randn(gates, p, q) / q**0.5).float().double() for p, q in shapes],
        "bias": randn(rows, units),
        "initial_state": randn(batch, planes, units) if initial else None,  # (B, S, N)
        "mask": torch.rand(batch, length, generator=generator) > 0.3 if mask else None,  # (B, T)
        "d_states": randn(batch, length, units),
        "d_final": randn(batch, planes, units),
    }


def arguments(case, dtype=torch.float32):
    """inputs, factors, bias, initial state and mask."""
    tensors = [case[name] for name in ("inputs", "bias", "initial_state")]
    inputs, bias, initial = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return inputs, [factor.to(dtype) for factor in case["factors"]], bias, initial, case["mask"]


def evaluate(engine, case, cell, dtype=torch.float32):
    """Outputs and gradients by name, for random cotangents on both outputs."""
    inputs, factors, bias, initial, mask = arguments(case, dtype)
    wanted = {"inputs": inputs, "bias": bias} | ({} if initial is None else {"initial_state": initial})
    wanted |= {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    for leaf in wanted.values():
        leaf.requires_grad_()
    states, final = engine(inputs, factors, bias, initial, mask, cell=cell)
    grads = torch.autograd.grad(
        (states, final), list(wanted.values()), (case["d_states"].to(dtype), case["d_final"].to(dtype))
    )
    return {"states": states.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def assert_equal(case, cell, engine=kru_gated_scan_cpu, floor=FLOOR):
    expected = evaluate(kru_gated_scan_reference, copy.deepcopy(case), cell, torch.float64)
    actual = evaluate(engine, case, cell)
    for name, want in expected.items():
        tolerance = STATE_TOLERANCE if name in ("states", "final_state") else GRADIENT_TOLERANCE
        error = (actual[name].double() - want).norm().item()
        assert error <= tolerance * (want.norm().item() + floor), f"{name}: error {error}, norm {want.norm()}"


SHAPES = {
    "2x2 seven times": [(2, 2)] * 7,
    "3·4·5": [(3, 3), (4, 4), (5, 5)],
    "13·11": [(13, 13), (11, 11)],
    "3·37, one that is large": [(3, 3), (37, 37)],
    "37·3": [(37, 37), (3, 3)],
    "one dense": [(45, 45)],
    "rectangular": [(2, 3), (3, 2), (5, 5)],
    "rectangular, growing first": [(4, 2), (2, 4), (6, 3), (3, 6)],
    "with 1x1": [(1, 1), (5, 5), (1, 1)],
    "scalar": [(1, 1)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cell", CELLS)
def test_equals_reference(cell, shapes, lanes):
    assert_equal(make_case(cell, shapes, 5, 4, mask=True), cell)


@settings(deadline=None, max_examples=60)
@given(
    cell=st.sampled_from(CELLS),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    swap=st.booleans(),
    batch=st.integers(1, 19),
    length=st.integers(1, 5),
    initial=st.booleans(),
    mask=st.booleans(),
    lanes=st.sampled_from(LANES or [4]),
    seed=st.integers(0, 2**31),
)
def test_equals_reference_everywhere(cell, sizes, swap, batch, length, initial, mask, lanes, seed):
    columns = sizes[1:] + sizes[:1] if swap else sizes  # the same product: rectangular factors
    case = make_case(cell, list(zip(sizes, columns, strict=True)), batch, length, initial=initial, mask=mask, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_gated_cpu, "_lanes", lanes)
        assert_equal(case, cell, floor=FLOOR_OF_DRAWN)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", range(1, 14))
def test_every_size_of_a_register_block(size, cell, lanes):
    assert_equal(make_case(cell, [(size, size), (2, 2), (size, size)], 2, 2), cell)


@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_stay_close(cell):
    """T = 3,000: errors do not grow."""
    case = make_case(cell, [(2, 2)] * 3, 1, 3_000, zeros=False)
    expected, _ = kru_gated_scan_reference(*arguments(case, torch.float64), cell=cell)
    actual, _ = kru_gated_scan_cpu(*arguments(case), cell=cell)
    assert (actual - expected).norm() <= STATE_TOLERANCE * expected.norm()


def gate(cell, values, index, others, lanes):
    """h_1 and (LSTM) c_1 of a cell without recurrence whose pre-activation of gate ``index`` runs over ``values``."""
    gates, rows, planes = GATED_CELLS[cell]
    inputs = torch.tensor(others).repeat(1, 1, len(values), 1).mT.contiguous()  # (1, 1, G, N)
    inputs[0, 0, index] = values
    initial = torch.ones(1, planes, len(values))
    factors = [torch.zeros(gates, len(values), len(values))]
    return kru_gated_scan_cpu(inputs, factors, torch.zeros(rows, len(values)), initial, cell=cell)[1][0]


def assert_accurate(actual, expected):
    error = ((actual.double() - expected) / expected).abs().max() / torch.finfo(torch.float32).eps
    assert error <= FUNCTION_ULPS


def test_sigmoid_is_accurate_in_its_tails_too(lanes):
    values = torch.cat([torch.linspace(-86, 86, 301), torch.linspace(-2, 2, 100)])  # (N,)
    cells = gate("lstm", values, 1, [-1e4, 0.0, 0.0, 0.0], lanes)[1]  # (N,): σ(f) c_0 with c_0 = 1 and no input
    assert_accurate(cells, values.double().sigmoid())


def test_tanh_is_accurate_near_zero_too(lanes):
    magnitudes = torch.cat([torch.logspace(-30, 1, 200), torch.linspace(0.1, 12, 200)])  # (N / 2,)
    values = torch.cat([-magnitudes, magnitudes])
    states = gate("gru", values, 2, [0.0, -1e4, 0.0], lanes)[0]  # (N,): the candidate alone
    assert_accurate(states, values.double().tanh())


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(cell, lanes):
    case = make_case(cell, [(3, 3), (4, 4)], 3, 4)
    case["inputs"][0, 1] = math.inf
    case["inputs"][1, 1] = -math.inf
    case["inputs"][2] *= 1e6
    expected, _ = kru_gated_scan_reference(*arguments(case, torch.float64), cell=cell)
    actual, _ = kru_gated_scan_cpu(*arguments(case), cell=cell)
    assert (actual - expected).norm() <= STATE_TOLERANCE * expected.norm()


@pytest.mark.parametrize("cell", CELLS)
def test_all_zeros_stay_zeros(cell):
    case = make_case(cell, [(2, 2), (5, 5)], 2, 3, initial=False)
    case = {name: torch.zeros_like(value) if torch.is_tensor(value) else value for name, value in case.items()}
    for name, value in evaluate(kru_gated_scan_cpu, case, cell).items():
        assert not value.any(), name


@pytest.mark.parametrize("cell", CELLS)
def test_final_state_is_a_copy_and_initial_state_is_untouched(cell):
    inputs, factors, bias, initial, _ = arguments(make_case(cell, [(4, 4), (4, 4)], 2, 3))
    kept = initial.clone()
    states, final = kru_gated_scan_cpu(inputs, factors, bias, initial, cell=cell)
    assert torch.equal(final[:, 0], states[:, -1])
    final.zero_()
    assert states[:, -1].abs().sum() > 0
    assert torch.equal(initial, kept)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_two_pieces(cell):
    """The state of one call carries the next: streaming and generation."""
    inputs, factors, bias, initial, _ = arguments(make_case(cell, [(3, 3), (5, 5)], 3, 7))
    whole, final = kru_gated_scan_cpu(inputs, factors, bias, initial, cell=cell)
    state, pieces = initial, []
    for piece in inputs.split([4, 1, 1, 1], 1):
        states, state = kru_gated_scan_cpu(piece, factors, bias, state, cell=cell)
        pieces.append(states)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_arguments(cell):
    case = make_case(cell, [(3, 3), (6, 6)], 3, 4, mask=True)
    strided = copy.deepcopy(case)
    strided["inputs"] = case["inputs"].transpose(0, 3).contiguous().transpose(0, 3)
    strided["factors"] = [factor.mT.contiguous().mT for factor in case["factors"]]
    strided["mask"] = case["mask"].T.contiguous().T
    expected, actual = (evaluate(kru_gated_scan_cpu, c, cell) for c in (case, strided))
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_for_any_number_of_threads(cell, monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    case = make_case(cell, [(2, 2), (7, 7)], 70, 5, mask=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(evaluate(kru_gated_scan_cpu, copy.deepcopy(case), cell))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, want in results[0].items():
            assert torch.equal(other[name], want), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("used", [0, 1], ids=["states", "final"])
def test_gradient_of_one_output_alone(cell, used):
    case = make_case(cell, [(4, 4), (3, 3)], 2, 5)
    found = []
    for engine, dtype in ((kru_gated_scan_cpu, torch.float32), (kru_gated_scan_reference, torch.float64)):
        inputs, factors, bias, initial, _ = arguments(copy.deepcopy(case), dtype)
        output = engine(inputs.requires_grad_(), factors, bias, initial, cell=cell)[used]
        found.append(torch.autograd.grad(output.square().sum(), inputs)[0].double())
    assert (found[0] - found[1]).norm() <= GRADIENT_TOLERANCE * found[1].norm()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_gives_nan_out(cell, lanes):
    case = make_case(cell, [(2, 2), (9, 9)], 3, 4, zeros=False)
    case["inputs"][0, 1, 0, 7] = math.nan
    states, final = kru_gated_scan_cpu(*arguments(case), cell=cell)
    assert states[0, 0].isfinite().all()
    assert states[0, 1, 7].isnan() and final[0].isnan().all()
    assert states[1:].isfinite().all()
    gradients = evaluate(kru_gated_scan_cpu, case, cell)
    assert gradients["bias"].isnan().any() and gradients["factors[0]"].isnan().any()
    assert gradients["inputs"][1:].isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_masked_steps_hide_a_nan(cell, lanes):
    case = make_case(cell, [(2, 2)] * 5, 3, 4)
    case["mask"] = torch.tensor([[True, False, True, True]] * 3)
    case["inputs"][:, 1] = math.nan
    actual = evaluate(kru_gated_scan_cpu, case, cell)
    for name, value in actual.items():
        assert value.isfinite().all(), name
    assert not actual["inputs"][:, 1].any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("cell", CELLS)
def test_a_forked_child_runs_the_scan_after_its_parent(cell, monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    case = make_case(cell, [(2, 2)] * 5, 40, 5)
    expected, _ = kru_gated_scan_cpu(*arguments(case), cell=cell)
    assert scan_cpu._workers
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        states, _ = kru_gated_scan_cpu(*arguments(case), cell=cell)
        os._exit(0 if torch.equal(states, expected) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("initial", [False, True])
def test_opcheck(cell, initial):
    case = make_case(cell, [(2, 2), (3, 3)], 2, 3, mask=initial, initial=initial)
    inputs, factors, bias, state, mask = arguments(case)
    for leaf in (inputs, bias, *factors, *([state] if initial else [])):
        leaf.requires_grad_()
    torch.library.opcheck(scan_gated_cpu._scan_op, (inputs, factors, bias, state, mask))


@pytest.mark.parametrize("cell", CELLS)
def test_compiles_without_a_break(cell):
    case = make_case(cell, [(2, 2), (3, 3)], 2, 3, mask=True)
    assert_equal(case, cell, engine=torch.compile(kru_gated_scan, backend="aot_eager", fullgraph=True))


def test_the_engine_is_chosen_and_refusals_say_why():
    inputs, factors, bias, _, _ = arguments(make_case("lstm", [(2, 2)], 2, 3))
    assert choose_gated_backend(inputs, factors)[0] == "cpu"
    name, reason = choose_gated_backend(inputs.double(), factors)
    assert name == "torch" and "float64" in reason
    assert "meta" in choose_gated_backend(inputs.to("meta"), factors)[1]
    assert "65 factors" in choose_gated_backend(inputs, factors * 65)[1]
    assert "gated cells: cpu" in scan_backend_report()
    expected = kru_gated_scan_cpu(inputs, factors, bias, cell="lstm")[0]
    assert torch.equal(kru_gated_scan(inputs, factors, bias, cell="lstm")[0], expected)
    with pytest.raises(RuntimeError, match="backend 'cpu' of a gated cell cannot run: inputs are torch.float64"):
        kru_gated_scan(
            inputs.double(), [factor.double() for factor in factors], bias.double(), cell="lstm", backend="cpu"
        )
    with pytest.raises(ValueError, match=r"inputs must have the shape \(B, T, 3, N\)"):
        kru_gated_scan_cpu(inputs, factors, bias, cell="gru")
    with pytest.raises(ValueError, match=r"bias must have the shape \(4, 2\), got \(2, 2\)"):
        kru_gated_scan_cpu(inputs, factors, bias[:2], cell="lstm")
    with pytest.raises(ValueError, match="cell must be one of lstm, gru, janet, got 'rnn'"):
        kru_gated_scan_cpu(inputs, factors, bias, cell="rnn")


def test_a_library_without_the_gated_engine_is_named():
    """The process itself is a library that has none of its functions."""
    assert "older than the gated engine" in scan_gated_cpu._declare(ctypes.CDLL(None))


def test_pushed_copy_registers_no_operator(tmp_path, monkeypatch):
    """A copy of the files outside the package finds the library, gives the same bits and leaves torch.ops alone."""
    folder = tmp_path / "pushed_gated_code"
    folder.mkdir()
    for module in (kronecker, scan_checks, scan_cpu, scan_gated_cpu, transforms):
        source = pathlib.Path(module.__file__)
        folder.joinpath(source.name).write_text(source.read_text())
    monkeypatch.syspath_prepend(str(folder.parent))
    import pushed_gated_code.scan_gated_cpu as pushed

    for name in ("kronecker", "scan_checks", "scan_cpu", "scan_gated_cpu", "transforms"):
        monkeypatch.delitem(sys.modules, f"pushed_gated_code.{name}")
    assert pushed.is_available()
    assert not hasattr(pushed, "_scan_op")
    case = make_case("lstm", [(2, 2)] * 5, 2, 3, mask=True)
    expected = evaluate(kru_gated_scan_cpu, copy.deepcopy(case), "lstm")
    for name, value in evaluate(pushed.kru_gated_scan_cpu, case, "lstm").items():
        assert torch.equal(value, expected[name]), name
