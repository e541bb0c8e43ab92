"""The C runtime against the models: every cell, block, head and dtype; its weight file; its sources on their own."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kru_hf import (
    KRUConfig,
    KRUForCausalLM,
    KRUForPianoRoll,
    KRUForSequenceClassification,
    KRUForTokenClassification,
    build_char_tokenizer,
)
from kru_hf.cells import BY_TYPE
from kru_hf.export import StreamingModel, weight_file
from kru_hf.export.__main__ import main
from kru_hf.export.streaming import library
from kru_hf.export.weight_file import CELL_ORDER, rounded_weights

ROOT = Path(__file__).resolve().parents[2]
EXPORT = ROOT / "kru_hf" / "export"
TOLERANCE = {"fp32": 1e-5, "int8": 2e-4, "int4": 2e-4}  # beside the model with the same rounded weights, of the largest
TEXT = "the quick brown fox jumps over the lazy dog, é"
COMPILER = shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

LOGITS = r"""
#include <stdio.h>
#include "kru_run.h"
static uint64_t file[1 << 15], memory[1 << 17];
int main(int count, char **words) {
    FILE *from = fopen(words[count - 1], "rb");
    size_t needed, bytes = fread(file, 1, sizeof file, from);
    if (kru_check(file, bytes, &needed) || needed > sizeof memory) return 1;
    kru *k = kru_open(file, bytes, memory);
    const float *logits = NULL;
    for (int token = 3, i = 0; i < 3; i++, token = i) logits = kru_step(k, token);
    puts(kru_instructions());
    for (int i = 0; i < kru_outputs(k); i++) printf("%.9g\n", logits[i]);
    return 0;
}
"""
OPTIONS = {
    "residual": {},
    "plain": {"block_type": "plain"},
    "terms, feed-forward, rectangular": {
        "kronecker_terms": 4,
        "intermediate_size": 40,
        "hidden_size": 20,
        "state_size": 24,
        "factor_shapes": [[2, 3], [4, 2], [3, 4]],
    },
    "sum of products, odd widths": {
        "recurrent_terms": 3,
        "state_size": 35,
        "factor_shapes": [[5, 5], [7, 7]],
        "kronecker_terms": 5,
        "hidden_size": 15,
        "num_hidden_layers": 3,
    },
    "low-rank maps": {"io_rank": 5, "state_size": 24, "hidden_size": 20, "intermediate_size": 12},
    "one factor, no norm": {"factor_shapes": [[18, 18]], "readout_norm": False, "kronecker_terms": 2},
}


def noisy(model):
    """No weight is zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def with_rounded_weights(model, dtype):
    """The model with the weights that its file has."""
    model.load_state_dict(rounded_weights(model, dtype), strict=False)
    return model


def agree(model, dtype, inputs, outputs=None):
    """Whether the runtime computes what the model does with the same weights."""
    stream = StreamingModel(weight_file(model, None, dtype))
    found = stream.run(inputs)
    with torch.no_grad():
        given = (
            {"input_values": torch.tensor(inputs)[None]} if stream.input_size else {"input_ids": torch.tensor([inputs])}
        )
        expected = with_rounded_weights(model, dtype)(**given).logits.squeeze(0).numpy()
    found = found[-1] if expected.ndim == 1 else found
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(expected).max(), 1))


def tokens(count=40, vocabulary=29):
    return np.random.default_rng(0).integers(0, vocabulary, count).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", [name for name in BY_TYPE if name != "kru_linear"])
def test_language_model(cell, options, dtype):
    agree(noisy(KRUForCausalLM(KRUConfig(vocab_size=29, cell_type=cell, **OPTIONS[options]))), dtype, tokens())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("head", [KRUForSequenceClassification, KRUForTokenClassification, KRUForPianoRoll])
