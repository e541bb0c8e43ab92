"""``kron_scan`` around the engines: which one runs, what is refused and by which words; the module on top."""

import logging

import pytest
import torch
from helpers import LOGITS, assert_near, tiny_config
from problems import problem, run

import kru_hf
from kru_hf import KRUForCausalLM, KRURecurrence, backend_report, kron_dense, kron_scan, use_backend
from kru_hf.cells import CELLS
from kru_hf.kronecker import merge_terms
from kru_hf.scan import choose_backend, unavailable_reason

needs_cpu = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="the native engine is not built")
GOOD = {"inputs": (2, 3, 2, 6), "factors": [(2, 2, 2), (2, 3, 3)], "bias": (6,)}
GATED = {"inputs": (2, 3, 4, 6), "factors": [(4, 2, 2), (4, 3, 3)], "bias": (4, 6), "cell": "lstm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [(3, 2, 2), (2, 3, 3)]}, r"factors\[0\] .* \(2, P, Q\) or \(R, 2, P, Q\), got \(3, 2, 2\)"),
        ({"starts": (2, 4)}, r"starts must have the shape \(2, 3\), got \(2, 4\)"),
        ({"activation": "relu"}, r"activation must be one of modrelu, identity, got 'relu'"),
        ({"backend": "torch"}, r"backend must be one of auto, reference, portable, cpu, triton, got 'torch'"),
        ({"cell": "rnn"}, r"cell must be one of kru, lstm, gru, janet.*, got 'rnn'"),
        (GATED | {"cell": "gru"}, r"inputs of the cell 'gru' must have the shape \(B, T, 3, N\)"),
        (GATED | {"activation": "identity"}, r"activation of the cell 'lstm' must stay 'modrelu', got 'identity'"),
    ],
)
def test_bad_options_are_named(change, message):
    given = GOOD | change
    arguments = {name: torch.zeros(value) for name, value in given.items() if isinstance(value, tuple)}
    factors = [torch.zeros(shape) for shape in given["factors"]]
    with pytest.raises(ValueError, match=message):
        kron_scan(**given | arguments | {"factors": factors})


@needs_cpu
def test_the_engine_is_chosen_and_refusals_say_why():
    inputs, factors, cell = torch.zeros(1, 1, 2, 2), [torch.zeros(1, 2, 2, 2)], CELLS["kru"]
    assert choose_backend(inputs, factors, cell)[0] == "cpu"
    name, reason = choose_backend(inputs.double(), factors, cell)
    assert name == "portable" and "float64" in reason
    assert "65 factors" in choose_backend(inputs, factors * 65, cell)[1]
    assert "cpu: available" in backend_report()
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: inputs are torch.float64"):
        kron_scan(inputs.double(), [torch.zeros(2, 2, 2).double()], backend="cpu")


def test_the_choice_of_the_process(caplog):
    p = problem("kru", [(2, 2)])
    inputs, factors = p.inputs.float(), [f.float() for f in p.factors]
    model = KRUForCausalLM(tiny_config()).eval()
    ids = torch.ones(1, 3, dtype=torch.long)
    expected = model(ids).logits
    kru_hf.scan._told.clear()
    try:
        use_backend("reference")
        with caplog.at_level(logging.INFO, "kru_hf"):
            kron_scan(inputs, factors)
            assert_near(model(ids).logits, expected, LOGITS)
        assert not caplog.records, "auto was asked"
        use_backend("triton")
        if unavailable_reason("triton") is not None:
            with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
                model(ids)
    finally:
        use_backend("auto")
    with pytest.raises(ValueError, match="backend must be one of"):
        use_backend("cuda")
    with caplog.at_level(logging.INFO, "kru_hf"):
        kron_scan(inputs, factors)
    assert "kron_scan uses the" in caplog.text


@pytest.mark.parametrize("cell", CELLS)
def test_terms_are_merged_where_a_dense_matrix_is_cheaper(cell, caplog):
    """Two terms of 5 + 5 against 25 stay; six do not."""
    for terms, merged in ((2, False), (6, True)):
        p = problem(cell, [(5, 5), (5, 5)], terms=terms)
        assert (len(merge_terms(p.factors, cell == "kru")) == 1) == merged
        kru_hf.scan._told.clear()
        with caplog.at_level(logging.INFO, "kru_hf"):
            found, expected = run(p, "portable"), run(p, "reference")
        assert (f"merges {terms} terms" in caplog.text) == merged
        for name, value in expected.items():
            assert_near(found[name], value, 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrence_of_terms(cell):
    """Each starts with 1/√R of the scale; one scale less is the whole matrix's."""
    torch.manual_seed(0)
    module = KRURecurrence([[4, 4], [5, 5]], cell, terms=4, init_scale=0.8)
    assert [tuple(f.shape) for f in module.factors] == [(4, CELLS[cell].planes, n, n) for n in (4, 5)]
    matrices = [torch.complex(f[:, 0], f[:, 1]) if cell == "kru" else f.flatten(0, 1) for f in module.factors]
    norms = [torch.linalg.matrix_norm(m, 2) for m in matrices]
    torch.testing.assert_close(norms[0] * norms[1], torch.full_like(norms[0], 0.4))
    single = KRURecurrence([[4, 4], [5, 5]], cell)
    assert [tuple(f.shape) for f in single.factors] == [(CELLS[cell].planes, n, n) for n in (4, 5)]
    assert (module.penalty() > 0) == (cell == "kru")


def test_the_norm_of_a_sum_is_bounded():
    torch.manual_seed(0)
    module = KRURecurrence([[4, 4], [5, 5]], terms=3, init_scale=3.0)
    module.bound_norm(1.1)
    norm = torch.linalg.matrix_norm(torch.complex(*kron_dense(list(module.factors))), 2).item()
    assert norm == pytest.approx(1.1, rel=0.02)


def test_options_of_other_cells_are_refused():
    for options, message in (
        ({"cell": "lstm", "activation": "identity"}, "activation of a gated cell must be 'modrelu'"),
        ({"cell": "gru", "init": "slow"}, "init of the cell 'gru' must be one of random, got 'slow'"),
        ({"cell": "kru", "chrono_max_length": 9}, "chrono_max_length must be None with the cell 'kru', got 9"),
        ({"terms": 2, "init": "identity"}, "init 'identity' makes all terms alike: there must be 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            KRURecurrence([[2, 2]], **options)


def test_a_model_of_terms_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    model = KRUForCausalLM(tiny_config(recurrent_terms=3)).train()
    ids = torch.randint(1, 11, (2, 6))
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.unitary_loss > 0 and all(p.grad is not None for p in model.parameters())
    assert model.num_recurrent_parameters() == 3 * KRUForCausalLM(tiny_config()).num_recurrent_parameters()
    model.eval().save_pretrained(tmp_path)
    loaded = KRUForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
