"""``--format torch`` and ``--format onnx``: a model in stock operators alone, with its state as an input and an output.

What is written loads where ``kru_hf`` is not installed. Two programs: ``step`` reads one token or frame of each row,
``sequence`` reads T of them, its loop over time a Scan (``torch.ops.higher_order.scan``). Weights stay factored. The
state of a model starts at zeros, also where the linear cell has learned a first one: it is counted from there.

Letters as in ``cells``; L layers, E and D widths of an embedding and of the hidden states, W width of a frame.
"""

from __future__ import annotations  # torch.export is a second to import: only what uses it does

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cells import Cell
from ..frame_heads import OCTAVE, WINDOW, KeyChain
from ..kronecker import apply_order
from ..layers.drop_in import _KroneckerLayer as KroneckerLayer
from ..maps import KroneckerLinear
from ..modeling_kru import KRUPreTrainedModel
from ..recurrence import KRUBidirectional, KRULinearRecurrence, KRURecurrence

HEADS = {"KRUForCausalLM": "lm_head", "KRUForPianoRoll": "key_head"}  # of the other heads: score
# Sizes while tracing of what is free in the result: like no other size of a model, which would be taken for the same.
TRACED: dict[Any, int] = {"batch": 61, "length": 67}
DTYPES = {"input_ids": torch.long}  # of the other inputs: float32
LIBRARIES = ("onnx", "onnxscript")
OPSET = 20
SUFFIXES = {"torch": "pt2", "onnx": "onnx"}
State = tuple[Tensor, ...]
Step = Callable[[State, Tensor], tuple[State, Tensor]]
Shape = tuple[int | str, ...]


class Program(NamedTuple):
    """A module to export, and the names of its inputs and outputs with their shapes, where "batch" is any number."""

    name: str
    module: nn.Module
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs to trace the module with."""
        shapes = {name: [TRACED.get(size, size) for size in shape] for name, shape in self.inputs.items()}
        return tuple(torch.zeros(shape, dtype=DTYPES.get(name)) for name, shape in shapes.items())  # type: ignore

    def free_axes(self) -> list[dict[int, str]]:
        """Of each input, the names of its axes that are free."""
        return [{i: size for i, size in enumerate(shape) if isinstance(size, str)} for shape in self.inputs.values()]

    def __str__(self) -> str:
        """inputs -> outputs, each with its shape."""
        sides = [
            ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in side.items())
            for side in (self.inputs, self.outputs)
        ]
        return " -> ".join(sides)


def apply_map(module: nn.Module, x: Tensor) -> Tensor:
    """A map on x (…, in), a sum of Kronecker products term by term: (…, out). W = Σ_i A_i ⊗ B_i is never built."""
    if not isinstance(module, KroneckerLinear):
        return F.linear(x, cast(Tensor, module.weight), cast(Tensor | None, module.bias))
    n = module.terms
    mixing = module.mixing.transpose(0, 1).flatten(0, 1)  # (n·n, n): row a·n + i
    blocks = module.blocks.mT.flatten(0, 1)  # (n·in/n, out/n)
    mixed = (mixing @ x.unflatten(-1, (n, -1))).flatten(-2).unflatten(-1, (n, -1))  # (…, n, n·in/n)
    return (mixed @ blocks).flatten(-2)  # (…, out)


def rms_norm(x: Tensor, epsilon: float, weight: Tensor | None = None) -> Tensor:
    """x (…, D) over the root of its mean square, times a weight (D,)."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)  # (…, D)
    return y if weight is None else y * weight