def test_frames(head, width, dtype):
    options = {"frame_head": "independent"} if head is KRUForPianoRoll else {}
    for block_type in ("plain", "residual"):
        config = KRUConfig(
            input_size=width, state_size=12, factor_size=4, block_type=block_type, num_labels=5, **options
        )
        frames = np.random.default_rng(0).random((30, width), np.float32)
        agree(noisy(head(config)), dtype, frames)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chain_of_keys(dtype):
    """The nats of frames, and of all frames of 5 keys how often each is drawn."""
    model = noisy(
        KRUForPianoRoll(
            KRUConfig(input_size=5, state_size=12, block_type="plain", frame_head="chain", frame_head_size=6)
        )
    )
    stream = StreamingModel(weight_file(model, None, dtype))
    frames = (np.random.default_rng(0).random((9, 5)) < 0.4).astype(np.float32)
    stream.run(frames)
    everything = (np.arange(32)[:, None] >> np.arange(5) & 1).astype(np.float32)  # (32, 5)
    nats = np.array([stream.nats(frame) for frame in everything])
    with torch.no_grad():
        piece = torch.from_numpy(np.concatenate((frames, everything[11:12])))[None]  # (1, 10, 5)
        logits = with_rounded_weights(model, dtype)(input_values=piece).logits[0, 8]  # of the last frame
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, piece[0, 9], reduction="sum")
    assert abs(nats[11] - expected.item()) < 10 * TOLERANCE[dtype]
    assert abs(np.exp(-nats).sum() - 1) < 1e-5
    draws = 4000
    drawn = [stream.draw(seed=seed)[0] @ 2 ** np.arange(5) for seed in range(draws)]
    counts = np.bincount(np.array(drawn, int), minlength=32)
    p = np.exp(-nats)
    assert np.all(np.abs(counts - draws * p) < 5 * np.sqrt(draws * p * (1 - p)) + 1)
    for seed in range(20):
        assert 2 <= stream.draw(voices=(2, 3), seed=seed)[0].sum() <= 3
    frame, forced = stream.draw(temperature=0, voices=(5, 5))
    assert frame.sum() == 5 and forced


def test_linear_network():
    agree(noisy(KRUForCausalLM(KRUConfig(vocab_size=29, activation="identity"))), "fp32", tokens())


def test_every_cell_has_its_number():
    assert [cell.name for cell in BY_TYPE.values() if cell.name != "linear"] == list(CELL_ORDER)


@pytest.fixture(scope="module")
def text_model():
    tokenizer = build_char_tokenizer(TEXT)
    return noisy(KRUForCausalLM(KRUConfig(vocab_size=len(tokenizer), state_size=24))), tokenizer


@pytest.fixture(scope="module")
def data(text_model):
    return weight_file(*text_model)


def test_stream_and_state(text_model, data):
    stream = StreamingModel(data)
    ids = text_model[1](TEXT)["input_ids"]
    assert stream.tokens(TEXT) == ids and "".join(map(stream.text, ids)) == TEXT
    whole = stream.run(ids)
    stream.reset()
    first = [stream.step(token) for token in ids[:20]]
    state = stream.state
    rest = stream.run(ids[20:])
    np.testing.assert_array_equal(np.concatenate((first, rest)), whole)
    other = StreamingModel(data)
    other.state = state
    np.testing.assert_array_equal(other.run(ids[20:]), rest)


def test_generate(text_model, data, tmp_path):
    stream = StreamingModel(data)
    greedy = stream.generate("the ", 20, temperature=0)
    model, tokenizer = text_model
    ids = tokenizer("the ", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy == tokenizer.decode(expected[0, 4:]).replace(tokenizer.unk_token, "")
    stream.reset()
    drawn = stream.generate("the ", 50, temperature=1.5, top_p=0.9, seed=3)
    stream.save(tmp_path / "model.kru")
    again = StreamingModel.load(tmp_path / "model.kru")
    assert "".join(again.stream("the ", 50, 1.5, 0.9, seed=3, burst=7)) == drawn
    assert again.generate("", 5, seed=1) == stream.generate("", 5, seed=1)


def test_draws_follow_their_probabilities(data):
    """Temperature and top_p as in transformers: a token is kept while those before it have less than top_p."""
    logits = StreamingModel(data).step(3)
    order = np.argsort(-logits)
    p = np.exp((logits - logits.max()) / 0.8)
    p /= p.sum()
    kept = order[: int((np.cumsum(p[order]) < 0.7).sum()) + 1]
    expected = np.zeros(len(p))
    expected[kept] = p[kept] / p[kept].sum()
    seed, draws = ctypes.c_uint64(5), 40_000
    draw = library().kru_sample
    draw.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_float, ctypes.c_void_p]
    found = [draw(logits.ctypes.data, len(p), 0.8, 0.7, ctypes.byref(seed)) for _ in range(draws)]
    counts = np.bincount(found, minlength=len(p))
    assert not counts[expected == 0].any()
    deviation = np.sqrt(draws * expected * (1 - expected)) + 1e-9
    assert np.all(np.abs(counts - draws * expected) < 5 * deviation)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.step(99), "below"),
        (lambda s: s.run([0, -1]), "numbers from 0 to"),
        (lambda s: s.generate("THE", 3), "does not know 'T'"),
        (lambda s: s.generate("", 3), "prompt must hold at least one character"),
        (lambda s: s.generate("the", 0), "length must be at least 1, got 0"),
        (lambda s: s.generate("the", 3, temperature=-1), "temperature must be 0 or more and finite, got -1"),
        (lambda s: s.generate("the", 3, top_p=0), "top_p must be above 0 and at most 1, got 0"),
        (lambda s: setattr(s, "state", np.zeros(3)), "state must have the shape"),
    ],
)
def test_bad_input(data, call, message):
    with pytest.raises(ValueError, match=message):
        call(StreamingModel(data))


