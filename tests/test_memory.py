"""Memory of forward and backward together: little beside the inputs, the outputs and their gradients."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BEYOND = 2.5  # times the bytes of the states

SHAPES = [[2] * 9, [7, 8, 9], [3, 137]]

# In a process of its own, where nothing else moves the peak. Prints it for each list of factor sizes, in multiples of
# the states' bytes and less what is returned: the states and the gradient of the inputs.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from kru_hf import kron_scan

status = Path("/proc/self/status")

def read(name):
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def case(sizes, batch, length):
    units = torch.Size(sizes).numel()
    factors = [(torch.randn(2, size, size) * (2 * size) ** -0.5).requires_grad_() for size in sizes]
    inputs = torch.randn(batch, length, 2, units).requires_grad_()
    return inputs, factors, torch.full((units,), -0.1).requires_grad_(), torch.randn(batch, length, 2, units)

def run(inputs, factors, bias, cotangent):
    states, _ = kron_scan(inputs, factors, bias, backend=sys.argv[1])
    return states, torch.autograd.grad(states, [inputs, bias, *factors], cotangent)

def measure(sizes):
    run(*case(sizes, 2, 3))  # what is loaded and cached once
    arguments = case(sizes, 64, 200)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read("VmRSS")
    states, gradients = run(*arguments)
    return (read("VmHWM") - before) / states.nbytes - 2

print(json.dumps([measure(sizes) for sizes in json.loads(sys.argv[2])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_forward_and_backward_need_little_beside_inputs_and_outputs(backend):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, json.dumps(SHAPES)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert all(-0.5 < times <= BEYOND for times in measured), f"{measured} times the bytes of the states"


# Allocates and frees the tensors of 50 steps, 40 MB each, and prints the pages faulted in after the first ten.
FAULTS = """
import resource, sys
import torch
from training.common.machine import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    torch.ones(10_000_000)

for _ in range(10):  # the heap grows in the first one to three
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_training_keeps_freed_memory_for_the_next_step():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "free")
    }
    assert faults["keep"] < 1000 < faults["free"], faults
