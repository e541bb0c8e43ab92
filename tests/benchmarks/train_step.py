"""Cost of a whole training step of `char_lm`, ours against torch's own layers in the same loop, in one run.

    python tests/benchmarks/train_step.py [--state_size 512] [--batch 128] [--length 100] [--repeats 7] [--json FILE]

Each contender is the training loop itself (`training.loop`: batch, forward, backward, clipping,
AdamW) on the embedded text, with as many units as the others; the steps run in turn and medians are printed.
`--profile` says where the time of our step goes, and where it went while the readout was two operations.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))  # `training` is part of the checkout, not of what is installed

import kru_hf
from kru_hf import modeling_kru
from training.common.stopping import StopRequest
from training.loop.accelerate_loop import TrainingLoop
from training.loop.arguments import parse_arguments
from training.loop.run import prepare_task

# What each operation of a profile belongs to; the first name that an operation contains decides.
PARTS = {
    "recurrence": ("kru_hf", "lstm", "rnn", "gru", "mkldnn"),
    "embedding": ("embedding", "index"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "readout": ("mm", "linear", "matmul"),
    "optimizer and clipping": ("adam", "foreach", "norm", "sqrt", "lerp"),
    "copies": ("copy", "contiguous", "clone", "cat"),
}


TWO_STEP = "kru 2×2 before"


def two_step_readout(x, module, epsilon, scale=1.0):
    """`normed_linear` as it was at first: a normalised copy of the states x (B, T, 2N), then the map."""
    return module(x if epsilon is None else F.rms_norm(x, x.shape[-1:], eps=epsilon))  # (B, T, out)


def train_step(name: str, loop: TrainingLoop) -> None:
    """One step of a contender, with the readout that it has."""
    if name != TWO_STEP:
        loop.train_step()
        return
    with mock.patch.object(modeling_kru, "normed_linear", two_step_readout):
        loop.train_step()


def make_loop(folder: str, batch: int, length: int, words: list[str], stop: StopRequest) -> TrainingLoop:
    """The training loop of one contender."""
    common = ["--output_dir", folder, "--report_to", "none", "--per_device_train_batch_size", str(batch)]
    arguments = parse_arguments([*common, "--sequence_length", str(length), *words])
    task, model = prepare_task(arguments)
    loop = TrainingLoop(arguments, task, model, Accelerator(), stop)
    loop.model.train()
    loop.set_rate()
    return loop


def contenders(state_size: int) -> dict[str, list[str]]:
    """Options of each: the recipe's own kind of network with 2x2 factors and with larger ones, and torch's layers."""
    kru = ["--state_size", str(state_size), "--block_type", "plain"]
    size = ["--state_size", str(state_size), "--hidden_size", str(state_size)]
    return {
        "kru 2×2": [*kru, "--factor_size", "2"],
        TWO_STEP: [*kru, "--factor_size", "2"],
        "kru 8": [*kru, "--factor_size", "8"],
        "lstm": ["--architecture", "lstm", *size],
        "gru": ["--architecture", "gru", *size],
        "rnn": ["--architecture", "rnn", *size],
    }


def where_time_goes(name: str, loop: TrainingLoop, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step that each part takes, by operation names; the rest is "other"."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            train_step(name, loop)
    parts: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        part = next((p for p, names in PARTS.items() if any(name in event.key.lower() for name in names)), "other")
        parts[part] += event.self_cpu_time_total / 1e3 / steps
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state_size", type=int, default=512, help="units of every contender")
    parser.add_argument("--batch", type=int, default=128, help="streams")
    parser.add_argument("--length", type=int, default=100, help="characters of a window")
    parser.add_argument("--repeats", type=int, default=7, help="rounds whose median is taken")
    parser.add_argument("--profile", action="store_true", help="say where the time of our steps goes")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    print(kru_hf.backend_report())
    with StopRequest() as stop, tempfile.TemporaryDirectory() as folder:
        loops = {
            name: make_loop(str(Path(folder) / name), options.batch, options.length, words, stop)
            for name, words in contenders(options.state_size).items()
        }
        times: dict[str, list[float]] = {name: [] for name in loops}
        for repeat in range(options.repeats + 1):  # the first round warms up
            for name, loop in loops.items():
                start = time.perf_counter()
                train_step(name, loop)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if repeat:
                    times[name].append(time.perf_counter() - start)
        characters = options.batch * options.length
        rates = {name: characters / statistics.median(values) for name, values in times.items()}
        print(f"\nN={options.state_size}, B={options.batch}, T={options.length}, {torch.get_num_threads()} threads")
        print(f"{'':15} {'parameters':>12} {'ms/step':>9} {'char/s':>9} {'x LSTM':>7} {'x RNN':>7}")
        for name, rate in rates.items():
            count = loops[name].model.num_parameters()
            row = f"{name:15} {count:12,} {1e3 * characters / rate:9.1f} {rate:9,.0f}"
            print(f"{row} {rate / rates['lstm']:7.2f} {rate / rates['rnn']:7.2f}")
        parts = {name: where_time_goes(name, loops[name]) for name in loops if options.profile}
    for name, costs in parts.items():
        print(f"{name}: " + ", ".join(f"{part} {cost:.1f} ms" for part, cost in costs.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({"characters_per_second": rates, "parts_ms": parts}, indent=1))


if __name__ == "__main__":
    main()
