"""CELLS: what tells one recurrent cell from another, in one place. A new cell is one more entry and its functions.

Letters: B samples, C steps of a chunk of time, N units; K planes of the inputs and the factors (the gates of a gated
cell, real and imaginary part of the complex one); M matrices that multiply h_{t-1} (one per gate, or one complex one);
S tensors of the state. Inside the functions a complex cell's tensors are complex, so that one code serves all cells.

Each cell brings four functions:

    step(products, u, b, state) -> state              the cell as its paper writes it. products W h_{t-1} and u = U x_t
                                                      are (M, B, N), b is (rows, 1, N), a state is a tuple of (B, N)
    derivatives(products, u, b, before, after)        of C steps at once: tensors (…, C, B, N), what the next one needs
    step_backward(derivatives of a step, d_state) -> d_u (M, B, N), d_products (M, B, N), and what reaches the state
                                                      before it other than through W (None: nothing)
    bias_gradient(derivatives, d_h, d_u, d_products) -> (rows, N), summed over a chunk: d_h (C, B, N), the others
                                                      (M, C, B, N)

A step that is held (mask) gets a d_state of zero, and has to give zeros for it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("modrelu", "identity")  # of the complex cell
State = tuple[Tensor, ...]
Local = tuple[Tensor, ...]
Gradients = tuple[Tensor, Tensor, tuple[Tensor | None, ...]]


def gate_sums(local: Local, d_h: Tensor, d_u: Tensor, d_products: Tensor) -> Tensor:
    """The gradient of a bias that is added to u, one row per gate."""
    return d_u.sum((1, 2))


class Start(NamedTuple):
    """Where a recurrence starts."""

    norm: float  # spectral norm of each recurrent matrix; of a sum of R terms, each term's is 1/√R of it
    input_scale: float  # standard deviation of U x; of the entries of U where a plain block reads frames
    max_phase: float | None = None  # radians: W has eigenvalues exp(iφ) with |φ| at most this; None: all of them
    identity: bool = False  # W is a multiple of the identity
    fourier: bool = False  # the eigenvalues of W are all N-th roots of unity


# Starts of the complex cell, whose factors are Haar-random unitary matrices or the identity.
STARTS = {
    "random": Start(0.95, 0.1),  # forgets slowly: text and music, where symbols have to be told apart
    "unitary": Start(1.0, 0.1),  # the paper's: forgets nothing, for copy memory and permuted pixels
    # Eigenvalues that turn once in 7 steps or more (Orvieto et al. 2023 bound phases alike): signals that are smooth.
    "slow": Start(1.0, 0.1, max_phase=0.9),
    "identity": Start(1.0, 0.1, identity=True),  # keeps what it reads where it is (Henaff, Szlam & LeCun 2016): sums
    "accumulate": Start(1.0, 0.03, identity=True),  # the same for sums over hundreds of steps
}
# Further ones of the linear cell, by the transition; the second is of what makes R_t as well.
FOURIER, SELECTIVE_START = Start(1.0, 0.1, fourier=True), Start(1.0, 1.0)
# Of gated cells, with orthogonal factors: with a smaller U x, gates start too near to constants.
GATED_START = Start(0.7, 1.0)


@dataclass(frozen=True, eq=False)
class Cell:
    """An entry of CELLS. ``gates`` names the K planes, ``states`` the S tensors of the state."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    bias_rows: int  # 0: the bias is (N,)
    step: Callable[..., State]
    derivatives: Callable[..., Local]
    step_backward: Callable[..., Gradients]
    bias_gradient: Callable[..., Tensor] = gate_sums
    complex: bool = False
    keeps: str | None = None  # the gate that keeps the state, whose bias says for how long
    fills: str | None = None  # the gate that starts opposite to it
    keep_bias: float = 0.0  # where the bias of ``keeps`` starts
    starts: dict[str, Start] = field(default_factory=lambda: {"random": GATED_START})  # where the recurrence may start

    @property
    def type(self) -> str:
        """The name by which a config's ``cell_type`` knows the cell."""
        return "kru" if self.name == "kru" else f"kru_{self.name}"

    @property
    def planes(self) -> int:
        """K: first axis of a factor (K, P, Q), third of the inputs (B, T, K, N)."""
        return len(self.gates)

    @property
    def feature_planes(self) -> int:
        """Width of the features h_t in multiples of N: both parts of a complex number, or one."""
        return 2 if self.complex else 1

    @property
    def matrices(self) -> int:
        """M: matrices that multiply h_{t-1}."""
        return 1 if self.complex else self.planes

    @property
    def kept(self) -> int:
        """Tensors of the state beside h: what ``states`` (B, T, …) does not hold."""
        return 0 if self.complex else len(self.states) - 1

    def bias_shape(self, units: int) -> tuple[int, ...]:
        """(N,), or (rows, N)."""
        return (self.bias_rows, units) if self.bias_rows else (units,)

    def states_shape(self, inputs_shape: Any) -> tuple[int, ...]:
        """Of h_t over time, for inputs (B, T, K, N): (B, T, 2, N) if complex, else (B, T, N)."""
        batch, length, _, units = inputs_shape
        return (batch, length, 2, units) if self.complex else (batch, length, units)

    def to_matrices(self, planes: Tensor) -> Tensor:
        """(K, …) to (M, …)."""
        return torch.complex(planes[0], planes[1]).unsqueeze(0) if self.complex else planes

    def to_planes(self, values: Tensor) -> Tensor:
        """(M, …) to (K, …)."""
        return torch.stack((values[0].real, values[0].imag)) if self.complex else values

    def to_state(self, tensor: Tensor) -> State:
        """(…, S, N) to tensors (…, N)."""
        return (torch.complex(tensor[..., 0, :], tensor[..., 1, :]),) if self.complex else tensor.unbind(-2)

    def from_state(self, state: State) -> Tensor:
        """Tensors (…, N) to (…, S, N)."""
        return torch.stack((state[0].real, state[0].imag) if self.complex else state, -2)


