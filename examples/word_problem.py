"""A linear recurrence learns to multiply in A5, a group that does not commute, in half a minute on one core.

    python examples/word_problem.py

A5 has 60 elements, the even permutations of five things. The model reads elements and names, at every step, the product
of all read so far. Each token has a 6x6 unitary matrix R of its own, and the state h_t = R(x_t) h_{t-1} + U x_t is that
product; there is no activation and no gate. It is trained on short products and follows them where training never went.
"""

import itertools

import torch
from torch import Tensor, nn

from kru_hf import KRUConfig, KRUForTokenClassification


def even_permutations(things: int) -> Tensor:
    """The table (n, n) of the alternating group: entry (a, b) is the number of a after b; element 0 is the identity."""
    elements = [
        p for p in itertools.permutations(range(things)) if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    ]
    number = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


def products(table: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random elements (B, T), and the products x_t ⋯ x_1 (B, T)."""
    tokens = torch.randint(len(table), (batch, length))
    found = [tokens[:, 0]]
    for t in range(1, length):
        found.append(table[tokens[:, t], found[-1]])
    return tokens, torch.stack(found, 1)


def accuracy(model: nn.Module, table: Tensor, length: int, batch: int = 50) -> float:
    """Share of right products among the positions beyond half the length."""
    tokens, labels = products(table, batch, length)
    with torch.no_grad():
        right = model(tokens).logits.argmax(-1) == labels
    return right[:, length // 2 :].float().mean().item()


def train(steps: int = 700, longest: int = 32, batch: int = 64, rate: float = 0.05, things: int = 5) -> float:
    """Train on products of 2 to `longest` elements, which grow; print accuracies and return that at 128 elements."""
    torch.manual_seed(0)
    table = even_permutations(things)
    size = len(table)
    config = KRUConfig(
        vocab_size=size,
        num_labels=size,
        cell_type="kru_linear",
        transition="selective",
        factor_shapes=[[6, 6]],
        block_type="plain",
        initializer_range=0.3,
    )
    model = KRUForTokenClassification(config)
    print(f"{size} elements, {model.num_parameters():,} parameters")
    # The readout alone has weight decay: large logits would hide that the matrices are not exact yet.
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if (name == "score.weight") == decayed],
            "weight_decay": wd,
        }
        for decayed, wd in ((True, 0.3), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        length = round(2 * (longest / 2) ** min(1.0, step / (0.8 * steps)))  # the images of two elements come first
        tokens, labels = products(table, batch, length)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step}: lengths to {length}, loss {loss.item():.4f}")
    found = {length: accuracy(model, table, length) for length in (32, 128, 512)}
    print(", ".join(f"{length} elements: {share:.1%}" for length, share in found.items()))
    return found[128]


if __name__ == "__main__":
    train()
