"""The portable engine: neighbouring factors merged into at most three dense groups, and an analytic backward.

No autograd graph over time: forward keeps the states alone, backward recomputes z = W h + u from them, a chunk of
time at a time, runs the adjoint recurrence, and gets the weight gradients from a few large products a chunk.
Works in float32 and float64 on any device.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kronecker import apply_order, factor_gradients, group_factors, kron, kron_apply_complex, to_complex, to_planes
from .scan_checks import check_scan
from .transforms import differentiable_once, is_concrete, refuse_derivative

# Steps whose z and stage intermediates are alive at once in the backward pass: bounds its memory, amortises its calls.
CHUNK = 16


def merge_groups(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (2, P_f, Q_f) to at most three dense complex groups (P, Q) with the same Kronecker product.

    Differentiable: autograd of the small products carries a group's gradient to its factors.
    """
    lengths = group_factors([(factor.shape[1], factor.shape[2]) for factor in factors])
    matrices = iter(to_complex(factor, 0) for factor in factors)
    groups = []
    for length in lengths:
        group = next(matrices)  # (P, Q)
        for matrix in itertools.islice(matrices, length - 1):
            group = kron(group, matrix)  # (P, Q)
        groups.append(group)
    return groups


def kron_backward(groups: Sequence[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients (P, Q) of the groups for y = (⊗ groups) x, given x (M, N) and grad of y (M, N), all complex."""
    shapes = [tuple(group.shape) for group in groups]
    order = apply_order(shapes)
    sizes = [columns for _, columns in shapes]
    stages = []
    for index in order:
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        x = x.reshape(-1, left, sizes[index], right)  # (M, L, Q, R)
        stages.append(x)
        x = (x.mT @ groups[index].mT).mT  # (M, L, P, R)
        sizes[index] = shapes[index][0]
    result: list[Tensor] = [x] * len(groups)
    for index, stage in zip(reversed(order), reversed(stages), strict=True):
        _, left, columns, right = stage.shape
        grad = grad.reshape(-1, left, shapes[index][0], right)  # (M, L, P, R)
        rows_first = grad.movedim(2, 0).flatten(1)  # (P, M·L·R)
        result[index] = rows_first @ stage.movedim(2, 0).flatten(1).conj_physical().mT  # (P, Q)
        grad = (grad.mT @ groups[index].conj_physical()).mT  # (M, L, Q, R)
    return result


def _idle(modulus: Tensor, bias: Tensor) -> Tensor:
    """Where modReLU is zero, given |z| (…, N) and b (N,). False for what is not a number."""
    return torch.where(modulus == 0, bias < math.inf, modulus + bias <= 0)  # (…, N)


def modrelu_complex(z: Tensor, bias: Tensor) -> Tensor:
    """modReLU of complex z (…, N) with bias (N,): see ``scan_reference.modrelu``."""
    modulus = z.abs()  # (…, N)
    return z * torch.where(_idle(modulus, bias), 0, 1 + bias / modulus + 0 * modulus)  # (…, N)


def _forward(
    inputs: Tensor,
    groups: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor,
    mask: Tensor | None,
    modrelu: bool,
) -> tuple[Tensor, Tensor]:
    """states (B, T, 2, N) and final_state (B, 2, N) of the matrix that is the Kronecker product of dense ``groups``."""
    length = inputs.shape[1]
    states = torch.empty_like(inputs, memory_format=torch.contiguous_format)  # (B, T, 2, N)
    state = to_complex(initial_state, 1)  # (B, N)
    for t in range(length):
        z = kron_apply_complex(groups, state) + to_complex(inputs[:, t], 1)  # (B, N)
        new = modrelu_complex(z, bias) if modrelu else z + 0 * z  # (B, N): an infinity becomes NaN
        state = new if mask is None else torch.where(mask[:, t, None], new, state)  # (B, N)
        states[:, t, 0], states[:, t, 1] = state.real, state.imag
    return states, to_planes(state, 1)


def _backward(
    grad_states: Tensor,
    grad_final: Tensor,
    inputs: Tensor,
    groups: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor,
    mask: Tensor | None,
    states: Tensor,
    modrelu: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of the inputs (B, T, 2, N), the groups (P, Q), the bias (N,) and the initial state (B, 2, N)."""
    length = inputs.shape[1]
    # Conjugates are written out: a lazy one is a bit of the tensor, which operators of compiled code can fail to see.
    adjoints = [group.mT.conj_physical() for group in groups]  # (Q, P) each
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)  # (B, T, 2, N)
    grad_bias = torch.zeros_like(bias)  # (N,)
    grad_groups = [torch.zeros_like(group) for group in groups]
    grad_state = to_complex(grad_final, 1)  # (B, N): of h_t, from the future
    for end in range(length, 0, -CHUNK):
        start = max(end - CHUNK, 0)
        before = states[:, max(start - 1, 0) : end - 1]
        if start == 0:
            before = torch.cat((initial_state.unsqueeze(1), before), 1)
        if mask is not None:
            before = before.where(mask[:, start:end, None, None], 0)  # (B, C, 2, N): 0 times a NaN would be one
        previous = to_complex(before, 2)  # (B, C, N): h_{t-1} of the chunk
        if modrelu:
            z = kron_apply_complex(groups, previous) + to_complex(inputs[:, start:end], 2)  # (B, C, N)
            modulus = z.abs()  # (B, C, N)
            active = ~_idle(modulus, bias)  # (B, C, N)
            if mask is not None:
                active &= mask[:, start:end, None]  # (B, C, N)
            modulus = modulus.where(modulus != 0, 1)  # (B, C, N): z/|z| is 0 at 0
            unit = torch.where(active, z / modulus + 0 * modulus, 0)  # (B, C, N): NaN for an infinite |z|
            ratio = torch.where(active, bias / modulus, 0)  # (B, C, N): b/|z|
        chunk = torch.empty_like(previous)  # (B, C, N): dz
        for t in range(end - 1, start - 1, -1):
            grad = grad_state + to_complex(grad_states[:, t], 1)  # (B, N)
            if modrelu:
                # h = z + b·z/|z|: the radial part of the gradient passes as it is, the tangential one times 1+b/|z|
                here = unit[:, t - start]  # (B, N)
                radial = here.real * grad.real + here.imag * grad.imag  # (B, N)
                scale = ratio[:, t - start]  # (B, N)
                grad_z = torch.where(active[:, t - start], grad + scale * (grad - here * radial), 0)  # (B, N)
                grad_bias += torch.where(active[:, t - start], radial, 0).sum(0)  # (N,)
            else:
                grad_z = grad if mask is None else torch.where(mask[:, t, None], grad, 0)  # (B, N)
            chunk[:, t - start] = grad_z
            passed = kron_apply_complex(adjoints, grad_z)  # (B, N)
            grad_state = passed if mask is None else torch.where(mask[:, t, None], passed, grad)  # (B, N)
        grad_inputs[:, start:end, 0], grad_inputs[:, start:end, 1] = chunk.real, chunk.imag
        for total, part in zip(
            grad_groups, kron_backward(groups, previous.flatten(0, 1), chunk.flatten(0, 1)), strict=True
        ):
            total += part  # (P, Q)
    return grad_inputs, grad_groups, grad_bias, to_planes(grad_state, 1)


class _Scan(torch.autograd.Function):
    """(states, final_state) of the recurrence whose matrix is the Kronecker product of dense complex ``groups``."""

    @staticmethod
    def forward(ctx, inputs, bias, initial_state, mask, modrelu, *groups):
        states, final_state = _forward(inputs, groups, bias, initial_state, mask, modrelu)
        ctx.save_for_backward(inputs, bias, initial_state, mask, states, *groups)
        ctx.modrelu = modrelu
        return states, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_states, grad_final):
        inputs, bias, initial_state, mask, states, *groups = ctx.saved_tensors
        d_inputs, d_groups, d_bias, d_initial = _backward(
            grad_states, grad_final, inputs, groups, bias, initial_state, mask, states, ctx.modrelu
        )
        return d_inputs, d_bias, d_initial, None, None, *d_groups


