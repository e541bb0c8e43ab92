"""What torch.compile, torch.export and fake tensors see of the engines: a pair of operators each, nothing unrolled.

Only the installed package registers operators: a second registration of a name replaces the first, so two revisions of
pushed code would run each other's kernel. Eager calls do not come here: the way through the dispatcher is longer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..scan import COMPILED, ENGINES, refuse_derivative
from ..scan_reference import Engine, Named, ScanCall, check_scan

# Of both operators, in the order of ScanCall, with the cell's name for the cell.
ARGUMENTS = (
    "Tensor inputs, Tensor[] factors, Tensor bias, Tensor? initial_state, Tensor? mask, Tensor? starts, "
    "str cell, str activation"
)
FORWARD = f"({ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    f"({ARGUMENTS}, Tensor states, Tensor saved, Tensor? d_states, Tensor? d_final) -> "
    "(Tensor, Tensor[], Tensor, Tensor)"
)


def read_call(arguments: Sequence[Any]) -> ScanCall:
    """The call that an operator's arguments start with."""
    inputs, factors, bias, initial_state, mask, starts, cell, activation, *_ = arguments
    return ScanCall(inputs, list(factors), bias, initial_state, mask, starts, CELLS[cell], activation)


def register(name: str, engine: Engine) -> Any:
    """Register kru_hf::<name>_scan and kru_hf::<name>_scan_backward; the first, differentiable once, is returned."""

    def check(call: ScanCall, others: Sequence[Named] = ()) -> None:
        check_scan(call, others)
        if (why := engine.obstacle(call.cell, call.inputs, call.factors)) is not None:
            raise RuntimeError(f"kru_hf::{name}_scan cannot run: {why}")

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        check(call := read_call(arguments))
        return engine.forward(call, arguments[8])

    def backward(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        call, given = read_call(arguments), arguments[8:]
        full, end = call.cell.states_shape(call.inputs.shape), tuple(call.state_like().shape)
        shapes = (full, call.saved_shape(engine.beside), full, end)
        names = ("states", "saved", "d_states", "d_final")
        check(call, [(*named, call.inputs.dtype) for named in zip(names, given, shapes, strict=True)])
        return engine.backward(call, *given)

    scan = torch.library.custom_op(f"kru_hf::{name}_scan", forward, mutates_args=(), schema=FORWARD)
    scan_backward = torch.library.custom_op(f"kru_hf::{name}_scan_backward", backward, mutates_args=(), schema=BACKWARD)

    @scan.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        check_scan(call := read_call(arguments))  # one tensor on meta brings the others here
        saved = call.inputs.new_empty(call.saved_shape(engine.beside) if arguments[8] else (0,))
        return call.inputs.new_empty(call.cell.states_shape(call.inputs.shape)), call.state_like(), saved

    @scan_backward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        call = read_call(arguments)
        d_inputs, d_bias = (tensor.new_empty(tensor.shape) for tensor in (call.inputs, call.bias))
        return d_inputs, [factor.new_empty(factor.shape) for factor in call.factors], d_bias, call.state_like()

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, (states, _, saved) = read_call(inputs), output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.options = (inputs[6], call.activation)
        ctx.save_for_backward(states, saved, *call.tensors())

    def gradient(ctx: Any, d_states: Tensor | None, d_final: Tensor | None, _: Any) -> tuple:
        states, saved, inputs, bias, initial_state, mask, starts, *factors = ctx.saved_tensors
        if d_states is None and d_final is None:
            return None, [None] * len(factors), *[None] * 7
        read = (inputs, factors, bias, initial_state, mask, starts, *ctx.options)
        d_inputs, d_factors, d_bias, d_initial = scan_backward(*read, states, saved, d_states, d_final)
        return d_inputs, d_factors, d_bias, None if initial_state is None else d_initial, *[None] * 5

    scan.register_autograd(gradient, setup_context=setup)
    scan_backward.register_autograd(refuse_derivative)
    return scan


COMPILED.update({name: register(name, engine) for name, engine in ENGINES.items()})
