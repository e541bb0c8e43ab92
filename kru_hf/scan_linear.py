"""The linear recurrence, parallel over time: the scan never leaves the family of Kronecker products.

    h_t = d_t (R_{0,t} ⊗ … ⊗ R_{F-1,t}) h_{t-1} + u_t

(A ⊗ B)(C ⊗ D) = AC ⊗ BD, so the product of any number of steps is again F small matrices. T is cut into chunks of
C steps. Within a chunk, with P_t = R_t ⋯ R_1 factor by factor and D_t = d_t ⋯ d_1:

- unitary factors take the short form h_t = P_t (D_t h_0 + Σ_{s≤t} (D_t / D_s) P_s^H u_s): rotate every input into the
  frame of the chunk, add up, rotate back;
- any other matrices take the associative scan over pairs, (A, b) after (A', b') = (A A', A b' + b), log₂ C rounds.

Chunks are joined by the scan over pairs. Rounding grows with C and log T, not with T. On a CPU, where steps cost little
beside their arithmetic, going step by step does a third of the work: "auto" does so there, unless the state is so small
that the calls cost more than what they compute. Fixed factors without a decay are the linear network of ``kron_scan``,
whose engines take the steps.

The backward of all forms is the adjoint recurrence λ_t = d_{t+1} R_{t+1}^H λ_{t+1} + g_t, the same scan from the end,
and dR_t = d_t λ_t h_{t-1}^H projected on the factors: automatic differentiation of the short form would give the
gradient of another function, which reads P^H.

| here | DESIGN | shape |
| --- | --- | --- |
| inputs | u_t | (B, T, 2, H·N) |
| factors | R_f | F tensors (H, 2, P_f, P_f), or by step (B, T, H, 2, P_f, P_f) |
| decay | d_t | (B, T, H) |
| states | h_t | (B, T, 2, H·N) |

H heads, each with a state of N = ∏ P_f units of its own. Inside, tensors are complex, without the axis of size 2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kronecker import check_choice, merge_groups, to_complex, to_planes
from .scan import can_look_at, differentiable_once, is_transformed, kron_scan

BACKENDS = ("auto", "parallel", "steps", "reference")
MERGED = 16  # most units of factors by step that are merged: a product of a step's own is used once
CHUNK = 64  # steps of a chunk; the short form adds up C² pairs of steps where there is a decay
FEW = 1024  # multiply-adds of a step's products, B·H·Σ P_f³, up to which a loop on a CPU mostly waits for its calls


def kron_linear_scan(
    inputs: Tensor,
    factors: Sequence[Tensor],
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    unitary: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = d_t (⊗_f R_{f,t}) h_{t-1} + u_t over a whole sequence, for H heads side by side.

    Args:
        inputs: u_t (B, T, 2, H·N), float32 or float64; axis 2 holds the real and the imaginary plane.
        factors: F tensors (H, 2, P_f, P_f), the same at every step, or (B, T, H, 2, P_f, P_f); ∏ P_f = N.
        decay: d_t (B, T, H) in (0, 1]; None: 1.
        initial_state: h_0 (B, 2, H·N); zeros if None.
        mask: (B, T) bool; False holds the state at that step, whatever the input.
        starts: (B, T) bool; True begins a new document: the state before that step is zero.
        unitary: whether every factor is unitary, by construction. The short form is then exact; of other factors it
            would compute something else, so that only the caller can say so.
        backend: "parallel" over time; "steps", one after another, with the same backward; "auto", which is "steps" on a
            CPU, but for unitary factors of a small state, and "parallel" elsewhere; or "reference", the loop that
            autograd differentiates.

    Returns:
        states (B, T, 2, H·N) and final_state (B, 2, H·N), a copy. Differentiable once, more often with "reference".

    Raises:
        ValueError: a shape or value that does not fit. TypeError: a dtype or device that does not.
    """
    heads = _check(inputs, factors, decay, initial_state, mask, starts, backend)
    batch, length = inputs.shape[:2]
    fixed = factors[0].dim() == 4 and decay is None
    if backend == "auto":
        few = unitary and not fixed and batch * heads * sum(factor.shape[-1] ** 3 for factor in factors) <= FEW
        backend = "steps" if inputs.device.type == "cpu" and not few else "parallel"
    if fixed and backend == "steps":
        return _by_head(inputs, factors, initial_state, mask, starts)
    u = _split_heads(inputs, heads)  # (B, T, H, N)
    matrices = _merge([to_complex(factor, -3) for factor in factors])  # (H, P, P) or (B, T, H, P, P)
    h0 = u.new_zeros(batch, *u.shape[2:]) if initial_state is None else _split_heads(initial_state, heads)  # (B, H, N)
    d = inputs.new_ones(batch, length, heads) if decay is None else decay  # (B, T, H)
    if starts is not None:
        d = torch.where(starts.unsqueeze(-1), 0, d)  # (B, T, H): nothing of what was before comes through
    if mask is not None:
        u = torch.where(mask[:, :, None, None], u, 0)  # (B, T, H, N)
        held = torch.ones_like(d) if starts is None else (~starts).unsqueeze(-1).to(d.dtype)  # (B, T, H) or (B, T, 1)
        d = torch.where(mask.unsqueeze(-1), d, held)  # (B, T, H)
        matrices = [_hold(matrix, mask) for matrix in matrices]  # (B, T, H, P, P)
    if backend == "reference" or is_transformed((inputs, decay, initial_state, *factors)):
        states = _loop(u, matrices, d, h0)  # (B, T, H, N)
    else:
        short = "unitary" if unitary else "pairs"
        form = "steps" if backend == "steps" else short
        plain = decay is None and starts is None and mask is None
        states = _LinearScan.apply(u, d, h0, form, plain, *matrices)  # (B, T, H, N)
    states = to_planes(states, 2).flatten(3)  # (B, T, 2, H·N)
    return states, states[:, -1].clone()


