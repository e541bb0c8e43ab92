"""The gated feed-forward block that may follow a recurrence of residual blocks."""

from torch import Tensor, nn
from torch.nn import functional as F

from .kronecker_linear import structured_linear


class KRUFeedForward(nn.Module):
    """Pre-norm SwiGLU (Shazeer 2020): W_down (silu(W_gate x) ⊙ W_up x), of width I (``intermediate_size``).

    The recurrence mixes steps, this block mixes the features of one step: it has no state.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, epsilon: float, terms: int | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=epsilon)
        self.gate_up_proj = structured_linear(hidden_size, 2 * intermediate_size, terms)
        self.down_proj = structured_linear(intermediate_size, hidden_size, terms)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) to the branch that is added to them (B, T, D)."""
        gate, up = self.gate_up_proj(self.norm(hidden_states)).chunk(2, -1)  # (B, T, I) each
        return self.down_proj(F.silu(gate) * up)  # (B, T, D)
