"""Kronecker recurrent weights for torch's own RNNs: shrink an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``, trained or not.

Each gate's N × N block of ``weight_hh`` becomes W_0 ⊗ … ⊗ W_{F-1} with real factors (P_f, Q_f), ∏ P_f = ∏ Q_f = N,
through :mod:`torch.nn.utils.parametrize`. Only the factors are stored and trained; torch's RNN kernels run on the dense
weight, which is rebuilt once a forward in training, and without gradients only where a factor has changed. So the gain
is in parameters, not in time: :func:`to_kru` gives an LSTM or a GRU whose time and memory are those of the factors.
G is the number of gates: 1 (RNN), 3 (GRU), 4 (LSTM).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kronecker import check_shapes, factorings, kron_product, random_orthogonal
from ..scan import can_look_at
from .drop_in import KRUGRU, KRULSTM

GATES = {
    "RNN_TANH": ("hidden",),
    "RNN_RELU": ("hidden",),
    "LSTM": ("input", "forget", "cell", "output"),
    "GRU": ("reset", "update", "new"),
}
ALS_SWEEPS = 200
# Relative gain of the explained norm below which a sweep of the rank-1 fit is the last one.
ALS_GAIN = 1e-9
# Spectral norm of a fresh gate: as much energy as torch's own U(−1/√N, 1/√N), whose entries have variance 1 / (3N).
FRESH_SCALE = 1 / math.sqrt(3)


@dataclass(frozen=True)
class GateFit:
    """What became of one gate: ``relative_error`` is ‖W − ⊗W_f‖_F / ‖W‖_F against the weight replaced."""

    weight: str
    gate: str
    relative_error: float


@dataclass(frozen=True)
class KroneckerizeReport:
    """Result of :func:`kroneckerize`: recurrent parameters of the module before and after; ``print`` shows a table."""

    factor_shapes: tuple[tuple[int, int], ...]
    init: str
    parameters_before: int
    parameters_after: int
    gates: tuple[GateFit, ...]

    @property
    def compression(self) -> float:
        """Recurrent parameters before / after, the same for each gate: 20.0 means twenty times fewer."""
        return self.parameters_before / self.parameters_after

    def __str__(self) -> str:
        shapes = " ⊗ ".join(f"{p}×{q}" for p, q in self.factor_shapes)
        width = max(len(gate.weight) for gate in self.gates)
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} ({self.compression:.1f}x fewer)"
        head = [
            f"{shapes} ({self.init}): recurrent parameters {counts}",
            f"{'weight':<{width}}  gate     relative error",
        ]
        rows = [f"{fit.weight:<{width}}  {fit.gate:<7}  {fit.relative_error:>14.4f}" for fit in self.gates]
        return "\n".join(head + rows)


def nearest_kronecker(weight: Tensor, factor_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Factors (P_f, Q_f) whose Kronecker product is near ``weight`` (∏ P_f, ∏ Q_f) in the Frobenius norm.

    Van Loan's rearrangement turns the problem into the best rank-1 approximation of a tensor with an axis of P_f·Q_f
    for each factor: alternating least squares from the HOSVD. Of two factors that is the SVD of a matrix, the global
    optimum; of three and more a local one, but exact where ``weight`` is a Kronecker product.
    All factors get the same norm. Computed in float64, returned in the dtype of ``weight``.
    """
    count = len(factor_shapes)
    rows, columns = [p for p, _ in factor_shapes], [q for _, q in factor_shapes]
    grid = weight.detach().double().reshape(*rows, *columns)  # (P_0, …, P_{F-1}, Q_0, …, Q_{F-1})
    pairs = [axis for f in range(count) for axis in (f, count + f)]
    tensor = grid.permute(pairs).reshape([p * q for p, q in factor_shapes])  # (P_0·Q_0, …, P_{F-1}·Q_{F-1})
    vectors = _rank_one(tensor)  # [(P_f·Q_f,)]
    norms = [float(torch.linalg.vector_norm(vector)) for vector in vectors]
    scale = math.prod(norms)
    if scale > 0:
        # Equal norms: no factor is much more sensitive to the learning rate than another.
        vectors = [vector * (scale ** (1 / count) / norm) for vector, norm in zip(vectors, norms, strict=True)]
    # A zero weight keeps unit vectors beside the zero: with every factor zero, no gradient would ever reach one.
    shaped = zip(vectors, factor_shapes, strict=True)
    return [vector.reshape(shape).to(weight.dtype) for vector, shape in shaped]  # [(P_f, Q_f)]


