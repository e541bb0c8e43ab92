"""Cost of a whole training step, ours against `nn.LSTM` in the same loop, all in one run.

    python tests/benchmarks/train_step.py [RECIPE] [--option value …] [--rounds 15] [--threads 1] [--precisions no,bf16]

RECIPE and options are those of `training.train`, by default the released Kronecker-LSTM of 123K parameters on the
embedded text. Its rivals are language models of one `nn.LSTM` with as many parameters and inputs 32 wide, as it is
usual, and with inputs as wide as ours and as many units, parameters, or multiply-adds. (Plain blocks, whose embedding
is the input map, have no width: theirs are 32 wide.) Each contender is the
training loop itself (batch, forward, backward, clipping, AdamW); steps take turns, medians are printed. `--profile`
says where the time of our step goes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))  # `training` is part of the checkout, not of what is installed

import kru_hf
from training.common.machine import keep_freed_memory
from training.common.stopping import StopRequest
from training.loop.accelerate_loop import TrainingLoop
from training.loop.arguments import parse_arguments
from training.loop.run import prepare_task
from training.models.costs import int8_bytes, multiply_adds

RELEASED = Path(__file__).parents[2] / "training" / "recipes" / "ptb_char_120k_gated.yaml"
NATURAL = 32  # width of the embedding that an LSTM of characters is usually given
WARM = 2  # rounds that are not counted
# What each operation of a profile belongs to; the first name that an operation contains decides.
PARTS = {
    "recurrence": ("enginescan", "lstm", "rnn", "gru"),
    "embedding": ("embedding", "index"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "optimizer and clipping": ("adam", "foreach", "linalg_vector_norm"),
    "products": ("mm", "linear", "matmul"),
    "norms": ("rms_norm", "normedlinear"),
    "copies": ("copy", "contiguous", "clone", "cat"),
}


def make_loop(folder: Path, words: list[str], precision: str, stop: StopRequest) -> TrainingLoop:
    """The training loop of one contender."""
    arguments = parse_arguments([*words, "--output_dir", str(folder), "--report_to", "none"])
    task, model = prepare_task(arguments)
    AcceleratorState._reset_state()  # each has its own precision
    loop = TrainingLoop(arguments, task, model, Accelerator(mixed_precision=precision), stop)
    loop.model.train()
    loop.set_rate()
    return loop


def parameters(units: int, width: int, symbols: int) -> int:
    """Of a language model of one `nn.LSTM`."""
    return 4 * units * (units + width + 2) + symbols * (units + width + 1)


def products(units: int, width: int, symbols: int) -> int:
    """Its multiply-adds for a symbol."""
    return 4 * units * (units + width) + symbols * units


def as_many(count, wanted: int, width: int, symbols: int) -> int:
    """The units with which it has, by that count, as many as ours, or nearly so."""
    return min(range(1, 4096), key=lambda units: abs(count(units, width, symbols) - wanted))


def rivals(loop: TrainingLoop) -> dict[str, list[str]]:
    """Options of the LSTMs beside our model."""
    config, size, symbols = loop.model.config, loop.model.num_parameters(), loop.model.config.vocab_size
    width = config.hidden_size if config.block_type == "residual" else NATURAL
    sizes = {
        ("parameters", NATURAL): as_many(parameters, size, NATURAL, symbols),
        ("parameters", width): as_many(parameters, size, width, symbols),
        ("multiply-adds", width): as_many(products, multiply_adds(loop.model), width, symbols),
        ("units", width): config.state_size,
    }
    run, data = loop.options, loop.arguments.task
    batch = ["--per_device_train_batch_size", str(run.per_device_train_batch_size)]
    shared = ["--architecture", "lstm", "--num_hidden_layers", "1", "--sequence_length", str(data.sequence_length)]
    shared += ["--dataset", loop.arguments.data.dataset, *batch]
    return {
        f"LSTM {units}, input {width}, as many {same}": [*shared, f"--state_size={units}", f"--hidden_size={width}"]
        for (same, width), units in sizes.items()
    }


def where_time_goes(loop: TrainingLoop, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step that each part takes, by operation names; the rest is "other"."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            loop.train_step()
    parts: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        part = next((p for p, names in PARTS.items() if any(name in event.key.lower() for name in names)), "other")
        parts[part] += event.self_cpu_time_total / 1e3 / steps
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def timed(loop: TrainingLoop) -> tuple[float, float]:
    """Milliseconds of a step, on the wall and of processors."""
    wall, processors = time.perf_counter(), time.process_time()
    loop.train_step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processors)


def compare(words: list[str], precision: str, rounds: int, profiled: bool, folder: Path, stop: StopRequest) -> dict:
    """Print the table of one precision; its rows by name."""
    loops = {"ours": make_loop(folder / "ours", words, precision, stop)}
    for name, own in rivals(loops["ours"]).items():
        loops[name] = make_loop(folder / name, own, precision, stop)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for _ in range(WARM + rounds):
        for name, loop in loops.items():
            times[name].append(timed(loop))
    print(f"\nprecision {precision}, {torch.get_num_threads()} threads, medians of {rounds} rounds")
    head = ("parameters", "int8 bytes", "multiply-adds", "ms", "processor ms", "ours / this", "of processor")
    print(f"{'':46}" + "".join(f"{word:>14}" for word in head))
    rows, own = {}, (1.0, 1.0)
    for name, loop in loops.items():
        wall, processors = (statistics.median(values) for values in zip(*times[name][WARM:], strict=True))
        own = (wall, processors) if name == "ours" else own
        model = loop.model
        row = (model.num_parameters(), int8_bytes(model), multiply_adds(model))
        rows[name] = dict(zip(head, (*row, wall, processors, own[0] / wall, own[1] / processors), strict=True))
        told = "".join(f"{value:14,}" for value in row) + f"{wall:14.1f}{processors:14.1f}"
        print(f"{name:46}{told}{own[0] / wall:14.2f}{own[1] / processors:14.2f}", flush=True)
    if profiled:
        parts = where_time_goes(loops["ours"])
        print("ours: " + ", ".join(f"{part} {cost:.1f} ms" for part, cost in parts.items()))
        rows["ours"] |= {"parts": parts}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each whose median is taken")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the engine")
    parser.add_argument("--precisions", default="no,bf16", help="values of --mixed_precision, one table each")
    parser.add_argument("--profile", action="store_true", help="say where the time of our step goes")
    parser.add_argument("--json", help="write the results here")
    options, words = parser.parse_known_args()
    if not words or words[0].startswith("-"):
        words = [str(RELEASED), *(["--dataset", "python_docs"] if "--dataset" not in words else []), *words]
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(kru_hf.backend_report())
    with StopRequest() as stop, tempfile.TemporaryDirectory() as folder:
        tables = {
            precision: compare(words, precision, options.rounds, options.profile, Path(folder) / precision, stop)
            for precision in options.precisions.split(",")
        }
    if options.json:
        Path(options.json).write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
