"""torch.export and ONNX: programs in stock operators alone, beside the models that they are made from."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import BLOCKS, tiny_config

from kru_hf import (
    KRUGRU,
    KRUForCausalLM,
    KRUForPianoRoll,
    KRUForSequenceClassification,
    KRUForTokenClassification,
    KRULinear,
    build_char_tokenizer,
    kroneckerize,
    to_kru,
)
from kru_hf.cells import CELLS
from kru_hf.export import __main__ as command
from kru_hf.export import standard

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = 1e-5  # of logits and states, times the largest
WIDTH = 5
CHAIN = {"frame_head": "chain", "frame_head_size": 4}
# Every cell, head and kind of block in one of them: tracing takes seconds.
TRACED = {
    "text, residual": (KRUForCausalLM, BLOCKS[3] | {"cell_type": "kru"}),
    "text, plain": (KRUForCausalLM, {"block_type": "plain", "cell_type": "kru_lstm", "recurrent_terms": 2}),
    "sequence": (KRUForSequenceClassification, BLOCKS[1] | {"cell_type": "kru_gru", "input_size": WIDTH}),
    "steps, two directions": (KRUForTokenClassification, {"cell_type": "kru_janet", "bidirectional": True}),
    "text, linear": (KRUForCausalLM, {"cell_type": "kru_linear", "transition": "selective", "block_type": "plain"}),
    "roll, chain": (KRUForPianoRoll, {"cell_type": "kru_peephole", "input_size": WIDTH} | CHAIN),
}


def make(head, options):
    """A model whose weights are far from where they start."""
    torch.manual_seed(0)
    model = head(tiny_config(num_labels=3, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def given(model, batch, length):
    torch.manual_seed(1)
    if model.config.input_size is None:
        return {"input_ids": torch.randint(0, model.config.vocab_size, (batch, length))}
    return {"input_values": (torch.rand(batch, length, WIDTH) > 0.5).float()}


def zeros(model, batch):
    config = model.config
    return torch.zeros(batch, config.num_hidden_layers, len(config.recurrent_cell.states), config.state_size)


@torch.no_grad()
def wanted(model, inputs):
    """Logits, the context of a chain, and the state (B, L, S, N) of a model, counted from a learned first one."""
    out = model(**inputs, use_cache=not model.config.bidirectional)
    found = [out.logits] + ([out.frame_context] if model.config.frame_head == "chain" else [])
    if out.past_key_values is None:
        return found
    firsts = [getattr(layer.recurrence, "first_state", None) for layer in model.model.layers]
    pairs = zip(out.past_key_values.states, firsts, strict=True)
    return [*found, torch.stack([state if first is None else state - first for state, first in pairs], 1)]


def near(actual, expected):
    for value, good in zip(actual, expected, strict=True):
        atol = TOLERANCE * max(1.0, float(good.abs().max()))
        torch.testing.assert_close(torch.as_tensor(value), good, rtol=0, atol=atol)


def streamed(run, model, inputs):
    """Outputs (B, T, ·) of one step after the other, and the state at the end."""
    (name, whole), state, steps = *inputs.items(), zeros(model, len(next(iter(inputs.values())))), []
    for t in range(whole.shape[1]):
        *outputs, state = run({name: whole[:, t], "state": state})
        steps.append(outputs)
    return [torch.stack([torch.as_tensor(x) for x in each], 1) for each in zip(*steps, strict=True)] + [state]


def check_steps(run, model, batch, length):
    """Step by step a model computes what it does at once, of a sequence's classes the last ones."""
    inputs = given(model, batch, length)
    found, good = streamed(run, model, inputs), wanted(model, inputs)
    if isinstance(model, KRUForSequenceClassification):
        found[0] = found[0][:, -1]
    elif model.config.frame_head == "chain":  # logits depend on the frame that follows: the context does not
        found, good = found[1:], good[1:]
    near(found, good)


@pytest.mark.parametrize("options", BLOCKS, ids=str)
@pytest.mark.parametrize("cell", [cell.type for cell in CELLS.values()])
def test_every_cell_and_block(cell, options):
    for head, more in (
        (KRUForCausalLM, {}),
        (KRUForSequenceClassification, {"recurrent_terms": 2}),
        (KRUForTokenClassification, {"input_size": WIDTH}),
        (KRUForPianoRoll, {"input_size": WIDTH}),
        (KRUForPianoRoll, {"input_size": WIDTH} | CHAIN),
    ):
        model = make(head, options | more | {"cell_type": cell})
        module = standard.programs(model)[0].module
        check_steps(lambda inputs, module=module: module(*inputs.values()), model, 2, 4)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("transition", ["fixed", "selective"])
def test_linear_cell(transition, decay):
    sizes = {"factor_shapes": [[1, 1], [2, 2], [3, 3]], "state_size": 12}
    for block_type in ("plain", "residual"):
        options = {"cell_type": "kru_linear", "transition": transition, "decay": decay, "num_heads": 2}
        model = make(KRUForCausalLM, options | sizes | {"block_type": block_type})
        module = standard.programs(model)[0].module
        check_steps(lambda inputs, module=module: module(*inputs.values()), model, 2, 4)


def test_linear_network():
    model = make(KRUForCausalLM, {"activation": "identity", "factor_shapes": [[2, 3], [3, 2]]})
    module = standard.programs(model)[0].module
    check_steps(lambda inputs: module(*inputs.values()), model, 2, 4)


@pytest.mark.parametrize("block_type", ["plain", "residual"])
def test_where_both_directions_end(block_type):
    model = make(KRUForSequenceClassification, {"bidirectional": True, "block_type": block_type})
    (program,) = standard.programs(model)
    features = torch.randn(2, 4, model.config.hidden_size)
    assert torch.equal(program.module.ends(features), model.pool(features, None))


