"""The network of "Kronecker Recurrent Units" (Jose, Cissé & Fleuret, ICML 2018) and the copy task, in plain torch.

    python examples/kru_minimal.py

Glossary: B samples, T steps, N complex units, F factors W_f (P_f × P_f) with ∏ P_f = N.
    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t          h_t = σ(z_t) = z_t · max(|z_t| + b, 0) / |z_t|   (modReLU)
    logits_t = V [Re h_t; Im h_t] + c                   loss = cross-entropy + λ Σ_f ‖W_f^H W_f − I‖²
The package `kru_hf` computes the same, faster; tests/test_examples.py holds the two equal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS, RECALLED, BLANK, DELIMITER = 8, 10, 8, 9


def random_unitary(size: int) -> Tensor:
    """A Haar-random unitary (P, P): the Q of a complex Gaussian, with the phases of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.cfloat))
    phases = r.diagonal() / r.diagonal().abs()
    return q * phases


def kron_multiply(factors: list[Tensor], h: Tensor) -> Tensor:
    """(W_0 ⊗ … ⊗ W_{F-1}) h for h (B, N), a factor at a time: N · Σ P_f multiply-adds in place of N²."""
    batch, units = h.shape
    for factor in factors:
        size = len(factor)
        h = h.reshape(batch, size, units // size)  # the slowest index first
        h = (factor @ h).transpose(1, 2)  # and last when it has been seen to: F turns bring back the order
    return h.reshape(batch, units)


def modrelu(z: Tensor, b: Tensor) -> Tensor:
    """σ(z) of complex z (B, N) and real b (N,); 0, with the gradient 0, at z = 0."""
    zero = z == 0
    modulus = z.where(~zero, 1).abs()
    scale = torch.relu(modulus + b) / modulus
    return z * scale.where(~zero, 0)


class KRU(nn.Module):
    """Token ids (B, T) to logits (B, T, C): the paper's layer between an embedding U and a readout V."""

    def __init__(self, vocabulary: int, classes: int, factor_sizes: list[int], bias: float = 0.0) -> None:
        super().__init__()
        units = math.prod(factor_sizes)
        self.U = nn.Embedding(vocabulary, 2 * units)
        nn.init.normal_(self.U.weight, std=0.1)
        # Stored as real and imaginary planes (2, P, P), as optimizers like them.
        starts = [random_unitary(size) for size in factor_sizes]
        self.factors = nn.ParameterList([torch.stack((start.real, start.imag)) for start in starts])
        self.b = nn.Parameter(torch.full((units,), bias))
        self.V = nn.Linear(2 * units, classes)

    def matrices(self) -> list[Tensor]:
        return [torch.complex(*factor) for factor in self.factors]

    def penalty(self) -> Tensor:
        """The soft unitary constraint Σ_f ‖W_f^H W_f − I‖²."""
        return sum(((w.mH @ w) - torch.eye(len(w))).abs().square().sum() for w in self.matrices())

    def forward(self, ids: Tensor) -> Tensor:
        real, imag = self.U(ids).chunk(2, -1)  # (B, T, N) each
        inputs, matrices = torch.complex(real, imag), self.matrices()
        h, states = torch.zeros_like(inputs[:, 0]), []
        for t in range(ids.shape[1]):
            h = modrelu(kron_multiply(matrices, h) + inputs[:, t], self.b)  # (B, N)
            states.append(torch.cat((h.real, h.imag), -1))  # (B, 2N)
        return self.V(torch.stack(states, 1))


def copy_task(batch: int, delay: int) -> tuple[Tensor, Tensor]:
    """Ten symbols, `delay` − 1 blanks, a delimiter, ten blanks; to be answered with blanks and then the symbols."""
    symbols = torch.randint(SYMBOLS, (batch, RECALLED))
    ids = torch.full((batch, delay + 2 * RECALLED), BLANK)
    targets = ids.clone()
    ids[:, :RECALLED] = symbols
    ids[:, RECALLED + delay - 1] = DELIMITER
    targets[:, -RECALLED:] = symbols
    return ids, targets


def train(steps: int = 300, delay: int = 30, batch: int = 32, factor_sizes: tuple[int, ...] = (8, 8)) -> float:
    """Train on fresh sequences; print and return the share of the ten symbols that are recalled (chance: 1/8)."""
    torch.manual_seed(0)
    model = KRU(SYMBOLS + 2, SYMBOLS + 1, list(factor_sizes))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, alpha=0.9)
    recalled = 0.0
    for step in range(1, steps + 1):
        ids, targets = copy_task(batch, delay)
        logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + 0.1 * model.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            right = logits[:, -RECALLED:].argmax(-1) == targets[:, -RECALLED:]
            recalled = right.float().mean().item()
            without_memory = RECALLED * math.log(SYMBOLS) / (delay + 2 * RECALLED)
            print(f"step {step}: loss {loss.item():.4f} (without memory {without_memory:.4f}), recalled {recalled:.0%}")
    return recalled


if __name__ == "__main__":
    train()
