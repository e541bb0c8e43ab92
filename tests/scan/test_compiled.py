"""What torch.compile and torch.library see of the engines: one operator each way, eager's values, nothing unrolled."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import LOGITS, RELATIVE, assert_near, loud, tiny_config
from problems import ON_EVERY_ENGINE, assert_close, assert_same, device_of, problem, run

import kru_hf
from kru_hf import KRUForCausalLM, KRUForTokenClassification, kron_scan
from kru_hf.cells import CELLS
from kru_hf.configuration_kru import CELL_TYPES
from kru_hf.scan import COMPILED, ENGINES, unavailable_reason

SHAPES = [(2, 3), (3, 2), (2, 2)]
IDS = torch.randint(1, 11, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@ON_EVERY_ENGINE
def test_compiled_is_eager(engine, dtype, cell, activation):
    torch._dynamo.reset()
    call = torch.compile(kron_scan, backend="aot_eager", fullgraph=True)
    p = problem(cell, SHAPES, terms=2, masked=True, starts=True, activation=activation)
    expected = {name: value.cpu().double() for name, value in run(p, engine, dtype, device_of(engine)).items()}
    assert_close(run(p, engine, dtype, device_of(engine), call=call), expected)
    one = p.but(d_states=None, initial_state=None)
    expected = {name: value.cpu().double() for name, value in run(one, engine, dtype, device_of(engine)).items()}
    assert_close(run(one, engine, dtype, device_of(engine), call=call), expected)


@pytest.mark.slow
@ON_EVERY_ENGINE
def test_operators_are_registered_correctly(engine, dtype, cell, activation):
    p, to = problem(cell, [(2, 2), (3, 3)], 2, 3, masked=True, starts=True, activation=activation), device_of(engine)
    leaves = [leaf.to(to, dtype).requires_grad_() for leaf in (p.inputs, *p.factors, p.bias, p.initial_state)]
    inputs, *factors, bias, state = [leaves[0], *(f[None] for f in leaves[1:-2]), *leaves[-2:]]
    options = (p.mask.to(to), p.starts.to(to), cell, activation)
    torch.library.opcheck(COMPILED[engine], (inputs, factors, bias, state, *options, True))
    with torch.no_grad():
        states, final, saved = COMPILED[engine](inputs, factors, bias, state, *options, True)
        arguments = (inputs.detach(), [f.detach() for f in factors], bias.detach(), state.detach(), *options)
        backward = getattr(torch.ops.kru_hf, f"{engine}_scan_backward").default
        gradients = (torch.randn_like(states), torch.randn_like(final))
        torch.library.opcheck(backward, (*arguments, states, saved, *gradients))


@pytest.mark.slow
@pytest.mark.parametrize("initial", [False, True])
def test_the_graph_holds_the_scan_once(initial):
    """Not unrolled: as many nodes for a long sequence as for a short one."""
    sizes = []
    for length in (2, 40):
        graphs = []

        def keep(module, _, graphs=graphs):
            graphs.append(module.graph)
            return module

        torch._dynamo.reset()
        p = problem("kru", SHAPES, 3, length)
        compiled = torch.compile(kron_scan, backend=keep, fullgraph=True)
        compiled(p.inputs, p.factors, p.bias, p.initial_state if initial else None)
        (graph,) = graphs
        targets = [str(node.target) for node in graph.nodes]
        assert sum("kru_hf" in target and "portable_scan" in target for target in targets) == 1
        sizes.append(len(targets))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELL_TYPES)
@pytest.mark.parametrize(("bidirectional", "dtype"), [(False, torch.float32), (True, torch.float64)], ids=str)
def test_compiled_models_are_eager(cell, bidirectional, dtype, choose_backend):
    torch._dynamo.reset()
    choose_backend("portable")
    torch.manual_seed(0)
    options = {"cell_type": cell, "num_labels": 11}
    head = KRUForTokenClassification if bidirectional else KRUForCausalLM
    model = loud(head(tiny_config(bidirectional=bidirectional, **options))).to(dtype).train()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for called in (model, compiled):
        model.zero_grad()
        output = called(input_ids=IDS, attention_mask=mask, labels=IDS)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert expected.dtype == dtype
        assert_near(found, expected, LOGITS if dtype == torch.float32 else RELATIVE[dtype])


def test_pushed_copies_register_no_operator(monkeypatch):
    """The files under another package's name give the same bits and leave torch.ops alone."""
    package = types.ModuleType("pushed_model_code")
    package.__path__ = [str(Path(kru_hf.__file__).parent)]
    monkeypatch.setitem(sys.modules, "pushed_model_code", package)
    pushed = importlib.import_module("pushed_model_code.scan")
    for name in [name for name in sys.modules if name.startswith("pushed_model_code")]:
        monkeypatch.delitem(sys.modules, name)
    assert set(COMPILED) == set(ENGINES) and not pushed.COMPILED
    for cell in CELLS:
        p = problem(cell, SHAPES, masked=True)
        for engine in ("portable", "cpu"):
            if unavailable_reason(engine, CELLS[cell]) is None:
                dtype = torch.float32
                assert_same(run(p, engine, dtype, call=pushed.kron_scan), run(p, engine, dtype))


@pytest.mark.skipif(unavailable_reason("cpu") is not None, reason=str(unavailable_reason("cpu")))
def test_an_operator_refuses_what_its_engine_does_not_compute():
    x, factor, bias = torch.zeros(1, 2, 2, 4).double(), torch.zeros(2, 4, 4).double(), torch.zeros(4).double()
    with pytest.raises(RuntimeError, match="kru_hf::cpu_scan cannot run: inputs are torch.float64"):
        torch.ops.kru_hf.cpu_scan(x, [factor], bias, None, None, None, "kru", "modrelu", False)
