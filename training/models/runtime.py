"""A trained model that computes in the C runtime, for scoring what is shipped."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kru_hf import KRUCache
from kru_hf.export import StreamingModel
from kru_hf.export.weight_file import rounded_weights, weight_file
from kru_hf.modeling_kru import KRUModelOutput

from ..common.errors import UserError


class _Runtime:
    """What stands in for a body and its head: token ids or frames of a batch to the outputs of the runtime."""

    def __init__(self, stream: StreamingModel) -> None:
        self.stream = stream

    def __call__(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_starts: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        **kwargs: Any,
    ) -> KRUModelOutput:
        """Outputs (B, T, num_outputs) as last_hidden_state, and the states (B, S) of the streams."""
        given = input_ids if input_values is None else input_values
        assert given is not None
        inputs = given.numpy()  # (B, T) or (B, T, width)
        batch, length = inputs.shape[:2]
        kept = np.ones((batch, length), bool) if attention_mask is None else attention_mask[:, -length:].bool().numpy()
        starts = np.zeros((batch, length), bool) if document_starts is None else document_starts.numpy()
        outputs = np.zeros((batch, length, self.stream.num_outputs), np.float32)
        states = []
        for row in range(batch):
            self.stream.reset()
            if past_key_values is not None:
                self.stream.state = past_key_values.states[0][row].numpy()
            bounds = [0, *np.flatnonzero(starts[row]), length]
            for first, last in zip(bounds, bounds[1:], strict=False):
                if first < length and starts[row, first]:
                    self.stream.reset()
                steps = first + np.flatnonzero(kept[row, first:last])
                outputs[row, steps] = self.stream.run(inputs[row, steps])
            states.append(self.stream.state)
        cache = KRUCache.from_states([torch.from_numpy(np.stack(states))])
        return KRUModelOutput(last_hidden_state=torch.from_numpy(outputs), past_key_values=cache)


def through_runtime(model: Any, dtype: str) -> Any:
    """The model, whose forward passes compute in the C runtime with weights of ``dtype`` from now on.

    Raises:
        UserError: a model that the runtime cannot run, or an install without it.
    """
    try:
        runtime = _Runtime(StreamingModel(weight_file(model, None, dtype)))
    except (ValueError, ImportError) as error:
        raise UserError(f"dtype={dtype!r}: {error}") from error
    model.model.forward = runtime
    model.read = lambda features, head: features  # the runtime has applied the head
    if getattr(model, "chain", None) is not None:  # the runtime has added what the frame before says, too
        model.load_state_dict(rounded_weights(model, dtype), strict=False)
        torch.nn.init.zeros_(model.chain.before.weight)
    return model
