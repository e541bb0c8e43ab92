"""Cost of the recurrence against nn.RNN, nn.LSTM and the other engines, as ratios measured in one run.

    python tests/benchmarks/scan.py [--json out.json] [--plot out.png] [--cases S1 S3] [--repeats 7] [--growth]

Every case gives all contenders the same number of units, batch and length, runs them in turn (so that whatever else
the machine does hits all alike) and prints medians. Inputs of ours are U x_t (B, T, 2, N), those of nn.RNN and nn.LSTM
are N real features, as wide as their state. The rows of gated cells that name a number of features are whole layers,
input map included, all with inputs of that width; where it is large, the input map costs more than the recurrence.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kru_hf
from kru_hf.cells import CELLS
from kru_hf.kronecker import random_orthogonal, random_unitary, unitary_exp
from kru_hf.scan_linear import kron_linear_scan

# name: B, T, N, factor sizes, whether the backward is measured too
CASES = {
    "S1": (128, 100, 512, [2] * 9, True),
    "S2": (32, 100, 2048, [2] * 11, True),
    "S3 7·8·9": (128, 100, 504, [7, 8, 9], True),
    "S3 8·8·8": (128, 100, 512, [8, 8, 8], True),
    "S4": (128, 100, 512, [16, 32], True),
    "S5": (17, 100, 480, [3, 5, 32], True),
    "S6": (1, 1000, 512, [2] * 9, False),
    "3·137": (128, 100, 411, [3, 137], True),
}
# name: cell, B, T, N, factor sizes, features of a whole layer (None: the recurrence alone, like the cases above)
GATED_CASES: dict[str, tuple[str, int, int, int, list[int], int | None]] = {
    "KRULSTM": ("lstm", 128, 100, 900, [9, 10, 10], None),
    "KRUGRU": ("gru", 128, 100, 900, [9, 10, 10], None),
    "KRUJANET": ("janet", 128, 100, 900, [9, 10, 10], None),
    "KRULSTM 128": ("lstm", 128, 100, 900, [9, 10, 10], 128),
    "KRUGRU 128": ("gru", 128, 100, 900, [9, 10, 10], 128),
    "KRULSTM 900": ("lstm", 128, 100, 900, [9, 10, 10], 900),
}
# The linear cell against the complex one of as many units. name: B, T, H heads, factor sizes of a head, transition
LINEAR_CASES: dict[str, tuple[int, int, int, list[int], str]] = {
    "linear 2×2": (16, 784, 1, [2] * 9, "fixed"),
    "linear 8·8·8": (16, 784, 1, [8, 8, 8], "fixed"),
    "linear 8×8·8": (16, 784, 8, [8, 8], "fixed"),
    "selective": (16, 784, 8, [8, 8], "selective"),
}
LAYERS = {"lstm": kru_hf.KRULSTM, "gru": kru_hf.KRUGRU, "janet": kru_hf.KRUJANET}
# Ratios that issue "The recurrence at hardware speed" asks for: (against nn.LSTM, against nn.RNN).
TARGETS = {
    "S1": (8, 1.5),
    "S2": (20, 7),
    "S3 7·8·9": (4, 0.8),
    "S3 8·8·8": (4, 0.8),
    "S4": (3, 0.6),
    "S5": (4, 1),
    "S6": (20, 5),
    "KRULSTM": (4, None),
}
# name: B, T, N, factor sizes
GPU_CASES = {
    "2x2": (16, 1024, 512, [2] * 9),
    "7·8·8": (16, 1024, 448, [7, 8, 8]),
    "2x2, N=2048": (16, 1024, 2048, [2] * 11),
    "2x2, B=128": (128, 784, 512, [2] * 9),
}


def make_scan(
    backend: str, batch: int, length: int, units: int, sizes: list[int], backward: bool, device: str
) -> Callable:
    """A function that runs one step of ours on its own tensors."""
    factors = [random_unitary(size, size).to(device).requires_grad_(backward) for size in sizes]  # (2, P, P)
    inputs = torch.randn(batch, length, 2, units, device=device).mul_(0.1).requires_grad_(backward)  # (B, T, 2, N)
    bias = torch.full((units,), -0.01, device=device).requires_grad_(backward)  # (N,)
    grad = torch.randn(batch, length, 2, units, device=device)  # (B, T, 2, N)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            states, _ = kru_hf.kron_scan(inputs, factors, bias, backend=backend)
        if backward:
            torch.autograd.grad(states, [inputs, bias, *factors], grad)

    return step


def make_linear_scan(batch: int, length: int, heads: int, sizes: list[int], transition: str) -> Callable:
    """The same for the linear recurrence, with its backward."""
    lead = (heads,) if transition == "fixed" else (batch, length, heads)
    factors = [unitary_exp(torch.randn(*lead, size * size)).requires_grad_() for size in sizes]  # (…, 2, P, P)
    units = heads * math.prod(sizes)
    inputs = torch.randn(batch, length, 2, units).mul_(0.1).requires_grad_()  # (B, T, 2, H·N)
    grad = torch.randn(batch, length, 2, units)  # (B, T, 2, H·N)

    def step() -> None:
        states, _ = kron_linear_scan(inputs, factors, unitary=transition == "selective")
        torch.autograd.grad(states, [inputs, *factors], grad)

    return step


def make_gated_scan(backend: str, cell: str, batch: int, length: int, units: int, sizes: list[int]) -> Callable:
    """The same for a gated cell, with its backward."""
    facts = CELLS[cell]
    gates = facts.planes
    factors = [
        torch.stack([random_orthogonal(size, size) for _ in range(gates)]).requires_grad_() for size in sizes
    ]  # (G, P, P)
    inputs = torch.randn(batch, length, gates, units).requires_grad_()  # (B, T, G, N)
    bias = torch.zeros(facts.bias_shape(units)).requires_grad_()  # (4 or 2, N)
    grad = torch.randn(batch, length, units)  # (B, T, N)

    def step() -> None:
        states, _ = kru_hf.kron_scan(inputs, factors, bias, cell=cell, backend=backend)
        torch.autograd.grad(states, [inputs, bias, *factors], grad)

    return step


def make_module(module: nn.Module, batch: int, length: int, features: int, units: int, backward: bool, device: str):
    """The same for a layer with the arguments of nn.RNN."""
    module = module.to(device)
    inputs = torch.randn(batch, length, features, device=device).mul_(0.1).requires_grad_(backward)  # (B, T, D)
    grad = torch.randn(batch, length, units, device=device)  # (B, T, N)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            states: Tensor = module(inputs)[0]
        if backward:
            torch.autograd.grad(states, [inputs, *module.parameters()], grad)

    return step


def make_torch_nn(
    kind: type, batch: int, length: int, units: int, backward: bool, device: str, features: int | None = None
) -> Callable:
    """The same for nn.RNN, nn.LSTM or nn.GRU of as many units."""
    features = features or units
    return make_module(kind(features, units, batch_first=True), batch, length, features, units, backward, device)


def measure(steps: dict[str, Callable], repeats: int, device: str, once: tuple[str, ...] = ()) -> dict[str, float]:
    """Median milliseconds of each, run in turn; those in ``once`` run a single time after nothing but themselves."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, step in steps.items():
            if name in once and repeat != 1:
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def run_case(name: str, repeats: int, slow: bool) -> dict:
    batch, length, units, sizes, backward = CASES[name]
    steps = {
        "kru": make_scan("auto", batch, length, units, sizes, backward, "cpu"),
        "rnn": make_torch_nn(nn.RNN, batch, length, units, backward, "cpu"),
        "lstm": make_torch_nn(nn.LSTM, batch, length, units, backward, "cpu"),
    }
    if slow:
        steps["portable engine"] = make_scan("portable", batch, length, units, sizes, backward, "cpu")
        steps["reference"] = make_scan("reference", batch, length, units, sizes, backward, "cpu")
    times = measure(steps, repeats, "cpu", ("portable engine", "reference"))
    return {
        "case": name,
        "shape": f"{batch}, {length}, {units}",
        "ms": times,
        "faster_than": {other: times[other] / times["kru"] for other in times if other != "kru"},
        "target": TARGETS.get(name),
    }


