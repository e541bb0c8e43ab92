"""What several test files need: tolerances by dtype, tiny models."""

from typing import Any

import torch
from torch import Tensor

from kru_hf import KRUCache, KRUConfig, KRUForCausalLM, KRUModel, KRUPreTrainedModel
from kru_hf.maps import KroneckerLinear

# Largest allowed |difference| over the largest |value| of the expected tensor.
RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
# The same for logits of whole models in float32, whose products may be ordered differently for other batch sizes.
LOGITS = 1e-4
FLOAT32_TOLERANCE = 1e-5  # nats per frame, and states: sums over keys in another order


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference within ``tolerance`` times the largest expected value (1 if that is less)."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


def tiny_config(**options) -> KRUConfig:
    """6 units in factors 2x2 and 3x3, 11 tokens, token 0 pads."""
    defaults = {"vocab_size": 11, "factor_shapes": [[2, 2], [3, 3]], "pad_token_id": 0}
    if options.get("block_type") != "plain":
        defaults |= {"hidden_size": 8, "num_hidden_layers": 2}
    return KRUConfig(**(defaults | options))


def loud(model: KRUPreTrainedModel) -> Any:
    """The model with U x of size 1 at its start, so that the states are far from zero."""
    body = model if isinstance(model, KRUModel) else model.model
    maps = [body.embed_tokens or body.input_map]
    if model.config.block_type == "residual":
        maps = [layer.in_proj for layer in body.layers]
    with torch.no_grad():
        for module in maps:
            (module.blocks if isinstance(module, KroneckerLinear) else module.weight).div_(
                model.config.start.input_scale
            )
    return model


def tiny_model(seed: int = 0, **options) -> KRUForCausalLM:
    """A model in eval mode whose states are far from zero, so that a wrong state is seen in the logits."""
    torch.manual_seed(seed)
    model = loud(KRUForCausalLM(tiny_config(**options))).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


# Every way to wire the maps around the recurrence.
BLOCKS = [
    {"block_type": "residual"},
    {"block_type": "residual", "io_rank": 3},
    {"block_type": "residual", "io_rank": 3, "intermediate_size": 5},
    {"block_type": "residual", "kronecker_terms": 2, "intermediate_size": 6},
    {"block_type": "plain"},
    {"block_type": "plain", "readout_norm": False},
]
# The gated cells, each in one of them.
GATED = [
    {"block_type": "residual", "cell_type": "kru_lstm"},
    {"block_type": "plain", "cell_type": "kru_gru"},
    {"block_type": "residual", "cell_type": "kru_janet"},
]


def check_windows(model: KRUPreTrainedModel, frames: Tensor) -> None:
    """A model of piano rolls gives windows of frames (B, 11, keys) what it gives the whole, with the state carried."""
    whole, state, nats = model(input_values=frames), None, 0.0
    for start in range(0, 10, 4):
        end = min(start + 4, 10)
        window = {"input_values": frames[:, start:end], "shift_labels": frames[:, start + 1 : end + 1]}
        out = model(**window, past_key_values=state, use_cache=True)
        state = KRUCache.from_states([s.detach() for s in out.past_key_values.states])
        nats += out.loss.item() * (end - start)
        torch.testing.assert_close(out.logits, whole.logits[:, start:end], atol=FLOAT32_TOLERANCE, rtol=0)
    assert abs(nats / 10 - whole.loss.item()) < FLOAT32_TOLERANCE