# The paper's complex cell: z_t = W h_{t-1} + U x_t, h_t = σ(z_t) with σ = modReLU (Arjovsky et al. 2016, eq. 8).
def _idle(zero: Tensor, modulus: Tensor, b: Tensor) -> Tensor:
    """Where modReLU is zero, given where z = 0, |z| (…, N) and b (N,). False for what is not a number."""
    return torch.where(zero, b < math.inf, modulus + b <= 0)  # (…, N)


def modrelu(z: Tensor, b: Tensor) -> Tensor:
    """σ(z) = z · max(|z| + b, 0) / |z|, σ(0) = 0; gradient 0 at z = 0 and where |z| + b ≤ 0. Complex z (…, N), b (N,).

    Non-expansive for b ≤ 0.
    """
    zero = z == 0  # (…, N)
    modulus = torch.hypot(z.real.where(~zero, 1), z.imag)  # (…, N): right where |z|² is beyond the dtype, either way
    idle = _idle(zero, modulus, b)  # (…, N)
    # The inner wheres keep the gradients finite where the outer one selects the zero. z/|z| is NaN for an infinite |z|.
    size, lost = modulus.where(~idle, 1), 0 * modulus  # (…, N)
    b = b.where(~idle, 0)
    # By parts: a complex product of an infinite b would mix them.
    return torch.where(idle, 0, torch.complex(z.real + b * (z.real / size + lost), z.imag + b * (z.imag / size + lost)))


def kru_step(products: Tensor, u: Tensor, b: Tensor | None, state: State) -> State:
    z = products[0] + u[0]
    return (z + 0 * z if b is None else modrelu(z, b[0]),)  # without b: the linear network, σ = identity


def kru_derivatives(products: Tensor, u: Tensor, b: Tensor | None, before: State, after: State) -> Local:
    if b is None:
        return ()
    z = products[0] + u[0]  # (C, B, N): recomputed, never recovered from |h|; right for b > 0 too
    modulus = z.abs()
    idle = _idle(modulus == 0, modulus, b[0])
    modulus = modulus.where(modulus != 0, 1)  # z/|z| is 0 at 0
    unit = torch.where(idle, 0, z / modulus + 0 * modulus)  # NaN for an infinite |z|
    ratio = torch.where(idle, 0, b[0] / modulus)
    return unit, ratio, idle


