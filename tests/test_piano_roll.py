"""The piano-roll head: loss, padding, carried state, sampling."""

import math

import pytest
import torch
from helpers import FLOAT32_TOLERANCE, check_windows
from transformers import AutoModel

from kru_hf import KRUConfig, KRUForPianoRoll
from kru_hf.frame_heads import draw_frame

BLOCKS = ({"block_type": "plain"}, {"block_type": "residual", "hidden_size": 12})


def small_model(**options) -> KRUForPianoRoll:
    torch.manual_seed(0)
    options = {"block_type": "plain", "vocab_size": 1, "factor_shapes": [[2, 2], [3, 3]], "input_size": 7, **options}
    return KRUForPianoRoll(KRUConfig(**options)).eval()


def random_roll(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.2).float()


# ---- the head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BLOCKS)
def test_loss_is_the_binary_cross_entropy_in_nats_per_scored_frame(options):
    model, x = small_model(**options), random_roll(2, 9, 7)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    out = model(input_values=x, attention_mask=mask)
    total, count = 0.0, 0
    for row, length in ((0, 6), (1, 9)):
        for t in range(length - 1):
            for key in range(7):
                p = 1 / (1 + math.exp(-out.logits[row, t, key].item()))
                total -= math.log(p if x[row, t + 1, key] else 1 - p)
            count += 1
    assert abs(out.loss.item() - total / count) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(options, side):
    model, x = small_model(**options), random_roll(1, 6, 7)
    pad = torch.ones(1, 3, 7)
    parts, mask = ([pad, x], [0] * 3 + [1] * 6) if side == "left" else ([x, pad], [1] * 6 + [0] * 3)
    alone = model(input_values=x, use_cache=True)
    padded = model(input_values=torch.cat(parts, 1), attention_mask=torch.tensor([mask]), use_cache=True)
    assert abs(alone.loss.item() - padded.loss.item()) < FLOAT32_TOLERANCE
    for ours, theirs in zip(padded.past_key_values.states, alone.past_key_values.states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


def test_padded_frames_are_not_scored_with_targets_of_their_own():
    model, x, targets = small_model(), random_roll(2, 6, 7), random_roll(2, 6, 7)
    mask, other = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]), targets.clone()
    other[1, 3:] = 1 - other[1, 3:]
    losses = [model(input_values=x, attention_mask=mask, shift_labels=y).loss.item() for y in (targets, other)]
    assert losses[0] == losses[1]
    both = model(input_values=x, attention_mask=mask, shift_labels=targets, shift_mask=torch.ones(2, 6)).loss
    assert both.item() == losses[0]


@pytest.mark.parametrize("options", BLOCKS)
def test_windows_with_carried_state_are_the_whole_piece(options):
    check_windows(small_model(**options), random_roll(2, 11, 7))


def test_prediction_uses_no_later_frame():
    model, x = small_model(), random_roll(1, 8, 7)
    changed = x.clone()
    changed[:, 5:] = 1 - changed[:, 5:]
    assert torch.equal(model(input_values=x).logits[:, :5], model(input_values=changed).logits[:, :5])


def test_penalty_is_in_the_training_loss_only():
    model, x = small_model(unitary_loss_coef=0.5), random_roll(1, 8, 7)
    plain = model(input_values=x)
    trained = model.train()(input_values=x)
    expected = plain.loss + 0.5 * plain.unitary_loss
    torch.testing.assert_close(trained.loss, expected, atol=FLOAT32_TOLERANCE, rtol=0)