def plan_stages(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Of each factor (P_f, Q_f), in the order in which they are applied: f, P_f, Q_f and the size of what is right."""
    sizes, stages = [q for _, q in shapes], []
    for index in apply_order(shapes):
        stages.append((index, *shapes[index], math.prod(sizes[index + 1 :])))
        sizes[index] = shapes[index][0]
    return stages


def multiply(
    groups: Sequence[Sequence[Tensor]], stages: Sequence[tuple[int, int, int, int]], x: Tensor, turn: Tensor
) -> Tensor:
    """(⊗_f W_f) x for each of G matrices, factor by factor, in real arithmetic.

    Args:
        groups: of each factor its matrices (G, P_f, Q_f): one, or the real and the imaginary part. stages: of
            :func:`plan_stages`. x: (B, N), or planes (2, B, N). turn: (-1, 1) as (2, 1, 1), for the product with i.

    Returns:
        (G, B, N), or (G, 2, B, N).
    """
    lead, units = x.shape[:-2], x.shape[-1]
    x = x.unsqueeze(0)  # (1 or G, (2,) B, N)
    for index, p, q, right in stages:
        x = x.reshape(len(x), -1, q) if right == 1 else x.reshape(len(x), -1, q, right)  # (G, (2·)B·L, Q, R)
        parts = [x @ w.mT if right == 1 else w.unsqueeze(1) @ x for w in groups[index]]  # (G, (2·)B·L, P, R)
        x = parts[0]
        if len(parts) > 1:
            real, imaginary = (part.reshape(len(x), 2, -1, p * right) for part in parts)  # (G, 2, B·L, P·R)
            x = real + imaginary.flip(1) * turn
    return x.reshape(len(x), *lead, -1, units)


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    """σ(z) = z · max(|z| + b, 0) / |z|, σ(0) = 0, of planes z (2, B, N) and b (N,)."""
    modulus = z.square().sum(0).sqrt()  # (B, N)
    return z * (F.relu(modulus + bias) / modulus.clamp(min=torch.finfo(z.dtype).tiny))


def stepper(cell: KRURecurrence) -> Step:
    """The function of a step: state and U x_t (K, B, N) to the next state and h_t, a copy.

    The state and h_t are one tensor of planes (2, B, N) of the complex cell; S tensors (B, N) and h_t of a gated one.
    """
    entry, terms = cell.cell, cell.terms
    stacked = [factor if terms > 1 else factor.unsqueeze(0) for factor in cell.factors]  # (R, K, P, Q)
    # (R or R·K, P, Q); no part is a view of another, which the scan refuses.
    groups = [[part.clone() for part in f.unbind(1)] if entry.complex else [f.flatten(0, 1).clone()] for f in stacked]
    stages, bias = plan_stages(cell.factor_shapes), cell.bias
    turn = torch.tensor([-1.0, 1.0]).view(2, 1, 1)

    def step(state: State, u: Tensor) -> tuple[State, Tensor]:
        products = multiply(groups, stages, state[0], turn)  # (R, 2, B, N) or (R·K, B, N)
        if entry.complex:
            z = products.sum(0) + u  # (2, B, N)
            state = (modrelu(z, bias) if cell.activation == "modrelu" else z + 0,)
        else:
            products = products.unflatten(0, (terms, -1)).sum(0) if terms > 1 else products  # (K, B, N)
            state = entry.step(products, u, bias.unsqueeze(1), state)
        return state, state[0].clone()

    return step


def unitary_exp(x: Tensor, identity: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """``kronecker.unitary_exp`` in real arithmetic: x (…, P²) to the planes of a unitary matrix, (…, P, P) each.

    A complex matrix is [[Re, -Im], [Im, Re]]. identity: (2·P, 2·P). upper, lower: ones (P, P) off the diagonal.
    """
    size = len(upper)
    square = x.unflatten(-1, (size, size)) / math.sqrt(2 * size)
    above, below = square * upper, square * lower
    real = above + above.mT + math.sqrt(2) * square * identity[:size, :size]
    imaginary = below - below.mT
    rows = torch.cat((-imaginary, -real), -1), torch.cat((real, -imaginary), -1)  # of i times the generator
    x1 = torch.cat(rows, -2) / 16  # (…, 2·P, 2·P)
    x2 = x1 @ x1
    matrix = identity + x1 + x2 / 2 + (x2 @ x1) @ (identity / 6 + x1 / 24 + x2 / 120 + (x2 @ x1) / 720)
    for _ in range(4):
        matrix = matrix @ matrix
    matrix = matrix @ (1.5 * identity - 0.5 * matrix.mT @ matrix)
    return matrix[..., :size, :size], matrix[..., size:, :size]


def linear_stepper(cell: KRULinearRecurrence) -> Step:
    """As :func:`stepper`: U x_t (2, B, N), or (W, B, 1) of selective transitions; the state is planes (2, B, N)."""
    heads, sizes, widths = cell.heads, [p for p, _ in cell.factor_shapes], list(cell.widths)
    units, selective = math.prod(sizes), cell.selective
    fixed = [[part.clone() for part in factor.unbind(1)] for factor in cell.factors]  # (H, P, P) each
    masks = [(torch.eye(2 * p), torch.ones(p, p).triu(1), torch.ones(p, p).tril(-1)) for p in sizes]
    rights = [math.prod(sizes[f + 1 :]) for f in range(len(sizes))]
    turn, decay = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1, 1), cell.decay

    def step(state: State, u: Tensor) -> tuple[State, Tensor]:
        matrices, kept = fixed, None if decay is None else decay.sigmoid().unsqueeze(-1)  # (H, 1)
        if selective:
            read, generators, gates, raw = u.squeeze(-1).mT.split(widths, -1)  # (B, ·)
            opened = 2 * gates.unflatten(-1, (heads, -1)).sigmoid()  # (B, H, F)
            parts = generators.unflatten(-1, (heads, -1)).split([p * p for p in sizes], -1)  # (B, H, P²)
            matrices = [list(unitary_exp(opened[..., f, None] * x, *masks[f])) for f, x in enumerate(parts)]
            kept = None if decay is None else (decay + raw).sigmoid().unsqueeze(-1)  # (B, H, 1)
            u = read.unflatten(-1, (2, -1)).transpose(0, 1)  # (2, B, N)
        x = state[0]  # (2, B, N)
        for size, right, pair in zip(sizes, rights, matrices, strict=True):
            x = x.reshape(2, -1, heads, units // (size * right), size, right)  # (2, B, H, L, P, R)
            real, imaginary = (part.unsqueeze(-3) @ x for part in pair)
            x = real + imaginary.flip(0) * turn
        x = x.reshape(2, -1, heads, units)  # (2, B, H, N / H)
        new = (x if kept is None else kept * x).flatten(2) + u  # (2, B, N)
        return (new,), new.clone()

    return step


def to_state(planes: Tensor, cell: Cell) -> State:
    """(B, S, N) to what a step takes, none of it a view."""
    parts = (planes.transpose(0, 1),) if cell.complex else planes.unbind(1)  # (2, B, N), or S times (B, N)
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def from_state(state: State, cell: Cell) -> Tensor:
    """What a step gives to (B, S, N)."""
    return state[0].transpose(0, 1) if cell.complex else torch.stack(state, 1)


def run_cell(cell: Any, inputs: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """U x (B, T, K, N), or (B, K, N) of one step, and state (B, S, N): features (B, T, ·N) or (B, ·N), new state."""
    from torch._higher_order_ops.scan import scan

    step = linear_stepper(cell) if isinstance(cell, KRULinearRecurrence) else stepper(cell)
    state = to_state(planes, cell.cell)
    if inputs.dim() == 3:
        state, h = step(state, inputs.transpose(0, 1))  # (2, B, N) or (B, N)
        features = h.transpose(0, 1).flatten(1) if cell.cell.complex else h
    else:
        u = inputs.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)  # (T, K, B, N)
        state, h = scan(step, state, u)  # (T, 2, B, N) or (T, B, N)
        features = h.permute(2, 0, 1, 3).flatten(2) if cell.cell.complex else h.transpose(0, 1)
    return features, from_state(state, cell.cell)


def run_recurrence(module: Any, inputs: Tensor, planes: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`run_cell`, the state counted from a learned first one; or both directions, which start there."""
    if not isinstance(module, KRUBidirectional):
        first = getattr(module, "first_state", None)
        if planes is None:
            planes = inputs.new_zeros(inputs.shape[0], module.state_planes, module.state_size)  # (B, S, N)
        features, after = run_cell(module, inputs, planes if first is None else planes + first)
        return features, after if first is None else after - first
    ahead, behind = inputs.chunk(2, 2)  # (B, T, K, N) each
    features, after = run_recurrence(module.forward_cell, ahead, None)  # (B, T, ·N)
    others, _ = run_recurrence(module.reverse_cell, behind.flip(1), None)  # (B, T, ·N), from the end
    return torch.cat((features, others.flip(1)), -1), after


class StandardModel(nn.Module):
    """A model's forward pass in stock operators: of one step, or of a sequence.

    Raises:
        ValueError: one step of a bidirectional model, which reads the whole sequence.
    """

    def __init__(self, model: KRUPreTrainedModel, whole: bool) -> None:
        super().__init__()
        # What tracing sees must hold nothing that asks for a gradient: the scan would keep states for it.
        model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.config: Any = model.config
        if self.config.bidirectional and not whole:
            raise ValueError("a model that is run step by step must have bidirectional = False, got True")
        self.kind, self.whole, self.body = type(model).__name__, whole, cast(Any, model).model
        self.head = getattr(model, HEADS.get(self.kind, "score"))
        self.chain = getattr(model, "chain", None)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens (B, T) or frames (B, T, W), or (B,) or (B, W) of one step; state (B, L, S, N), zeros at the start.

        Returns:
            logits (B, T, ·) or (B, ·), (B, ·) of a sequence's classes; of a chain its context; the state.
        """
        body = self.body
        hidden = F.embedding(inputs, body.embed_tokens.weight) if body.input_map is None else body.input_map(inputs)
        states = []
        for index, layer in enumerate(body.layers):
            hidden, after = self.layer(layer, hidden, None if state is None else state[:, index])
            states.append(after)
        if body.norm is not None:
            hidden = rms_norm(hidden, self.config.layer_norm_epsilon, body.norm.weight)  # (B, T, D)
        if self.kind == "KRUForSequenceClassification" and self.whole:
            hidden = self.ends(hidden)  # (B, D)
        plain = self.config.block_type == "plain"  # which gives states as they are
        outputs = self.read(hidden, self.head) if plain else apply_map(self.head, hidden)  # (B, T, ·)
        found = self.keys(outputs, inputs) if self.chain is not None else (outputs,)
        return found if state is None else (*found, torch.stack(states, 1))

    def read(self, features: Tensor, module: nn.Module) -> Tensor:
        """A map of states, normalised where the config says so."""
        config = self.config
        return apply_map(module, rms_norm(features, config.layer_norm_epsilon) if config.readout_norm else features)

    def layer(self, layer: Any, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden (B, T, ·), state (B, S, N): the same of the next layer, and the state after it."""
        cell, axes = layer.recurrence, layer.recurrence.input_shape
        if self.config.block_type == "plain":
            return run_recurrence(cell, hidden.unflatten(-1, axes), state)
        x = rms_norm(hidden, layer.epsilon, layer.norm.weight)  # (B, T, D)
        x = x if layer.down is None else apply_map(layer.down, x)  # (B, T, r)
        features, after = run_recurrence(cell, apply_map(layer.in_proj, x).unflatten(-1, axes), state)  # (B, T, ·N)
        x = self.read(features, layer.out_proj)  # (B, T, r)
        hidden = hidden + (x if layer.up is None else apply_map(layer.up, x))  # (B, T, D)
        if (inner := layer.feed_forward) is not None:
            x = rms_norm(hidden, layer.epsilon, inner.norm.weight)
            gate, up = apply_map(inner.gate_up_proj, x).chunk(2, -1)  # (B, T, I) each
            hidden = hidden + apply_map(inner.down_proj, F.silu(gate) * up)  # (B, T, D)
        return hidden, after

    def ends(self, features: Tensor) -> Tensor:
        """What a sequence's classes are read from, as ``KRUForSequenceClassification.pool``: (B, T, D) to (B, ·)."""
        last, first = features[:, -1], features[:, 0]  # (B, D)
        if not self.config.bidirectional:
            return last
        if self.head.in_features == features.shape[-1]:  # the directions lie side by side
            last, first = last.chunk(2, -1)[0], first.chunk(2, -1)[1]  # (B, D/2) each
        return torch.cat((last, first), 1)  # (B, D) or (B, 2·D)

    def keys(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, W + H), frames (B, T, W): logits (B, T, W) of each next frame, and what it is drawn from.

        The keys of a frame are given its lower keys. No frame follows the last, whose keys are given silent ones.
        """
        chain = cast(KeyChain, self.chain)
        features = features + apply_map(chain.before, frames)  # (B, T, W + H)
        own, hidden = features.split((chain.width, chain.size), -1)  # (B, T, W), (B, T, H)
        context = torch.cat((features, frames), -1)  # (B, T, W + H + W)
        if not self.whole:
            logits = own + apply_map(chain.keys, F.relu(hidden))  # (B, W)
            return logits + seen_near(chain, hidden, frames, torch.zeros_like(frames)), context
        after = torch.cat((frames, torch.zeros_like(frames[:, :1])), 1)[:, 1:]  # (B, T, W)
        added = after.unsqueeze(-1) * chain.lower.weight.mT  # (B, T, W, H)
        below = hidden.unsqueeze(-2) + added.cumsum(-2) - added  # (B, T, W, H): what lies below each key
        logits = own + (F.relu(below) * chain.keys.weight).sum(-1)  # (B, T, W)
        return logits + seen_near(chain, hidden, frames, after), context


def seen_near(chain: KeyChain, hidden: Tensor, before: Tensor, frame: Tensor) -> Tensor:
    """``KeyWindows`` as two convolutions over the keys: hidden (…, H), before and frame (…, W) to (…, W)."""
    around, below = chain.windows.near.mT.unsqueeze(2).unbind(0)  # (C, 1, WINDOW) each
    width, lead = chain.width, before.shape[:-1]
    units = F.conv1d(before.reshape(-1, 1, width), around, padding=OCTAVE)  # (M, C, W)
    lower = F.pad(frame.reshape(-1, 1, width), (WINDOW, 0))[..., :-1]  # (M, 1, W + WINDOW - 1)
    units = units + F.conv1d(lower, below) + chain.windows.context(F.relu(hidden)).reshape(-1, len(around), 1)
    return (chain.windows.out.weight @ F.relu(units)).reshape(*lead, width)


class ChainKeys(nn.Module):
    """A frame's logits from its context, were the keys of ``lower`` those that sound below each key."""

    def __init__(self, chain: KeyChain) -> None:
        super().__init__()
        self.chain = copy.deepcopy(chain).float().eval().requires_grad_(False)

    def forward(self, context: Tensor, lower: Tensor) -> tuple[Tensor]:
        """context (B, W + H + W), lower (B, W) of zeros and ones: logits (B, W)."""
        own, hidden, before = context.split((self.chain.width, self.chain.size, self.chain.width), -1)
        return (own + self.chain(hidden, lower) + seen_near(self.chain, hidden, before, lower),)


class StandardLayer(nn.Module):
    """A layer in place of torch's, ``KRULSTM`` and its like, in stock operators; arguments and results as torch's."""

    def __init__(self, layer: KroneckerLayer) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).float().eval().requires_grad_(False)

    def forward(self, input: Tensor, h_0: Tensor, c_0: Tensor | None = None) -> tuple[Tensor, ...]:
        """input (T, B, ·), or (B, T, ·) with batch_first; h_0 (and c_0) (L·directions, B, ·N): the same afterwards."""
        layer, finals, state = self.layer, [], [h_0] if c_0 is None else [h_0, c_0]
        x = input if layer.batch_first else input.transpose(0, 1)  # (B, T, ·)
        planes = torch.cat([part.unflatten(-1, (-1, layer.state_size)) for part in state], 2)  # (L·directions, B, S, N)
        for first in range(0, len(layer.recurrences), layer.num_directions):
            outputs = []
            for index in range(first, first + layer.num_directions):
                cell: Any = layer.recurrences[index]
                u = apply_map(layer.input_maps[index], x).unflatten(-1, cell.input_shape)  # (B, T, K, N)
                features, after = run_cell(cell, u if index == first else u.flip(1), planes[index])
                outputs.append(features if index == first else features.flip(1))
                finals.append(after)
            x = torch.cat(outputs, -1)  # (B, T, ·)
        last = torch.stack(finals).chunk(len(state), 2)  # (L·directions, B, S, N)
        return (x if layer.batch_first else x.transpose(0, 1), *(part.flatten(2) for part in last))


