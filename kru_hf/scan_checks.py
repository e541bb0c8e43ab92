"""What every engine demands of its arguments, checked in one place: kernels read as far as these shapes say."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import Cell

Named = tuple[str, Tensor | None, tuple[int, ...]]


def _check_factors(factors: Sequence[Tensor], cell: Cell, units: int) -> None:
    planes = cell.planes
    if not factors:
        raise ValueError(f"factors must hold at least one ({planes}, P, Q) tensor, got none")
    for index, factor in enumerate(factors):
        if factor.dim() not in (3, 4) or factor.shape[-3] != planes or 0 in factor.shape:
            allowed = f"({planes}, P, Q) or (R, {planes}, P, Q)"
            raise ValueError(f"factors[{index}] must have the shape {allowed}, got {tuple(factor.shape)}")
        if factor.shape[:-3] != factors[0].shape[:-3]:
            found = f"{tuple(factors[0].shape)} and {tuple(factor.shape)}"
            raise ValueError(f"factors must have the same terms R, got {found}")
    rows, columns = math.prod([f.shape[-2] for f in factors]), math.prod([f.shape[-1] for f in factors])
    if (rows, columns) != (units, units):
        shapes = " ".join(f"{factor.shape[-2]}x{factor.shape[-1]}" for factor in factors)
        raise ValueError(f"factors {shapes} multiply to {rows}x{columns}, but the inputs have N = {units} units")


def check_scan(
    cell: Cell,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    others: Sequence[Named] = (),
) -> None:
    """Raise `ValueError` or `TypeError` naming the argument, its value and what is allowed.

    ``others`` are further tensors by name, of the dtype of the inputs, each with the shape that it must have.
    """
    if inputs.dim() != 4 or inputs.shape[2] != cell.planes or 0 in inputs.shape:
        shape = f"(B, T, {cell.planes}, N) with no empty axis"
        raise ValueError(f"inputs of the cell {cell.name!r} must have the shape {shape}, got {tuple(inputs.shape)}")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs must be float32 or float64 (the state is never kept in less), got {inputs.dtype}")
    batch, length, _, units = inputs.shape
    _check_factors(factors, cell, units)
    state = (batch, len(cell.states), units)
    named = [("bias", bias, cell.bias_shape(units)), ("initial_state", initial_state, state), *others]
    for name, tensor, wanted in named:
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(tensor.shape)}")
    times = [("mask", mask), ("starts", starts)]
    for name, tensor in times:
        if tensor is not None and (tuple(tensor.shape) != (batch, length) or tensor.dtype != torch.bool):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be a bool tensor of the shape {(batch, length)}, got {found}")
    dtype, device = inputs.dtype, inputs.device
    numbers = (inputs, *factors, *[tensor for _, tensor, _ in named])
    for tensor in (*numbers, mask, starts):
        if tensor is not None and (
            tensor.device != device
            or tensor.layout != torch.strided
            or (tensor.dtype != dtype and tensor is not mask and tensor is not starts)
        ):
            names = [("inputs", inputs), *((f"factors[{i}]", f) for i, f in enumerate(factors)), *times]
            _refuse(tensor, inputs, [*names, *((name, other) for name, other, _ in named)])


def _refuse(tensor: Tensor, inputs: Tensor, names: Sequence[tuple[str, Tensor | None]]) -> None:
    """Say which argument ``tensor`` is and what it must be."""
    name = next(name for name, other in names if other is tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {tensor.layout}")
    wanted = torch.bool if name in ("mask", "starts") else inputs.dtype
    found = f"{tensor.dtype} on {tensor.device}"
    raise TypeError(f"{name} must be {wanted} on {inputs.device} like the inputs, got {found}")
