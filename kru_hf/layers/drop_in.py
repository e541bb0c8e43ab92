"""Layers in place of ``nn.RNN``, ``LSTM`` and ``GRU``: ``KRU``, ``KRULSTM``, ``KRUGRU``, ``KRUJANET``, ``KRULinear``.

nn.LSTM(64, 900, num_layers=2, batch_first=True)  ->  KRULSTM(64, 900, num_layers=2, batch_first=True)
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..kronecker import check_shapes, plan_with_warning
from ..recurrence import KRULinearRecurrence, KRURecurrence, Recurrence


class _KroneckerLayer(nn.Module):
    """Stacked, possibly bidirectional recurrences with torch's arguments and shapes.

    Args:
        input_size: width of the inputs. state_size: N units per direction; ``hidden_size``, torch's name, is taken too.
        num_layers: layers, each reading the one below. bias: False fixes the cell's bias at zero.
        batch_first: inputs and outputs (B, T, ·) instead of (T, B, ·).
        dropout: probability on the output of every layer but the last, in training.
        bidirectional: a second recurrence from the end of each layer; features double. Such a layer needs the whole
            sequence: its state cannot be carried to a next piece of it.
        factor_shapes: [[P_0, Q_0], …] with ∏ P_f = ∏ Q_f = N, an integer for a square factor; else planned from
            factor_size (8 by default).
        train_factors: False freezes the recurrent matrices. backend: engine of the recurrence.

    The output has the dtype of the input, the state is in fp32 (fp64) whatever it is.

    Raises:
        ValueError: an argument outside what is allowed. TypeError: an unknown one.
    """

    proj_size = 0  # read by code that knows torch's layers
    _cell: str  # a name of CELLS
    _biased_maps = False  # whether it is the input maps that ``bias`` is about
    _pair = False  # whether the caller's state is (h, c)
    _cell_options: tuple[str, ...] = ("init_scale", "chrono_max_length", "terms")  # of KRURecurrence

    def __init__(
        self,
        input_size: int,
        state_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        hidden_size: int | None = None,
        factor_shapes: Sequence[Sequence[int] | int] | None = None,
        factor_size: int | None = None,
        train_factors: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        if (state_size is None) == (hidden_size is None):
            raise TypeError(f"give state_size or hidden_size, one of the two: got {state_size} and {hidden_size}")
        state_size = cast(int, hidden_size if state_size is None else state_size)
        for name, value in (("input_size", input_size), ("state_size", state_size), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if flag not in (True, False):  # 0 and 1 are, as for torch
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number in [0, 1], got {dropout}")
        for name in cell_options:
            if name not in self._cell_options:
                raise TypeError(f"{type(self).__name__} has no option {name!r}; it has {', '.join(self._cell_options)}")
        if factor_shapes is not None and factor_size is not None:
            raise ValueError(f"give factor_shapes or factor_size, not both: got {factor_shapes} and {factor_size}")
        heads = cell_options.get("heads", 1)
        if heads < 1 or state_size % heads:
            raise ValueError(f"heads must be at least 1 and divide state_size = {state_size}, got {heads}")
        units = state_size // heads
        if factor_shapes is None:
            shapes = plan_with_warning(units, 8 if factor_size is None else factor_size)
        else:
            shapes = check_shapes(factor_shapes, units)
        self.input_size, self.state_size, self.num_layers = input_size, state_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.num_directions = 2 if bidirectional else 1
        self.input_maps, self.recurrences = nn.ModuleList(), nn.ModuleList()  # layer by layer, forward then reverse
        width = input_size
        for _ in range(num_layers):
            for _ in range(self.num_directions):
                cell = self._make_cell(shapes, train_factors=train_factors, backend=backend, **cell_options)
                self.recurrences.append(cell)
                self.input_maps.append(
                    nn.Linear(width, math.prod(cell.input_shape), bias=self._biased_maps and bool(bias))
                )
            width = self.num_directions * cell.output_planes * state_size
        self.output_size = width
        if device is not None or dtype is not None:  # under FakeTensorMode nothing can be moved
            self.to(device=device, dtype=dtype)

    def _make_cell(self, shapes: list[list[int]], **options: Any) -> Recurrence:
        """The recurrence of a layer and direction."""
        return KRURecurrence(shapes, self._cell, bias=bool(self.bias), **options)

    def _planes(self, hx: Any, batch: int | None) -> Tensor:
        """The caller's initial state, for ``batch`` sequences or one without a batch, to (L·directions, B, S, N)."""
        parts = hx if self._pair else (hx,)
        if not isinstance(parts, (tuple, list)) or len(parts) != 1 + self._pair:
            raise ValueError(
                f"the initial state of {type(self).__name__} is a pair (h_0, c_0), got {type(hx).__name__}"
            )
        rows, planes = len(self.recurrences), cast(Recurrence, self.recurrences[0]).state_planes // len(parts)
        width = planes * self.state_size
        shape = (rows, width) if batch is None else (rows, batch, width)
        for name, value in zip(("h_0", "c_0"), parts, strict=False):
            if not isinstance(value, Tensor) or value.shape != shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be a tensor of the shape {shape}, got {found}")
        return torch.cat([value.reshape(rows, -1, planes, self.state_size) for value in parts], 2)

    def _state(self, planes: Tensor) -> Any:
        """(L·directions, B, S, N) to what the caller gets: a state, or a pair, (L·directions, B, ·N) each."""
        # No views: c's storage need not live as long as h, and each can be detached in place.
        parts = [
            part.flatten(-2).clone(memory_format=torch.contiguous_format) for part in planes.chunk(1 + self._pair, 2)
        ]
        return tuple(parts) if self._pair else parts[0]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """Run over T steps.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size) for one sequence without a
                batch, or a PackedSequence, whose shorter sequences hold their state at the end.
            hx: the initial state in the form in which the final one is returned; zeros if None.

        Returns:
            The features of the last layer in the form of the input, and the final state of every layer and direction.
        """
        packed = input if isinstance(input, PackedSequence) else None
        mask, lengths = None, None
        if packed is not None:
            # In the order of the packed data, as torch does it: only the state is permuted.
            x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes), batch_first=True)
            mask = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B, T)
            single = False
        else:
            tensor = cast(Tensor, input)
            single = tensor.dim() == 2
            x = tensor.unsqueeze(0) if single else tensor if self.batch_first else tensor.transpose(0, 1)
        if x.dim() != 3 or x.shape[-1] != self.input_size or 0 in x.shape:
            raise ValueError(
                f"input must be 2-D or 3-D, not empty and {self.input_size} wide, got {tuple(x.shape)} (batch first)"
            )
        state = None
        if hx is not None:
            state = self._planes(hx, None if single else len(x))  # (L·directions, B, S, N)
            if packed is not None and packed.sorted_indices is not None:
                state = state[:, packed.sorted_indices]
        out, final = self._run(x, state, mask)
        if packed is not None:
            assert lengths is not None
            data = pack_padded_sequence(out, lengths, batch_first=True).data
            output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            if packed.unsorted_indices is not None:
                final = final[:, packed.unsorted_indices]
            return output, self._state(final)
        last = self._state(final)
        if single:
            return out[0], tuple(h[:, 0] for h in last) if isinstance(last, tuple) else last[:, 0]
        return out if self.batch_first else out.transpose(0, 1).contiguous(), last

    def _run(self, x: Tensor, state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, ·), state (L·directions, B, S, N), mask (B, T): features (B, T, ·) and the final state."""
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.num_directions):
                index = layer * self.num_directions + direction
                cell = self.recurrences[index]
                inputs = self.input_maps[index](x).unflatten(-1, cell.input_shape)  # (B, T, ·, N)
                here = mask
                if direction:
                    # Flipped, padding comes first: the mask holds the initial state until the sequence begins.
                    inputs, here = inputs.flip(1), None if mask is None else mask.flip(1)
                states, final = cell(inputs, None if state is None else state[index], here)  # (B, T, ·, N), (B, S, N)
                outputs.append((states.flip(1) if direction else states).flatten(-2))  # (B, T, ·N)
                finals.append(final)
            features = torch.cat(outputs, -1) if self.bidirectional else outputs[0]  # (B, T, directions·N)
            x = features.to(x.dtype)
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, torch.stack(finals)

    @property
    def hidden_size(self) -> int:
        """N, by torch's name."""
        return self.state_size

    def reset_parameters(self) -> None:
        """Draw maps, factors and biases anew."""
        for part in (*self.input_maps, *self.recurrences):
            cast(Any, part).reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing to do: here for code that calls it on torch's layers before each forward."""

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.state_size}", f"num_layers={self.num_layers}"]
        parts += [f"{name}=True" for name in ("batch_first", "bidirectional") if getattr(self, name)]
        return ", ".join(parts + ([f"dropout={self.dropout}"] if self.dropout else []))