def run_gated_case(name: str, repeats: int, slow: bool) -> dict:
    cell, batch, length, units, sizes, features = GATED_CASES[name]
    if features is None:
        steps = {"kru": make_gated_scan("auto", cell, batch, length, units, sizes)}
    else:
        layer = LAYERS[cell](features, units, batch_first=True, factor_shapes=[(size, size) for size in sizes])
        steps = {"kru": make_module(layer, batch, length, features, units, True, "cpu")}
    for other, kind in (("rnn", nn.RNN), ("lstm", nn.LSTM)) + ((("gru", nn.GRU),) if cell == "gru" else ()):
        steps[other] = make_torch_nn(kind, batch, length, units, True, "cpu", features)
    if slow and features is None:
        steps["portable engine"] = make_gated_scan("portable", cell, batch, length, units, sizes)
        steps["reference"] = make_gated_scan("reference", cell, batch, length, units, sizes)
    times = measure(steps, repeats, "cpu", ("portable engine", "reference"))
    return {
        "case": name,
        "shape": f"{batch}, {length}, {units}",
        "features": features,
        "ms": times,
        "faster_than": {other: times[other] / times["kru"] for other in times if other != "kru"},
        "target": TARGETS.get(name),
    }


def run_linear_case(name: str, repeats: int) -> dict:
    """Milliseconds of the linear cell, and of the complex one with the factors of all heads in one product."""
    batch, length, heads, sizes, transition = LINEAR_CASES[name]
    whole = sizes if heads == 1 else [heads, *sizes]
    units = math.prod(whole)
    steps = {
        "linear": make_linear_scan(batch, length, heads, sizes, transition),
        "kru": make_scan("auto", batch, length, units, whole, True, "cpu"),
    }
    times = measure(steps, repeats, "cpu")
    return {
        "case": name,
        "shape": f"{batch}, {length}, {units}",
        "ms": times,
        "faster_than": {"kru": times["kru"] / times["linear"]},
    }


