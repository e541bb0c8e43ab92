"""The chain over the keys of a frame: its likelihood, what is drawn from it, and limits on the voices of a draw."""

import itertools
import math

import pytest
import torch
from helpers import FLOAT32_TOLERANCE, check_windows

from kru_hf import KRUConfig, KRUForPianoRoll
from kru_hf.frame_heads import draw_frame, next_key
from kru_hf.piano_roll_head import frame_nats
from training.models.baselines import BaselineConfig, BaselineForPianoRoll

KEYS = 8
ALL_FRAMES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=KEYS)))  # (256, 8)


def chain_model(kind: str = "kru", **options) -> KRUForPianoRoll:
    """A model of eight keys whose chain has been felt: its random weights are large."""
    torch.manual_seed(0)
    options = {"vocab_size": 1, "input_size": KEYS, "frame_head": "chain", "frame_head_size": 5, **options}
    if kind == "kru":
        config = KRUConfig(block_type="plain", factor_shapes=[[2, 2], [3, 3]], **options)
        model = KRUForPianoRoll(config).eval()
    else:
        model = BaselineForPianoRoll(BaselineConfig(cell="lstm", state_size=6, **options)).eval()
    with torch.no_grad():
        for part in (model.chain.before, model.chain.lower, model.chain.keys, model.chain.windows.out):
            part.weight.normal_()
        model.key_head.bias[:KEYS] = 0.0
    return model


