"""The torch engine under torch.compile: one operator each way, whose results are those of eager calls."""

import importlib
import pathlib
import sys

import pytest
import torch
from helpers import LOGITS, RELATIVE, assert_near, random_problem, run_engine, tiny_config
from kru_hf.scan_gated import GATED_CELLS
from kru_hf.scan_gated_torch import kru_gated_scan_torch
from kru_hf.scan_torch import kru_scan_torch
from torch.utils._pytree import tree_map_only

from kru_hf import KRUForCausalLM, KRUForTokenClassification, scan_gated_torch, scan_torch
from kru_hf.configuration_kru import CELL_TYPES

CELLS = list(CELL_TYPES)
GATED = list(GATED_CELLS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# One factor, factors that are merged in runs of several, and rectangular ones.
SHAPES = [[(3, 3)], [(2, 2)] * 5, [(2, 3), (2, 2), (3, 2), (1, 2), (2, 1)]]
BATCH, LENGTH = 3, 19  # more steps than the backward pass takes at once
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other tests would be recompiled for new shapes, and count towards a limit."""
    torch._dynamo.reset()


def gated_problem(cell, shapes, *, dtype=torch.float64, masked=True):
    """Inputs, factors, bias, initial state and mask of a gated scan."""
    generator = torch.Generator().manual_seed(0)
    gates, rows, planes = GATED_CELLS[cell]
    units = torch.Size([p for p, _ in shapes]).numel()

    def leaf(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.7 if masked else None
    factors = [leaf(gates, p, q, scale=q**-0.5) for p, q in shapes]
    return leaf(BATCH, LENGTH, gates, units), factors, leaf(rows, units), leaf(BATCH, planes, units), mask


def gated_run(engine, arguments, cell, of=(0, 1)):
    """[states, final state, every gradient] of a weighted sum of the outputs that ``of`` names."""
    inputs, factors, bias, initial, _ = arguments
    outputs = engine(*arguments, cell=cell)
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    loss = sum((outputs[i] * weights[i]).sum() for i in of)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, [inputs, bias, initial, *factors])]


@DTYPES
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(("masked", "activation"), [(True, "modrelu"), (False, "identity")])
def test_compiled_is_eager(shapes, masked, activation, dtype):
    problem = random_problem(shapes, BATCH, LENGTH, dtype=dtype, masked=masked)
    compiled = torch.compile(kru_scan_torch, backend="aot_eager", fullgraph=True)
    found = run_engine(compiled, problem, activation=activation)
    for a, b in zip(found, run_engine(kru_scan_torch, problem, activation=activation), strict=True):
        assert_near(a, b, RELATIVE[dtype])


@DTYPES
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(("cell", "masked"), [("lstm", True), ("gru", False), ("janet", True)])
def test_compiled_gated_is_eager(cell, shapes, masked, dtype):
    arguments = gated_problem(cell, shapes, dtype=dtype, masked=masked)
    compiled = torch.compile(kru_gated_scan_torch, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        gated_run(compiled, arguments, cell), gated_run(kru_gated_scan_torch, arguments, cell), strict=True
    ):
        assert_near(a, b, RELATIVE[dtype])


@pytest.mark.parametrize("of", [(0,), (1,)], ids=["states", "final"])
@pytest.mark.parametrize("cell", GATED)
def test_one_output_may_go_unused(cell, of):
    """Called as they are, the operators are told of an output without a gradient."""
    arguments = gated_problem(cell, SHAPES[1])

    def engine(inputs, factors, bias, initial, mask, cell):
        return scan_gated_torch._scan_op(inputs, factors, bias, initial, mask)[:2]

    expected = gated_run(kru_gated_scan_torch, arguments, cell, of)
    for a, b in zip(gated_run(engine, arguments, cell, of), expected, strict=True):
        assert_near(a, b, RELATIVE[torch.float64])


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
        problem = random_problem(SHAPES[1], BATCH, length)
        state = problem.initial if initial else None
        compiled = torch.compile(kru_scan_torch, backend=keep, fullgraph=True)
        compiled(problem.inputs, problem.factors, problem.bias, state)
        (graph,) = graphs
        targets = [str(node.target) for node in graph.nodes]
        assert sum("kru_hf" in target and "scan_torch" in target for target in targets) == 1
        sizes.append(len(targets))
    assert sizes[0] == sizes[1]


def detached(values):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), values)


@pytest.mark.parametrize(("masked", "modrelu"), [(True, True), (False, False)])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_opcheck(shapes, masked, modrelu):
    p = random_problem(shapes, BATCH, LENGTH, dtype=torch.float64, masked=masked)
    arguments = (p.inputs, p.factors, p.bias, p.initial, p.mask)
    torch.library.opcheck(scan_torch._scan_op, (*arguments, modrelu))
    states, _ = scan_torch._scan_op(*arguments, modrelu)
    given = detached((p.grad_states, p.grad_final, *arguments, states))
    torch.library.opcheck(scan_torch._scan_backward_op, (*given, modrelu))


@pytest.mark.parametrize(("shapes", "masked"), list(zip(SHAPES, (False, True, True), strict=True)), ids=str)
@pytest.mark.parametrize("cell", GATED)
def test_opcheck_gated(cell, shapes, masked):
    arguments = gated_problem(cell, shapes, masked=masked)
    torch.library.opcheck(scan_gated_torch._scan_op, arguments)
    _, factors, _, initial, mask = arguments
    states, final, cells, kept = detached(scan_gated_torch._scan_op(*arguments))
    given = detached((torch.randn_like(states), torch.randn_like(final), factors, initial, mask, states, cells, kept))
    torch.library.opcheck(scan_gated_torch._scan_backward_op, given)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("bidirectional", "dtype"), [(False, torch.float32), (True, torch.float64)], ids=str)
def test_compiled_models_are_eager(cell, bidirectional, dtype):
    torch.manual_seed(0)
    options = {"cell_type": cell, "input_scale": 1.0, "scan_backend": "torch", "num_labels": 11}
    head = KRUForTokenClassification if bidirectional else KRUForCausalLM
    model = head(tiny_config(bidirectional=bidirectional, **options)).to(dtype).train()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(input_ids=IDS, attention_mask=mask, labels=IDS)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert expected.dtype == dtype
        assert_near(found, expected, LOGITS if dtype == torch.float32 else RELATIVE[dtype])


def test_pushed_copies_register_no_operator(tmp_path, monkeypatch):
    """Copies of the files outside the package give the same bits and leave torch.ops alone."""
    folder = tmp_path / "pushed_model_code"
    folder.mkdir()
    for name in ("kronecker.py", "scan_checks.py", "scan_torch.py", "scan_gated_torch.py", "transforms.py"):
        folder.joinpath(name).write_text(pathlib.Path(scan_torch.__file__).with_name(name).read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    pushed, gated = (
        importlib.import_module(f"pushed_model_code.{name}") for name in ("scan_torch", "scan_gated_torch")
    )
    for name in [name for name in sys.modules if name.startswith("pushed_model_code")]:
        monkeypatch.delitem(sys.modules, name)
    assert not hasattr(pushed, "_scan_op") and not hasattr(gated, "_scan_op")
    problem = random_problem(SHAPES[1], BATCH, LENGTH, masked=True)
    found, expected = run_engine(pushed.kru_scan_torch, problem), run_engine(kru_scan_torch, problem)
    arguments = gated_problem("lstm", SHAPES[1])
    found += gated_run(gated.kru_gated_scan_torch, arguments, "lstm")
    expected += gated_run(kru_gated_scan_torch, arguments, "lstm")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