class KRU(_KroneckerLayer):
    """The paper's complex recurrence: features [Re h; Im h], 2N wide per direction; state (L·directions, B, 2N).

    Further options: ``activation``, ``init``, ``init_scale``, ``terms``, ``bias_init`` of ``KRURecurrence``.
    Add :meth:`penalty`, times a coefficient, to the training loss.
    """

    _cell = "kru"
    _cell_options = ("terms", "activation", "init", "init_scale", "bias_init")

    def penalty(self) -> Tensor:
        """Soft unitary penalty Σ ‖W_f^H W_f − I‖² over all factors: a scalar."""
        return torch.stack([cast(KRURecurrence, cell).penalty() for cell in self.recurrences]).sum()


class KRULSTM(_KroneckerLayer):
    """LSTM with Kronecker recurrent matrices: features N wide per direction; state (h, c), (L·directions, B, N) each.

    Further options: ``init_scale``, ``chrono_max_length`` and ``terms`` of ``KRURecurrence``.
    """

    _cell = "lstm"
    _pair = True


class KRUGRU(_KroneckerLayer):
    """GRU with Kronecker recurrent matrices: features N wide per direction; state (L·directions, B, N).

    Further options: ``init_scale``, ``chrono_max_length`` and ``terms`` of ``KRURecurrence``.
    """

    _cell = "gru"


class KRUJANET(_KroneckerLayer):
    """JANET, the LSTM with only a forget gate, with Kronecker recurrent matrices: half the parameters of ``KRULSTM``.

    Features N wide per direction; state (L·directions, B, N). See ``cells`` for its equation. Further options:
    ``init_scale``, ``chrono_max_length`` and ``terms`` of ``KRURecurrence``.
    """

    _cell = "janet"


class KRULinear(_KroneckerLayer):
    """The linear recurrence h_t = d_t R_t h_{t-1} + U x_t: features [Re h; Im h], 2N wide per direction.

    State (L·directions, B, 2N). Further options: ``transition``, ``heads``, ``decay`` and ``init`` of
    ``KRULinearRecurrence``. ``bias`` is that of the maps that the input passes. Add :meth:`penalty`, times a
    coefficient, to the training loss where the transition is fixed.
    """

    _cell_options = ("transition", "heads", "decay", "init")
    _biased_maps = True

    def _make_cell(self, shapes: list[list[int]], **options: Any) -> Recurrence:
        return KRULinearRecurrence(shapes, **options)

    penalty = KRU.penalty