def _radial(unit: Tensor, d: Tensor) -> Tensor:
    return unit.real * d.real + unit.imag * d.imag


def kru_step_backward(local: Local, d_state: State) -> Gradients:
    d = d_state[0]  # (B, N)
    if local:
        # h = z + b·z/|z|: the radial part of the gradient passes as it is, the tangential one times 1 + b/|z|.
        unit, ratio, idle = local
        d = torch.where(idle, 0, d + ratio * (d - unit * _radial(unit, d)))
    d = d.unsqueeze(0)
    return d, d, (None,)


def kru_bias_gradient(local: Local, d_h: Tensor, d_u: Tensor, d_products: Tensor) -> Tensor:
    if not local:
        return d_u.real.new_zeros(1, d_u.shape[-1])
    unit, _, idle = local
    return torch.where(idle, 0, _radial(unit, d_h)).sum((0, 1)).unsqueeze(0)


def _counted(products: Tensor) -> Tensor:
    """W h of a gated cell, an infinity as NaN. An infinite u or b closes or opens a gate."""
    return torch.add(products, products, alpha=0)


# LSTM, gates i f g o (Hochreiter & Schmidhuber 1997; Gers et al. 2000):
# a = W h_{t-1} + u_t + b,  c_t = σ(a_f) c_{t-1} + σ(a_i) tanh(a_g),  h_t = σ(a_o) tanh(c_t)
def _lstm_gates(products: Tensor, u: Tensor, b: Tensor) -> State:
    a = _counted(products) + u + b
    return a[0].sigmoid(), a[1].sigmoid(), a[2].tanh(), a[3].sigmoid()


def lstm_step(products: Tensor, u: Tensor, b: Tensor, state: State) -> State:
    i, f, g, o = _lstm_gates(products, u, b)
    c = f * state[1] + i * g
    return o * c.tanh(), c


def _lstm_local(gates: Sequence[Tensor], before: Tensor, c: Tensor) -> Local:
    """c_t by a_i, a_f, a_g, (3, C, B, N); h_t by a_o and by c_t; c_t by the c_{t-1} ``before`` it."""
    (i, f, g, o), shown = gates, c.tanh()
    of_c = torch.stack((g * i * (1 - i), before * f * (1 - f), i * (1 - g.square())))
    return of_c, shown * o * (1 - o), o * (1 - shown.square()), f


def lstm_derivatives(products: Tensor, u: Tensor, b: Tensor, before: State, after: State) -> Local:
    return _lstm_local(_lstm_gates(products, u, b), before[1], after[1])


def lstm_step_backward(local: Local, d_state: State) -> Gradients:
    of_c, by_o, by_c, kept, *_ = local
    dh, dc = d_state
    dc = dc + dh * by_c
    d = torch.cat((dc * of_c, (dh * by_o).unsqueeze(0)))
    return d, d, (None, dc * kept)


# GRU, gates r z n (Cho et al. 2014, with the reset inside as in torch); b_3 = b'_n is the candidate's recurrent bias:
# n = tanh(u_n + b_n + r (W_n h_{t-1} + b'_n)),  h_t = (1 − z) n + z h_{t-1}
def _gru_gates(products: Tensor, u: Tensor, b: Tensor) -> State:
    products = _counted(products)
    r = (products[0] + u[0] + b[0]).sigmoid()
    z = (products[1] + u[1] + b[1]).sigmoid()
    inner = products[2] + b[3]
    return r, z, (u[2] + b[2] + r * inner).tanh(), inner


def gru_step(products: Tensor, u: Tensor, b: Tensor, state: State) -> State:
    _, z, n, _ = _gru_gates(products, u, b)
    return ((1 - z) * n + z * state[0],)


def gru_derivatives(products: Tensor, u: Tensor, b: Tensor, before: State, after: State) -> Local:
    r, z, n, inner = _gru_gates(products, u, b)
    by_n = (1 - z) * (1 - n.square())
    by_u = torch.stack((by_n * inner * r * (1 - r), (before[0] - n) * z * (1 - z), by_n))  # (3, C, B, N)
    return by_u, r, z


