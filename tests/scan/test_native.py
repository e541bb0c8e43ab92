"""The native CPU engine beyond the contract of ``test_engines``: vector widths, threads, forks, its own functions."""

import _thread
import ctypes
import math
import os
import pathlib
import shutil
import subprocess
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CASES, FLOOR_OF_DRAWN, SHAPES, STATE_TOLERANCE, assert_close, assert_same, problem, problems, run

from kru_hf import kron_scan, scan_cpu
from kru_hf.cells import CELLS
from kru_hf.scan import unavailable_reason

pytestmark = pytest.mark.skipif(
    scan_cpu.obstacle() is not None, reason=f"the native engine is not built: {scan_cpu.obstacle()}"
)
LANES = [n for n in (4, 8, 16) if scan_cpu.obstacle() is None and n <= scan_cpu._library.kru_lanes()]
NATIVE = [case for case in CASES if unavailable_reason("cpu", CELLS[case[0]]) is None]
ON_EVERY_CELL = pytest.mark.parametrize(("cell", "activation"), NATIVE)
FUNCTION_ULPS = 3.0  # largest relative error of sigmoid and tanh at a single argument, in float32's epsilon


@pytest.fixture(params=LANES, ids=lambda lanes: f"lanes{lanes}")
def lanes(request, monkeypatch):
    """Every vector width that this processor has."""
    monkeypatch.setattr(scan_cpu, "_lanes", request.param)
    return request.param


def native(p):
    return run(p, "cpu", torch.float32)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@ON_EVERY_CELL
def test_every_width(cell, activation, shapes, lanes):
    p = problem(cell, shapes, 19, 3, masked=True, starts=True, activation=activation)
    assert_close(native(p), run(p, "reference"))


@settings(deadline=None, max_examples=60)
@given(p=problems(), lanes=st.sampled_from(LANES or [4]))
def test_every_width_everywhere(p, lanes):
    if (p.cell, p.activation) in NATIVE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan_cpu, "_lanes", lanes)
            assert_close(native(p), run(p, "reference"), floor=FLOOR_OF_DRAWN)


@ON_EVERY_CELL
@pytest.mark.parametrize("size", [*range(1, 14), 137])
def test_every_size_of_a_register_block(size, cell, activation, lanes):
    shapes = [(size, size), (2, 2)] if size > 13 else [(size, size), (2, 2), (size, size)]
    for batch in (1, 9):  # lanes over units, and for real cells lanes over samples
        p = problem(cell, shapes, batch, 2, activation=activation)
        assert_close(native(p), run(p, "reference"))


