"""Sizes from a parameter budget: the one dimension that was not given becomes as large as the budget allows.

| architecture | free dimension, the first that is not given |
| --- | --- |
| kru, unitary | `state_size` N (`factor_shapes` fix it too), then `hidden_size` of residual blocks |
| rnn, lstm, gru, orthogonal | `state_size` H, then `hidden_size` (the embedding's width) |
| low_rank | `state_size` H, then `recurrent_rank`, then `hidden_size` |

N is a product of factor sizes as near `factor_size` as the budget allows (of 7 to 11 first where that is not given).
Unless it is given or free itself, the embedding of a baseline is half as wide as the vocabulary (never wider than H):
wider ones spend on a map of V symbols what the state could use.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from kru_hf import plan_factor_shapes
from kru_hf.kronecker import MOST_UNITS

from ..common.errors import UserError

DEFAULT_SIZE = 8  # KRUConfig's own factor_size
# Factors may be that much smaller or larger than factor_size: the first that gives an N near the budget. Of the sizes
# near 8, 7 to 11 did best.
SPREADS = (1.4, 1.5, 2.0, 3.0)
UNUSED = 0.08  # largest share of a budget that may stay unused
NEIGHBOURS = 8  # sizes tried on either side of the crossing: the count of a kru is not quite monotone in N

Count = Callable[[dict[str, Any]], int]


def fit_to_budget(budget: int, architecture: str, values: dict[str, Any], count: Count) -> dict[str, Any]:
    """Config values whose free dimension gives as many of `budget` real parameters as possible, and no more.

    Args:
        budget: most parameters of the whole model. architecture: as in `--architecture`.
        values: config fields, given ones (None: turned off) and those that the data fixes.
        count: their number of parameters.

    Raises:
        UserError: no dimension is free, the smallest model is too large, or none comes within 8 % of the budget.
    """
    field = free_field(architecture, values)
    kronecker = architecture in ("kru", "unitary")

    def complete(size: int) -> dict[str, Any]:
        chosen = {**values, field: size}
        if not kronecker and field != "hidden_size" and embeds(values):
            chosen.setdefault("hidden_size", min(chosen["state_size"], -(-values["vocab_size"] // 2)))
        return chosen

    counts: dict[int, int] = {}  # of the sizes that were tried

    @cache
    def counted(size: int) -> int:
        counts[size] = count(complete(size))
        return counts[size]

    # Widths that a sum of n Kronecker products maps are multiples of n.
    step = values.get("kronecker_terms") or 1 if kronecker else 1
    choices: Iterable[Sequence[int]]
    if kronecker and field == "state_size":
        wanted = values.get("factor_size") or DEFAULT_SIZE
        limit = 4 * step
        # The fewest factor parameters that N can have.
        while 4 * limit <= MOST_UNITS and count({**complete(limit), "factor_size": 2}) <= budget:
            limit *= 2
        ranges = [range(7, 12)] if values.get("factor_size") is None else []
        ranges += [range(math.ceil(wanted / x), int(wanted * x) + 1) for x in SPREADS]
        choices = ([n for n in kronecker_sizes(wanted, sizes, 2 * limit) if n % step == 0] for sizes in ranges)
    else:
        choices = [range(step, (values["state_size"] if field == "recurrent_rank" else budget) + 1, step)]

    for candidates in choices:
        size = largest(budget, candidates, counted)
        if size is not None and counted(size) >= (1 - UNUSED) * budget:
            return complete(size)
    raise UserError(not_found(budget, architecture, field, counts))


def not_found(budget: int, architecture: str, field: str, counts: dict[int, int]) -> str:
    """What to say when no size comes near, with the nearest of those that were tried."""
    below = max((n for n in counts if counts[n] <= budget), key=counts.__getitem__, default=None)
    above = min((n for n in counts if counts[n] > budget), key=counts.__getitem__, default=None)
    if below is None and above is not None:
        return f"parameter_budget={budget:,} is too small for {architecture}: {field}={above} has {counts[above]:,}"
    found = ", ".join(f"{n} has {counts[n]:,}" for n in (below, above) if n is not None)
    return (
        f"parameter_budget={budget:,}: no {field} of {architecture} comes near; {found}. Give another budget, or "
        f"{field} itself"
    )


def embeds(values: dict[str, Any]) -> bool:
    """Whether the model reads tokens through an embedding."""
    return values.get("input_size") is None and values.get("vocab_size") is not None


def free_field(architecture: str, values: dict[str, Any]) -> str:
    """The first dimension of the architecture that was not given."""
    if architecture in ("kru", "unitary"):
        order = ["state_size", *(["hidden_size"] if values.get("block_type") != "plain" else [])]
    else:
        rank = ["recurrent_rank"] if architecture == "low_rank" else []
        order = ["state_size", *rank, *(["hidden_size"] if embeds(values) else [])]
    given = set(values)
    if "factor_shapes" in given:
        given.add("state_size")
    for name in order:
        if name not in given:
            return name
    raise UserError(f"parameter_budget: nothing is left to choose, {', '.join(order)} are given; remove one of them")


def kronecker_sizes(factor_size: int, sizes: Sequence[int], limit: int) -> list[int]:
    """All N up to `limit`, ascending, whose factors as planned for `factor_size` are all among `sizes`."""
    allowed = {size for size in sizes if size > 1}
    products: set[int] = set()
    grown = {1}
    while grown:
        grown = {n * size for n in grown for size in allowed if n * size <= limit} - products
        products |= grown
    return [n for n in sorted(products) if all(p in allowed for p, _ in plan_factor_shapes(n, factor_size))]


def largest(budget: int, candidates: Sequence[int], count: Callable[[int], int]) -> int | None:
    """The candidate with the most parameters within the budget; None if even the first has more."""
    if not candidates or count(candidates[0]) > budget:
        return None
    top = 1  # galloping first: the last candidates would be huge models
    while top < len(candidates) and count(candidates[top]) <= budget:
        top *= 2
    top = min(top, len(candidates))
    crossing = bisect.bisect_right(candidates, budget, lo=top // 2, hi=top, key=count)
    near = candidates[max(0, crossing - NEIGHBOURS) : crossing + NEIGHBOURS]
    return max((n for n in near if count(n) <= budget), key=lambda n: (count(n), n))