def gpu_ceilings() -> dict[str, float]:
    """What the device moves (GB/s, read and written) and computes in fp32, measured: a large copy, a large product."""
    source, target = torch.randn(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda")
    times = measure({"copy": lambda: target.copy_(source), "product": lambda: square @ square}, 5, "cuda")
    return {
        "GB/s": 2 * 4 * source.numel() / times["copy"] / 1e6,
        "TFLOP/s": 2 * 8192**3 / times["product"] / 1e9,
    }


def run_gpu(repeats: int) -> dict | None:
    """The GPU cases, or None where there is no GPU. Microseconds are those of one step of the recurrence."""
    if not torch.cuda.is_available():
        return None
    results: dict = {"device": torch.cuda.get_device_name(), "ceilings": gpu_ceilings(), "cases": []}
    for name, (batch, length, units, sizes) in GPU_CASES.items():
        for backward in (False, True):
            steps = {
                "kru": make_scan("auto", batch, length, units, sizes, backward, "cuda"),
                "lstm": make_torch_nn(nn.LSTM, batch, length, units, backward, "cuda"),
                "portable engine": make_scan("portable", batch, length, units, sizes, backward, "cuda"),
                "reference": make_scan("reference", batch, length, units, sizes, backward, "cuda"),
            }
            times = measure(steps, repeats, "cuda", ("portable engine", "reference"))
            # Moved at least: U x_t read and h_t written; backward reads h_t and dh_t and writes dU x_t.
            moved = 4 * batch * length * 2 * units * (5 if backward else 2)
            case = {
                "case": name,
                "shape": f"{batch}, {length}, {units}",
                "pass": "forward+backward" if backward else "forward",
                "us_a_step": {other: 1e3 * value / length for other, value in times.items()},
                "faster_than": {other: times[other] / times["kru"] for other in times if other != "kru"},
                "share_of_bandwidth": moved / times["kru"] / 1e6 / results["ceilings"]["GB/s"],
            }
            results["cases"].append(case)
            ratios = ", ".join(f"{value:.1f} x {other}" for other, value in case["faster_than"].items())
            line = (
                f"{name:11} {case['shape']:>15} {case['us_a_step']['kru']:6.2f} us a step of {case['pass']}: {ratios}"
            )
            print(f"{line}; {case['share_of_bandwidth']:.1%} of the bandwidth", flush=True)
    return results


def run_growth(repeats: int) -> dict[str, dict[int, float]]:
    """Milliseconds of forward + backward against N (B=16, T=20), T (N=512, B=16) and B (N=512, T=100), 2x2 factors."""

    def cost(batch: int, length: int, bits: int) -> float:
        step = make_scan("auto", batch, length, 2**bits, [2] * bits, True, "cpu")
        return measure({"kru": step}, repeats, "cpu")["kru"]

    return {
        "N": {2**bits: cost(16, 20, bits) for bits in range(8, 17)},
        "T": {length: cost(16, length, 9) for length in (10, 30, 100, 300, 1000)},
        "B": {batch: cost(batch, 100, 9) for batch in (1, 2, 4, 8, 17, 32, 64, 128)},
    }


def plot(growth: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, (axis, values) in zip(panels, growth.items(), strict=True):
        sizes, costs = list(values), list(values.values())
        ideal = [n * math.log2(n) if axis == "N" else n for n in sizes]
        panel.loglog(sizes, costs, "o-", label="measured")
        panel.loglog(
            sizes, [costs[0] * i / ideal[0] for i in ideal], "--", label="N log N" if axis == "N" else "linear"
        )
        panel.set(xlabel=axis, ylabel="ms, forward + backward", title=f"Cost against {axis}, 2×2 factors")
        panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*CASES, *GATED_CASES, *LINEAR_CASES]
    parser.add_argument("--cases", nargs="*", default=names, help=f"among {', '.join(names)}")
    parser.add_argument("--repeats", type=int, default=7, help="rounds whose median is taken")
    parser.add_argument("--fast", action="store_true", help="leave out the portable engine and the reference")
    parser.add_argument("--growth", action="store_true", help="also measure growth in N, T and B")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--plot", help="write a PNG of cost against N, T and B here (implies --growth)")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(kru_hf.backend_report())
    print(f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}\n")
    heads = " ".join(f"{head:>8}" for head in ("ms", "x RNN", "x LSTM", "x port.", "x ref."))
    print(f"{'case':11} {'B, T, N':>15} {heads}   wanted: RNN, LSTM")
    results: dict = {"cases": [], "gpu": None, "growth": None}
    for name in names:
        if not any(name.startswith(wanted) for wanted in options.cases):
            continue
        if name in LINEAR_CASES:
            case = run_linear_case(name, options.repeats)
            results["cases"].append(case)
            ratio = f"{case['faster_than']['kru']:.2f} x the complex cell"
            print(f"{name:12} {case['shape']:>14} {case['ms']['linear']:8.1f}   {ratio}", flush=True)
            continue
        case = (run_case if name in CASES else run_gated_case)(name, options.repeats, not options.fast)
        results["cases"].append(case)
        ratio = [case["faster_than"].get(other) for other in ("rnn", "lstm", "portable engine", "reference")]
        cells = " ".join(f"{value:8.1f}" if value else f"{'-':>8}" for value in ratio)
        target = f"{case['target'][1] or '-'}, {case['target'][0]}" if case["target"] else "-"
        if "gru" in case["ms"]:
            target += f"   ({case['faster_than']['gru']:.1f} x GRU)"
        print(f"{name:11} {case['shape']:>15} {case['ms']['kru']:8.1f} {cells}   {target}", flush=True)
    print("\nGPU:" if torch.cuda.is_available() else "\nGPU: not measured (no CUDA device)")
    results["gpu"] = run_gpu(options.repeats)
    if results["gpu"]:
        ceilings = ", ".join(f"{value:,.0f} {unit}" for unit, value in results["gpu"]["ceilings"].items())
        print(f"{results['gpu']['device']}, measured ceilings: {ceilings}")
    if options.growth or options.plot:
        results["growth"] = run_growth(options.repeats)
        for axis, values in results["growth"].items():
            print(f"ms against {axis}:", ", ".join(f"{size}: {value:.1f}" for size, value in values.items()))
        costs = results["growth"]["N"]
        first, last = min(costs), max(costs)
        excess = costs[last] / costs[first] / (last * math.log2(last) / (first * math.log2(first)))
        print(f"growth over N log N from {first} to {last}: {excess:.2f} (at most 1.5)")
    if options.plot:
        plot(results["growth"], options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
