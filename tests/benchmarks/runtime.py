"""Characters per second of one stream: the C runtime, and an `nn.LSTM` of equal size in PyTorch and ONNX Runtime.

    python tests/benchmarks/runtime.py [--model model_cards/kru-lstm-ptb-char-120k] [--tokens 5000] [--rounds 7]

One thread, by its processor time: what else the machine does counts little. The candidates take turns in each round,
and the best round of each counts.
"""

import argparse
import io
import time
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from kru_hf import KRURecurrence
from kru_hf.export import StreamingModel
from kru_hf.export.streaming import instructions, load_model
from kru_hf.maps import KroneckerLinear

SHARE = 10  # generate() draws so many times fewer tokens, for a turn of about equal length


class LSTM(nn.Module):
    """A language model of one layer: a step is a token and the state to logits and the state."""

    def __init__(self, vocabulary: int, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, units, batch_first=True)
        self.head = nn.Linear(units, vocabulary)

    def forward(self, token, h, c):
        states, (h, c) = self.lstm(self.embedding(token), (h, c))
        return self.head(states), h, c


def in_torch(model: LSTM, units: int, tokens: int) -> None:
    token, h, c = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, units), torch.zeros(1, 1, units)
    with torch.inference_mode():
        for _ in range(tokens):
            logits, h, c = model(token, h, c)
            token = logits.argmax(-1)


def onnx_session(model: LSTM, units: int):
    import onnxruntime

    example = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, units), torch.zeros(1, 1, units))
    file = io.BytesIO()
    names = {"input_names": ["token", "h", "c"], "output_names": ["logits", "h_next", "c_next"]}
    torch.onnx.export(model, example, file, dynamo=False, **names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options)


def in_onnx(session, units: int, tokens: int) -> None:
    token = np.zeros((1, 1), np.int64)
    h = c = np.zeros((1, 1, units), np.float32)
    for _ in range(tokens):
        logits, h, c = session.run(None, {"token": token, "h": h, "c": c})
        token = logits.argmax(-1)


def multiply_adds(model: nn.Module) -> int:
    """Of a token: those of the maps, and of the recurrence in factored form; a complex product is four real ones."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.LSTM):
            total += sum(weight.numel() for name, weight in module.named_parameters() if "weight" in name)
        elif isinstance(module, KroneckerLinear):
            wide, narrow = module.in_features, min(module.in_features, module.out_features)
            total += wide * module.out_features + narrow * module.terms**2
        elif isinstance(module, KRURecurrence):
            products = 4 if module.cell.complex else module.cell.planes
            total += products * module.terms * module.state_size * sum(p for p, _ in module.factor_shapes)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/kru-lstm-ptb-char-120k")
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model)
    vocabulary, wanted = model.config.vocab_size, model.num_parameters()
    units = next(n for n in range(8, 4096) if sum(p.numel() for p in LSTM(vocabulary, n + 1).parameters()) > wanted)
    lstm = LSTM(vocabulary, units).eval()
    own = sum(p.numel() for p in lstm.parameters())
    rival = f"nn.LSTM {units} ({4 * own:,} bytes)"
    streams = {dtype: StreamingModel.from_pretrained(options.model, dtype) for dtype in ("fp32", "int8", "int4")}
    candidates = {
        f"C runtime, {dtype} ({len(stream.data):,} bytes)": lambda n, stream=stream: stream.generate("the ", n, 0)
        for dtype, stream in streams.items()
    }
    candidates[f"{rival}, PyTorch"] = lambda n: in_torch(lstm, units, n)
    if find_spec("onnxruntime"):
        session = onnx_session(lstm, units)
        candidates[f"{rival}, ONNX Runtime"] = lambda n: in_onnx(session, units, n)
    ids = tokenizer("the ", return_tensors="pt")
    candidates["transformers generate"] = lambda n: model.generate(
        **ids, max_new_tokens=n // SHARE, min_new_tokens=n // SHARE, do_sample=False, pad_token_id=0
    )
    best = dict.fromkeys(candidates, 0.0)
    for _ in range(options.rounds):
        for name, run in candidates.items():
            count = options.tokens if name != "transformers generate" else options.tokens // SHARE
            start = time.process_time()
            run(options.tokens)
            best[name] = max(best[name], count / (time.process_time() - start))
    base = best[f"{rival}, PyTorch"]
    print(f"{options.model}: {wanted:,} parameters, {multiply_adds(model):,} multiply-adds per token")
    print(
        f"nn.LSTM {units}: {own:,} parameters, {multiply_adds(lstm):,} multiply-adds per token; "
        f"{instructions()}, one thread"
    )
    for name, speed in best.items():
        print(f"{name:<62} {speed:>9,.0f} characters per second  {speed / base:6.2f} of nn.LSTM in PyTorch")


if __name__ == "__main__":
    main()