if __name__.startswith("kru_hf."):
    # What torch.compile and tracers see: a node each way, where they would unroll the loop over time. They take the
    # factors, not the groups, so that the compiled graph has no complex tensor. Only the installed package registers
    # operators: see scan_cpu. Eager calls keep the autograd function, whose way through the dispatcher is shorter.
    @torch.library.custom_op("kru_hf::scan_torch", mutates_args=())
    def _scan_op(
        inputs: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor,
        initial_state: Tensor,
        mask: Tensor | None,
        modrelu: bool,
    ) -> tuple[Tensor, Tensor]:
        check_scan("kru", inputs, factors, bias, initial_state, mask)
        return _forward(inputs, merge_groups(factors), bias, initial_state, mask, modrelu)

    @_scan_op.register_fake
    def _(inputs, factors, bias, initial_state, mask, modrelu):
        check_scan("kru", inputs, factors, bias, initial_state, mask)
        return inputs.new_empty(inputs.shape), initial_state.new_empty(initial_state.shape)

    @torch.library.custom_op("kru_hf::scan_torch_backward", mutates_args=())
    def _scan_backward_op(
        d_states: Tensor,
        d_final: Tensor,
        inputs: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor,
        initial_state: Tensor,
        mask: Tensor | None,
        states: Tensor,
        modrelu: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        full, end = tuple(inputs.shape), tuple(initial_state.shape)
        others = [("d_states", d_states, full), ("d_final", d_final, end), ("states", states, full)]
        check_scan("kru", inputs, factors, bias, initial_state, mask, others)
        groups = merge_groups(factors)
        d_inputs, d_groups, d_bias, d_initial = _backward(
            d_states, d_final, inputs, groups, bias, initial_state, mask, states, modrelu
        )
        matrices = [to_complex(factor, 0).unsqueeze(0) for factor in factors]  # (1, P, Q) each
        d_factors = factor_gradients(matrices, [grad.unsqueeze(0) for grad in d_groups])
        return d_inputs, [to_planes(grad[0], 0) for grad in d_factors], d_bias, d_initial

    @_scan_backward_op.register_fake
    def _(d_states, d_final, inputs, factors, bias, initial_state, mask, states, modrelu):
        d_factors = [factor.new_empty(factor.shape) for factor in factors]
        d_initial = initial_state.new_empty(initial_state.shape)
        return inputs.new_empty(inputs.shape), d_factors, bias.new_empty(bias.shape), d_initial

    def _setup(ctx, inputs, output) -> None:
        u, factors, bias, initial_state, mask, modrelu = inputs
        ctx.modrelu = modrelu
        ctx.save_for_backward(u, bias, initial_state, mask, output[0], *factors)

    def _op_gradient(ctx, d_states, d_final):
        inputs, bias, initial_state, mask, states, *factors = ctx.saved_tensors
        d_inputs, d_factors, d_bias, d_initial = _scan_backward_op(
            d_states, d_final, inputs, factors, bias, initial_state, mask, states, ctx.modrelu
        )
        return d_inputs, d_factors, d_bias, d_initial, None, None

    _scan_op.register_autograd(_op_gradient, setup_context=_setup)
    _scan_backward_op.register_autograd(refuse_derivative)
    _compiled: Callable[..., tuple[Tensor, Tensor]] | None = _scan_op
else:
    _compiled = None


def kru_scan_torch(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "modrelu",
) -> tuple[Tensor, Tensor]:
    """The recurrence on any device. See :func:`kru_hf.kru_scan` for the contract.

    Returns states (B, T, 2, N) and final_state (B, 2, N), a copy.
    """
    check_scan("kru", inputs, factors, bias, initial_state, mask)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], 2, inputs.shape[3])  # (B, 2, N)
    modrelu = activation == "modrelu"
    if _compiled is not None and (torch.compiler.is_compiling() or not is_concrete([inputs, *factors])):
        return _compiled(inputs, list(factors), bias, initial_state, mask, modrelu)
    return _Scan.apply(inputs, bias, initial_state, mask, modrelu, *merge_groups(factors))
