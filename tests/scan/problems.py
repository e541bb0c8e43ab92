"""One builder of problems of the recurrence for every engine, cell and option, and how close a result has to be."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kru_hf.cells import CELLS
from kru_hf.scan import kron_scan, unavailable_reason

# Relative error in norm against the definition in float64.
STATE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# At b > 0 gradients contain the phase z/|z| of small |z|, which float32 knows less well.
POSITIVE_BIAS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
# Added to the norm of what is wanted: a whole gradient can be what cancellation among numbers of order 1 leaves. The
# problems that hypothesis draws can be as small as one unit and one step.
FLOOR, FLOOR_OF_DRAWN = 1e-2, 1.0

SHAPES = {
    "2x2 six times": [(2, 2)] * 6,
    "3·4·5": [(3, 3), (4, 4), (5, 5)],
    "3·37": [(3, 3), (37, 37)],
    "one dense": [(13, 13)],
    "rectangular": [(2, 3), (3, 2), (5, 5)],
    "growing first": [(4, 2), (2, 4), (6, 3), (1, 2)],
    "with 1x1": [(1, 1), (5, 5), (1, 1)],
    "scalar": [(1, 1)],
}
# Every cell, the complex one with and without its activation.
CASES = [("kru", "modrelu"), ("kru", "identity"), *((name, "modrelu") for name in CELLS if name != "kru")]


@dataclass(frozen=True)
class Problem:
    """Arguments of ``kron_scan`` in float64, exact in float32, and cotangents of its two outputs."""

    cell: str
    inputs: Tensor
    factors: list[Tensor]
    bias: Tensor
    initial_state: Tensor | None
    mask: Tensor | None
    starts: Tensor | None
    d_states: Tensor | None
    d_final: Tensor | None
    activation: str = "modrelu"

    def but(self, **changes) -> "Problem":
        return replace(self, **changes)


def problem(
    cell: str, shapes: list[tuple[int, int]], batch: int = 3, length: int = 6, *, terms: int = 1, initial: bool = True,
    masked: bool = False, starts: bool = False, activation: str = "modrelu", positive: bool = False, seed: int = 0,
) -> Problem:  # fmt: skip
    """Factors of a norm near 1, every third input exactly zero as blank pixels are; modReLU's b > 0 if ``positive``."""
    facts, generator = CELLS[cell], torch.Generator().manual_seed(seed)
    units = math.prod(p for p, _ in shapes)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).double()

    def some(share: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < share

    inputs, state = normal(batch, length, facts.planes, units), normal(batch, len(facts.states), units)
    inputs[:, ::3] = 0
    state[0] = 0  # with a zero input: z is exactly 0
    width = 2 if facts.complex else 1
    lead = (terms, facts.planes) if terms > 1 else (facts.planes,)
    factors = [(normal(*lead, p, q) * 0.9 / (width * q * terms ** (1 / len(shapes))) ** 0.5) for p, q in shapes]
    bias = normal(*facts.bias_shape(units))
    if facts.complex:
        bias = 0.1 * bias + 0.2 if positive else -(0.1 * bias).abs()
    return Problem(
        cell, inputs, [f.float().double() for f in factors], bias.float().double(), state if initial else None,
        some(0.7) if masked else None, some(0.3) if starts else None,
        normal(*facts.states_shape(inputs.shape)), normal(*state.shape), activation,
    )  # fmt: skip


@st.composite
def problems(draw) -> Problem:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    columns = sizes[1:] + sizes[:1] if draw(st.booleans()) else sizes  # the same product: rectangular factors
    cell, activation = draw(st.sampled_from(CASES))
    flags = {name: draw(st.booleans()) for name in ("initial", "masked", "starts")}
    batch, length = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, 16, 17, 33]))
    options = {"terms": draw(st.integers(1, 3)), "activation": activation, "seed": draw(st.integers(0, 2**31))}
    return problem(cell, list(zip(sizes, columns, strict=True)), batch, length, **flags, **options)


def scan(p: Problem, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu", call=kron_scan):
    """states, final state, and the leaves by name."""
    leaves = {"inputs": p.inputs, "bias": p.bias, "initial_state": p.initial_state}
    leaves |= {f"factors[{index}]": factor for index, factor in enumerate(p.factors)}
    # Strides are kept: some tests give others than the contiguous ones.
    made = {n: v.to(device, dtype, copy=True).requires_grad_() for n, v in leaves.items() if v is not None}
    times = [None if t is None else t.to(device) for t in (p.mask, p.starts)]
    states, final = call(
        made["inputs"], [made[f"factors[{i}]"] for i in range(len(p.factors))], made["bias"],
        made.get("initial_state"), times[0], cell=p.cell, starts=times[1], activation=p.activation, backend=backend,
    )  # fmt: skip
    return states, final, made


def run(p: Problem, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu", call=kron_scan) -> dict:
    """Outputs and gradients by name; of the outputs that have a cotangent."""
    states, final, leaves = scan(p, backend, dtype, device, call)
    pairs = [(out, d) for out, d in ((states, p.d_states), (final, p.d_final)) if d is not None]
    outputs, cotangents = zip(*((out, d.to(out)) for out, d in pairs), strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return {"states": states.detach(), "final_state": final.detach()} | dict(zip(leaves, grads, strict=True))


def assert_close(found: dict, expected: dict, floor: float = FLOOR, positive: bool = False) -> None:
    for name, want in expected.items():
        got = found[name].cpu()
        table = POSITIVE_BIAS_TOLERANCE if positive else GRADIENT_TOLERANCE
        tolerance = (STATE_TOLERANCE if name in ("states", "final_state") else table)[got.dtype]
        error, norm = (got.double() - want).norm().item(), want.norm().item()
        assert error <= tolerance * (norm + floor), f"{name}: error {error}, norm {norm}"


def assert_same(found: dict, expected: dict) -> None:
    """The same bits."""
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


RUNS = [("portable", torch.float64), *((engine, torch.float32) for engine in ("portable", "cpu", "triton"))]
# engine, dtype, cell: those that run in this process. Triton runs gated cells some day; its own test starts it.
TARGETS = [
    pytest.param(engine, dtype, *case, id="-".join((engine, str(dtype)[6:], *case)))
    for engine, dtype in RUNS
    for case in CASES
    if unavailable_reason(engine, CELLS[case[0]]) is None
]
ON_EVERY_ENGINE = pytest.mark.parametrize(("engine", "dtype", "cell", "activation"), TARGETS)


def device_of(engine: str) -> str:
    """Where the engine's tensors have to be: Triton's interpreter takes those of the CPU."""
    return "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"
