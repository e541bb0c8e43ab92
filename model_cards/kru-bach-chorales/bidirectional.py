"""Two recurrences over one sequence, from its start and from its end, with the interface of a single one."""

from typing import Any

import torch
from torch import Tensor, nn

from .cells import KRURecurrence
from .gated_cells import KRUGatedRecurrence


class KRUBidirectional(nn.Module):
    """A forward and a reverse cell of the same kind: inputs (B, T, 2·G, N) to features (B, T, 2·O, N).

    The forward cell has the first half of the planes of inputs, features and state, the reverse cell the second.
    """

    def __init__(
        self, forward_cell: KRURecurrence | KRUGatedRecurrence, reverse_cell: KRURecurrence | KRUGatedRecurrence
    ) -> None:
        super().__init__()
        self.forward_cell = forward_cell
        self.reverse_cell = reverse_cell
        self.state_size = forward_cell.state_size
        self.input_planes = 2 * forward_cell.input_planes
        self.output_planes = 2 * forward_cell.output_planes
        self.state_planes = 2 * forward_cell.state_planes

    def forward(
        self, inputs: Tensor, initial_state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, T, 2·G, N), mask (B, T): states (B, T, 2·O, N) in the order of the inputs, final (B, 2·S, N).

        Raises:
            ValueError: an initial state is given. The reverse direction begins after the last step: nothing that was
                read before can be carried into it.
        """
        if initial_state is not None:
            raise ValueError("a bidirectional recurrence reads the whole sequence: initial_state must be None")
        ahead, behind = inputs.chunk(2, 2)  # (B, T, G, N) each
        ahead, ahead_final = self.forward_cell(ahead, None, mask)  # (B, T, O, N), (B, S, N)
        # Flipped, padding that followed comes first: the mask holds the zero state until the sequence begins.
        flipped = None if mask is None else mask.flip(1)  # (B, T)
        behind, behind_final = self.reverse_cell(behind.flip(1), None, flipped)  # (B, T, O, N), (B, S, N)
        return torch.cat((ahead, behind.flip(1)), 2), torch.cat((ahead_final, behind_final), 1)


def refuse_state(past_key_values: Any, use_cache: bool | None) -> None:
    """A ValueError that names the argument with which a bidirectional model is asked to carry or return a state."""
    name = "past_key_values" if past_key_values is not None else "use_cache=True" if use_cache else None
    if name is not None:
        raise ValueError(
            f"{name} needs a model with bidirectional = False: the reverse direction of this one begins at the end of "
            "the sequence, so there is no state to go on from"
        )


def refuse_bidirectional(config: Any, what: str) -> None:
    """A ValueError that names the field if ``config.bidirectional``, for a head that predicts what comes next."""
    if config.bidirectional:
        raise ValueError(f"{what} must not read ahead: bidirectional must be False, got True")
