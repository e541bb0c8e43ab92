"""What a model costs besides its parameters: bytes of weights in 8 bits, multiply-adds of a step of the sequence."""

import math
from typing import Any

from torch import nn

from kru_hf import KRULinearRecurrence, KRURecurrence
from kru_hf.maps import KroneckerLinear

from .structured import LowRank

SCALE = VECTOR = 2  # bytes of a row's scale, and of a number of a bias or a norm: fp16
EXACT = 4  # bytes of a number of the complex cell's factors: an error of its eigenvalues grows with every step


def int8_bytes(model: Any) -> int:
    """Bytes of the weights as a file of the C runtime rounds them, without its header; the same rule for baselines.

    A byte for a number of a matrix, fp16 for biases, norms and scales: one for each row, for the rows at the same place
    of all terms of a map together, and for a map of a single input as a whole.
    """
    exact = not getattr(model.config, "gated", True)
    total = 0
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if exact and "factors" in path:
            total += EXACT * parameter.numel()
        elif parameter.ndim < 2 or path[-1] == "bias":
            total += VECTOR * parameter.numel()
        else:
            *rows, inputs = parameter.shape
            if path[-1] == "blocks":  # (n, out/n, in/n)
                terms, *rows = rows
                inputs *= terms
            if inputs == 1 and not {"embed_tokens", "factors"} & set(path):
                rows = []
            total += parameter.numel() + SCALE * math.prod(rows)
    return total


def multiply_adds(model: Any) -> int | None:
    """Multiply-adds of a step of the sequence: maps as dense products, the recurrence factor by factor.

    A complex product is four real ones. None for models whose steps are not counted: those that draw the keys of a
    frame one by one, and the linear recurrence, which goes over many steps at once.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, KRULinearRecurrence) or getattr(module, "chain", None) is not None:
            return None
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, KroneckerLinear):
            total += module.in_features * module.out_features
        elif isinstance(module, nn.RNNBase):
            groups: Any = getattr(module, "parametrizations", {})
            for name in (name for name in module._flat_weights_names if name.startswith("weight")):
                low_rank = name in groups and isinstance(groups[name][0], LowRank)
                matrices = groups[name].parameters() if low_rank else [getattr(module, name)]
                total += sum(matrix.numel() for matrix in matrices)
        elif isinstance(module, KRURecurrence):
            total += recurrent_multiply_adds(module)
    return total


def recurrent_multiply_adds(cell: KRURecurrence) -> int:
    """Those of a cell's products W h, each term factor by factor, or W as a dense matrix where that is cheaper."""
    products, units = 4 if cell.cell.complex else cell.cell.planes, cell.state_size
    return products * units * min(cell.terms * sum(max(shape) for shape in cell.factor_shapes), units)