def _rank_one(tensor: Tensor) -> list[Tensor]:
    """Vectors, all but one of norm 1, of a locally best rank-1 approximation of ``tensor`` by ALS from the HOSVD."""
    count = tensor.ndim
    # Contiguous once: every sweep then reads them as plain matrix-vector products.
    unfoldings = [tensor.movedim(f, 0).contiguous() for f in range(count)]  # [(P_f·Q_f, the other axes in order)]
    starts = [torch.linalg.svd(x.flatten(1), full_matrices=False).U[:, 0] for x in unfoldings[1:]]  # [(P_f·Q_f,)]
    vectors = [torch.empty(0), *starts]  # the first is solved for before it is read
    explained = -1.0
    for _ in range(ALS_SWEEPS):
        for f in range(count):
            rest = unfoldings[f]  # (P_f·Q_f, the other axes in order)
            for vector in reversed([vectors[g] for g in range(count) if g != f]):
                rest = rest @ vector  # one axis fewer, the last
            norm = float(torch.linalg.vector_norm(rest))
            if norm == 0:
                # Orthogonal to the current fit, as for a zero weight: the best multiple of it is zero.
                vectors[f] = rest  # (P_f·Q_f,)
                return vectors
            vectors[f] = rest / norm  # (P_f·Q_f,)
        if norm - explained <= ALS_GAIN * norm:
            break
        explained = norm
    vectors[-1] = vectors[-1] * norm  # (P_{F-1}·Q_{F-1},)
    return vectors


