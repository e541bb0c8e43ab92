"""What every engine demands of its arguments, checked in one place: kernels read as far as these shapes say."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Named = tuple[str, Tensor | None, tuple[int, ...]]
# cell: (gates G, rows of the bias, planes S of the state). The GRU's fourth bias is the candidate's recurrent one.
GATED_CELLS = {"lstm": (4, 4, 2), "gru": (3, 4, 1), "janet": (2, 2, 1)}


def gated_cell(inputs: Tensor) -> str:
    """The gated cell whose inputs (B, T, G, N) have as many gates; `ValueError` if there is none."""
    for cell, (gates, _, _) in GATED_CELLS.items():
        if inputs.dim() == 4 and inputs.shape[2] == gates:
            return cell
    raise ValueError(f"inputs must have the shape (B, T, G, N) with G = 2, 3 or 4 gates, got {tuple(inputs.shape)}")


def check_scan(
    cell: str,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    others: Sequence[Named] = (),
) -> None:
    """Raise `ValueError` or `TypeError` naming the argument, its value and what is allowed.

    ``cell`` is "kru" or one of ``GATED_CELLS``. ``others`` are further tensors by name, of the dtype of the inputs,
    each with the shape that it must have.
    """
    rows, bias_rows, planes = GATED_CELLS.get(cell, (2, None, 2))
    if inputs.dim() != 4 or inputs.shape[2] != rows or 0 in inputs.shape:
        raise ValueError(f"inputs must have the shape (B, T, {rows}, N) with no empty axis, got {tuple(inputs.shape)}")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs must be float32 or float64 (the state is never kept in less), got {inputs.dtype}")
    batch, length, _, units = inputs.shape
    if not factors:
        raise ValueError(f"factors must hold at least one ({rows}, P, Q) tensor, got none")
    for index, factor in enumerate(factors):
        if factor.dim() != 3 or factor.shape[0] != rows:
            raise ValueError(f"factors[{index}] must have the shape ({rows}, P, Q), got {tuple(factor.shape)}")
    height, width = math.prod([f.shape[1] for f in factors]), math.prod([f.shape[2] for f in factors])
    if (height, width) != (units, units):
        shapes = " ".join(f"{f.shape[1]}x{f.shape[2]}" for f in factors)
        raise ValueError(f"factors {shapes} multiply to {height}x{width}, but the inputs have N = {units} units")
    named: list[Named] = [
        ("bias", bias, (units,) if bias_rows is None else (bias_rows, units)),
        ("initial_state", initial_state, (batch, planes, units)),
        *others,
    ]
    for name, tensor, shape in named:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if mask is not None and (tuple(mask.shape) != (batch, length) or mask.dtype != torch.bool):
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be a bool tensor of the shape {(batch, length)}, got {found}")
    dtype, device = inputs.dtype, inputs.device
    for tensor in (inputs, *factors, *[tensor for _, tensor, _ in named], mask):
        if tensor is not None and (
            tensor.device != device or tensor.layout != torch.strided or (tensor.dtype != dtype and tensor is not mask)
        ):
            _refuse(tensor, inputs, factors, [*named, ("mask", mask, ())])


def _refuse(
    tensor: Tensor,
    inputs: Tensor,
    factors: Sequence[Tensor],
    named: Sequence[Named],
) -> None:
    """Say which argument ``tensor`` is and what it must be."""
    names = [("inputs", inputs), *((f"factors[{index}]", factor) for index, factor in enumerate(factors))]
    name = next(name for name, other in [*names, *((name, other) for name, other, _ in named)] if other is tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {tensor.layout}")
    wanted = torch.bool if name == "mask" else inputs.dtype
    found = f"{tensor.dtype} on {tensor.device}"
    raise TypeError(f"{name} must be {wanted} on {inputs.device} like the inputs, got {found}")