def gru_step_backward(local: Local, d_state: State) -> Gradients:
    by_u, r, z = local
    d_u = d_state[0] * by_u
    return d_u, torch.cat((d_u[:2], (d_u[2] * r).unsqueeze(0))), (d_state[0] * z,)


def gru_bias_gradient(local: Local, d_h: Tensor, d_u: Tensor, d_products: Tensor) -> Tensor:
    return torch.cat((d_u, d_products[2:])).sum((1, 2))


# JANET, gates f g: the LSTM with only a forget gate (van der Westhuizen & Lasenby 2018) with their β = 1:
# a = W h_{t-1} + u_t + b,  h_t = σ(a_f) h_{t-1} + (1 − σ(a_f − 1)) tanh(a_g)
def _janet_gates(products: Tensor, u: Tensor, b: Tensor) -> State:
    a = _counted(products) + u + b
    # 1 − σ(a_f − 1) = σ(1 − a_f), without the digits that the difference loses
    return a[0].sigmoid(), (1 - a[0]).sigmoid(), a[1].tanh()


def janet_step(products: Tensor, u: Tensor, b: Tensor, state: State) -> State:
    f, opened, g = _janet_gates(products, u, b)
    return (f * state[0] + opened * g,)


def janet_derivatives(products: Tensor, u: Tensor, b: Tensor, before: State, after: State) -> Local:
    f, opened, g = _janet_gates(products, u, b)
    by_f = before[0] * f * (1 - f) - g * opened * (1 - opened)
    return torch.stack((by_f, opened * (1 - g.square()))), f  # (2, C, B, N), (C, B, N)


def janet_step_backward(local: Local, d_state: State) -> Gradients:
    by_a, f = local
    d = d_state[0] * by_a
    return d, d, (d_state[0] * f,)


# LSTM with peepholes (Gers & Schmidhuber 2000): gates i f g o that see the cell through p = b_4, b_5, b_6, (N,) each:
# i = σ(a_i + p_i c_{t-1}),  f = σ(a_f + p_f c_{t-1}),  c_t = f c_{t-1} + i tanh(a_g),  h_t = σ(a_o + p_o c_t) tanh(c_t)
def _peephole_gates(products: Tensor, u: Tensor, b: Tensor, c: Tensor) -> State:
    a = _counted(products) + u + b[:4]
    i, f, g = (a[0] + b[4] * c).sigmoid(), (a[1] + b[5] * c).sigmoid(), a[2].tanh()
    new = f * c + i * g
    return i, f, g, (a[3] + b[6] * new).sigmoid(), new


def peephole_step(products: Tensor, u: Tensor, b: Tensor, state: State) -> State:
    _, _, _, o, c = _peephole_gates(products, u, b, state[1])
    return o * c.tanh(), c


def peephole_derivatives(products: Tensor, u: Tensor, b: Tensor, before: State, after: State) -> Local:
    *gates, c = _peephole_gates(products, u, b, before[1])
    of_c, by_o, by_c, f = _lstm_local(gates, before[1], c)
    return of_c, by_o, by_c + by_o * b[6], f + of_c[0] * b[4] + of_c[1] * b[5], before[1], c


def peephole_bias_gradient(local: Local, d_h: Tensor, d_u: Tensor, d_products: Tensor) -> Tensor:
    before, after = local[4:]
    return torch.cat((d_u, torch.stack((d_u[0] * before, d_u[1] * before, d_u[3] * after)))).sum((1, 2))


_ENTRIES = (
    Cell(
        "kru", ("re", "im"), ("re", "im"), 0,
        kru_step, kru_derivatives, kru_step_backward, kru_bias_gradient,
        complex=True, starts=STARTS,
    ),
    Cell(
        "lstm", ("i", "f", "g", "o"), ("h", "c"), 4,
        lstm_step, lstm_derivatives, lstm_step_backward,
        keeps="f", fills="i", keep_bias=1.0,
    ),
    Cell(
        "gru", ("r", "z", "n"), ("h",), 4,
        gru_step, gru_derivatives, gru_step_backward, gru_bias_gradient,
        keeps="z",
    ),
    Cell(
        "janet", ("f", "g"), ("h",), 2,
        janet_step, janet_derivatives, janet_step_backward,
        keeps="f", keep_bias=1.0,
    ),
    Cell(
        "peephole", ("i", "f", "g", "o"), ("h", "c"), 7,
        peephole_step, peephole_derivatives, lstm_step_backward, peephole_bias_gradient,
        keeps="f", fills="i", keep_bias=1.0,
    ),
)  # fmt: skip
CELLS = {cell.name: cell for cell in _ENTRIES}
# h_t = d_t R_t h_{t-1} + U x_t, which has a scan of its own: kron_linear_scan.
LINEAR = replace(_ENTRIES[0], name="linear", starts={**STARTS, "fourier": FOURIER})
BY_TYPE = {cell.type: cell for cell in (*_ENTRIES, LINEAR)}
TRANSITIONS = ("fixed", "selective")  # of the linear cell


