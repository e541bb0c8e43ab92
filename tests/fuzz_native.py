"""Random calls of the engines against the definition in float64: shapes, strides, vector widths, masks, magnitudes.

    python tests/fuzz_native.py [COUNT] [--seed SEED]

Each case is drawn from a seed of its own. A case that fails prints it, and ``--seed SEED 1`` draws that one again.
States and gradients of the native engine, at every vector width, and of the portable one must be near the definition's,
and not be finite where the definition's are not, neither more nor fewer. TRITON_INTERPRET=1 adds the GPU's kernels.
"""

import argparse
import functools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from kru_hf import kron_scan, scan_cpu
from kru_hf.cells import CELLS
from kru_hf.scan import unavailable_reason
from kru_hf.scan_triton import obstacle

# In norm: rounding of float32 over a few steps and factors. At b > 0 gradients hold the phase z/|z|, and where |z| is
# small, as many of its digits are rounding as |z| has lost: the definition in float32 is as far off as any engine, so
# what it is off by on the same case, times LIKE_THE_DEFINITION, is allowed where it is more.
STATES, GRADIENTS, LIKE_THE_DEFINITION = 3e-5, 1e-3, 16
SPECIAL = [math.inf, -math.inf, math.nan]
WIDTHS = [lanes for lanes in (4, 8, 16) if scan_cpu.obstacle() is None and lanes <= scan_cpu._library.kru_lanes()]


def relaid(tensor: Tensor, draw: random.Random) -> Tensor:
    """The same numbers in another layout of memory, or with torch's negative bit."""
    choice = draw.randrange(5)
    if choice == 0:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if choice == 1:
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if choice == 2:
        return torch._neg_view(-tensor)
    return tensor


