"""What a kroneckerized ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` does in its own way: its weights' start and their list."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kronecker import random_orthogonal

# Spectral norm of a fresh gate: as much energy as torch's own U(−1/√N, 1/√N), whose entries have variance 1 / (3N).
FRESH_SCALE = 1 / math.sqrt(3)


def fresh_factors(factor_shapes: Sequence[tuple[int, int]], gates: int) -> list[Tensor]:
    """Haar-orthogonal factors (G, P_f, Q_f), each times the F-th root of ``FRESH_SCALE``."""
    scale = FRESH_SCALE ** (1 / len(factor_shapes))
    return [torch.stack([random_orthogonal(p, q) * scale for _ in range(gates)]) for p, q in factor_shapes]


def own_rnn_class(module: nn.RNNBase) -> None:
    """Let torch's RNN code see the rebuilt weights: the list that its kernels take is otherwise made once and kept.

    The overrides go into the class that parametrize made for this module alone. Flattening into a cuDNN buffer is off:
    it moves the storage of its tensors, which here are results of autograd. ``reset_parameters`` draws factors as
    ``init="fresh"`` does: torch's own would make each of them small, and their product next to nothing.
    """
    cls: Any = type(module)

    def current(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def ignored(self: nn.RNNBase, *_: Any) -> None:
        return None

    @torch.no_grad()
    def reset_parameters(self: Any) -> None:
        bound = self.hidden_size**-0.5
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound)  # maps and biases, as torch draws them
        for group in self.parametrizations.values():
            for index, start in enumerate(fresh_factors(group[0].factor_shapes, group[0].gates)):
                getattr(group, f"original{index}").copy_(start)  # (G, P_f, Q_f)

    module.__dict__.pop("_flat_weights", None)
    module._flat_weight_refs = []
    cls._flat_weights = property(current, ignored)
    cls._init_flat_weights = cls._update_flat_weights = cls.flatten_parameters = ignored
    cls.reset_parameters = reset_parameters
