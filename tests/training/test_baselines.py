"""Baselines whose recurrent matrix is constrained: the constraint holds in training, and they train like all others."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kru_hf import KRUConfig, KRUForCausalLM, kron_dense, random_unitary
from training.common.errors import UserError
from training.loop.arguments import parse_arguments
from training.loop.checkpoint import load_weights
from training.models.baselines import BaselineConfig, BaselineForCausalLM
from training.models.build import build_model
from training.models.optimization import parameter_groups
from training.models.unitary import UnitaryExponential, UnitaryKRUConfig, UnitaryKRUForCausalLM
from training.options.model import ModelOptions

UNITARY = 5e-6  # largest |entry| of WᴴW − I in fp32
EQUAL = 1e-5  # two orders of the same fp32 products
VOCABULARY = 13


def options(architecture: str, **values) -> ModelOptions:
    sizes = (
        {"factor_shapes": "3x3,4x4", "block_type": "plain"}
        if architecture in ("kru", "unitary")
        else {"state_size": 12}
    )
    return ModelOptions(architecture=architecture, **{**sizes, **values})


def new_model(architecture: str, seed: int = 0, **values):
    torch.manual_seed(seed)
    return build_model("causal_lm", options(architecture, **values), vocab_size=VOCABULARY, pad_token_id=0)


def train(model, steps: int, rate: float) -> list[float]:
    """Losses of a few large steps on a fixed batch."""
    run = parse_arguments([f"--learning_rate={rate}", "--factor_learning_rate_scale=1"]).run
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=rate)
    tokens = torch.randint(1, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def distance_from_identity(matrix: torch.Tensor) -> float:
    return float((matrix.mH @ matrix - torch.eye(len(matrix))).abs().max())


def unitary_matrix(model) -> torch.Tensor:
    """The dense W (N, N), complex."""
    (cell,) = model.cells()
    return torch.complex(*kron_dense(list(cell.factors)))


def constrained(architecture: str, model) -> list[torch.Tensor]:
    """The recurrent matrices of a model."""
    if architecture == "unitary":
        return [unitary_matrix(model).detach()]
    recurrent = model.model.recurrent
    return [getattr(recurrent, f"weight_hh_l{layer}").detach() for layer in range(recurrent.num_layers)]


@pytest.mark.parametrize(
    ("architecture", "options", "count"),
    [
        ("unitary", {}, 2 * (9 + 16)),
        ("orthogonal", {"num_hidden_layers": 2}, 2 * 12 * 11 // 2),
        ("low_rank", {"recurrent_rank": 3}, 2 * 12 * 3),
    ],
)
def test_a_constraint_holds_while_the_model_learns(architecture, options, count):
    model = new_model(architecture, **options)
    starts = [matrix.clone() for matrix in constrained(architecture, model)]
    losses = train(model, 30, 0.05)
    assert losses[-1] < 0.7 * losses[0] and model.num_recurrent_parameters() == count
    assert len(starts) == options.get("num_hidden_layers", 1)
    for matrix, start in zip(constrained(architecture, model), starts, strict=True):
        assert float((matrix - start).abs().max()) > 0.1
        if architecture == "low_rank":
            values = torch.linalg.svdvals(matrix)
            assert values[2] > 1e-2 * values[0] and values[3] < UNITARY * values[0]
        else:
            assert max(distance_from_identity(start), distance_from_identity(matrix)) < UNITARY
            # Uniform on the circle: 1.8, near the identity: 0
            assert float(torch.linalg.eigvals(start).angle().std()) > 1.0


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_every_unitary_factor_has_a_generator(size):
    """So the strict model can start where the soft one does: at Haar-random factors."""
    torch.manual_seed(size)
    factor = random_unitary(size, size)  # (2, P, P)
    exponential = UnitaryExponential()
    torch.testing.assert_close(exponential(exponential.right_inverse(factor)), factor, rtol=0, atol=UNITARY)


def test_unitary_forward_is_the_soft_models_with_its_factors():
    strict = new_model("unitary").eval()
    (cell,) = strict.cells()
    soft = KRUForCausalLM(KRUConfig(vocab_size=VOCABULARY, factor_shapes=[[3, 3], [4, 4]], block_type="plain")).eval()
    weights = {name: value for name, value in strict.state_dict().items() if "parametrizations" not in name}
    factors = {f"model.layers.0.recurrence.factors.{i}": factor.detach() for i, factor in enumerate(cell.factors)}
    soft.load_state_dict({**weights, **factors})
    assert strict.num_parameters() == soft.num_parameters()
    assert strict.num_recurrent_parameters() == soft.num_recurrent_parameters()
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    torch.testing.assert_close(strict(tokens).logits, soft(tokens).logits, rtol=0, atol=EQUAL)


@pytest.mark.parametrize("architecture", ["orthogonal", "low_rank"])
def test_structured_rnn_is_torchs_rnn_with_its_matrices(architecture):
    model = new_model(architecture, num_hidden_layers=2, hidden_size=5)
    structured = model.model.recurrent
    plain = nn.RNN(5, 12, 2, batch_first=True)
    with torch.no_grad():
        for parameter in structured.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in range(2):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(plain, f"{name}_l{layer}").copy_(getattr(structured, f"{name}_l{layer}"))
    x, initial = torch.randn(3, 7, 5), torch.randn(2, 3, 12)
    for ours, theirs in zip(structured(x, initial), plain(x, initial), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=EQUAL)
    torch.testing.assert_close(structured(x)[0], plain(x)[0], rtol=0, atol=EQUAL)


@pytest.mark.parametrize("architecture", ["unitary", "orthogonal", "low_rank"])
def test_state_is_carried_from_call_to_call(architecture):
    model = new_model(architecture).eval()
    tokens = torch.randint(1, VOCABULARY, (2, 12))
    whole = model(tokens).logits
    first = model(tokens[:, :5], use_cache=True)
    second = model(tokens[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=EQUAL)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("architecture", ["unitary", "orthogonal", "low_rank", "kroneckerized"])
def test_saved_folder_loads_with_equal_outputs(architecture, tmp_path):
    if architecture == "kroneckerized":
        torch.manual_seed(0)
        shapes = [[3, 3], [4, 4]]
        config = BaselineConfig(vocab_size=VOCABULARY, cell="lstm", state_size=12, recurrent_factor_shapes=shapes)
        model = BaselineForCausalLM(config)
        assert model.num_recurrent_parameters() == 4 * (9 + 16)
    else:
        model = new_model(architecture)
    train(model, 2, 0.05)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("head", ["piano_roll", "sequence_classification", "token_classification"])
def test_unitary_has_every_head(head):
    model = build_model(head, options("unitary"), vocab_size=1, input_size=5)
    values = torch.rand(2, 6, 5).round()
    assert model(input_values=values).logits.isfinite().all()
    assert distance_from_identity(unitary_matrix(model).detach()) < UNITARY


def test_generators_have_the_factors_rate_and_no_decay():
    run = parse_arguments(["--weight_decay", "0.1", "--factor_learning_rate_scale", "0.2"]).run
    for architecture in ("unitary", "orthogonal"):
        model = new_model(architecture)
        group = parameter_groups(model, run)[-1]
        assert {id(p) for p in group["params"]} == {id(p) for _, p in model.recurrent_parameters()}
        assert (group["scale"], group["weight_decay"]) == (0.2, 0.0)
    low_rank = new_model("low_rank")
    ordinary = {id(p) for p in parameter_groups(low_rank, run)[0]["params"]}
    assert {id(p) for _, p in low_rank.recurrent_parameters()} <= ordinary


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("unitary", {"factor_shapes": "3x4,4x3"}, "must be square"),
        ("low_rank", {"recurrent_rank": 13}, r"recurrent_rank must be in \[1, state_size = 12\], got 13"),
        ("gru", {"chrono_max_length": 2}, "chrono_max_length must be None or at least 3 steps, got 2"),
    ],
)
def test_options_that_do_not_fit(architecture, values, message):
    with pytest.raises(UserError, match=message):
        new_model(architecture, **values)


@pytest.mark.parametrize("marks", [{"attention_mask": [[1, 1, 0]]}, {"position_ids": [[0, 1, 0]]}])
def test_padded_and_packed_batches_are_refused(marks):
    tokens, marks = torch.ones(1, 3, dtype=torch.long), {name: torch.tensor(value) for name, value in marks.items()}
    with pytest.raises(ValueError, match="do not take padded or packed batches"):
        new_model("lstm")(tokens, **marks)
    new_model("lstm")(tokens, attention_mask=torch.ones(1, 3))


def test_kroneckerized_config_is_for_gated_and_plain_cells():
    with pytest.raises(Exception, match="recurrent_factor_shapes is for rnn, lstm, gru only"):
        BaselineConfig(cell="low_rank", recurrent_factor_shapes=[[2, 2]])
    assert isinstance(UnitaryKRUConfig().layer_types, list)
    assert UnitaryKRUForCausalLM.config_class is UnitaryKRUConfig


def test_loads_weights_that_share_one_storage(tmp_path):
    """As cuDNN keeps those of an nn.LSTM on a GPU."""
    new_model("lstm").save_pretrained(tmp_path)
    model = new_model("lstm", seed=1)
    parameters = list(model.model.recurrent.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view(parameter.shape)
    load_weights(model, tmp_path)
    expected = new_model("lstm").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_named(tmp_path):
    new_model("lstm").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing .*weight_ih_l1.*; unknown none"):
        load_weights(new_model("lstm", num_hidden_layers=2), tmp_path)