class Case:
    """One drawn call: the cell, float32 arguments, cotangents of both outputs."""

    def __init__(self, seed: int) -> None:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.cell = draw.choice(["kru", "kru", *CELLS])
        self.activation = draw.choice(["modrelu"] * 3 + ["identity"]) if self.cell == "kru" else "modrelu"
        sizes = [draw.choice([1, 2, 2, 3, 4, 5, 7, 8, 9, 16, 17]) for _ in range(draw.randint(1, 4))]
        while math.prod(sizes) > 700:
            sizes.pop()
        columns = draw.sample(sizes, len(sizes))
        units = math.prod(sizes)
        batch, length = draw.choice([1, 2, 3, 4, 5, 8, 16, 17, 33]), draw.choice([1, 1, 2, 3, 5])
        facts, terms = CELLS[self.cell], draw.choice([1, 1, 2])
        lead = (terms, facts.planes) if terms > 1 else (facts.planes,)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.inputs = normal(batch, length, facts.planes, units)
        self.factors = [normal(*lead, p, q) * (2 * q) ** -0.5 for p, q in zip(sizes, columns, strict=True)]
        self.bias = 0.3 * normal(*facts.bias_shape(units))
        self.initial = normal(batch, len(facts.states), units) if draw.random() < 0.7 else None
        if draw.random() < 0.3:
            self.inputs[:, ::2] = 0
        self.scale = 1.0
        if self.cell == "kru" and draw.random() < 0.4:
            # One step, so that the numbers do not leave float32 on the way; a bias of their size, or of order 1.
            self.inputs, self.scale = self.inputs[:, :1].clone(), 10.0 ** draw.uniform(-30, 36)
            self.inputs *= self.scale
            self.bias *= self.scale if draw.random() < 0.5 else 1
            self.initial = None if self.initial is None else self.initial * self.scale
        self.mask = self.starts = None
        if draw.random() < 0.5:
            self.mask = torch.rand(self.inputs.shape[:2], generator=generator) < 0.7
        if draw.random() < 0.3:
            self.starts = torch.rand(self.inputs.shape[:2], generator=generator) < 0.3
        self.special = draw.random() < 0.3
        if self.special:
            tensor = draw.choice(
                [self.inputs, self.bias, *self.factors, *([] if self.initial is None else [self.initial])]
            )
            for _ in range(draw.choice([1, 1, 3])):
                tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(SPECIAL)
        self.d_states = normal(*facts.states_shape(self.inputs.shape))
        self.d_final = normal(batch, len(facts.states), units)
        self.inputs, self.bias, *self.factors = (
            relaid(tensor, draw) for tensor in (self.inputs, self.bias, *self.factors)
        )
        self.initial = None if self.initial is None else relaid(self.initial, draw)
        self.mask = self.mask if self.mask is None or draw.random() < 0.5 else self.mask.mT.contiguous().mT

    def run(self, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Both outputs and every gradient, by name."""
        leaves = {"inputs": self.inputs, "bias": self.bias} | (
            {} if self.initial is None else {"initial": self.initial}
        )
        leaves |= {f"factors[{index}]": factor for index, factor in enumerate(self.factors)}
        leaves = {name: tensor.to(dtype).detach().requires_grad_() for name, tensor in leaves.items()}
        factors = [leaves[f"factors[{index}]"] for index in range(len(self.factors))]
        arguments = (leaves["inputs"], factors, leaves["bias"], leaves.get("initial"), self.mask)
        options = {"cell": self.cell, "starts": self.starts, "activation": self.activation}
        states, final = kron_scan(*arguments, **options, backend=backend)
        cotangents = (self.d_states.to(dtype), self.d_final.to(dtype))
        wanted = [leaf for name, leaf in leaves.items() if name != "bias" or self.activation == "modrelu"]
        gradients = torch.autograd.grad((states, final), wanted, cotangents, allow_unused=True, materialize_grads=True)
        names = [name for name in leaves if name != "bias" or self.activation == "modrelu"]
        return {"states": states.detach(), "final": final.detach()} | dict(zip(names, gradients, strict=True))


def faults(
    found: dict[str, Tensor], wanted: dict[str, Tensor], rounded: Callable[[], dict[str, Tensor]] | None = None
) -> list[str]:
    """What of ``found`` is not as the definition has it; ``rounded`` gives what the definition is in float32."""
    said = []
    for name, want in wanted.items():
        have, want = found[name].double(), want.double()
        finite = want.isfinite()
        if not torch.equal(have.isfinite(), finite):
            said.append(f"{name}: {(~have.isfinite()).sum()} not finite, expected {(~finite).sum()} of {want.numel()}")
            continue
        if name in ("states", "final") and not torch.equal(have.isnan(), want.isnan()):
            said.append(f"{name}: infinities and NaN are exchanged")
        error, scale = (have - want)[finite].norm().item(), want[finite].norm().item()
        tolerance = STATES if name in ("states", "final") else GRADIENTS
        if error > tolerance * scale + 1e-36:
            if rounded is not None and error <= LIKE_THE_DEFINITION * (rounded()[name].double() - want).norm():
                continue
            said.append(f"{name}: off by {error:.3g} of {scale:.3g}")
    return said


def check(seed: int) -> list[str]:
    """What is wrong with the case of that seed, by engine; none: nothing."""
    case, said = Case(seed), []
    rounded = None if case.special else functools.cache(lambda: case.run("reference", torch.float32))
    # Numbers that are not finite are compared within float32, whose range decides where they are.
    wanted = case.run("reference", torch.float32 if case.special else torch.float64)
    for width in WIDTHS if unavailable_reason("cpu", CELLS[case.cell]) is None else ():
        scan_cpu._lanes = width
        said += [f"cpu, {width} lanes: {fault}" for fault in faults(case.run("cpu", torch.float32), wanted, rounded)]
    scan_cpu._lanes = None
    said += [f"portable: {fault}" for fault in faults(case.run("portable", torch.float32), wanted, rounded)]
    factors = [factor if factor.dim() == 4 else factor[None] for factor in case.factors]
    if unavailable_reason("triton") is None and obstacle(CELLS[case.cell], case.inputs, factors) is None:
        if not case.bias.isfinite().all():
            wanted.pop("bias", None)  # the kernels know z/|z| from h alone, which is NaN then
        said += [f"triton: {fault}" for fault in faults(case.run("triton", torch.float32), wanted, rounded)]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10_000, help="cases (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--threads", type=int, default=1, help="threads of every other call, however small (default 1)")
    options = parser.parse_args()
    if options.threads > 1:
        scan_cpu.THREADS_FROM = 0
    failed = 0
    for seed in range(options.seed, options.seed + options.count):
        torch.set_num_threads(options.threads if seed % 2 else 1)
        if said := check(seed):
            failed += 1
            print(f"seed {seed}:", *said, sep="\n  ", flush=True)
    print(f"{options.count} cases from seed {options.seed}, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
