"""``cell_type="kru_linear"``: transitions, starts, states, in every block and in the layer."""

import pytest
import torch
from helpers import LOGITS, assert_near, tiny_config

from kru_hf import KRUConfig, KRUForCausalLM, KRULinear, KRULinearRecurrence
from kru_hf.export import weight_file
from kru_hf.kronecker import kron_dense, unitary_exp

KINDS = [
    {"transition": "fixed", "num_heads": 1},
    {"transition": "fixed", "num_heads": 2, "decay": True},
    {"transition": "selective", "num_heads": 1, "decay": True},
    {"transition": "selective", "num_heads": 3},
]
BLOCKS = [{"block_type": "plain"}, {"block_type": "residual", "hidden_size": 10}, {"io_rank": 3, "hidden_size": 8}]
EVERY = pytest.mark.parametrize("options", [{**k, **b} for k in KINDS for b in BLOCKS], ids=str)
IDS = torch.randint(1, 11, (2, 9), generator=torch.Generator().manual_seed(1))


def config(**options):
    size = {"state_size": None, "factor_shapes": [[2, 2], [3, 3]], "vocab_size": 11}
    return KRUConfig(cell_type="kru_linear", **{**size, **options})


@pytest.fixture
def model(options):
    torch.manual_seed(0)
    return KRUForCausalLM(config(**options)).eval()


@EVERY
def test_a_state_is_carried_and_padding_holds_it(model, options):
    whole = model(IDS)
    half = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=half.past_key_values)
    assert_near(torch.cat((half.logits, rest.logits), 1), whole.logits, LOGITS)
    padded, mask = torch.nn.functional.pad(IDS, (3, 0)), torch.ones(2, 12, dtype=torch.long)
    mask[:, :3] = 0
    assert_near(model(padded, attention_mask=mask).logits[:, 3:], whole.logits, LOGITS)


@EVERY
def test_packed_documents_are_read_as_if_alone(model, options):
    numbers = torch.tensor([[1] * 4 + [2] * 5] * 2)
    packed = model(IDS, attention_mask=numbers).logits
    for part in (slice(0, 4), slice(4, 9)):
        assert_near(packed[:, part], model(IDS[:, part]).logits, LOGITS)


@EVERY
def test_it_learns_and_is_saved(model, options, tmp_path):
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert (model.unitary_loss() == 0) == (options["transition"] == "selective")
    model.save_pretrained(tmp_path)
    loaded = KRUForCausalLM.from_pretrained(tmp_path)
    assert_near(loaded(IDS).logits, model.eval()(IDS).logits, LOGITS)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_exponentials_are_unitary_and_exact(size):
    x = torch.randn(50, size * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.complex(*unitary_exp(x).unbind(-3))
    square = x.unflatten(-1, (size, size)) / (2 * size) ** 0.5
    upper, lower = square.triu(1), square.tril(-1)
    generator = torch.complex(upper + upper.mT, lower - lower.mT) + 2**0.5 * square.diagonal(0, 1, 2).diag_embed()
    torch.testing.assert_close(matrix.mH @ matrix, torch.eye(size, dtype=matrix.dtype).expand(50, -1, -1))
    torch.testing.assert_close(matrix, torch.matrix_exp(1j * generator), atol=1e-7, rtol=0)
    x.requires_grad_()
    assert torch.autograd.gradcheck(unitary_exp, (x[:3],))
    (gradient,) = torch.autograd.grad(unitary_exp(0 * x).sum(), x)
    assert bool(gradient.isfinite().all())


def test_fourier_starts_with_all_roots_of_unity():
    cell = KRULinearRecurrence([[2, 2], [3, 3], [4, 4]], heads=2, init="fourier")
    found = torch.complex(*kron_dense([factor[1] for factor in cell.factors])).diagonal()
    turns = (found.angle() / (2 * torch.pi) * 24).round().long() % 24
    assert sorted(turns.tolist()) == list(range(24))
    assert cell.penalty().item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("options", [{}, {"transition": "selective", "heads": 3}, {"bidirectional": True}], ids=str)
def test_layer(options):
    torch.manual_seed(0)
    layer = KRULinear(5, 12, num_layers=2, batch_first=True, **options)
    x = torch.randn(2, 7, 5)
    out, state = layer(x)
    assert out.shape == (2, 7, 24 * layer.num_directions) and state.shape == (2 * layer.num_directions, 2, 24)
    if not options.get("bidirectional"):
        first, carried = layer(x[:, :3])
        second, final = layer(x[:, 3:], carried)
        torch.testing.assert_close(torch.cat((first, second), 1), out)
        torch.testing.assert_close(final, state)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


BAD = {
    "transition must be one of fixed, selective, got 'token'": {"transition": "token"},
    "num_heads must be at least 1, got 0": {"num_heads": 0, "state_size": 6},
    "must be square": {"factor_shapes": [[2, 3], [3, 2]]},
    "recurrent_init of selective transitions must be 'random', got 'slow'": {
        "transition": "selective",
        "recurrent_init": "slow",
    },
    "activation of the cell 'kru_linear' must be 'modrelu', got 'identity'": {"activation": "identity"},
    "num_heads of a cell other than 'kru_linear' must be 1, got 2": {"cell_type": "kru", "num_heads": 2},
    "unitary_loss_coef of selective transitions": {"transition": "selective", "unitary_loss_coef": 0.5},
    "both must equal state_size = 8 and num_heads = 2": {"num_heads": 2, "state_size": 8},
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=BAD)
def test_bad_options_are_named(message, options):
    with pytest.raises(Exception, match=message):
        KRUConfig(**{"cell_type": "kru_linear", "factor_shapes": [[2, 2], [3, 3]], **options})


def test_exports_refuse_it():
    with pytest.raises(ValueError, match="cell_type must not be 'kru_linear'"):
        weight_file(KRUForCausalLM(tiny_config(cell_type="kru_linear")))