def test_models_that_cannot_be_run_by_steps(text_model):
    with pytest.raises(ValueError, match="bidirectional = False, got True"):
        weight_file(KRUForTokenClassification(KRUConfig(bidirectional=True, state_size=16)))
    with pytest.raises(ValueError, match="cell_type must not be 'kru_linear'"):
        weight_file(KRUForCausalLM(KRUConfig(cell_type="kru_linear", state_size=16)))
    with pytest.raises(ValueError, match="dtype must be one of fp32, int8, int4, got 'fp16'"):
        weight_file(*text_model, "fp16")
    with pytest.raises(ValueError, match="model must be one of KRUForCausalLM"):
        weight_file(text_model[0].model)


@pytest.mark.parametrize("change", ["empty", "cut", "longer", "altered", "magic"])
def test_files_that_are_not_whole(data, tmp_path, change):
    path = tmp_path / "model.kru"
    middle = len(data) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-4],
            "longer": data + bytes(4),
            "altered": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "magic": b"KRU1" + data[4:],
        }[change]
    )
    with pytest.raises(ValueError, match=str(path)):
        StreamingModel.load(path)


def compile_c(out, *sources, flags=()):
    subprocess.run(
        [COMPILER, "-std=c99", "-Wall", "-Wextra", "-Werror", *flags, *map(str, sources), "-o", str(out)], check=True
    )


@needs_compiler
def test_hostile_files(text_model, tmp_path):
    """Cut, altered and hostile files, under the sanitizers."""
    frames = noisy(
        KRUForSequenceClassification(KRUConfig(input_size=3, state_size=12, block_type="plain", num_labels=5))
    )
    sanitizers = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{EXPORT}")
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    if subprocess.run(
        [COMPILER, *sanitizers, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    ).returncode:
        pytest.skip("the C compiler has no sanitizers")
    compile_c(tmp_path / "fuzz", ROOT / "tests" / "export" / "fuzz_weights.c", flags=sanitizers)
    for seed, (model, dtype) in enumerate([(text_model[0], "int8"), (text_model[0], "int4"), (frames, "fp32")]):
        path = tmp_path / "model.kru"
        path.write_bytes(weight_file(model, text_model[1] if model is text_model[0] else None, dtype))
        done = subprocess.run([tmp_path / "fuzz", path, "300", str(seed)], capture_output=True, text=True)
        assert done.returncode == 0 and "accepted" in done.stdout, done.stderr


@needs_compiler
def test_example_in_c(text_model, tmp_path):
    """What the command writes compiles without warnings and without kru_hf, and writes the text that Python does."""
    model, tokenizer = text_model
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out, program = tmp_path / "out", tmp_path / "text"
    assert main(["--model", str(tmp_path / "model"), "--dtype", "int8", "--output_dir", str(out)]) == 0
    assert {path.name for path in out.iterdir()} >= {"kru_run.c", "kru_run.h", "model.kru", "weights.h"}
    expected = "the " + StreamingModel.load(out / "model.kru").generate("the ", 30, 0) + "\n"
    for flags in (("-DKRU_SCALAR", "-pedantic"), ("-DKRU_GENERIC",), ()):
        compile_c(program, ROOT / "examples" / "text.c", out / "kru_run.c", flags=(*flags, "-Os", f"-I{out}"))
        assert (
            subprocess.run([program, "the ", "30", "0"], capture_output=True, text=True, check=True).stdout == expected
        )


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang, which compiles for other machines")
def test_compiles_for_arm(tmp_path):
    """The vectors of NEON, without warnings; run where there is an emulator."""
    options = OPTIONS["sum of products, odd widths"]
    model = noisy(KRUForCausalLM(KRUConfig(vocab_size=29, cell_type="kru_lstm", **options)))
    model_file, program = tmp_path / "model.kru", tmp_path / "logits"
    model_file.write_bytes(data := weight_file(model, None, "int8"))
    (tmp_path / "logits.c").write_text(LOGITS)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-std=c99", "-O2"]
    sources = [str(tmp_path / "logits.c"), str(EXPORT / "kru_run.c"), f"-I{EXPORT}"]
    subprocess.run([*zig, "-Wall", "-Wextra", "-Werror", *sources, "-o", str(program)], check=True)
    if (emulator := shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")) is None:
        return
    done = subprocess.run([emulator, program, model_file], capture_output=True, text=True, check=True)
    found = np.array([float(word) for word in done.stdout.split()[1:]])
    assert done.stdout.split()[0] == "neon"
    expected = StreamingModel(data).run([3, 1, 2])[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE["int8"] * np.abs(expected).max())


def test_export_of_what_is_not_a_model(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_library_names_its_instructions():
    assert library().kru_instructions().decode() in ("avx512", "avx2", "neon", "generic")