class KroneckerWeight(nn.Module):
    """Parametrization of a recurrent weight (G·N, N): factors (G, P_f, Q_f), one stack of gates for each f.

    Assigning a dense weight (``module.weight_hh_l0 = dense``) takes the nearest factors, see :func:`nearest_kronecker`;
    while ``fresh``, it takes fresh ones.
    """

    def __init__(self, factor_shapes: Sequence[tuple[int, int]], gates: int, fresh: bool = False) -> None:
        super().__init__()
        self.factor_shapes, self.gates, self.fresh = tuple(factor_shapes), gates, fresh

    def forward(self, *factors: Tensor) -> Tensor:
        """Factors, each (G, P_f, Q_f), to the dense weight (G·N, N)."""
        return kron_product(factors).flatten(0, 1)  # (G·N, N)

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Dense weight (G·N, N) to the nearest factors, each (G, P_f, Q_f)."""
        if self.fresh:
            return [factor.to(weight) for factor in self.start()]
        fits = [nearest_kronecker(gate, self.factor_shapes) for gate in weight.chunk(self.gates)]
        return [torch.stack(gates) for gates in zip(*fits, strict=True)]  # [(G, P_f, Q_f)]

    def start(self) -> list[Tensor]:
        """Haar-orthogonal factors (G, P_f, Q_f), each times the F-th root of ``FRESH_SCALE``."""
        shapes, scale = self.factor_shapes, FRESH_SCALE ** (1 / len(self.factor_shapes))
        return [torch.stack([random_orthogonal(p, q) * scale for _ in range(self.gates)]) for p, q in shapes]

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"gates={self.gates}, factor_shapes={[list(shape) for shape in self.factor_shapes]}"


def plan_target_shapes(state_size: int, gates: int, target_parameters: int) -> list[tuple[int, int]]:
    """Square factors of N = ``state_size`` with the most parameters that ``gates`` blocks of N × N may have in total.

    Raises:
        ValueError: even the prime factors of N need more than ``target_parameters``.
    """

    def cost(sizes: tuple[int, ...]) -> int:
        return gates * sum(size * size for size in sizes)

    choices = factorings(state_size)
    fitting = [sizes for sizes in choices if cost(sizes) <= target_parameters]
    if not fitting:
        smallest = min(choices, key=cost)
        raise ValueError(
            f"target_parameters={target_parameters} is too small: the smallest Kronecker factors of hidden_size"
            f"={state_size} are {'·'.join(map(str, smallest))}, and {gates} blocks of them"
            f" need {cost(smallest)} parameters"
        )
    return [(size, size) for size in max(fitting, key=lambda sizes: (cost(sizes), -len(sizes)))]


def kroneckerize(
    module: nn.RNNBase,
    factor_shapes: Sequence[Sequence[int] | int] | None = None,
    *,
    target_parameters: int | None = None,
    init: Literal["nearest", "fresh"] = "nearest",
) -> tuple[nn.RNNBase, KroneckerizeReport]:
    """Replace, in place, the recurrent weights of an RNN by Kronecker factors: all layers, directions and gates.

    Args:
        module: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` with hidden size N. Input weights and biases stay as they are.
        factor_shapes: (P_f, Q_f) of each factor, or P_f of a square one, the same for every gate; ∏ P_f = ∏ Q_f = N.
            With a non-square factor the rank of a gate is at most ∏ min(P_f, Q_f) < N.
        target_parameters: instead of ``factor_shapes``, the most recurrent parameters that the whole module may keep:
            the square factors that come nearest to it from below. Few sizes exist: N = 512 has 2·256, 4·128, 8·64, ….
        init: "nearest" approximates the present weights in the Frobenius norm. With two factors that is the global
            optimum, by SVD of Van Loan's rearrangement; with three or more a rank-1 tensor fit by alternating least
            squares (ALS) from the HOSVD, a local optimum. "fresh" draws Haar-orthogonal factors with the energy of
            torch's own initialisation, to train from the start.

    Returns:
        The same module and a :class:`KroneckerizeReport`. The factors are new Parameters
        ``parametrizations.weight_hh_l{k}{_reverse}.original{f}`` (G, P_f, Q_f): make the optimizer afterwards. A state
        dict loads into a module kroneckerized with the same shapes. ``copy.deepcopy`` works; pickling the whole module
        does not (no parametrized module can be pickled), save its state dict. On a GPU, cuDNN copies the weights into
        one buffer at each call and may warn once about it: the rebuilt weights cannot live in a buffer for good.

    Raises:
        TypeError: ``module`` is no ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
        ValueError: shapes that do not give N, both or neither of the two sizes, an unknown ``init``, ``proj_size`` > 0,
            a recurrent weight that is parametrized already, is no parameter, or is not finite. The module is then
            unchanged.
    """
    names = _recurrent_names(module)
    gate_names = GATES[module.mode]
    for name in names:
        if parametrize.is_parametrized(module, name):
            raise ValueError(f"{name} is parametrized already; call dekroneckerize (or remove_parametrizations) first")
        if name not in module._parameters:
            raise ValueError(f"{name} is no parameter of the module: remove weight_norm or pruning first")
        if type(module.get_parameter(name)) is not nn.Parameter:
            kind = type(module.get_parameter(name)).__name__
            raise ValueError(f"{name} is a {kind}, no plain parameter: kroneckerize before quantizing or sharding")
        if not torch.isfinite(module.get_parameter(name)).all():
            raise ValueError(f"{name} has entries that are not finite")
    if init not in ("nearest", "fresh"):
        raise ValueError(f"init must be 'nearest' or 'fresh', got {init!r}")
    if (factor_shapes is None) == (target_parameters is None):
        raise ValueError(
            "give either factor_shapes or target_parameters,"
            f" got factor_shapes={factor_shapes}, target_parameters={target_parameters}"
        )
    size = module.hidden_size
    if target_parameters is None:
        shapes = [(p, q) for p, q in check_shapes(factor_shapes or [], size, "hidden_size")]
    else:
        shapes = plan_target_shapes(size, len(names) * len(gate_names), target_parameters)

    fits = []
    for name in names:
        weight = module.get_parameter(name).detach().clone()  # (G·N, N)
        parametrization = KroneckerWeight(shapes, len(gate_names), fresh=init == "fresh")
        parametrize.register_parametrization(module, name, parametrization)
        parametrization.fresh = False
        dense = getattr(module, name).detach()  # (G·N, N)
        pairs = zip(gate_names, weight.chunk(len(gate_names)), dense.chunk(len(gate_names)), strict=True)
        for gate, before, after in pairs:
            error = float(torch.linalg.vector_norm(after.double() - before.double()))
            norm = float(torch.linalg.vector_norm(before.double()))
            fits.append(GateFit(name, gate, error / norm if norm > 0 else (0.0 if error == 0 else math.inf)))
    own_rnn_class(module)
    counts = len(fits) * size * size, len(fits) * sum(p * q for p, q in shapes)
    return module, KroneckerizeReport(tuple(shapes), init, *counts, tuple(fits))


def dekroneckerize(module: nn.RNNBase) -> nn.RNNBase:
    """Undo :func:`kroneckerize` in place: dense parameters ``weight_hh_l*`` with the values of the Kronecker products.

    Outputs stay the same; the weights before the approximation do not come back. The parameters are new: make the
    optimizer afterwards. Returns the same module.

    Raises:
        TypeError: ``module`` is no ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
        ValueError: a recurrent weight is no Kronecker parametrization.
    """
    names, lists = _kroneckerized_names(module), cast(Any, module.parametrizations)
    # A deep copy shares the class that parametrize made, and removal deletes properties from the class: have our own.
    shared = type(module)
    body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
    for name in names:
        trainable = lists[name].original0.requires_grad
        parametrize.remove_parametrizations(module, name)
        dense = getattr(module, name).detach()  # (G·N, N)
        # Frozen weights come back from torch as a buffer: here a parameter again, as before.
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(dense, trainable))
    # Optimizers match their saved state to parameters by position: have torch's own order again.
    for name in module._flat_weights_names:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    module.__dict__.pop("_known", None)
    module._init_flat_weights()
    return module


def to_kru(module: nn.RNNBase) -> KRULSTM | KRUGRU:
    """A :class:`KRULSTM` or :class:`KRUGRU` that computes what a kroneckerized ``nn.LSTM`` or ``nn.GRU`` does.

    It never builds the dense weights: faster from a few hundred units on, in training too, and exported at the size of
    the factors. It has parameters of its own, equal in value; torch's two biases become one, but for the candidate of a
    GRU. Arguments, shapes of inputs and states, dtype, device and what is frozen stay.

    Raises:
        TypeError: ``module`` is no ``nn.LSTM`` or ``nn.GRU``.
        ValueError: a recurrent weight is no Kronecker parametrization.
    """
    if not isinstance(module, (nn.LSTM, nn.GRU)):
        raise TypeError(f"module must be a kroneckerized nn.LSTM or nn.GRU, got {type(module).__name__}")
    names = _kroneckerized_names(module)
    lists: Any = module.parametrizations
    layer = (KRULSTM if isinstance(module, nn.LSTM) else KRUGRU)(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bool(module.bias),
        module.batch_first,
        module.dropout,
        module.bidirectional,
        factor_shapes=lists[names[0]][0].factor_shapes,
        dtype=lists[names[0]].original0.dtype,
        device=lists[names[0]].original0.device,
    )
    for name, map_, cell in zip(names, layer.input_maps, layer.recurrences, strict=True):
        place = name.removeprefix("weight_hh")  # _l0, _l0_reverse, …
        _take(cast(Any, map_).weight, [module.get_parameter(f"weight_ih{place}")])
        for index, factor in enumerate(cast(Any, cell).factors):
            _take(factor, [getattr(lists[name], f"original{index}")])
        if module.bias:
            pair = [module.get_parameter(f"bias_{part}{place}") for part in ("ih", "hh")]  # (G·N,) each
            if isinstance(module, nn.GRU):  # the reset gate multiplies the candidate's recurrent bias
                read, carried = (bias.unflatten(0, (3, -1)) for bias in pair)  # (3, N)
                rows = torch.cat((read[:2] + carried[:2], read[2:], carried[2:]))  # (4, N)
            else:
                rows = pair[0] + pair[1]
            _take(cast(Any, cell).bias, [rows.view(4, -1), *pair])
    return layer.train(module.training)


@torch.no_grad()
def _take(parameter: Tensor, sources: Sequence[Tensor]) -> None:
    """Give a parameter the value of the first source, and train it if any of them is trained."""
    parameter.copy_(sources[0])
    parameter.requires_grad_(any(source.requires_grad for source in sources))


def _kroneckerized_names(module: nn.RNNBase) -> list[str]:
    """Names of the recurrent weights, after a check that all are Kronecker parametrizations."""
    names, lists = _recurrent_names(module), cast(Any, getattr(module, "parametrizations", {}))
    for name in names:
        if name not in lists or not isinstance(lists[name][0], KroneckerWeight):
            raise ValueError(f"{name} is not kroneckerized: the module must be one that kroneckerize returned")
    return names


def _recurrent_names(module: nn.RNNBase) -> list[str]:
    """Names of the recurrent weights, after a check that the module is one of the three that can be factored."""
    if not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        raise TypeError(f"module must be an nn.RNN, nn.LSTM or nn.GRU, got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(f"proj_size={module.proj_size} is not supported: the recurrent weights are not square")
    return [name for name in module._flat_weights_names if name.startswith("weight_hh")]


def _dense_weight(module: nn.RNNBase, name: str) -> Tensor:
    """A recurrent weight (G·N, N): rebuilt where gradients are recorded, else only if a factor has changed.

    Whether one has is seen from its numbers, which are few beside those of the weight: a version is not told of writes
    to ``.data``. On other devices the look would wait for the device.
    """
    group = cast(Any, module.parametrizations)[name]
    factors = list(group.parameters(recurse=False))  # [(G, P_f, Q_f)]
    known: dict[str, tuple[list[Tensor], Tensor]] = module.__dict__.setdefault("_known", {})
    if torch.is_grad_enabled() or len(group) > 1 or not all(f.is_cpu and can_look_at(f) for f in factors):
        known.pop(name, None)
        return getattr(module, name)
    before, dense = known.get(name, ([], factors[0]))
    same = [f.dtype == b.dtype and torch.equal(f, b) for f, b in zip(factors, before, strict=False)]
    if not same or not all(same):
        before, dense = known[name] = [f.detach().clone() for f in factors], getattr(module, name)
    return dense


def own_rnn_class(module: nn.RNNBase) -> None:
    """Let torch's RNN code see the rebuilt weights: the list that its kernels take is otherwise made once and kept.

    The overrides go into the class that parametrize made for this module alone. Flattening into a cuDNN buffer is off:
    it moves the storage of its tensors, which here are results of autograd. ``reset_parameters`` draws factors as
    ``init="fresh"`` does: torch's own would make each of them small, and their product next to nothing.
    """
    cls: Any = type(module)
    torch_forward, ours = cls.forward, frozenset(_recurrent_names(module))

    def build(self: nn.RNNBase) -> list[Tensor | None]:
        names = self._flat_weights_names
        return [_dense_weight(self, name) if name in ours else getattr(self, name, None) for name in names]

    def current(self: nn.RNNBase) -> list[Tensor | None]:
        return self.__dict__.get("_built") or build(self)

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch_forward(self, *args, **kwargs)
        self.__dict__["_built"] = build(self)  # torch asks for the weights several times a call
        try:
            return torch_forward(self, *args, **kwargs)
        finally:
            self.__dict__.pop("_built", None)

    def ignored(self: nn.RNNBase, *_: Any) -> None:
        return None

    @torch.no_grad()
    def reset_parameters(self: Any) -> None:
        bound = self.hidden_size**-0.5
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound)  # maps and biases, as torch draws them
        for group in self.parametrizations.values():
            for factor, start in zip(group.parameters(recurse=False), group[0].start(), strict=True):
                factor.copy_(start)  # (G, P_f, Q_f)

    module.__dict__.pop("_flat_weights", None)
    module._flat_weight_refs = []
    cls._flat_weights = property(current, ignored)
    cls._init_flat_weights = cls._update_flat_weights = cls.flatten_parameters = ignored
    cls.forward, cls.reset_parameters = forward, reset_parameters
