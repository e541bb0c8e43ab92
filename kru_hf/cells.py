"""The recurrent cell as a module: the factors and the bias, on top of ``kru_scan``."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kronecker import (
    at_least_fp32,
    check_choice,
    check_max_phase,
    random_unitary,
    slow_unitary,
    to_complex,
    unitary_penalty,
)
from .scan import BACKENDS, kru_scan
from .scan_reference import ACTIVATIONS

_warned_rectangular = False


def warn_rectangular(shapes: Sequence[Sequence[int]]) -> None:
    """Say once that a non-square factor cannot be unitary."""
    global _warned_rectangular
    if not _warned_rectangular and any(p != q for p, q in shapes):
        _warned_rectangular = True
        rank = math.prod(min(p, q) for p, q in shapes)
        warnings.warn(
            f"factor_shapes {list(map(list, shapes))} has non-square factors: the recurrent matrix has rank {rank} of "
            f"{math.prod(p for p, _ in shapes)} and is a partial isometry at best, never unitary",
            stacklevel=3,
        )


def check_scale(init_scale: float) -> None:
    """Raise `ValueError` unless it can be the spectral norm that a recurrent matrix starts with."""
    if not 0 < init_scale < math.inf:
        raise ValueError(f"init_scale must be positive and finite, got {init_scale}")


def own_bias(cell: nn.Module, bias: Tensor, trained: bool) -> None:
    """Make ``bias`` the cell's: a parameter, or a buffer, which no optimizer and no requires_grad_() reaches."""
    if trained:
        cell.bias = nn.Parameter(bias)
    else:
        cell.register_buffer("bias", bias)


class FactorList(nn.ParameterList):
    """The factors of a cell. They are read by a call, which is when weights that are offloaded are brought in."""

    __call__ = nn.Module.__call__  # ParameterList refuses calls

    def forward(self, x: Tensor) -> list[Tensor]:
        """The factors, slowest index of the state first. Adapters in this place are called with an x, any tensor."""
        return list(self)


class KRURecurrence(nn.Module):
    """h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t): factors (2, P_f, Q_f) and b (N,).

    ``input_planes``, ``output_planes`` and ``state_planes`` give the width of inputs (B, T, ·, N), of the features
    read from it and of its state (B, ·, N), in multiples of N.
    """

    input_planes = 2
    output_planes = 2
    state_planes = 2
    bias: Tensor

    def __init__(
        self,
        factor_shapes: Sequence[Sequence[int]],
        *,
        activation: str = "modrelu",
        init: str = "random",
        init_scale: float = 0.95,
        init_max_phase: float | None = None,
        bias_init: float | None = None,
        bias: bool = True,
        train_factors: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        warn_rectangular(factor_shapes)
        if init not in ("random", "identity"):
            raise ValueError(f"init must be 'random' or 'identity', got {init!r}")
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        check_scale(init_scale)
        bias = bias and activation == "modrelu"  # the linear network reads none
        if bias_init is not None and not bias:
            raise ValueError(f"bias_init must be None without a bias, got {bias_init}")
        bias_init = (-0.1 if bias else 0.0) if bias_init is None else bias_init
        if not math.isfinite(bias_init):
            raise ValueError(f"bias_init must be finite, got {bias_init}")
        if init_max_phase is not None:
            check_max_phase("init_max_phase", init_max_phase, init, factor_shapes)
        self.factor_shapes = [(p, q) for p, q in factor_shapes]
        self.state_size = math.prod(p for p, _ in self.factor_shapes)
        self.activation = activation
        self.init = init
        self.init_scale = init_scale
        self.init_max_phase = init_max_phase
        self.bias_init = bias_init
        self.backend = backend
        self.factors = FactorList(
            [nn.Parameter(torch.empty(2, p, q), requires_grad=train_factors) for p, q in self.factor_shapes]
        )
        own_bias(self, torch.empty(self.state_size), bias)  # (N,)
        self.reset_parameters()

    def initial_factors(self) -> list[Tensor]:
        """Random unitary or identity factors (2, P_f, Q_f), times the F-th root of the spectral norm wanted of W."""
        count = len(self.factor_shapes)
        scale = self.init_scale ** (1 / count)
        if self.init == "identity":
            return [scale * torch.stack([torch.eye(p, q), torch.zeros(p, q)]) for p, q in self.factor_shapes]
        if self.init_max_phase is not None:
            # The phases of a Kronecker product are the sums of its factors' phases.
            return [scale * slow_unitary(p, self.init_max_phase / count) for p, _ in self.factor_shapes]
        return [scale * random_unitary(p, q) for p, q in self.factor_shapes]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial factors, constant bias. Parameters on the meta device are left for the loader to fill."""
        if self.bias.is_meta:
            return
        for factor, start in zip(self.factors, self.initial_factors(), strict=True):
            factor.copy_(start)  # (2, P, Q)
        self.bias.fill_(self.bias_init)  # (N,)

    def penalty(self) -> Tensor:
        """Soft unitary penalty Σ_f ‖W_f^H W_f − I‖²: a scalar."""
        return unitary_penalty(self.factors(torch.empty(0)))  # the bias may be offloaded: no x to call with

    @torch.no_grad()
    def bound_norm(self, limit: float) -> None:
        """Scale the factors alike, so that the spectral norm of W, the product of theirs, is at most ``limit``.

        The penalty keeps it near 1, on either side. Above 1 a state that is carried on and on can grow beyond float32.
        """
        if not all(bool(factor.isfinite().all()) for factor in self.factors):
            return  # there is no norm to hold, and whoever looks at the loss sees it
        norms = [torch.linalg.matrix_norm(to_complex(at_least_fp32(factor), 0), 2) for factor in self.factors]
        scale = (limit / torch.stack(norms).prod()).clamp(max=1) ** (1 / len(norms))  # ()
        for factor in self.factors:
            factor.mul_(scale)  # (2, P, Q)

    def forward(
        self, inputs: Tensor, initial_state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, T, 2, N) = U x_t, initial_state (B, 2, N), mask (B, T): states (B, T, 2, N), final (B, 2, N).

        Computed in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs; that is also the dtype returned.
        """
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        return kru_scan(
            inputs.to(dtype),
            [factor.to(dtype) for factor in self.factors(inputs)],
            self.bias.to(dtype),
            None if initial_state is None else initial_state.to(dtype),
            mask,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        shapes = " ".join(f"{p}x{q}" for p, q in self.factor_shapes)
        return f"state_size={self.state_size}, factors={shapes}, activation={self.activation}"