class SelectiveWidths(NamedTuple):
    """Reals that the linear cell reads in a step, with H heads of F factors each."""

    inputs: int  # U x_t, both planes
    generators: int  # P_f² for each factor, from which R_f is made
    gates: int  # one for each factor
    decay: int  # one for each head, or none


def selective_widths(shapes: Any, heads: int, decay: bool) -> SelectiveWidths:
    """What the linear cell reads in a step where its transitions follow the input."""
    sizes = [p for p, _ in shapes]
    return SelectiveWidths(
        2 * heads * math.prod(sizes), heads * sum(p * p for p in sizes), heads * len(sizes), heads * decay
    )


def check_chrono(name: str, max_length: int) -> None:
    """Raise `ValueError` unless [1, T_max − 1] is an interval."""
    if max_length < 3:
        raise ValueError(f"{name} must be None or at least 3 steps, got {max_length}")


def gate_bias(
    cell: Cell, size: int, max_length: int | None, keep_bias: float | None = None, rows: int | None = None
) -> Tensor:
    """Where the biases (rows, N) of a gated cell start; ``rows`` for torch's own layers, which have one per gate.

    The bias of the gate that keeps the state is log u with u ~ U[1, T_max − 1], so that σ(log u) = u / (1 + u) keeps
    what a unit holds for about 1 + u steps, and an LSTM's input gate starts at −log u: the chrono initialisation of
    Tallec & Ollivier, "Can recurrent neural networks warp time?" (ICLR 2018), equation 16. Without ``max_length``,
    T_max in steps, that bias is ``keep_bias``, by default the cell's own. All others are zero.
    """
    bias = torch.zeros(rows or cell.bias_rows, size)
    if cell.keeps is not None:
        keeps = bias[cell.gates.index(cell.keeps)]  # (N,), a view
        if max_length is None:
            keeps.fill_(cell.keep_bias if keep_bias is None else keep_bias)
        else:
            keeps.uniform_(1, max_length - 1).log_()
            if cell.fills is not None:
                bias[cell.gates.index(cell.fills)] = -keeps
    return bias


def check_start(name: str, value: str, cell: Cell, shapes: Any, terms: int) -> None:
    """Raise `ValueError` unless a recurrence of these factors and so many terms can start there."""
    if value not in cell.starts:
        raise ValueError(f"{name} of the cell {cell.name!r} must be one of {', '.join(cell.starts)}, got {value!r}")
    start = cell.starts[value]
    if start.identity and terms > 1:
        raise ValueError(f"{name} {value!r} makes all terms alike: there must be 1, got {terms}")
    if (start.max_phase is not None or start.fourier) and any(p != q for p, q in shapes):
        raise ValueError(f"{name} {value!r} needs square factors, got {list(map(list, shapes))}")


def check_linear(shapes: Any, transition: str, init: str) -> None:
    """Raise `ValueError` unless the linear cell can have these factors, transitions and start."""
    if transition not in TRANSITIONS:
        raise ValueError(f"transition must be one of {', '.join(TRANSITIONS)}, got {transition!r}")
    if any(p != q for p, q in shapes):
        raise ValueError(f"factor_shapes of the cell 'linear' must be square, got {list(map(list, shapes))}")
    if transition == "selective" and init != "random":
        raise ValueError(f"recurrent_init of selective transitions must be 'random', got {init!r}")
    check_start("recurrent_init", init, LINEAR, shapes, 1)
