"""What several test files need: tolerances by dtype, random problems of the recurrence, tiny models."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kru_hf import KRUConfig, KRUForCausalLM

# Largest allowed |difference| over the largest |value| of the expected tensor.
RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
# The same for logits of whole models in float32, whose products may be ordered differently for other batch sizes.
LOGITS = 1e-4


@dataclass
class Problem:
    """Arguments of ``kru_scan`` and random cotangents of its two outputs."""

    inputs: Tensor
    factors: list[Tensor]
    bias: Tensor
    initial: Tensor
    mask: Tensor | None
    grad_states: Tensor
    grad_final: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.inputs, self.bias, self.initial, *self.factors]


def random_problem(
    shapes: list[tuple[int, int]], batch: int, length: int, *, seed: int = 0, dtype=torch.float32, masked: bool = False
) -> Problem:
    """Biases of either sign, some inputs and initial states exactly zero, factors of a norm near 1."""
    g = torch.Generator().manual_seed(seed)
    units = math.prod(p for p, _ in shapes)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    inputs = normal(batch, length, 2, units)
    inputs = torch.where(torch.rand(batch, length, 1, units, generator=g) < 0.3, 0, inputs)
    initial = normal(batch, 2, units)
    initial[0] = 0
    inputs[0, 0] = 0  # with the zero state: z is exactly 0
    factors = [normal(2, p, q) * (2 * max(p, q)) ** -0.5 for p, q in shapes]
    bias = 0.3 * normal(units)
    mask = torch.rand(batch, length, generator=g) < 0.7 if masked else None
    tensors = [inputs, bias, initial, *factors]
    inputs, bias, initial, *factors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return Problem(
        inputs,
        factors,
        bias,
        initial,
        mask,
        normal(batch, length, 2, units).to(dtype),
        normal(batch, 2, units).to(dtype),
    )


def run_engine(engine, problem: Problem, **options) -> list[Tensor]:
    """[states, final state, gradient of inputs, bias, initial state and each factor]."""
    p = problem
    states, final = engine(p.inputs, p.factors, p.bias, p.initial, p.mask, **options)
    grads = torch.autograd.grad(
        (states, final), p.leaves(), (p.grad_states, p.grad_final), allow_unused=True, materialize_grads=True
    )
    return [states.detach(), final.detach(), *grads]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference within ``tolerance`` times the largest expected value (1 if that is less)."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


def tiny_config(**options) -> KRUConfig:
    """6 units in factors 2x2 and 3x3, 11 tokens, token 0 pads."""
    defaults = {"vocab_size": 11, "factor_shapes": [[2, 2], [3, 3]], "pad_token_id": 0}
    if options.get("wiring") != "plain":
        defaults |= {"hidden_size": 8, "num_hidden_layers": 2}
    return KRUConfig(**(defaults | options))


def tiny_model(seed: int = 0, **options) -> KRUForCausalLM:
    """A model in eval mode whose states are far from zero, so that a wrong state is seen in the logits."""
    torch.manual_seed(seed)
    model = KRUForCausalLM(tiny_config(**({"input_scale": 1.0} | options))).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


# Every way to wire the maps around the recurrence.
WIRINGS = [
    {"wiring": "residual"},
    {"wiring": "residual", "io_rank": 3},
    {"wiring": "residual", "io_rank": 3, "intermediate_size": 5},
    {"wiring": "residual", "kronecker_terms": 2, "intermediate_size": 6},
    {"wiring": "plain"},
    {"wiring": "plain", "io_rank": 3},
    {"wiring": "plain", "readout_norm": False},
]
# The gated cells, each in one of them.
GATED = [
    {"wiring": "residual", "cell_type": "kru_lstm"},
    {"wiring": "plain", "cell_type": "kru_gru", "io_rank": 3},
    {"wiring": "residual", "cell_type": "kru_janet"},
]