def runner(path):
    """A file as a function of named inputs."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda inputs: module(*inputs.values())
    session = onnxruntime.InferenceSession(path)
    return lambda inputs: session.run(None, {name: np.asarray(value) for name, value in inputs.items()})


def all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACED)
@pytest.mark.parametrize("format", standard.SUFFIXES)
def test_files(format, case, tmp_path):
    """Equal to the model for other batches and lengths than were traced; of no other size; one loop a direction."""
    model = make(*TRACED[case])
    written = standard.export_standard(model, format, tmp_path)
    runs = {path.stem: runner(path) for path in written}
    carried = not model.config.bidirectional
    for batch, length in ((1, 1), (3, 7)):
        inputs = given(model, batch, length)
        state = {"state": zeros(model, batch)} if carried else {}
        near(runs["sequence"](inputs | state), wanted(model, inputs))
    if carried:
        check_steps(runs["step"], model, 3, 7)
        name, whole = *inputs, next(iter(inputs.values()))
        state = torch.as_tensor(runs["sequence"]({name: whole[:, :4], "state": state["state"]})[-1])
        near(runs["sequence"]({name: whole[:, 4:], "state": state})[-1:], wanted(model, inputs)[-1:])
    if "keys" in runs:
        logits, context, _ = wanted(model, inputs)
        lower = whole[:, 1:] * (torch.arange(WIDTH) < 3)  # (B, T - 1, W)
        below = runs["keys"]({"context": context[:, :-1].flatten(0, 1), "lower": lower.flatten(0, 1)})[0]
        near([torch.as_tensor(below)[:, 3]], [logits[:, :-1, 3].flatten()])
    if format == "onnx":
        for path, program in written.items():
            found = onnx.load(path)
            onnx.checker.check_model(found, full_check=True)
            nodes = list(all_nodes(found.graph))
            assert {node.domain for node in nodes} == {""} and b"standard.py" not in path.read_bytes()
            loops = model.config.num_hidden_layers * model.config.directions * (path.stem == "sequence")
            assert [node.op_type for node in nodes].count("Scan") == loops
            numbers = sum(int(np.prod(tensor.dims)) for tensor in found.graph.initializer)
            assert numbers < model.num_parameters() + 300  # masks and shapes
            for side, shapes in ((found.graph.input, program.inputs), (found.graph.output, program.outputs)):
                axes = {x.name: tuple(d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim) for x in side}
                assert axes == shapes


LAYERS = {
    "lstm": lambda: to_kru(kroneckerize(torch.nn.LSTM(5, 12, 2), [(3, 3), (4, 4)])[0]),
    "gru": lambda: KRUGRU(5, 12, factor_size=4, bidirectional=True, batch_first=True),
    "linear": lambda: KRULinear(5, 12, factor_shapes=[(2, 2), (3, 3)], heads=2, transition="selective", decay=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("format", standard.SUFFIXES)
def test_layers(format, name, tmp_path):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    ((path, program),) = standard.export_standard(layer, format, tmp_path).items()
    sizes = {"batch": 3, "length": 7}
    inputs = {name: torch.randn([sizes.get(n, n) for n in shape]) for name, shape in program.inputs.items()}
    x, *state = inputs.values()
    with torch.no_grad():
        output, final = layer(x, tuple(state) if len(state) > 1 else state[0])
    near(runner(path)(inputs), [output, *(final if isinstance(final, tuple) else (final,))])


ALONE = """
import json, sys
sys.modules["kru_hf"] = None
import numpy as np, onnxruntime, torch
folder, ids, state = sys.argv[1], json.loads(sys.argv[2]), np.zeros(json.loads(sys.argv[3]), np.float32)
session = onnxruntime.InferenceSession(folder + "/sequence.onnx")
first = session.run(None, {"input_ids": np.array(ids), "state": state})[0]
second = torch.export.load(folder + "/sequence.pt2").module()(torch.tensor(ids), torch.tensor(state))[0]
print(json.dumps([first.tolist(), second.tolist()]))
"""


@pytest.mark.slow
def test_command_and_files_without_the_package(tmp_path, capsys):
    tokenizer = build_char_tokenizer("the quick fox")
    model = make(KRUForCausalLM, {"vocab_size": len(tokenizer)})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for format in standard.SUFFIXES:
        words = ["--model", str(tmp_path / "model"), "--format", format, "--output_dir", str(tmp_path / "out")]
        assert command.main(words) == 0
        told = capsys.readouterr().out
        assert f"sequence.{standard.SUFFIXES[format]}" in told and "next_state is the state of the next call" in told
        assert "input_ids (batch, length), state (batch, 2, 2, 6) -> logits (batch, length, " in told
    inputs = given(model, 2, 5)
    arguments = [str(tmp_path / "out"), json.dumps(inputs["input_ids"].tolist()), json.dumps(zeros(model, 2).shape)]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=True)
    for logits in json.loads(done.stdout):
        near([torch.tensor(logits)], wanted(model, inputs)[:1])


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    words = ["--model", "none", "--output_dir", str(tmp_path / "out"), "--format"]
    with pytest.raises(SystemExit):
        command.main([*words, "onnx", "--dtype", "int8"])
    assert "dtype of format onnx must be fp32, got int8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="model must have a head, got KRUModel"):
        standard.programs(make(KRUForCausalLM, {}).model)
    with pytest.raises(ValueError, match="bidirectional = False, got True"):
        standard.StandardModel(make(KRUForTokenClassification, {"bidirectional": True}), whole=False)
    monkeypatch.setattr(standard.importlib.util, "find_spec", functools.partial(lambda name: None))
    assert command.main([*words, "onnx"]) == 1
    assert "format onnx needs onnx and onnxscript: pip install 'kru-hf[export]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
