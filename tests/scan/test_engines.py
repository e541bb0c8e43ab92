"""The contract of ``kron_scan``: every engine, cell and option against the definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from problems import (
    CASES,
    FLOOR_OF_DRAWN,
    ON_EVERY_ENGINE,
    SHAPES,
    STATE_TOLERANCE,
    TARGETS,
    assert_close,
    assert_same,
    device_of,
    problem,
    problems,
    run,
    scan,
)

from kru_hf import kron_scan, random_unitary
from kru_hf.cells import CELLS
from kru_hf.scan import ENGINES, unavailable_reason

SMALL = [(2, 2), (3, 3)]
LONG = 3_000
DRAWN_ENGINES = [("portable", torch.float64), ("cpu", torch.float32)]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@ON_EVERY_ENGINE
def test_equals_the_definition(engine, dtype, cell, activation, shapes):
    for terms, positive in ((1, False), (2, True)):
        p = problem(cell, shapes, 5, 4, terms=terms, masked=True, starts=True, activation=activation, positive=positive)
        assert_close(run(p, engine, dtype, device_of(engine)), run(p, "reference"), positive=positive)


@given(p=problems())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_everywhere(p):
    expected = run(p, "reference")
    for engine, dtype in DRAWN_ENGINES:
        if unavailable_reason(engine, CELLS[p.cell]) is None:
            assert_close(run(p, engine, dtype), expected, floor=FLOOR_OF_DRAWN)


@ON_EVERY_ENGINE
@pytest.mark.parametrize("option", ["nothing", "initial", "masked", "starts"])
@pytest.mark.parametrize("length", [1, 33])
def test_each_option_alone(engine, dtype, cell, activation, option, length):
    flags = {"initial": option == "initial", **({option: True} if option in ("masked", "starts") else {})}
    p = problem(cell, SMALL, 2, length, activation=activation, seed=1, **flags)
    assert_close(run(p, engine, dtype, device_of(engine)), run(p, "reference"))


@ON_EVERY_ENGINE
def test_one_output_alone_and_no_bias(engine, dtype, cell, activation):
    p = problem(cell, SMALL, activation=activation)
    for one in (p.but(d_final=None), p.but(d_states=None)):
        assert_close(run(one, engine, dtype, device_of(engine)), run(one, "reference"))
    inputs, factors = p.inputs.to(device_of(engine), dtype), [f.to(device_of(engine), dtype) for f in p.factors]
    zeros = torch.zeros_like(p.bias).to(inputs)
    found, expected = (kron_scan(inputs, factors, b, cell=cell, activation=activation) for b in (None, zeros))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@ON_EVERY_ENGINE
def test_arguments_stay_and_the_final_state_is_a_copy(engine, dtype, cell, activation):
    p = problem(cell, SMALL, activation=activation)
    states, final, leaves = scan(p, engine, dtype, device_of(engine))
    last = final.detach().clone()
    states.detach().zero_()
    assert torch.equal(final, last)
    assert torch.equal(leaves["inputs"].cpu().double(), p.inputs)
    assert torch.equal(leaves["initial_state"].cpu().double(), p.initial_state)


@ON_EVERY_ENGINE
def test_strides_and_repetition_change_no_bit(engine, dtype, cell, activation):
    p = problem(cell, SMALL, masked=True, starts=True, activation=activation)
    strided = p.but(
        inputs=p.inputs.transpose(0, 3).contiguous().transpose(0, 3),
        factors=[factor.mT.contiguous().mT for factor in p.factors],
        mask=p.mask.T.contiguous().T, starts=p.starts.T.contiguous().T,
    )  # fmt: skip
    first, second, third = (run(q, engine, dtype, device_of(engine)) for q in (p, p, strided))
    assert_same(second, first)
    if engine == "portable":  # its products are the device's, which add in another order for other strides
        assert_close(third, {name: value.double() for name, value in first.items()})
    else:
        assert_same(third, first)


@ON_EVERY_ENGINE
def test_memory_that_is_not_filled_is_never_read(engine, dtype, cell, activation, monkeypatch):
    p = problem(cell, SMALL, 3, 20, masked=True, starts=True, activation=activation)
    expected = run(p, engine, dtype, device_of(engine))

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() or tensor.is_complex() else tensor

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert_same(run(p, engine, dtype, device_of(engine)), expected)


@ON_EVERY_ENGINE
def test_a_nan_stays_in_its_sample_and_is_seen(engine, dtype, cell, activation):
    p = problem(cell, [(2, 2), (9, 9)], activation=activation)
    p.inputs[1, 2, 0, 7] = math.nan
    found = run(p, engine, dtype, device_of(engine))
    states = found["states"].flatten(2).isnan()
    assert states[1, 2].any() and states[1, 3:].all() and found["final_state"][1].isnan().all()
    assert not states[[0, 2]].any() and not states[1, :2].any() and not found["inputs"][[0, 2]].isnan().any()
    assert all(found[f"factors[{i}]"].isnan().any() for i in range(2))


@ON_EVERY_ENGINE
def test_what_is_masked_has_no_gradient_and_spoils_none(engine, dtype, cell, activation):
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]).bool()
    p = problem(cell, SMALL, 2, 6, starts=True, activation=activation).but(mask=mask)
    expected = run(p, engine, dtype, device_of(engine))
    for garbage in (math.nan, math.inf, 1e30):
        found = run(p.but(inputs=p.inputs.where(mask[..., None, None], garbage)), engine, dtype, device_of(engine))
        assert_same(found, expected)
    assert not expected["inputs"].cpu()[~mask].any()


@ON_EVERY_ENGINE
def test_documents_are_single_runs(engine, dtype, cell, activation):
    """Each document of a row alone, from zero; and what goes wrong in one is not seen in the next."""
    begins = [0, 2, 5]
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[:, begins[1:]] = True
    p = problem(cell, SMALL, 2, 6, activation=activation).but(starts=starts)
    found = run(p, engine, dtype, device_of(engine))
    for begin, end in zip(begins, [*begins[1:], 6], strict=True):
        last = end == 6
        alone = p.but(
            inputs=p.inputs[:, begin:end], starts=None, initial_state=None if begin else p.initial_state,
            d_states=p.d_states[:, begin:end], d_final=p.d_final if last else None,
        )  # fmt: skip
        expected = run(alone, "reference")
        ours = {"states": found["states"][:, begin:end], "inputs": found["inputs"][:, begin:end]}
        if last:
            ours["final_state"] = found["final_state"]
        if not begin:
            ours["initial_state"] = found["initial_state"]
        assert_close(ours, {name: expected[name] for name in ours})
    p.inputs[0, 1], spoiled = math.nan, None
    spoiled = run(p, engine, dtype, device_of(engine))
    assert torch.equal(spoiled["states"][:, 2:], found["states"][:, 2:])
    assert torch.equal(spoiled["inputs"][:, 2:], found["inputs"][:, 2:])


@ON_EVERY_ENGINE
def test_a_start_at_a_held_step_leaves_zero(engine, dtype, cell, activation):
    p = problem(cell, SMALL, 1, 3, activation=activation)
    p = p.but(
        initial_state=p.initial_state + 1,
        mask=torch.tensor([[True, False, False]]),
        starts=torch.tensor([[False, True, False]]),
    )
    found = run(p, engine, dtype, device_of(engine))
    assert found["states"][:, 0].any() and not found["states"][:, 1:].any() and not found["final_state"].any()


@ON_EVERY_ENGINE
def test_pieces_are_the_whole(engine, dtype, cell, activation):
    """The state of one call carries the next, and gradients flow through it: streaming and truncated BPTT."""
    p = problem(cell, SMALL, 3, 7, activation=activation)
    expected = run(p, engine, dtype, device_of(engine))

    def pieces(inputs, factors, bias, state, mask, starts, **options):
        states = []
        for piece in inputs.split([3, 1, 3], 1):
            here, state = kron_scan(piece, factors, bias, state, **options)
            states.append(here)
        return torch.cat(states, 1), state

    found = run(p, engine, dtype, device_of(engine), call=pieces)
    assert_close(found, {name: value.cpu().double() for name, value in expected.items()})
    assert torch.equal(found["states"], expected["states"])


@pytest.mark.parametrize(("engine", "dtype", "cell", "activation"), [t for t in TARGETS if t.values[2] == "kru"])
def test_exact_zero_stays_zero_with_zero_gradient(engine, dtype, cell, activation):
    p = problem(cell, SMALL, positive=True, activation=activation)  # b > 0: the scale would be infinite
    p = p.but(inputs=torch.zeros_like(p.inputs), initial_state=torch.zeros_like(p.initial_state))
    found = run(p, engine, dtype, device_of(engine))
    silent = activation == "modrelu"
    assert not found["states"].any() and not (silent and any(value.any() for value in found.values()))


@pytest.mark.parametrize("engine", [e for e in ("reference", *ENGINES) if unavailable_reason(e) is None])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-21, 1e-12])
def test_no_gradient_where_a_small_z_is_silenced(size, engine):
    """b / |z|² is beyond float32 there."""
    inputs = torch.full((1, 1, 2, 4), size, device=device_of(engine), requires_grad=True)
    bias = torch.full((4,), -0.1, device=device_of(engine))
    states, _ = kron_scan(inputs, [random_unitary(4, 4).to(bias)], bias, backend=engine)
    states.sum().backward()
    assert not states.any() and torch.equal(inputs.grad, torch.zeros_like(inputs))


@ON_EVERY_ENGINE
def test_long_sequences_stay_near_float64(engine, dtype, cell, activation):
    if engine == "triton" and device_of(engine) == "cpu":
        pytest.skip("the interpreter is slow")
    p = problem(cell, [(2, 2)] * 3, 1, LONG, initial=False, activation=activation)
    if cell == "kru":  # norm below 1 and b ≤ 0: no step expands, so that rounding errors add up at most
        factors = [0.99 * f / torch.linalg.matrix_norm(torch.complex(*f), 2) for f in p.factors]
        p = p.but(factors=[f.float().double() for f in factors], bias=-p.bias.abs(), inputs=0.1 * p.inputs)
    with torch.no_grad():
        (found, _, _), (exact, _, _) = scan(p, engine, dtype, device_of(engine)), scan(p, "portable")
    assert (found.cpu().double() - exact).norm() <= STATE_TOLERANCE[torch.float32] * exact.norm()


@pytest.mark.parametrize(("cell", "activation"), CASES)
def test_the_definition_passes_gradcheck(cell, activation):
    # Away from z = 0, where modReLU has a kink and finite differences mean nothing.
    p = problem(cell, [(2, 3), (3, 2)], 2, 4, terms=2, masked=True, starts=True, activation=activation, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (p.inputs + 2, p.bias, p.initial_state + 2, *p.factors)]

    def function(inputs, bias, initial, *factors):
        options = {"cell": cell, "activation": activation, "backend": "reference", "starts": p.starts}
        return kron_scan(inputs, list(factors), bias, initial, p.mask, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_the_portable_engine_keeps_no_graph_over_time(cell):
    """Nodes of the graph, and bytes saved for backward a step, do not grow with T."""

    def cost(length):
        p, saved = problem(cell, [(2, 2)] * 4, 2, length), {}

        def pack(tensor):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states, _, _ = scan(p, "portable")
        seen, todo = set(), [states.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        per_step = p.inputs[:, :1].numel() + (1 + CELLS[cell].kept) * states[:, :1].numel()
        return len(seen), sum(saved.values()) - length * per_step

    assert cost(5) == cost(50)