@ON_EVERY_CELL
def test_same_bits_for_any_number_of_threads(cell, activation, monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    p = problem(cell, [(2, 2), (7, 7)], 70, 5, masked=True, starts=True, activation=activation)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(native(p))
    torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("possible", [0, 1])
@pytest.mark.parametrize("wait_from", [0, math.inf], ids=["the caller waits", "the caller takes part"])
def test_fewer_threads_than_wanted(possible, wait_from, monkeypatch):
    """The process may start no more threads: the call runs on those that there are."""
    p = problem("kru", [(2, 2)] * 6, 13, 7, masked=True)
    expected, start, started = native(p), _thread.start_new_thread, []

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
        found = native(p)
    finally:
        torch.set_num_threads(before)
    assert len(started) == possible
    assert_same(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@ON_EVERY_CELL
def test_a_forked_child_runs_the_scan_after_its_parent(cell, activation, monkeypatch):
    monkeypatch.setattr(scan_cpu, "THREADS_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    p = problem(cell, [(2, 2)] * 5, 40, 5, activation=activation)
    inputs, factors, bias = p.inputs.float(), [f.float() for f in p.factors], p.bias.float()
    expected, _ = kron_scan(inputs, factors, bias, cell=cell, activation=activation, backend="cpu")
    assert scan_cpu._workers
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        states, _ = kron_scan(inputs, factors, bias, cell=cell, activation=activation, backend="cpu")
        os._exit(0 if torch.equal(states, expected) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


def gate(cell, values, index, others):
    """The last state of a cell without recurrence whose pre-activation of gate ``index`` runs over ``values``."""
    facts, units = CELLS[cell], len(values)
    inputs = torch.tensor(others).repeat(1, 1, units, 1).mT.contiguous()  # (1, 1, K, N)
    inputs[0, 0, index] = values
    factors = [torch.zeros(facts.planes, units, units)]
    initial = torch.ones(1, len(facts.states), units)
    return kron_scan(inputs, factors, None, initial, cell=cell, backend="cpu")[1][0]


def assert_accurate(actual, expected):
    error = ((actual.double() - expected) / expected).abs().max() / torch.finfo(torch.float32).eps
    assert error <= FUNCTION_ULPS


def test_sigmoid_is_accurate_in_its_tails_too(lanes):
    values = torch.cat([torch.linspace(-86, 86, 301), torch.linspace(-2, 2, 100)])  # (N,)
    cells = gate("lstm", values, 1, [-1e4, 0.0, 0.0, 0.0])[1]  # (N,): σ(f) c_0 with c_0 = 1 and no input
    assert_accurate(cells, values.double().sigmoid())


def test_tanh_is_accurate_near_zero_too(lanes):
    magnitudes = torch.cat([torch.logspace(-30, 1, 200), torch.linspace(0.1, 12, 200)])  # (N / 2,)
    values = torch.cat([-magnitudes, magnitudes])
    states = gate("gru", values, 2, [0.0, -1e4, 0.0])[0]  # (N,): the candidate alone
    assert_accurate(states, values.double().tanh())


@pytest.mark.parametrize("cell", [cell for cell, _ in NATIVE if cell != "kru"])
def test_saturated_gates(cell, lanes):
    p = problem(cell, [(3, 3), (4, 4)], 3, 4)
    p.inputs[0, 1], p.inputs[1, 1], p.inputs[2] = math.inf, -math.inf, 1e6 * p.inputs[2]
    expected, found = run(p, "reference")["states"], native(p)["states"]
    assert (found - expected).norm() <= STATE_TOLERANCE[torch.float32] * expected.norm()


def test_tiny_states_do_not_slow_down_or_break():
    """A decaying linear network ends in zeros, not in subnormal numbers."""
    factors = [torch.stack([0.5 * torch.eye(4), torch.zeros(4, 4)])] * 2
    inputs, initial = torch.zeros(1, 400, 2, 16), torch.ones(1, 2, 16)
    states, final = kron_scan(inputs, factors, None, initial, activation="identity", backend="cpu")
    assert final.abs().max() == 0
    assert states.isfinite().all()
    assert torch.tensor(1e-39) * 1 != 0  # the caller's own floating-point mode is as before


def test_negated_views_are_read_with_their_signs():
    """The imaginary plane of a conjugate is a view whose numbers lie in memory with the other sign."""
    p = problem("kru", [(2, 2), (3, 3)])
    inputs = p.inputs.float()
    planes = torch.complex(inputs[:, :, 0], inputs[:, :, 1]).conj()
    factors = [torch.complex(*f.float()).conj().imag.neg().neg() for f in p.factors]
    negated = torch.stack((planes.real, planes.imag), 2)
    assert not torch.equal(negated, inputs)
    lazy = torch._neg_view(-negated)
    assert lazy.is_neg() and not any(f.is_neg() for f in factors)
    arguments = ([f.float() for f in p.factors], p.bias.float())
    expected = kron_scan(negated, *arguments, backend="cpu")[0]
    assert torch.equal(kron_scan(lazy, *arguments, backend="cpu")[0], expected)


def test_another_library_is_named(monkeypatch, tmp_path):
    """The process itself is a library that has none of its functions."""
    monkeypatch.setattr(ctypes, "CDLL", lambda path, own=ctypes.CDLL: own(None))
    library, reason = scan_cpu._load()
    assert library is None and "cannot be loaded" in reason


@pytest.mark.slow
def test_the_library_alone_under_sanitizers(tmp_path):
    """``native_test.c`` calls it with arrays of the exact shapes; all that it is told of a cell is what CELLS has."""
    tests, compiler = pathlib.Path(__file__).parents[1], shutil.which(os.environ.get("CC", "cc"))
    build = [
        compiler,
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-o",
        str(tmp_path / "program"),
    ]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if compiler is None or subprocess.run([*build, str(empty)], capture_output=True).returncode:
        pytest.skip("no C compiler with AddressSanitizer and UndefinedBehaviorSanitizer")
    source = ["-I", str(tests.parent / "kru_hf/native"), str(tests / "native_test.c"), "-lm", "-lpthread"]
    subprocess.run([*build, *source], check=True)
    facts = []
    for name, activation in NATIVE:
        cell = CELLS[name]
        numbers = (cell.planes, cell.bias_rows or 1, len(cell.states))
        facts += [scan_cpu._template(cell, activation), *map(str, numbers)]
    done = subprocess.run([tmp_path / "program", *facts], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no faults\n"), done.stderr
