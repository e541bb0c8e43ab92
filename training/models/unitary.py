"""The strictly unitary KRU: every factor is exp(A − Aᴴ), so W is unitary to rounding at every step of training.

The same network and heads as :mod:`kru_hf`, for comparison with its soft constraint. The parameters are the generators
A, real planes (2, P, P) as everywhere; they stand where the soft model keeps its factors, and count as its factors do.
"""

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import initialization as init

from kru_hf import KRUConfig
from kru_hf.kronecker import to_complex, to_planes
from kru_hf.recurrence import KRURecurrence

from .heads import register_heads


@strict
class UnitaryKRUConfig(KRUConfig):
    """Options of KRUConfig with square factors and λ = 0; W has a spectral norm of 1 whatever ``recurrent_init``."""

    model_type = "kru_unitary"

    unitary_loss_coef: float | int = 0.0

    def validate_unitary_options(self) -> None:
        """What a strictly unitary recurrence cannot have."""
        if any(p != q for p, q in self.factor_shapes or []):
            raise ValueError(f"factor_shapes of a unitary model must be square, got {self.factor_shapes}")
        for name, allowed in (
            ("unitary_loss_coef", 0),
            ("cell_type", "kru"),
            ("recurrent_terms", 1),
        ):
            if getattr(self, name) != allowed:
                raise ValueError(f"{name} of a strictly unitary model must be {allowed!r}, got {getattr(self, name)!r}")


class UnitaryExponential(nn.Module):
    """Parametrization of a factor (2, P, P): generator A (2, P, P) to exp(A − Aᴴ)."""

    def forward(self, generator: Tensor) -> Tensor:
        """A (2, P, P) to a unitary factor (2, P, P); in fp32 at least, also under autocast."""
        a = to_complex(generator, 0)  # (P, P)
        return to_planes(torch.matrix_exp(a - a.mH), 0)  # (2, P, P)

    def right_inverse(self, factor: Tensor) -> Tensor:
        """A unitary factor (2, P, P) to A = log(W) / 2 (2, P, P); W is Haar-random, so its eigenvalues differ."""
        values, vectors = torch.linalg.eig(to_complex(factor.double(), 0))  # (P,), (P, P)
        log = vectors @ torch.diag(1j * values.angle()) @ torch.linalg.inv(vectors)  # (P, P)
        return to_planes((log - log.mH) / 4, 0).to(factor.dtype)  # (2, P, P)


class UnitaryKRU:
    """Its W is strictly unitary: generators stand in place of the factors."""

    def __init__(self, config: UnitaryKRUConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for cell in self.cells():
            for index in range(len(cell.factors)):
                parametrize.register_parametrization(cell.factors, str(index), UnitaryExponential())

    def cells(self) -> list[KRURecurrence]:
        """The recurrences of all layers."""
        return [module for module in cast(nn.Module, self).modules() if isinstance(module, KRURecurrence)]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, KRURecurrence) and parametrize.is_parametrized(module.factors):
            generators: Any = module.factors.parametrizations
            for index, start in enumerate(module.initial_factors()):
                init.copy_(generators[str(index)].original, UnitaryExponential().right_inverse(start))


globals().update(register_heads(UnitaryKRU, UnitaryKRUConfig))