def _check(
    inputs: Tensor,
    factors: Sequence[Tensor],
    decay: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    backend: str,
) -> int:
    """The number of heads; ValueError or TypeError naming the argument, its value and what is allowed."""
    check_choice("backend", backend, BACKENDS)
    if inputs.dim() != 4 or inputs.shape[2] != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs must have the shape (B, T, 2, H*N) with no empty axis, got {tuple(inputs.shape)}")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs must be float32 or float64, got {inputs.dtype}")
    batch, length, _, width = inputs.shape
    if not factors:
        raise ValueError("factors must hold at least one tensor, got none")
    heads = factors[0].shape[-4] if factors[0].dim() in (4, 6) else 0
    lead = (heads,) if factors[0].dim() == 4 else (batch, length, heads)
    for index, factor in enumerate(factors):
        shape = tuple(factor.shape)
        if factor.dim() not in (4, 6) or shape[:-3] != lead or shape[-3] != 2:
            allowed = f"(H, 2, P, P) or ({batch}, {length}, H, 2, P, P), all alike but for P"
            raise ValueError(f"factors[{index}] must have the shape {allowed}, got {shape}")
        if shape[-1] != shape[-2]:
            raise ValueError(f"factors[{index}] must be square, got {shape[-2]}x{shape[-1]}")
    units = math.prod([factor.shape[-1] for factor in factors])
    if heads * units != width:
        raise ValueError(f"{heads} heads with factors of N = {units} have {heads * units} units, the inputs {width}")
    shapes = {"decay": (decay, (batch, length, heads)), "initial_state": (initial_state, (batch, 2, width))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in {"mask": mask, "starts": starts}.items():
        if tensor is not None and (tuple(tensor.shape) != (batch, length) or tensor.dtype != torch.bool):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be a bool tensor of the shape {(batch, length)}, got {found}")
    named = {"decay": decay, "initial_state": initial_state, **{f"factors[{i}]": f for i, f in enumerate(factors)}}
    for name, tensor in named.items():
        if tensor is not None and (tensor.dtype != inputs.dtype or tensor.device != inputs.device):
            found = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name} must be {inputs.dtype} on {inputs.device} like the inputs, got {found}")
    for name, tensor in {"mask": mask, "starts": starts}.items():
        if tensor is not None and tensor.device != inputs.device:
            raise TypeError(f"{name} must be on {inputs.device} like the inputs, got {tensor.device}")
    if decay is not None and decay.device.type == "cpu" and can_look_at(decay):
        low, high = (float(n) for n in decay.aminmax())
        if not (low > 0 and high <= 1):
            raise ValueError(f"decay must be in (0, 1], got values from {low:.4g} to {high:.4g}")
    return heads


