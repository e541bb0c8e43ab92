"""Steps of ``generate()`` by the C runtime: a token costs microseconds there, and a dozen operators a layer in torch.

A stream is opened at the first step of a call of ``generate()`` and goes with it, so no weights outlive what they were
copied from. Whatever it does not compute, or would not compute as torch does, is left to torch: see ``_fits``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .. import modeling_kru, scan
from ..cache_kru import KRUCacheLayer
from ..maps import KroneckerLinear, KRUFeedForward
from ..modeling_kru import KRUForCausalLM, KRUModel, KRUPlainLayer, KRUResidualLayer
from ..recurrence import FactorList, KRURecurrence
from .streaming import StreamingModel, library
from .weight_file import weight_file

# Larger models wait for memory, not for operators, and batches of more rows for arithmetic: those torch shares out.
MOST_PARAMETERS, MOST_ROWS = 2_000_000, 16
PARTS = (
    *(KRUModel, KRUPlainLayer, KRUResidualLayer, KRURecurrence, KRUFeedForward, KroneckerLinear, FactorList),
    *(nn.ModuleList, nn.Embedding, nn.Linear, nn.RMSNorm, nn.Dropout),
)
CALLS = nn.Module.__call__, nn.Module._call_impl, nn.functional.linear


class Steps:
    """The steps of one model during one ``generate()``."""

    def __init__(self, model: KRUForCausalLM) -> None:
        self._model = model
        self._parts = [part for part in model.modules() if part is not model]
        own = [parameter for part in self._parts for parameter in part._parameters.values() if parameter is not None]
        self._possible = (
            sum(parameter.numel() for parameter in own) <= MOST_PARAMETERS
            and {type(parameter) for parameter in own} == {nn.Parameter}
            and {(parameter.dtype, parameter.device.type) for parameter in own} == {(torch.float32, "cpu")}
            and all(type(part) in PARTS and "forward" not in vars(part) for part in self._parts)
            and all(part.max_norm is None for part in self._parts if isinstance(part, nn.Embedding))
            and all(part.backend == "auto" for part in self._parts if isinstance(part, KRURecurrence))
        )
        self._stream: StreamingModel | None = None
        self._weights: list[tuple[int, int]] = []

    def _fits(self) -> bool:
        """Whether nothing watches or changes what torch would compute now."""
        return not (
            self._model.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or scan._choice != "auto"
            or nn.modules.module._has_any_global_hook()
            or (nn.Module.__call__, nn.Module._call_impl, nn.functional.linear) != CALLS
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
            or torch.jit.is_tracing()
            or any(part._forward_hooks or part._forward_pre_hooks or part.training for part in self._parts)
        )

    def _open(self) -> StreamingModel | None:
        """The stream, made anew when a weight has been changed in place or replaced; None: the runtime cannot."""
        weights = [
            (0, 0) if weight is None else (weight.data_ptr(), weight._version)
            for part in self._parts
            for weight in part._parameters.values()
        ]
        if weights != self._weights:
            self._weights, self._stream = weights, None
            with contextlib.suppress(ValueError):  # a model that no file can hold
                self._stream = StreamingModel(weight_file(self._model))
        return self._stream

    def __call__(self, tokens: Tensor, cache: Any) -> Tensor | None:
        """Logits (B, 1, V) after tokens (B, 1) and the states in ``cache``, which it replaces; None: torch has to."""
        rows = len(tokens)
        if not self._possible or tokens.shape != (rows, 1) or not 0 < rows <= MOST_ROWS or not self._fits():
            return None
        layers, config = cache.layers, self._model.config
        shape = (rows, len(config.recurrent_cell.states), config.state_size)
        if len(layers) != config.num_hidden_layers or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
            return None
        states = [layer.state for layer in layers if type(layer) is KRUCacheLayer and layer.state is not None]
        if len(states) < len(layers) or any(s.shape != shape or s.dtype != torch.float32 for s in states):
            return None
        low, high = (int(bound) for bound in tokens.aminmax())
        if (stream := self._open()) is None or low < 0 or high >= config.vocab_size:
            return None  # of a token that the model does not have torch says so
        after = torch.stack(states)  # (L, B, S, N)
        logits = torch.from_numpy(stream.step_rows(tokens[:, 0].numpy(), after.numpy()))  # (B, V)
        for layer, state in zip(layers, after.unbind(0), strict=True):
            layer.store(state, 1)
        return logits.unsqueeze(1)


def steps_of(model: KRUForCausalLM) -> Steps | None:
    """For ``modeling_kru.STEPS``; None for a model that the runtime cannot run, or without a compiled runtime."""
    config = model.config
    if type(model) is not KRUForCausalLM or config.linear or config.bidirectional:
        return None
    try:
        library()
    except (ImportError, OSError):
        return None
    return Steps(model)


modeling_kru.STEPS["cpu"] = steps_of
