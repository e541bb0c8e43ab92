"""Kronecker products of small factors: the algebra behind the recurrent matrix.

A complex factor is a real tensor (2, P, Q): plane 0 is the real part, plane 1 the imaginary part. The matrix is
``W = W_0 ⊗ … ⊗ W_{F-1}`` in the order of :func:`torch.kron`: factor 0 is the slowest index of the state; or a sum of
R such terms, whose factors are (R, 2, P, Q). Gated cells have real factors (K, P, Q) or (R, K, P, Q), one per gate.
Letters: F factors, factor f is P_f × Q_f, N = ∏ P_f = ∏ Q_f.
"""

import itertools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_UNITS = 2**24


def to_complex(planes: Tensor, dim: int) -> Tensor:
    """Planes (…, 2, …) with the plane axis at ``dim`` to a complex tensor without it."""
    return torch.complex(planes.select(dim, 0), planes.select(dim, 1))


def to_planes(values: Tensor, dim: int) -> Tensor:
    """Complex tensor to real planes, with the new axis of size 2 at ``dim``."""
    return torch.stack((values.real, values.imag), dim)


def kron_multiply(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """(W_0 ⊗ … ⊗ W_{F-1}) x without building the matrix; complex or real factors (P_f, Q_f), x (…, ∏ Q_f).

    Factors act in the order of :func:`apply_order`, which keeps the intermediates small when some are rectangular.
    Returns (…, ∏ P_f).
    """
    lead = x.shape[:-1]
    sizes = [factor.shape[1] for factor in factors]
    for index in apply_order([tuple(factor.shape) for factor in factors]):
        factor = factors[index]
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        rows, columns = factor.shape
        x = x.reshape(-1, left, columns, right)  # (…, L, Q, R)
        # y[…, p, r] = Σ_q W[p, q] x[…, q, r]
        # As one large product of (…·L·R, Q) by (Q, P): a batch of small complex products is many times slower.
        x = (x.mT @ factor.mT).mT  # (…, L, P, R)
        sizes[index] = rows
    return x.reshape(*lead, math.prod(sizes))


def kron_apply(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Kronecker product of the complex ``factors``, each (2, P_f, Q_f), times ``x`` (…, 2, ∏ Q_f): (…, 2, ∏ P_f)."""
    product = kron_multiply([to_complex(factor, 0) for factor in factors], to_complex(x, -2))
    return to_planes(product, -2)


def kron_product(matrices: Sequence[Tensor]) -> Tensor:
    """⊗ of F stacks of real or complex matrices (…, P_f, Q_f), stack by stack: (…, ∏ P_f, ∏ Q_f). Differentiable."""
    product = matrices[0]
    for matrix in matrices[1:]:
        rows, columns = product.shape[-2] * matrix.shape[-2], product.shape[-1] * matrix.shape[-1]
        blocks = product[..., :, None, :, None] * matrix[..., None, :, None, :]  # (…, P, P', Q, Q')
        product = blocks.reshape(*product.shape[:-2], rows, columns)
    return product


def kron_dense(factors: Sequence[Tensor]) -> Tensor:
    """The whole matrix (2, ∏ P_f, ∏ Q_f) of complex factors (2, P_f, Q_f) or (R, 2, P_f, Q_f); O(N²) memory."""
    product = kron_product([to_complex(factor, -3) for factor in factors])  # (∏ P, ∏ Q), or (R, ∏ P, ∏ Q)
    return to_planes(product if product.dim() == 2 else product.sum(0), 0)


def merge_terms(factors: list[Tensor], complex_planes: bool) -> list[Tensor]:
    """Factors (R, K, P_f, Q_f) as they are, or one (1, K, N, N), the sum of their terms, where that is cheaper.

    A term costs N · Σ P_f multiply-adds a step, the dense matrix N². Differentiable.
    """
    terms = len(factors[0])
    units = math.prod([factor.shape[2] for factor in factors])
    if terms == 1 or units > terms * sum([max(factor.shape[2:]) for factor in factors]):
        return factors
    matrices = [to_complex(factor, 1) for factor in factors] if complex_planes else factors
    dense = kron_product(matrices).sum(0, keepdim=True)  # (1, N, N), or (1, K, N, N)
    return [to_planes(dense, 1) if complex_planes else dense]


def apply_order(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The cheapest order in which to apply factors of the given (P_f, Q_f): shrinking factors first, growing ones last.

    Sorting by (P − Q) / (P·Q) minimises Σ of the multiply-adds: of two neighbours f, g in the order, f first costs
    P_f·Q_f·Q_g + P_f·P_g·Q_g per remaining index and g first the same with the letters exchanged.
    """
    return sorted(range(len(shapes)), key=lambda f: ((shapes[f][0] - shapes[f][1]) / math.prod(shapes[f]), f))


def at_least_fp32(x: Tensor) -> Tensor:
    """x, or x in float32 where it has fewer bits: torch's decompositions and complex products take no less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gram_residual(factor: Tensor) -> Tensor:
    """W^H W − I (Q, Q), complex; W W^H − I (P, P) where P < Q: its norm² has the same gradient, Q − P less in value."""
    matrix = to_complex(at_least_fp32(factor), 0)  # (P, Q)
    gram = matrix.mH @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mH  # (min, min)
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)  # (min, min)


def unitary_penalty(factors: Sequence[Tensor]) -> Tensor:
    """The soft unitary constraint: a scalar, 0 exactly for a unitary W (of square factors).

    One term, factors (2, P, Q): the paper's Σ_f ‖W_f^H W_f − I‖²_F. A rectangular factor makes W a partial isometry at
    best: its penalty can vanish, yet W is never unitary. A sum of R terms, factors (R, 2, P, Q): ‖W^H W − I‖²_F.
    """
    if factors[0].dim() == 4:
        return _sum_penalty(factors)
    terms = [torch.view_as_real(gram_residual(factor)).square().sum() for factor in factors]
    return torch.stack(terms).sum()


def _sum_penalty(factors: Sequence[Tensor]) -> Tensor:
    """‖W^H W − I‖²_F = Σ_{rstu} ∏_f tr(G_f^rs G_f^tu) − 2 Σ_rs ∏_f tr(G_f^rs) + N with G_f^rs = W_f^(r)H W_f^(s).

    Unitary terms do not make a unitary sum, so that W itself is held, without W: from the Gram matrices of the pairs.
    In float64, for the terms cancel.
    """
    units = 1
    traces = squares = torch.ones((), dtype=torch.complex128, device=factors[0].device)
    for factor in factors:
        matrices = to_complex(factor.double(), 1)  # (R, P, Q)
        grams = torch.einsum("rpa,spb->rsab", matrices.conj(), matrices).flatten(0, 1)  # (R², Q, Q)
        traces = traces * grams.diagonal(dim1=1, dim2=2).sum(1)  # (R²,)
        squares = squares * (grams.flatten(1) @ grams.mT.flatten(1).mT)  # (R², R²): tr(G G')
        units *= factor.shape[3]
    return (squares.sum().real - 2 * traces.sum().real + units).to(at_least_fp32(factors[0]).dtype)


def spectral_norm(factors: Sequence[Tensor]) -> Tensor:
    """‖W‖_2 of complex factors (2, P, Q): the product of theirs; of a sum (R, 2, P, Q): by 50 power iterations."""
    matrices = [to_complex(at_least_fp32(factor), -3) for factor in factors]
    if factors[0].dim() == 3:
        return torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in matrices]).prod()  # ()
    terms = list(zip(*matrices, strict=True))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, math.prod(f.shape[-1] for f in factors), generator=generator).to(matrices[0])  # (1, N)
    norm = x.new_ones((), dtype=x.real.dtype)
    for _ in range(50):
        x = x / torch.linalg.vector_norm(x)
        x = torch.stack([kron_multiply(term, x) for term in terms]).sum(0)
        norm = torch.linalg.vector_norm(x)
        x = torch.stack([kron_multiply([matrix.mH for matrix in term], x) for term in terms]).sum(0)
    return norm


def unitary_exp(x: Tensor) -> Tensor:
    """exp(iG) (…, 2, P, P), unitary, of the Hermitian G that P² reals x (…, P²) hold; for normal x |G| is about 2.

    The upper triangle of x (P, P) is the real part of G, what is below the diagonal the imaginary part.
    """
    size = math.isqrt(x.shape[-1])
    square = x.unflatten(-1, (size, size)) / math.sqrt(2 * size)
    upper, lower = square.triu(1), square.tril(-1)
    diagonal = math.sqrt(2) * torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))
    generator = torch.complex(upper + upper.mT + diagonal, lower - lower.mT)  # (…, P, P)
    if size == 1:
        return to_planes(torch.exp(1j * generator), -3)
    identity = torch.eye(size, dtype=generator.dtype, device=x.device)
    if size == 2:
        # G = m + V, V² = r²: exp(iG) = exp(im) (cos r + i V sin r / r)
        mean = generator.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # (…, 1, 1)
        traceless = generator - mean * identity
        radius = (traceless.abs().square().sum((-2, -1), keepdim=True) / 2 + 1e-24).sqrt()  # (…, 1, 1)
        matrix = torch.exp(1j * mean) * (radius.cos() * identity + 1j * (radius.sin() / radius) * traceless)
        return to_planes(matrix, -3)
    # Taylor's series to the 6th power of iG / 16, squared 4 times; what is missing for large G is made good at the
    # end: a step of Newton's iteration leaves a matrix that is unitary to rounding.
    x1 = generator * (1j / 16)
    x2 = x1 @ x1
    x3 = x2 @ x1
    matrix = identity + x1 + x2 / 2 + x3 @ (identity / 6 + x1 / 24 + x2 / 120 + x3 / 720)
    for _ in range(4):
        matrix = matrix @ matrix
    matrix = matrix @ (1.5 * identity - 0.5 * matrix.mH @ matrix)
    return to_planes(matrix, -3)


def random_unitary(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """A Haar-random (2, P, Q) factor with orthonormal columns (rows where P < Q), float32, by QR of a Gaussian."""
    big, small = max(rows, columns), min(rows, columns)
    gaussian = torch.randn(2, big, small, dtype=torch.float64, generator=generator)  # (2, big, small)
    q, r = torch.linalg.qr(to_complex(gaussian, 0))
    # Without the phases of R's diagonal the distribution of Q is not the Haar measure.
    phase = torch.diagonal(r) / torch.diagonal(r).abs()  # (small,)
    q = q * phase  # (big, small)
    matrix = q if rows >= columns else q.mH  # (P, Q)
    return to_planes(matrix, 0).float()


def slow_unitary(size: int, max_phase: float, generator: torch.Generator | None = None) -> Tensor:
    """Q diag(exp(iφ)) Q^H, a unitary (2, P, P), float32: Q Haar-random, phases φ uniform within ±``max_phase`` radians.

    An eigenvalue exp(iφ) turns what it holds once in 2π / |φ| steps (Orvieto et al. 2023 bound their phases alike).
    """
    q = to_complex(random_unitary(size, size, generator).double(), 0)  # (P, P)
    phases = (2 * torch.rand(size, dtype=torch.float64, generator=generator) - 1) * max_phase  # (P,)
    return to_planes((q * torch.exp(1j * phases)) @ q.mH, 0).float()  # (2, P, P)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ValueError` unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def random_orthogonal(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """A Haar-random real (P, Q) factor with orthonormal columns (rows where P < Q), float32."""
    big, small = max(rows, columns), min(rows, columns)
    q, r = torch.linalg.qr(torch.randn(big, small, dtype=torch.float64, generator=generator))
    q = q * torch.diagonal(r).sign()  # (big, small)
    return (q if rows >= columns else q.mT).float()


def factorings(size: int, least: int = 2) -> list[tuple[int, ...]]:
    """All ways to write N = ``size`` as a product of sizes from ``least`` on, each in ascending order."""
    found: list[tuple[int, ...]] = [(size,)]
    for divisor in range(least, math.isqrt(size) + 1):
        if size % divisor == 0:
            found += [(divisor, *rest) for rest in factorings(size // divisor, divisor)]
    return found


def check_pairs(shapes: Sequence[Sequence[int] | int]) -> list[list[int]]:
    """``factor_shapes`` as pairs [P, Q], of which an integer gives a square one; ValueError for anything else."""
    pairs = [[shape, shape] if isinstance(shape, int) else shape for shape in shapes]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
            raise ValueError(f"factor_shapes must hold pairs [P, Q] of positive integers, got {pair!r}")
    if not pairs:
        raise ValueError("factor_shapes must hold at least one pair [P, Q], got an empty list")
    return [list(pair) for pair in pairs]


def check_shapes(shapes: Sequence[Sequence[int] | int], size: int, name: str = "state_size") -> list[list[int]]:
    """``factor_shapes`` as pairs [P, Q].

    Raises:
        ValueError: no pairs of positive integers, or ∏ P_f or ∏ Q_f is not ``size``, the value of the option ``name``.
    """
    pairs = check_pairs(shapes)
    rows, columns = (math.prod(sizes) for sizes in zip(*pairs, strict=True))
    if not rows == columns == size:
        raise ValueError(f"factor_shapes {pairs} multiply to {rows}x{columns}; both must equal {name} = {size}")
    return pairs


def plan_factor_shapes(state_size: int, factor_size: int) -> list[list[int]]:
    """Square factor shapes with product ``state_size`` and sizes as near ``factor_size`` as the divisors of N allow.

    504 with size 8 gives 7·8·9, 512 with size 2 gives nine 2×2 factors, 411 gives 3·137: a prime stays whole.

    Raises:
        ValueError: ``state_size`` < 1 or ``factor_size`` < 2.
    """
    if state_size < 1:
        raise ValueError(f"state_size must be at least 1, got {state_size}")
    if state_size > MOST_UNITS:  # trying its divisors would take hours
        raise ValueError(f"state_size must be at most {MOST_UNITS:,}, got {state_size:,}")
    if factor_size < 2:
        raise ValueError(f"factor_size must be at least 2, got {factor_size}")

    def cost(sizes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        return sum(math.log(size / factor_size) ** 2 for size in reversed(sizes)), sizes

    return [[size, size] for size in min(factorings(state_size), key=cost)]


def plan_with_warning(state_size: int, factor_size: int) -> list[list[int]]:
    """:func:`plan_factor_shapes`, with a warning where N has no divisors that are anywhere near ``factor_size``."""
    shapes = plan_factor_shapes(state_size, factor_size)
    largest = max(size for size, _ in shapes)
    if largest > 8 * factor_size:
        warnings.warn(
            f"state_size = {state_size} has factors of {'·'.join(str(size) for size, _ in shapes)} units, far from "
            f"factor_size = {factor_size}: {largest}x{largest} is nearly a dense matrix; take a state_size with more "
            "small divisors, or give factor_shapes",
            stacklevel=3,
        )
    return shapes


def group_factors(shapes: Sequence[tuple[int, int]], max_groups: int = 3, overhead: int = 4096) -> list[int]:
    """Cut F neighbouring factors into at most ``max_groups`` runs to be merged into one dense matrix each.

    The cost of a group is its multiply-adds for one state plus ``overhead`` for the extra call. Returns the lengths of
    the runs, in order, with sum F.
    """
    count = len(shapes)

    def cost(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, count]
        merged = [
            (math.prod([p for p, _ in shapes[a:b]]), math.prod([q for _, q in shapes[a:b]]))
            for a, b in itertools.pairwise(bounds)
        ]
        sizes, total = [q for _, q in merged], 0
        for index in apply_order(merged):
            rows, _ = merged[index]
            total += rows * math.prod(sizes) + overhead
            sizes[index] = rows
        return total

    # In the words that torch.compile follows: no min() with a key, no product of a generator.
    choices = [c for groups in range(min(max_groups, count)) for c in itertools.combinations(range(1, count), groups)]
    cuts = sorted(choices, key=lambda c: (cost(c), c))[0]
    return [b - a for a, b in itertools.pairwise([0, *cuts, count])]


def merge_groups(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (G, P_f, Q_f), real or complex, to at most three groups (G, P, Q) with the same product in each of G."""
    rest = iter(factors)
    lengths = group_factors([(factor.shape[1], factor.shape[2]) for factor in factors])
    return [kron_product(list(itertools.islice(rest, length))) for length in lengths]


def factor_gradients(
    factors: Sequence[Tensor], group_grads: Sequence[Tensor], lengths: Sequence[int] | None = None
) -> list[Tensor]:
    """Gradients (G, P_f, Q_f) of factors that were merged in runs of ``lengths``, from those of the merged matrices.

    The runs are by default those of :func:`merge_groups`.

    factors: G gates of real or complex (G, P_f, Q_f), each gate a product of its own. group_grads: (G, ∏ P, ∏ Q) a run.
    """
    result: list[Tensor] = []
    lengths = lengths or group_factors([(f.shape[1], f.shape[2]) for f in factors])
    for length, grad in zip(lengths, group_grads, strict=True):
        run = factors[len(result) : len(result) + length]
        merged = [run[0]]  # (G, P, Q): products of the first one, two, … factors
        for factor in run[1:-1]:
            merged.append(kron_product([merged[-1], factor]))
        grads = []
        for head, last in zip(reversed(merged[: length - 1]), reversed(run[1:]), strict=True):
            sizes = (head.shape[1], last.shape[1], head.shape[2], last.shape[2])
            blocks = grad.reshape(-1, *sizes)  # (G, P, P', Q, Q')
            grads.append(torch.einsum("gacbd,gab->gcd", blocks, head.conj_physical()))  # (G, P', Q')
            grad = torch.einsum("gacbd,gcd->gab", blocks, last.conj_physical())  # (G, P, Q)
        result += [grad.reshape(run[0].shape), *reversed(grads)]
    return result