def _by_head(
    inputs: Tensor, factors: Sequence[Tensor], initial_state: Tensor | None, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States and final state of factors (H, 2, P, P) by the engines of :func:`kron_scan`, a head at a time."""
    heads = factors[0].shape[0]
    split = heads > 1  # one head is not cut out of its tensors: the backward would copy them
    u = inputs.unflatten(-1, (heads, -1)).unbind(-2) if split else (inputs,)  # (B, T, 2, N) each
    h0 = (initial_state,) * heads  # (B, 2, N) each, or None
    if split and initial_state is not None:
        h0 = initial_state.unflatten(-1, (heads, -1)).unbind(-2)
    found = [
        kron_scan(u[h], [f[h] for f in factors], None, h0[h], mask, starts=starts, activation="identity")
        for h in range(heads)
    ]
    states, finals = zip(*found, strict=True)
    return (torch.cat(states, -1), torch.cat(finals, -1)) if split else found[0]


def _split_heads(planes: Tensor, heads: int) -> Tensor:
    """(…, 2, H·N) planes to complex (…, H, N)."""
    return to_complex(planes, -2).unflatten(-1, (heads, -1))


def _merge(matrices: list[Tensor]) -> list[Tensor]:
    """Factors (…, P, P) as at most three matrices with the same Kronecker product; autograd differentiates."""
    lead = matrices[0].shape[:-2]
    if len(lead) > 1 and math.prod([matrix.shape[-1] for matrix in matrices]) > MERGED:
        return matrices
    merged = merge_groups([matrix.flatten(0, -3) for matrix in matrices])  # (G, P, P)
    return [matrix.unflatten(0, lead) for matrix in merged]


def _hold(matrix: Tensor, mask: Tensor) -> Tensor:
    """Matrices (H, P, P) or (B, T, H, P, P) by step, the identity where the mask (B, T) is False."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)  # (P, P)
    return torch.where(mask[:, :, None, None, None], matrix, identity)  # (B, T, H, P, P)


def apply_steps(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """(⊗_f R_f) x, complex: R_f (…, P_f, P_f) whose leading axes are the last ones of those of x (…, N).

    The axes that only x has become columns: a few large products instead of many small ones.
    """
    lead, own = x.shape[:-1], matrices[0].dim() - 2
    outer = len(lead) - own
    x = x.flatten(0, outer - 1).movedim(0, -1) if outer else x.unsqueeze(-1)  # (…, N, M), M = 1 without such axes
    shape = x.shape
    sizes = [matrix.shape[-1] for matrix in matrices]
    for index, matrix in enumerate(matrices):
        left = math.prod(sizes[:index])
        blocks = x.reshape(*shape[:-2], left, sizes[index], -1)  # (…, L, P, R·M)
        single = left > 1 and blocks.shape[-1] == 1
        x = blocks.squeeze(-1) @ matrix.mT if single else matrix.unsqueeze(-3) @ blocks  # (…, L, P, R·M)
    x = x.reshape(shape)
    return x.movedim(-1, 0).reshape(*lead, shape[-2]) if outer else x.squeeze(-1)


def _loop(u: Tensor, matrices: Sequence[Tensor], d: Tensor, h0: Tensor) -> Tensor:
    """The definition: states (B, T, H, N) by a loop over time. Shapes as in :func:`_scan`."""
    states, h = [], h0  # (B, H, N)
    steps = [[matrix] * u.shape[1] if matrix.dim() == 3 else matrix.unbind(1) for matrix in matrices]
    for here, decay, *step in zip(u.unbind(1), d.unsqueeze(-1).unbind(1), *steps, strict=True):
        h = decay * apply_steps(step, h) + here  # (B, H, N)
        states.append(h)
    return torch.stack(states, 1)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """(B, T, …) to (B, ⌈T/C⌉, C, …), padded with zeros."""
    missing = -x.shape[1] % chunk
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)
    return x.unflatten(1, (-1, chunk))


def _powers(matrix: Tensor, count: int) -> Tensor:
    """R, R², …, R^count of fixed matrices (H, P, P), by doubling: (count, H, P, P)."""
    found = matrix.unsqueeze(0)  # (1, H, P, P)
    while found.shape[0] < count:
        found = torch.cat((found, found[-1] @ found[: count - found.shape[0]]))
    return found


def _products(matrix: Tensor) -> Tensor:
    """R_t ⋯ R_1 of each chunk (B, n, C, H, P, P), for every t, in log₂ C rounds."""
    shift = 1
    while shift < matrix.shape[2]:
        matrix = torch.cat((matrix[:, :, :shift], matrix[:, :, shift:] @ matrix[:, :, :-shift]), 2)
        shift *= 2
    return matrix


def _pairs(b: Tensor, matrices: list[Tensor], d: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """The associative scan over pairs along axis 1: b (B, n, H, N), R_f (B, n, H, P, P) or (H, P, P), d (B, n, H).

    Returns for every step, of all steps up to it: what they add (B, n, H, N), their matrices (not of fixed ones, where
    they are powers) and their decay.
    """
    shift = 1
    while shift < b.shape[1]:
        now = [matrix if matrix.dim() == 3 else matrix[:, shift:] for matrix in matrices]
        carried = d[:, shift:, :, None] * apply_steps(now, b[:, :-shift])  # (B, n - shift, H, N)
        b = torch.cat((b[:, :shift], b[:, shift:] + carried), 1)
        d = torch.cat((d[:, :shift], d[:, shift:] * d[:, :-shift]), 1)
        matrices = [
            m @ m if m.dim() == 3 else torch.cat((m[:, :shift], m[:, shift:] @ m[:, :-shift]), 1) for m in matrices
        ]
        shift *= 2
    return b, matrices, d


def _scan(u: Tensor, matrices: Sequence[Tensor], d: Tensor, h0: Tensor, form: str, plain: bool) -> Tensor:
    """States (B, T, H, N), all complex but d: u (B, T, H, N), d (B, T, H) (0 at a start), h0 (B, H, N).

    R_f (H, P_f, P_f) or (B, T, H, P_f, P_f). ``form``: "steps", "unitary" or "pairs". ``plain``: d is 1.
    """
    if form == "steps":
        return _loop(u, matrices, d, h0)
    batch, length, heads, _ = u.shape
    chunk = min(CHUNK, length)
    b = _chunked(u, chunk)  # (B, n, C, H, N)
    fixed = matrices[0].dim() == 3
    if fixed:
        products = [_powers(matrix, chunk) for matrix in matrices]  # (C, H, P, P)
        ends = [product[-1] for product in products]  # (H, P, P)
    else:
        products = [_products(_chunked(matrix, chunk)) for matrix in matrices]  # (B, n, C, H, P, P)
        ends = [product[:, :, -1] for product in products]  # (B, n, H, P, P)
    decays = None if plain else _chunked(d, chunk)  # (B, n, C, H)
    if form == "unitary":
        # Σ_{s≤t} (D_t / D_s) P_s^H u_s, in the frame of the chunk
        local, through = _add_up(apply_steps([product.mH for product in products], b), decays)  # (B, n, C, H, N)
        last = apply_steps(ends, local[:, :, -1])  # (B, n, H, N)
    else:
        steps = [m if fixed else _chunked(m, chunk).flatten(0, 1) for m in matrices]
        ones = d.new_ones(1, chunk, 1).expand(b.shape[0] * b.shape[1], chunk, heads)  # (B·n, C, H)
        local, _, through = _pairs(b.flatten(0, 1), steps, ones if decays is None else decays.flatten(0, 1))
        local, through = local.view_as(b), through.unflatten(0, (batch, -1))
        last = local[:, :, -1]  # (B, n, H, N)
    entering = _entering(last, ends, through[:, :, -1], h0).unsqueeze(2)  # (B, n, 1, H, N)
    carried = through.unsqueeze(-1) * entering  # (B, n, C, H, N)
    if form == "unitary":
        local, carried = carried.new_zeros(()), local + carried
    states = local + apply_steps(products, carried)  # (B, n, C, H, N)
    return states.flatten(1, 2)[:, :length]


def _entering(last: Tensor, ends: list[Tensor], through: Tensor, h0: Tensor) -> Tensor:
    """What comes into each chunk (B, n, H, N): the same recurrence, in which a step is a chunk.

    last (B, n, H, N): the end of each chunk from a zero state; ends (B, n, H, P, P) or (H, P, P) and through (B, n, H):
    its matrices and decay.
    """
    if last.shape[1] == 1:
        return h0.unsqueeze(1)
    first = [end if end.dim() == 3 else end[:, 0] for end in ends]
    start = last[:, 0] + through[:, 0].unsqueeze(-1) * apply_steps(first, h0)  # (B, H, N)
    totals, _, _ = _pairs(torch.cat((start.unsqueeze(1), last[:, 1:-1]), 1), *_but_last(ends, through))
    return torch.cat((h0.unsqueeze(1), totals), 1)


def _but_last(matrices: list[Tensor], d: Tensor) -> tuple[list[Tensor], Tensor]:
    """Matrices (B, n, H, P, P) or (H, P, P) and decays (B, n, H) without the last of n."""
    return [m if m.dim() == 3 else m[:, :-1] for m in matrices], d[:, :-1]


def _add_up(rotated: Tensor, decays: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_{s≤t} (D_t / D_s) x_s of x (B, n, C, H, N) over the chunk, and D_t (B, n, C, H), 0 behind a start.

    The quotients are exponentials of differences of logarithms, never above 1.
    """
    if decays is None:
        return rotated.cumsum(2), torch.ones_like(rotated[..., 0].real)
    started = (decays == 0).cumsum(2)  # (B, n, C, H): starts so far
    logs = torch.where(decays == 0, 1, decays).log().cumsum(2)  # (B, n, C, H)
    logs, started = logs.transpose(2, 3), started.transpose(2, 3)  # (B, n, H, C)
    chunk = logs.shape[-1]
    before = torch.ones(chunk, chunk, dtype=torch.bool, device=logs.device).tril()  # (C, C)
    one_document = started.unsqueeze(-1) == started.unsqueeze(-2)  # (B, n, H, C, C)
    gaps = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).masked_fill(~(before & one_document), -math.inf)
    planes = torch.view_as_real(rotated).flatten(-2).transpose(2, 3)  # (B, n, H, C, 2N)
    mixed = (gaps.exp() @ planes).transpose(2, 3).unflatten(-1, (-1, 2)).contiguous()  # (B, n, C, H, N, 2)
    through = torch.where(started == 0, logs.exp(), 0).transpose(2, 3)  # (B, n, C, H)
    return torch.view_as_complex(mixed), through


def _step_gradients(matrices: Sequence[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of the R_f for y = (⊗ R_f) x at every step, given x and grad of y, both (B, T, H, N).

    (B, T, H, P, P), or summed over all steps for fixed R_f (H, P, P).
    """
    if matrices[0].dim() == 3:
        x, grad = (tensor.flatten(0, 1).movedim(0, -1) for tensor in (x, grad))  # (H, N, B·T)
    else:
        x, grad = x.unsqueeze(-1), grad.unsqueeze(-1)  # (B, T, H, N, 1)
    shape, sizes, stages = x.shape, [matrix.shape[-1] for matrix in matrices], []
    for index, matrix in enumerate(matrices):
        stages.append(x.reshape(*shape[:-2], math.prod(sizes[:index]), sizes[index], -1))  # (…, L, P, R·M)
        x = matrix.unsqueeze(-3) @ stages[-1]
    found: list[Tensor] = []
    for matrix, stage in zip(reversed(matrices), reversed(stages), strict=True):
        here = grad.reshape(stage.shape)  # (…, L, P, R·M)
        if stage.shape[-1] == 1 and stage.shape[-3] == 1:  # an outer product: a batch of small ones is slower
            found.append((here * stage.mH).squeeze(-3))  # (…, P, P)
        else:
            found.append((here @ stage.mH).sum(-3))  # (…, P, P)
        grad = matrix.mH.unsqueeze(-3) @ here
    return found[::-1]


class _LinearScan(torch.autograd.Function):
    """States of :func:`_scan`, with the adjoint recurrence as the backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, d: Tensor, h0: Tensor, form: str, plain: bool, *matrices: Tensor) -> Tensor:
        states = _scan(u, matrices, d, h0, form, plain)
        ctx.save_for_backward(d, h0, states, *matrices)
        ctx.form = form, plain
        return states

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, h0, states, *matrices = ctx.saved_tensors
        # Step t of the adjoint uses d and R of step t + 1. The last one meets a zero state: any unitary R will do.
        ahead = torch.cat((d[:, 1:], torch.ones_like(d[:, :1])), 1).flip(1)  # (B, T, H)
        adjoints = [m.mH if m.dim() == 3 else m.roll(-1, 1).flip(1).mH for m in matrices]
        lam = _scan(grad.flip(1), adjoints, ahead, torch.zeros_like(h0), *ctx.form).flip(1)  # (B, T, H, N): λ_t
        first = [m if m.dim() == 3 else m[:, 0] for m in matrices]
        d_h0 = d[:, 0, :, None] * apply_steps([m.mH for m in first], lam[:, 0])  # (B, H, N)
        previous = torch.cat((h0.unsqueeze(1), states[:, :-1]), 1)  # (B, T, H, N): h_{t-1}
        d_matrices: list[Tensor] | list[None] = [None] * len(matrices)
        if any(ctx.needs_input_grad[5:]):
            d_matrices = _step_gradients(matrices, previous, d.unsqueeze(-1) * lam)
        d_decay = None
        if ctx.needs_input_grad[1]:
            d_decay = (lam.conj() * apply_steps(matrices, previous)).real.sum(-1)  # (B, T, H)
        return lam, d_decay, d_h0, None, None, *d_matrices
