"""The recurrence as a module: the factors and the bias of any cell, in one or two directions."""

import math
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .cells import (
    ACTIVATIONS,
    CELLS,
    LINEAR,
    Start,
    check_chrono,
    check_linear,
    check_start,
    gate_bias,
    selective_widths,
)
from .kronecker import (
    check_choice,
    random_orthogonal,
    random_unitary,
    slow_unitary,
    spectral_norm,
    to_complex,
    to_planes,
    unitary_exp,
    unitary_penalty,
)
from .scan import BACKENDS, kron_scan
from .scan_linear import BACKENDS as LINEAR_BACKENDS
from .scan_linear import apply_steps, kron_linear_scan


def warn_rectangular(shapes: Sequence[Sequence[int]]) -> None:
    """Say that a non-square factor cannot be unitary; Python shows the same warning once."""
    if any(p != q for p, q in shapes):
        rank = math.prod(min(p, q) for p, q in shapes)
        warnings.warn(
            f"factor_shapes {list(map(list, shapes))} has non-square factors: the recurrent matrix has rank {rank} of "
            f"{math.prod(p for p, _ in shapes)} and is a partial isometry at best, never unitary",
            stacklevel=3,
        )


class FactorList(nn.ParameterList):
    """The factors of a cell. They are read by a call, which is when weights that are offloaded are brought in."""

    __call__ = nn.Module.__call__  # ParameterList refuses calls

    def forward(self, x: Tensor) -> list[Tensor]:
        """The factors, slowest index of the state first. Adapters in this place are called with an x, any tensor."""
        return list(self)


def unitary_factor(start: Start, rows: int, columns: int, count: int) -> Tensor:
    """Where one of ``count`` factors (2, P, Q) of a complex matrix starts, but for its norm."""
    if start.identity:
        return torch.stack([torch.eye(rows, columns), torch.zeros(rows, columns)])
    if start.max_phase is not None:  # the phases of a Kronecker product are the sums of its factors' phases
        return slow_unitary(rows, start.max_phase / count)
    return random_unitary(rows, columns)