def layer_program(layer: KroneckerLayer) -> Program:
    """The one program of a layer, ``sequence``: T = 1 is a step."""
    cell: Any = layer.recurrences[0]
    names = ("h", "c") if layer._pair else ("h",)
    lead = ("batch", "length") if layer.batch_first else ("length", "batch")
    state = (len(layer.recurrences), "batch", cell.state_planes // len(names) * layer.state_size)
    inputs: dict[str, Shape] = {"input": (*lead, layer.input_size)} | {f"{name}_0": state for name in names}
    outputs: dict[str, Shape] = {"output": (*lead, layer.output_size)} | {f"{name}_n": state for name in names}
    return Program("sequence", StandardLayer(layer), inputs, outputs)


def programs(model: KRUPreTrainedModel | KroneckerLayer) -> list[Program]:
    """What a model is exported as: ``step`` (not of a bidirectional model), ``sequence``, and ``keys`` of a chain.

    Of a layer in place of torch's: ``sequence``.

    Raises:
        ValueError: a model without a head, or of music with onsets.
    """
    if isinstance(model, KroneckerLayer):
        return [layer_program(model)]
    config, body, chain = cast(Any, model.config), getattr(model, "model", None), getattr(model, "chain", None)
    if body is None:
        raise ValueError(f"model must have a head, got {type(model).__name__}")
    if config.frame_onsets:
        raise ValueError("onsets cannot be exported: frame_onsets must be False, got True")
    states = ("batch", config.num_hidden_layers, len(config.recurrent_cell.states), config.state_size)  # (B, L, S, N)
    context = {} if chain is None else {"context": (2 * chain.width + chain.size,)}
    found = []
    for whole in (False, True):
        if config.bidirectional and not whole:
            continue
        module, lead = StandardModel(model, whole), ("batch", "length") if whole else ("batch",)
        read: dict[str, Shape] = (
            {"input_ids": lead} if body.input_map is None else {"input_values": (*lead, config.input_size)}
        )
        each = lead[:1] if module.kind == "KRUForSequenceClassification" else lead
        width = module.head.out_features if chain is None else chain.width
        given = {"logits": (*each, width)} | {name: (*lead, *shape) for name, shape in context.items()}
        carried = not config.bidirectional
        inputs, outputs = (
            read | ({"state": states} if carried else {}),
            given | ({"next_state": states} if carried else {}),
        )
        found.append(Program("sequence" if whole else "step", module, inputs, outputs))
    if chain is not None:
        read = {"context": ("batch", *context["context"]), "lower": ("batch", chain.width)}
        found.append(Program("keys", ChainKeys(chain), read, {"logits": ("batch", chain.width)}))
    return found


def traced(program: Program) -> torch.export.ExportedProgram:
    """The program of ``torch.export``, its batch and length free."""
    free = {label: torch.export.Dim(label) for label in TRACED}
    shapes = tuple({axis: free[label] for axis, label in axes.items()} for axes in program.free_axes())
    torch._dynamo.reset()  # sizes that differ between two exports of a process would else be taken for free ones
    with torch.no_grad():
        return torch.export.export(program.module, program.examples(), dynamic_shapes=shapes, strict=False)


def check_libraries() -> None:
    """An ImportError that says what to install where ONNX cannot be written."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"format onnx needs {' and '.join(missing)}: pip install 'kru-hf[export]'")


def write_onnx(program: Program, path: Path) -> None:
    """The program as ONNX, its inputs, outputs and free axes by their names."""
    names: dict[str, Any] = {"input_names": list(program.inputs), "output_names": list(program.outputs)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its trees
        result: Any = torch.onnx.export(traced(program), dynamo=True, opset_version=OPSET, verbose=False, **names)
    graph, free = result.model.graph, program.free_axes()
    result.rename_axes({x.shape[axis]: axes[axis] for x, axes in zip(graph.inputs, free, strict=True) for axis in axes})
    for node in graph.all_nodes():
        node.metadata_props.clear()  # of where in our sources, and in which folder of this machine, it was made
    result.save(path)


def export_standard(model: KRUPreTrainedModel | KroneckerLayer, format: str, folder: Path) -> dict[Path, Program]:
    """Write each of :func:`programs` as ``NAME.pt2`` (format "torch") or ``NAME.onnx`` (format "onnx").

    Raises:
        ValueError: a model without a head. ImportError: the libraries that write ONNX are not installed.
    """
    if format == "onnx":
        check_libraries()
    written, made = {}, programs(model)
    folder.mkdir(parents=True, exist_ok=True)
    for program in made:
        path = folder / f"{program.name}.{SUFFIXES[format]}"
        if format == "onnx":
            write_onnx(program, path)
        else:
            torch.export.save(traced(program), path)
        written[path] = program
    return written