def random_roll(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def frame_probabilities(model: KRUForPianoRoll) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability (256,) of each frame after three others, and the context (8 + H,) that it is drawn from."""
    past = random_roll(1, 3, KEYS).expand(256, -1, -1)
    targets = torch.cat([past[:, 1:], ALL_FRAMES[:, None]], 1)
    with torch.no_grad():
        out = model(input_values=past, shift_labels=targets)
    return (-frame_nats(out.logits, targets)[:, -1]).exp(), out.frame_context[0, -1]


def shares_of(frames: torch.Tensor) -> torch.Tensor:
    """How often each of the 256 frames is among frames (M, 8)."""
    places = 2.0 ** torch.arange(KEYS - 1, -1, -1)
    return torch.bincount((frames @ places).long(), minlength=256) / len(frames)


def check_shares(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    errors = (shares_of(drawn) - expected).abs()
    deviations = errors / (expected * (1 - expected) / len(drawn)).sqrt().clamp(min=1 / len(drawn))
    assert deviations.max() < 5  # standard errors, of 256 frames


@pytest.mark.parametrize("kind", ["kru", "lstm"])
def test_the_probabilities_of_all_frames_sum_to_one(kind):
    probabilities, _ = frame_probabilities(chain_model(kind))
    assert abs(probabilities.sum().item() - 1) < FLOAT32_TOLERANCE
    single = torch.tensor([probabilities[ALL_FRAMES[:, key] > 0].sum() for key in range(KEYS)])
    apart = torch.where(ALL_FRAMES > 0, single, 1 - single).prod(-1)
    assert (probabilities - apart).abs().max() > 0.01  # the keys are not independent


def onset_model() -> tuple[KRUForPianoRoll, torch.Tensor]:
    """A model of four keys with onsets, and a piece of five frames (1, 5, 8)."""
    model = chain_model(input_size=8, frame_onsets=True)
    with torch.no_grad():
        for part in (model.onsets.begun.weight, model.onsets.windows.near, model.onsets.windows.out.weight):
            part.normal_()
    keys = random_roll(1, 5, 4)
    keys[0, 2] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    before = torch.cat([torch.zeros(1, 1, 4), keys[:, :-1]], 1)
    return model, torch.cat([keys, keys * (1 - before)], -1)


def frames_after(keys: torch.Tensor) -> torch.Tensor:
    """All frames with their onsets (M, 8) that can follow one (4,): what begins has an onset, what is silent none."""
    found = [frame for frame in ALL_FRAMES if (frame[4:] <= frame[:4]).all() and (frame[4:] >= frame[:4] - keys).all()]
    return torch.stack(found)


def test_the_probabilities_of_all_frames_and_onsets_sum_to_one_and_are_those_of_the_draws():
    model, piece = onset_model()
    past, frames = piece[:, :3], frames_after(piece[0, 2, :4])
    targets = torch.cat([past[:, 1:].expand(len(frames), -1, -1), frames[:, None]], 1)
    with torch.no_grad():
        logits = model(input_values=past.expand(len(frames), -1, -1), shift_labels=targets).logits[:, -1]
    probabilities = (-frame_nats(logits, frames)).exp()
    assert len(frames) == 54 and abs(probabilities.sum().item() - 1) < FLOAT32_TOLERANCE
    keys = (-frame_nats(logits[:, :4], frames[:, :4])).exp()
    for first in range(16):  # onsets given the keys sum to one
        chosen = (frames[:, :4] == ALL_FRAMES[16 * first, :4]).all(-1)
        assert abs((probabilities[chosen] / keys[chosen]).sum().item() - 1) < FLOAT32_TOLERANCE
    drawn = model.generate_piano_roll(past.expand(40_000, -1, -1), num_frames=1, seed=0)[:, 0]
    expected = torch.zeros(256).scatter(0, (frames @ 2.0 ** torch.arange(7, -1, -1)).long(), probabilities)
    check_shares(drawn, expected)


def test_an_onset_sees_lower_onsets_and_every_key_but_no_higher_onset():
    model, piece = onset_model()
    past, frame = piece[:, :3], torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    logits = []
    for onsets in ([0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]):
        frame[4:] = torch.tensor(onsets)
        logits.append(model(input_values=past, shift_labels=frame.expand(1, 3, 8)).logits[0, -1, 4:])
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0][:2], logits[2][:2]) and logits[0][3] != logits[2][3]
    assert logits[0][2] == -10_000  # a silent key


def test_windows_at_one_key_are_those_of_all():
    windows = chain_model().chain.windows
    hidden, before, frame = torch.randn(6, 5), random_roll(6, KEYS), random_roll(6, KEYS, seed=1)
    for key in (0, 3, KEYS - 1):
        one = windows.at(hidden, before, frame, torch.full((6,), key))
        torch.testing.assert_close(one, windows(hidden, before, frame)[:, key], rtol=0, atol=FLOAT32_TOLERANCE)


def test_onsets_without_a_sounding_key_or_an_even_width_are_an_error():
    model, piece = onset_model()
    with pytest.raises(ValueError, match="must be 0 where the key, in the first half, is silent"):
        model(input_values=piece, shift_labels=torch.tensor([0.0] * 7 + [1]).expand(1, 5, 8))
    with pytest.raises(ValueError, match="input_size must be twice the keys with frame_onsets, got 7"):
        chain_model(input_size=7, frame_onsets=True)


def test_the_nats_of_a_frame_are_those_summed_by_hand():
    model, x = chain_model(), random_roll(1, 4, KEYS)
    out = model(input_values=x)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        states = model.model(input_values=x).last_hidden_state.double()
    total = 0.0
    for t in range(3):
        features = states[0, t] / (states[0, t].square().mean() + 1e-6).sqrt()
        context = weights["key_head.weight"] @ features + weights["key_head.bias"]
        context += weights["chain.before.weight"] @ x[0, t].double()
        for key in range(KEYS):
            hidden = context[KEYS:].clone()
            for lower in range(key):
                hidden += weights["chain.lower.weight"][:, lower] * x[0, t + 1, lower].double()
            units = weights["chain.windows.context.weight"] @ context[KEYS:].clamp(min=0)
            units += weights["chain.windows.context.bias"]
            for other in range(KEYS):  # at most an octave away, as the keyboard has eight keys
                units += weights["chain.windows.near"][0, other - key + 12] * x[0, t, other].double()
            for lower in range(key):
                units += weights["chain.windows.near"][1, lower - key + 25] * x[0, t + 1, lower].double()
            logit = context[key] + weights["chain.keys.weight"][key] @ hidden.clamp(min=0)
            logit += weights["chain.windows.out.weight"][0] @ units.clamp(min=0)
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p if x[0, t + 1, key] else 1 - p)
    assert abs(out.loss.item() - total / 3) < FLOAT32_TOLERANCE


def test_a_logit_depends_on_no_higher_key_of_its_frame():
    model, x, targets = chain_model(), random_roll(1, 2, KEYS), random_roll(1, 2, KEYS, seed=3)
    changed = targets.clone()
    changed[..., 4:] = 1 - changed[..., 4:]
    first, second = (model(input_values=x, shift_labels=y).logits for y in (targets, changed))
    assert torch.equal(first[..., :5], second[..., :5])
    assert (first[..., 5:] != second[..., 5:]).any()


def test_draws_have_the_probabilities_of_the_model():
    model = chain_model()
    probabilities, context = frame_probabilities(model)
    drawn, limited = draw_frame(context.expand(40_000, -1), model.chain, generator=torch.Generator().manual_seed(0))
    check_shares(drawn, probabilities)
    assert not limited.any()


def test_limits_on_voices_leave_the_shares_of_the_frames_within_them():
    model = chain_model()
    probabilities, context = frame_probabilities(model)
    counts = ALL_FRAMES.sum(-1).long()
    usual = int(torch.zeros(KEYS + 1).index_add(0, counts, probabilities).argmax())
    within = probabilities * ((counts == usual) | (counts == usual - 1))
    generator = torch.Generator().manual_seed(0)
    drawn, limited = draw_frame(context.expand(20_000, -1), model.chain, voices=(usual - 1, usual), generator=generator)
    check_shares(drawn, within / within.sum())
    assert not limited.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chained", [True, False])
def test_limits_that_no_free_draw_meets_are_held_within_the_draw(chained, temperature):
    model = chain_model() if chained else None
    context = (
        torch.full((20, 2 * KEYS + 5), -40.0) if chained else torch.tensor([-9.0, -8, -7, -6, -5, -4, -3, -9]) * 10
    )
    chain, context = (model.chain, context) if chained else (None, context.expand(20, -1))
    drawn, limited = draw_frame(context, chain, temperature, voices=(3, 4), generator=torch.Generator().manual_seed(0))
    assert drawn.sum(-1).unique().tolist() == [3]
    assert limited.all() == (temperature > 0)
    full, _ = draw_frame(context, chain, temperature, voices=(KEYS, None))
    assert (full == 1).all()


def test_the_next_key_and_what_is_left_of_it():
    logits = torch.tensor([[0.0, math.log(3), -math.log(3), 50.0]])  # probabilities 1/2, 3/4, 1/4, 1
    free, first = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)

    def shares(lowest=0, temperature=1.0, top_p=1.0, allowed=free):
        found = next_key(logits, first + lowest, temperature, top_p, allowed)
        return (found / found.sum()).flatten().tolist()

    assert shares() == pytest.approx([1 / 2, 3 / 8, 1 / 32, 3 / 32, 0])
    assert shares(lowest=2) == pytest.approx([0, 0, 1 / 4, 3 / 4, 0])
    assert shares(lowest=4) == [0, 0, 0, 0, 1]
    assert shares(top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])
    assert shares(temperature=0) == [1, 0, 0, 0, 0]
    assert shares(temperature=0.5)[:2] == pytest.approx([256 / 410, 144 / 410])
    assert shares(allowed=torch.tensor([[False, False, True, True, False]])) == pytest.approx([0, 0, 1 / 4, 3 / 4, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, x, pad = chain_model(), random_roll(1, 6, KEYS), torch.ones(1, 3, KEYS)
    parts, mask = ([pad, x], [0] * 3 + [1] * 6) if side == "left" else ([x, pad], [1] * 6 + [0] * 3)
    padded = model(input_values=torch.cat(parts, 1), attention_mask=torch.tensor([mask]))
    assert abs(model(input_values=x).loss.item() - padded.loss.item()) < FLOAT32_TOLERANCE


def test_windows_with_carried_state_are_the_whole_piece():
    check_windows(chain_model(), random_roll(2, 11, KEYS))


@pytest.mark.parametrize("kind", ["kru", "lstm"])
def test_a_stream_draws_what_feeding_everything_again_would(kind):
    model, seen = chain_model(kind), random_roll(1, 4, KEYS)
    roll = model.generate_piano_roll(seen, num_frames=12, seed=1, top_p=0.9, temperature=0.8, max_voices=4)
    generator = torch.Generator().manual_seed(1)
    for t in range(12):
        context = model(input_values=seen).frame_context[:, -1]
        frame, _ = draw_frame(context, model.chain, 0.8, 0.9, (0, 4), generator)
        assert torch.equal(roll[:, t], frame)
        seen = torch.cat([seen, frame[:, None]], 1)


def test_limits_held_within_the_draw_are_said(caplog):
    model = chain_model()
    with torch.no_grad():
        model.key_head.bias[:KEYS] = -60.0
    assert (model.generate_piano_roll(num_frames=3, min_voices=5).sum(-1) == 5).all()
    assert "min_voices and max_voices were held within the draw in 3 frames" in caplog.text


def test_dropout_and_gradients():
    model = chain_model(frame_head_dropout=0.5).train()
    x = random_roll(2, 8, KEYS)
    first, second = model(input_values=x), model(input_values=x)
    assert not torch.equal(first.logits, second.logits)
    first.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model.eval()(input_values=x).logits, model(input_values=x).logits)


def test_the_chain_is_saved_with_the_model(tmp_path):
    model, x = chain_model(), random_roll(1, 5, KEYS)
    model.save_pretrained(tmp_path)
    assert torch.equal(KRUForPianoRoll.from_pretrained(tmp_path)(input_values=x).loss, model(input_values=x).loss)


def test_frames_that_are_no_frames_are_an_error():
    with pytest.raises(ValueError, match=r"must hold 0 and 1 alone, got 0\.5"):
        chain_model()(input_values=torch.full((1, 3, KEYS), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_head": "coin"}, "frame_head.*'coin'"),
        ({"frame_onsets": True}, "frame_onsets needs frame_head='chain', got frame_head='independent'"),
        ({"frame_head": "chain", "frame_head_size": 0}, "frame_head_size must be at least 1, got 0"),
        ({"frame_head": "chain", "frame_head_dropout": 1.0}, r"frame_head_dropout must be in \[0, 1\), got 1\.0"),
        ({"frame_head_size": 32}, r"frame_head_size of independent keys must stay 64 \(unused\), got 32"),
    ],
)
@pytest.mark.parametrize("config", [KRUConfig, BaselineConfig])
def test_bad_fields_name_themselves(config, options, message):
    with pytest.raises(Exception, match=message):
        config(**options)


def test_bad_shares_name_themselves():
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got 0"):
        chain_model().generate_piano_roll(top_p=0.0)