class StartingModule(nn.Module):
    """A module that knows where its parameters start."""

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters, and a buffer in the place of one, each with where it starts."""
        raise NotImplementedError("each recurrence says where its parameters start")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start. Parameters on the meta device are left for the loader to fill."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            for parameter, start in self.initial_values():
                parameter.copy_(start)


class KRURecurrence(StartingModule):
    """h_t = cell(W h_{t-1}, U x_t, b, h_{t-1}): factors (K, P_f, Q_f), or (R, K, P_f, Q_f) with R > 1 terms, and b.

    Args:
        factor_shapes: [[P_0, Q_0], …]. cell: a name of ``cells.CELLS``. terms: R, of which W is the sum.
        init_scale: spectral norm of each matrix at the start, by default that of ``init``; of a sum, each term has 1/√R
            of it. bias: False fixes b at zero. train_factors: False freezes W.
        backend: engine, see ``kron_scan``; "auto" follows ``use_backend``.
        activation, init, bias_init: of the complex cell. activation: "modrelu" or "identity"; init: a name of
            ``cells.STARTS``; bias_init: modReLU's b at the start, -0.1.
        chrono_max_length: of gated cells, the longest memory, in steps, that they start with: see ``gate_bias``.

    Raises:
        ValueError: an option outside what is allowed, or one of another cell.
    """

    bias: Tensor

    def __init__(
        self,
        factor_shapes: Sequence[Sequence[int]],
        cell: str = "kru",
        *,
        terms: int = 1,
        init_scale: float | None = None,
        bias: bool = True,
        train_factors: bool = True,
        backend: str = "auto",
        activation: str = "modrelu",
        init: str = "random",
        bias_init: float | None = None,
        chrono_max_length: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("cell", cell, tuple(CELLS))
        warn_rectangular(factor_shapes)
        self.cell = CELLS[cell]
        self.factor_shapes = [(p, q) for p, q in factor_shapes]
        self.state_size = math.prod(p for p, _ in self.factor_shapes)
        self.input_shape = self.cell.planes, self.state_size  # axes 2 and 3 of the inputs
        # Widths of the features and the state (B, T, ·, N), in multiples of N.
        self.output_planes, self.state_planes = self.cell.feature_planes, len(self.cell.states)
        self.terms, self.activation = terms, activation
        check_start("init", init, self.cell, self.factor_shapes, terms)
        self.start = self.cell.starts[init]
        self.init_scale = self.start.norm if init_scale is None else init_scale
        self.chrono_max_length, self.backend = chrono_max_length, backend
        self.has_bias = bias and activation == "modrelu"  # the linear network reads none
        self._check(bias_init)
        self.bias_init = (-0.1 if self.has_bias else 0.0) if bias_init is None else bias_init
        lead = (terms, self.cell.planes) if terms > 1 else (self.cell.planes,)
        self.factors = FactorList(
            [nn.Parameter(torch.empty(*lead, p, q), requires_grad=train_factors) for p, q in self.factor_shapes]
        )
        start = torch.empty(self.cell.bias_shape(self.state_size))  # (N,), or (rows, N)
        if self.has_bias:
            self.bias = nn.Parameter(start)
        else:  # a buffer: no optimizer and no requires_grad_() reaches it
            self.register_buffer("bias", start)
        self.reset_parameters()

    def _check(self, bias_init: float | None) -> None:
        check_choice("backend", self.backend, BACKENDS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale must be positive and finite, got {self.init_scale}")
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, got {self.terms}")
        if bias_init is not None and not (self.has_bias and math.isfinite(bias_init)):
            allowed = "finite" if self.has_bias else "None without a bias"
            raise ValueError(f"bias_init must be {allowed}, got {bias_init}")
        if not self.cell.complex:
            for name, value, own in (("activation", self.activation, "modrelu"), ("bias_init", bias_init, None)):
                if value != own:
                    raise ValueError(f"{name} of a gated cell must be {own!r}, got {value!r}")
        if self.chrono_max_length is not None:
            check_chrono("chrono_max_length", self.chrono_max_length)
            if self.cell.keeps is None or not self.has_bias:
                place = "without a bias" if self.cell.keeps else f"with the cell {self.cell.name!r}"
                raise ValueError(f"chrono_max_length must be None {place}, got {self.chrono_max_length}")

    def _initial_factor(self, rows: int, columns: int) -> Tensor:
        """One term's random unitary, identity or orthogonal factor (K, P, Q)."""
        if self.cell.complex:
            return unitary_factor(self.start, rows, columns, len(self.factor_shapes))
        return torch.stack([random_orthogonal(rows, columns) for _ in range(self.cell.planes)])

    def initial_factors(self) -> list[Tensor]:
        """Where the factors start: each times the F-th root of the spectral norm that its term is to have."""
        scale = (self.init_scale / math.sqrt(self.terms)) ** (1 / len(self.factor_shapes))
        starts = [torch.stack([self._initial_factor(p, q) for _ in range(self.terms)]) for p, q in self.factor_shapes]
        return [scale * (start if self.terms > 1 else start[0]) for start in starts]

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """The factors and the bias, each with where it starts."""
        bias = torch.full(self.bias.shape, self.bias_init if self.cell.complex else 0.0)
        if self.cell.keeps is not None and self.has_bias:
            bias = gate_bias(self.cell, self.state_size, self.chrono_max_length)
        return [*zip(self.factors, self.initial_factors(), strict=True), (self.bias, bias)]

    def penalty(self) -> Tensor:
        """Soft unitary penalty of the complex cell, see ``unitary_penalty``: a scalar; zero for gated cells."""
        return unitary_penalty(self.factors(torch.empty(0))) if self.cell.complex else self.bias.new_zeros(())

    @torch.no_grad()
    def bound_norm(self, limit: float) -> None:
        """Scale the factors of the complex cell alike, so that the spectral norm of W is at most ``limit``.

        The penalty keeps it near 1, on either side. Above 1 a state that is carried on and on can grow beyond float32.
        """
        if not all(bool(factor.isfinite().all()) for factor in self.factors):
            return  # there is no norm to hold, and whoever looks at the loss sees it
        scale = (limit / spectral_norm(list(self.factors))).clamp(max=1) ** (1 / len(self.factors))  # ()
        for factor in self.factors:
            factor.mul_(scale)

    def forward(
        self,
        inputs: Tensor,
        initial_state: Tensor | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, T, K, N) = U x_t, initial_state (B, S, N), mask and starts (B, T): states (B, T, ·, N), final.

        Computed in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs; that is also the dtype returned.
        """
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        states, final = kron_scan(
            inputs.to(dtype),
            [factor.to(dtype) for factor in self.factors(inputs)],
            self.bias.to(dtype),
            None if initial_state is None else initial_state.to(dtype),
            mask,
            cell=self.cell.name,
            starts=starts,
            activation=self.activation,
            backend=None if self.backend == "auto" else self.backend,
        )
        return states if self.cell.complex else states.unsqueeze(2), final  # (B, T, ·, N), (B, S, N)

    def extra_repr(self) -> str:
        shapes = " ".join(f"{p}x{q}" for p, q in self.factor_shapes)
        options = f", activation={self.activation}" if self.cell.complex else ""
        terms = f", terms={self.terms}" if self.terms > 1 else ""
        return f"{self.cell.name}, state_size={self.state_size}, factors={shapes}{terms}{options}"


class KRULinearRecurrence(StartingModule):
    """h_t = d_t (⊗_f R_f,t) h_{t-1} + U x_t, H heads side by side, each with factors and N / H units of its own.

    Without an activation between the steps it can be computed in parallel over time, see ``kron_linear_scan``; with
    transitions that follow the input it can track the state of a group, which diagonal recurrences cannot.

    Args:
        factor_shapes: [[P_0, P_0], …] of a head, square.
        transition: "fixed", the same learned factors at all steps, held near unitary by the penalty; or "selective":
            R_f,t = exp(i 2σ(g_f) G_f) with a Hermitian G_f and a gate g_f for each factor that the input gives, unitary
            whatever they are. Its first state is learned, that of "fixed" is zero.
        heads: H. decay: whether each head forgets, by d = σ(a) at all steps, a learned, or σ(a + a_t), a_t of the
            input, of selective transitions; else d = 1.
        init: a name of ``CELL.starts`` for fixed factors. train_factors: False freezes them.
        backend: see ``kron_linear_scan``.

    Raises:
        ValueError: an option outside what is allowed.
    """

    cell = LINEAR
    state_planes = output_planes = 2

    def __init__(
        self,
        factor_shapes: Sequence[Sequence[int]],
        *,
        transition: str = "fixed",
        heads: int = 1,
        decay: bool = False,
        init: str = "random",
        train_factors: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, LINEAR_BACKENDS)
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        check_linear(factor_shapes, transition, init)
        self.factor_shapes = [(p, q) for p, q in factor_shapes]
        self.selective, self.heads, self.backend = transition == "selective", heads, backend
        self.state_size = heads * math.prod(p for p, _ in self.factor_shapes)  # H·N
        self.start = LINEAR.starts[init]
        self.widths = selective_widths(self.factor_shapes, heads, decay)
        sizes = [] if self.selective else [p for p, _ in self.factor_shapes]
        self.factors = FactorList(
            [nn.Parameter(torch.empty(heads, 2, p, p), requires_grad=train_factors) for p in sizes]
        )
        self.first_state = nn.Parameter(torch.empty(2, self.state_size)) if self.selective else None
        self.decay = nn.Parameter(torch.empty(heads)) if decay else None  # a
        self.reset_parameters()

    @property
    def input_shape(self) -> tuple[int, int]:
        """Axes 2 and 3 of the inputs."""
        return (sum(self.widths), 1) if self.selective else (2, self.state_size)

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters, each with where it starts.

        "fourier": W_f = diag(exp(2πik / (P_0 ⋯ P_f))), k < P_f, whose product has all N-th roots of unity on its
        diagonal. Heads that forget keep what they hold for 1 to 1000 steps, evenly spread on a logarithmic scale.
        """
        found: list[tuple[Tensor, Tensor]] = []
        count, below = len(self.factor_shapes), 1
        for factor, (size, _) in zip(self.factors, self.factor_shapes, strict=False):
            below *= size
            start = torch.stack([unitary_factor(self.start, size, size, count) for _ in range(self.heads)])
            if self.start.fourier:
                turns = torch.arange(size) / below  # (P,)
                start = to_planes(torch.exp(2j * math.pi * turns).diag(), 0).expand(self.heads, -1, -1, -1)
            found.append((factor, self.start.norm ** (1 / count) * start))
        if self.first_state is not None:
            found.append((self.first_state, torch.randn(2, self.state_size) / math.sqrt(2)))
        if self.decay is not None:
            found.append((self.decay, torch.linspace(math.log(1000), 0, self.heads)))  # σ(log n) = 1 − 1 / (n + 1)
        return found

    def penalty(self) -> Tensor:
        """Σ over heads and factors of ‖W^H W − I‖²: a scalar; zero for selective transitions, which are unitary."""
        if self.first_state is not None:
            return self.first_state.new_zeros(())
        factors = self.factors(torch.empty(0))
        return torch.stack([unitary_penalty(factor.unbind(0)) for factor in factors]).sum()

    def _transitions(self, generators: Tensor, gates: Tensor) -> list[Tensor]:
        """R_f (B, T, H, 2, P, P) of generators (B, T, H·ΣP_f²) and gates (B, T, H·F)."""
        sizes = [p for p, _ in self.factor_shapes]
        parts = generators.unflatten(-1, (self.heads, -1)).split([p * p for p in sizes], -1)  # (B, T, H, P²)
        opened = 2 * gates.unflatten(-1, (self.heads, -1)).sigmoid()  # (B, T, H, F)
        return [unitary_exp(opened[..., f, None] * part) for f, part in enumerate(parts)]

    def forward(
        self,
        inputs: Tensor,
        initial_state: Tensor | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, T, *input_shape), initial_state (B, 2, N), mask and starts (B, T): states (B, T, 2, N), final.

        N is here that of all heads. Computed in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs; that is
        also the dtype returned.
        """
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        batch = inputs.shape[0]
        read = inputs.to(dtype).flatten(2)  # (B, T, W)
        factors = [factor.to(dtype) for factor in self.factors(inputs)]
        forgets = None if self.decay is None else self.decay.to(dtype)  # a (H,)
        state = None if initial_state is None else initial_state.to(dtype)
        decay = None
        if self.first_state is not None:
            read, generators, gates, raw = read.split(self.widths, -1)
            factors = self._transitions(generators, gates)
            if forgets is not None:
                decay = (forgets + raw).sigmoid().clamp(min=torch.finfo(dtype).tiny)  # (B, T, H)
            first = self.first_state.to(dtype).expand(batch, -1, -1)  # (B, 2, N)
            state = first if state is None else state
        elif forgets is not None:  # the same at all steps: d W
            factors[0] = forgets.sigmoid()[:, None, None, None] * factors[0]  # (H, 2, P, P)
        u = read.unflatten(-1, (2, -1))  # (B, T, 2, N)
        if self.first_state is not None and starts is not None:
            u = u + torch.where(starts[:, :, None, None], self._from_first(factors, decay), 0)
        backend = self.backend
        return kron_linear_scan(u, factors, decay, state, mask, starts, unitary=self.selective, backend=backend)

    def _from_first(self, factors: list[Tensor], decay: Tensor | None) -> Tensor:
        """What a step makes of the first state, d_t R_t h (B, T, 2, N): a document that starts in a row meets zeros."""
        first = to_complex(cast(Tensor, self.first_state).to(factors[0].dtype), 0).unflatten(0, (self.heads, -1))
        matrices = [to_complex(factor, -3) for factor in factors]  # (B, T, H, P, P)
        moved = apply_steps(matrices, first.expand(*factors[0].shape[:2], -1, -1))  # (B, T, H, N/H)
        return to_planes((moved if decay is None else decay.unsqueeze(-1) * moved).flatten(2), 2)

    def extra_repr(self) -> str:
        shapes = " ".join(f"{p}x{q}" for p, q in self.factor_shapes)
        kind = "selective" if self.selective else "fixed"
        decay = ", decay" if self.decay is not None else ""
        return f"linear, {kind}, heads={self.heads}, state_size={self.state_size}, factors={shapes}{decay}"


Recurrence = KRURecurrence | KRULinearRecurrence


class KRUBidirectional(nn.Module):
    """Two recurrences of a kind over one sequence, from its start and from its end, with the interface of a single one.

    Inputs (B, T, 2·K, N) to features (B, T, 2·O, N): the forward cell has the first half of the planes of inputs,
    features and state, the reverse cell the second.
    """

    def __init__(self, forward_cell: Recurrence, reverse_cell: Recurrence) -> None:
        super().__init__()
        self.forward_cell = forward_cell
        self.reverse_cell = reverse_cell
        self.state_size = forward_cell.state_size
        planes, units = forward_cell.input_shape
        self.input_shape = 2 * planes, units
        self.output_planes = 2 * forward_cell.output_planes
        self.state_planes = 2 * forward_cell.state_planes

    def forward(
        self,
        inputs: Tensor,
        initial_state: Tensor | None = None,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``KRURecurrence``, in the order of the inputs; a document's end is where the reverse direction starts.

        Raises:
            ValueError: an initial state is given. The reverse direction begins after the last step: nothing that was
                read before can be carried into it.
        """
        if initial_state is not None:
            raise ValueError("a bidirectional recurrence reads the whole sequence: initial_state must be None")
        ahead, behind = inputs.chunk(2, 2)  # (B, T, K, N) each
        ahead, ahead_final = self.forward_cell(ahead, None, mask, starts)  # (B, T, O, N), (B, S, N)
        # Flipped, padding that followed comes first: the mask holds the zero state until the sequence begins.
        flipped = None if mask is None else mask.flip(1)  # (B, T)
        ends = None if starts is None else starts.roll(-1, 1).flip(1)  # (B, T): the last step of each document
        behind, behind_final = self.reverse_cell(behind.flip(1), None, flipped, ends)
        return torch.cat((ahead, behind.flip(1)), 2), torch.cat((ahead_final, behind_final), 1)
