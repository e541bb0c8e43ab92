"""The Triton engine beyond the contract of ``test_engines``: where it runs, its plan, gradients of large groups.

TRITON_INTERPRET=1 must be set before the kernels are defined, so without a GPU one test runs the engine's part of the
contract in a process of its own, where Triton's interpreter executes the kernels on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kru_hf import kron_scan, scan_triton
from kru_hf.cells import CELLS
from kru_hf.scan_triton import obstacle, plan_groups

pytest.importorskip("triton")

KRU = CELLS["kru"]
RUNS_HERE = obstacle() is None
runs_elsewhere = pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")


@pytest.mark.slow
@runs_elsewhere
def test_the_contract_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [str(Path(__file__).with_name(name)) for name in ("test_engines.py", "test_compiled.py", "test_triton.py")]
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    chosen = ["-k", "triton and (not identity or alone)"]
    result = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@runs_elsewhere
def test_says_why_it_cannot_run():
    assert "no GPU" in obstacle()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: no GPU"):
        kron_scan(torch.zeros(1, 1, 2, 4), [torch.zeros(2, 4, 4)], backend="triton")


def test_refuses_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(scan_triton, "is_interpreted", lambda: True)
    factors = [torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 137, 137)]
    inputs = torch.zeros(1, 1, 2, 411)
    assert "3x3 137x137" in obstacle(KRU, inputs, factors)
    assert "float64" in obstacle(KRU, inputs.double(), factors)
    assert "meta" in obstacle(KRU, inputs.to("meta"), factors)
    assert "no kernel for the cell 'lstm'" in obstacle(CELLS["lstm"], inputs, factors)
    assert obstacle(KRU, inputs[..., :9], [torch.zeros(1, 2, 9, 9)]) is None


@pytest.mark.skipif(not RUNS_HERE, reason="needs the kernels")
def test_gradients_of_large_groups_are_those_of_small_ones(monkeypatch):
    from problems import assert_close, device_of, problem, run

    p = problem("kru", [(3, 3), (4, 4)], terms=2, masked=True, starts=True)
    by_kernel = run(p, "triton", torch.float32, device_of("triton"))
    monkeypatch.setattr(scan_triton, "_IEEE_TILE", 0)
    monkeypatch.setattr(scan_triton, "_GRADIENT_ELEMENTS", 1)
    by_torch = run(p, "triton", torch.float32, device_of("triton"))
    assert_close(by_torch, {name: value.cpu().double() for name, value in by_kernel.items()})


@pytest.mark.skipif(not scan_triton.is_interpreted(), reason="draws calls on the CPU")
def test_drawn_calls_by_triton():
    """Numbers of every size, infinities, NaN and layouts, against the definition: see ``fuzz_native``."""
    import fuzz_native

    assert not {seed: faults for seed in range(40) if (faults := fuzz_native.check(seed))}


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
