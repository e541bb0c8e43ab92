"""What torch.compile, torch.export and fake tensors see of the engines: a pair of operators each, nothing unrolled.

Only the installed package registers operators: a second registration of a name replaces the first, so two revisions of
pushed code would run each other's kernel. Eager calls do not come here: the way through the dispatcher is longer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..scan import COMPILED, ENGINES, Engine
from ..scan_checks import Named, check_scan
from ..transforms import refuse_derivative


def state_like(inputs: Tensor, cell: str) -> Tensor:
    return inputs.new_empty(inputs.shape[0], len(CELLS[cell].states), inputs.shape[3])  # (B, S, N)


def register(name: str, engine: Engine) -> Any:
    """Register kru_hf::<name>_scan and kru_hf::<name>_scan_backward; the first, differentiable once, is returned."""

    def forward(
        inputs: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor,
        initial_state: Tensor | None,
        mask: Tensor | None,
        starts: Tensor | None,
        cell: str,
        activation: str,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_scan(CELLS[cell], inputs, factors, bias, initial_state, mask, starts)
        options = (CELLS[cell], activation, save)
        return engine.forward(inputs, list(factors), bias, initial_state, mask, starts, *options)

    def backward(
        d_states: Tensor | None,
        d_final: Tensor | None,
        inputs: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor,
        initial_state: Tensor | None,
        mask: Tensor | None,
        starts: Tensor | None,
        states: Tensor,
        saved: Tensor,
        cell: str,
        activation: str,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        full, end = CELLS[cell].states_shape(inputs.shape), tuple(state_like(inputs, cell).shape)
        others: list[Named] = [("d_states", d_states, full), ("d_final", d_final, end), ("states", states, full)]
        others.append(("saved", saved, engine.saved_shape(inputs.shape, CELLS[cell])))
        check_scan(CELLS[cell], inputs, factors, bias, initial_state, mask, starts, others)
        read = (inputs, list(factors), bias, initial_state, mask, starts, states, saved)
        return engine.backward(d_states, d_final, *read, CELLS[cell], activation)

    scan = torch.library.custom_op(f"kru_hf::{name}_scan", forward, mutates_args=())
    scan_backward = torch.library.custom_op(f"kru_hf::{name}_scan_backward", backward, mutates_args=())

    @scan.register_fake
    def _(inputs, factors, bias, initial_state, mask, starts, cell, activation, save):
        # One tensor on meta brings the others here.
        check_scan(CELLS[cell], inputs, factors, bias, initial_state, mask, starts)
        states = inputs.new_empty(CELLS[cell].states_shape(inputs.shape))
        saved = inputs.new_empty(engine.saved_shape(inputs.shape, CELLS[cell]) if save else (0,))
        return states, state_like(inputs, cell), saved

    @scan_backward.register_fake
    def _(d_states, d_final, inputs, factors, bias, initial_state, mask, starts, states, saved, cell, activation):
        d_inputs, d_bias = inputs.new_empty(inputs.shape), bias.new_empty(bias.shape)
        return d_inputs, [factor.new_empty(factor.shape) for factor in factors], d_bias, state_like(inputs, cell)

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        u, factors, bias, initial_state, mask, starts, ctx.cell, ctx.activation, _ = inputs
        states, _, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(u, bias, initial_state, mask, starts, states, saved, *factors)

    def gradient(ctx: Any, d_states: Tensor | None, d_final: Tensor | None, _: Any) -> tuple:
        u, bias, initial_state, mask, starts, states, saved, *factors = ctx.saved_tensors
        if d_states is None and d_final is None:
            return None, [None] * len(factors), None, None, None, None, None, None, None
        read = (u, factors, bias, initial_state, mask, starts, states, saved)
        d_inputs, d_factors, d_bias, d_initial = scan_backward(d_states, d_final, *read, ctx.cell, ctx.activation)
        d_state = None if initial_state is None else d_initial
        return d_inputs, d_factors, d_bias, d_state, None, None, None, None, None

    scan.register_autograd(gradient, setup_context=setup)
    scan_backward.register_autograd(refuse_derivative)
    return scan


COMPILED.update({name: register(name, engine) for name, engine in ENGINES.items()})