def test_dropout_keeps_the_expected_logits():
    """Normalising after dropout would shrink them by (1 - p)^(1/2) = 0.71."""
    model, x = small_model(factor_shapes=[[32, 32], [32, 32]], state_dropout=0.5), random_roll(1, 5, 7)
    with torch.no_grad():
        model.key_head.weight.copy_(
            model.model.layers[0]
            .recurrence(  # rows that point along the last state
                model.model.input_map(x).unflatten(-1, (2, -1)), None, None
            )[0][0, -1]
            .flatten()
            .expand(7, -1)
        )
        expected = model(input_values=x).logits[0, -1] - model.key_head.bias
        drawn = model.train()(input_values=x.expand(200, -1, -1)).logits[:, -1].mean(0) - model.key_head.bias
    ratio = drawn / expected
    assert (ratio - 1).abs().max() < 0.02  # 200 draws of 2048 units: a standard error of about 0.2 %


def test_every_parameter_gets_a_gradient():
    model = small_model(num_hidden_layers=2, block_type="residual", hidden_size=12).train()
    model(input_values=random_roll(2, 8, 7)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_saved_model_is_the_same_and_maps_automodel(tmp_path, monkeypatch):
    model, x = small_model(), random_roll(1, 8, 7)
    for cls in (KRUForPianoRoll, KRUConfig):
        monkeypatch.setattr(cls, "_auto_class", None)  # and again when the test ends
    KRUForPianoRoll.register_for_auto_class("AutoModel")
    KRUConfig.register_for_auto_class()
    model.save_pretrained(tmp_path)
    for loaded in (
        KRUForPianoRoll.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "KRUForPianoRoll"
        assert torch.equal(loaded(input_values=x).loss, model(input_values=x).loss)


def test_default_width_is_a_piano():
    assert small_model(input_size=None).config.input_size == 88


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(1, 3, 6), r"shape \(B, T, 7\)"),
        (torch.zeros(1, 0, 7), "T >= 1"),
        (torch.full((1, 2, 7), 60.0), r"in \[0, 1\].*60"),
        (torch.full((1, 2, 7), math.nan), "nan"),
    ],
)
def test_bad_frames_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        small_model()(input_values=values)


# ---- sampling -----------------------------------------------------------------------------------------------------


def test_generation_equals_feeding_everything_again():
    model = small_model()
    prime = random_roll(1, 4, 7)
    roll = model.generate_piano_roll(prime, num_frames=12, temperature=0)
    seen = prime
    for t in range(12):
        frame = (model(input_values=seen).logits[:, -1] > 0).float()
        assert torch.equal(roll[:, t], frame)
        seen = torch.cat([seen, frame[:, None]], 1)


def test_seed_voices_and_mode():
    model = small_model().train()
    with torch.no_grad():
        model.key_head.bias.fill_(1.0)
    first = model.generate_piano_roll(num_frames=20, seed=3, batch_size=2)
    assert torch.equal(first, model.generate_piano_roll(num_frames=20, seed=3, batch_size=2))
    assert not torch.equal(first, model.generate_piano_roll(num_frames=20, seed=4, batch_size=2))
    assert first.shape == (2, 20, 7)
    assert first.sum(-1).max() > 2
    assert model.generate_piano_roll(num_frames=20, seed=3, max_voices=2).sum(-1).max() == 2
    with torch.no_grad():
        model.key_head.bias.fill_(-2.0)
    few = model.generate_piano_roll(num_frames=20, seed=3).sum(-1)
    assert few.min() == 0 and few.max() < 3
    assert model.generate_piano_roll(num_frames=20, seed=3, min_voices=3, max_voices=3).sum(-1).unique().tolist() == [3]
    assert model.training


def test_draws_have_the_models_probabilities():
    logits = torch.tensor([[-2.0, 0.0, 1.0]]).expand(40_000, 3)
    share = draw_frame(logits, None, generator=torch.Generator().manual_seed(0))[0].mean(0)
    deviations = (share - logits[0].sigmoid()).abs() / (0.25 / 40_000) ** 0.5
    assert deviations.max() < 4  # standard errors


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"temperature": -1.0}, {"max_voices": 0}, {"min_voices": 8}])
def test_bad_sampling_options_name_themselves(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        small_model().generate_piano_roll(**options)
