"""The weight file of the C runtime: its layout is described at the top of ``kru_run.c``."""

import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cells import BY_TYPE
from ..modeling_kru import KRUPreTrainedModel

DTYPES = ("fp32", "int8", "int4")
CELL_ORDER = ("kru", "lstm", "gru", "janet", "peephole")  # the enum in kru_run.c
HEADS = ("KRUForCausalLM", "KRUForSequenceClassification", "KRUForTokenClassification", "KRUForPianoRoll")
CHAIN = len(HEADS)  # the number of a KRUForPianoRoll with a chain
PLAIN, READOUT_NORM, IDENTITY, HEAD_BIAS = 1, 2, 4, 8
MAGIC, SLACK = b"KRU2", 64
MOST = {"int8": 127, "int4": 7}  # the largest code of a map
SHARES = {127: (1.0,), 7: (1.0, 0.9, 0.8, 0.7, 0.6)}  # of its largest weight that a row's largest code stands for


def round_rows(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes -most … most, with a scale in fp16 for each row of a matrix (…, columns): int8 (…, columns), fp16 (…).

    With 4 bits a row's largest weights may be cut off, where that makes the sum of its squared errors smaller.
    """
    largest = np.abs(matrix).max(-1)  # (…)
    found = [_round_to(matrix, (share * largest / most).astype(np.float16), most) for share in SHARES[most]]
    errors = [np.square(codes * scales[..., None].astype(np.float32) - matrix).sum(-1) for codes, scales in found]
    best = np.argmin(errors, 0)  # (…): the first of equals, so that rounding what is rounded changes nothing
    codes, scales = (np.stack(each) for each in zip(*found, strict=True))  # (shares, …, columns), (shares, …)
    codes = np.take_along_axis(codes, best[None, ..., None], 0)[0]
    return codes, np.take_along_axis(scales, best[None], 0)[0]


def _round_to(matrix: np.ndarray, scales: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    # A scale below fp16's smallest number stands for a row of zeros.
    safe = np.where(scales == 0, 1, scales).astype(np.float32)[..., None]
    return np.clip(np.rint(matrix / safe), -most, most).astype(np.int8), scales


def rounded_weights(model: KRUPreTrainedModel, dtype: str) -> dict[str, Tensor]:
    """The parameters as a weight file of that dtype holds them, by name; new tensors, on the devices of the old."""

    def rows(weight: Tensor, most: int = 127) -> Tensor:
        codes, scales = round_rows(_numpy(weight), most)
        return torch.from_numpy(codes * scales[..., None].astype(np.float32))

    found = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if dtype == "fp32" or ("factors" in path and not model.config.gated):
            weight = parameter.detach().clone()
        elif path[-1] == "bias" or "norm" in name:
            weight = parameter.detach().half().float() if dtype == "int8" else rows(parameter)
        elif path[-2:] == ["lower", "weight"]:
            weight = rows(parameter.mT).mT  # of a chain: stored key by key
        elif {"embed_tokens", "factors", "mixing", "keys", "windows"} & set(path):
            weight = rows(parameter)
        elif path[-1] == "weight" and parameter.shape[-1] == 1:
            weight = rows(parameter.mT).mT  # a single input
        else:
            blocks = parameter if path[-1] == "blocks" else parameter[None]  # (n, out/n, in/n)
            flat = blocks.swapaxes(0, 1)  # (out/n, n, in/n)
            weight = rows(flat.flatten(1), MOST[dtype]).view(flat.shape).swapaxes(0, 1).reshape(parameter.shape)
        found[name] = weight.to(parameter.device, parameter.dtype)
    return found


class _Writer:
    """Tensors one after the other, each padded to 4 bytes."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.parts: list[bytes] = []

    def raw(self, data: bytes) -> None:
        self.parts.append(data + bytes(-len(data) % 4))

    def array(self, values: np.ndarray, dtype: Any) -> None:
        with np.errstate(over="raise"):
            self.raw(np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())

    def numbers(self, tensor: Tensor) -> None:
        """Biases and norms: (columns,), or rows of them."""
        if self.dtype == "int4":
            self.rows(np.atleast_2d(_numpy(tensor)))
        else:
            self.array(_numpy(tensor), np.float32 if self.dtype == "fp32" else np.float16)

    def rows(self, values: np.ndarray) -> None:
        """(…, columns), with a scale for each row."""
        if self.dtype == "fp32":
            self.array(values, np.float32)
        else:
            codes, scales = round_rows(values, 127)
            self.array(scales, np.float16)
            self.array(codes, np.int8)

    def map(self, module: Any) -> None:
        """A dense map, or a sum of Kronecker products, without its bias."""
        if hasattr(module, "mixing"):
            self.rows(_numpy(module.mixing))
            blocks = _numpy(module.blocks)  # (n, out/n, in/n)
        else:
            blocks = _numpy(module.weight)[None]  # (1, out, in)
        # With fewer outputs than inputs A comes after B, whose terms then stand side by side: less arithmetic.
        terms, outputs, inputs = blocks.shape
        side_by_side = (1, terms * outputs, inputs) if outputs < inputs else (terms, outputs, inputs)
        if self.dtype == "fp32":
            self.array(blocks.reshape(side_by_side).transpose(0, 2, 1), np.float32)  # (n, in/n, out/n)
        elif blocks.shape[0] * blocks.shape[2] == 1:
            self.rows(blocks.reshape(1, -1))  # a single input: one scale, not one for each number
        else:
            codes, scales = round_rows(blocks.swapaxes(0, 1).reshape(outputs, -1), MOST[self.dtype])
            self.array(scales, np.float16)
            codes = codes.reshape(outputs, terms, inputs).swapaxes(0, 1).reshape(side_by_side)  # (n, out/n, in/n)
            if inputs % 2:
                codes = np.concatenate((codes, np.zeros_like(codes[..., :1])), -1)
            pairs = codes.reshape(*side_by_side[:2], -1, 2).transpose(0, 2, 1, 3)  # (n, pairs, out/n, 2)
            self.array(pairs if self.dtype == "int8" else (pairs[..., 0] & 15) | (pairs[..., 1] << 4), np.int8)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def token_texts(tokenizer: Any, vocabulary: int) -> bytes:
    """The text that each token stands for, each behind its length in a byte; nothing without a tokenizer.

    The unknown token stands for none: no text is read as it, and it is written as nothing.
    """
    if tokenizer is None:
        return b""
    unknown = tokenizer.unk_token_id
    texts = [b"" if index == unknown else tokenizer.decode([index]).encode() for index in range(vocabulary)]
    if (longest := max(map(len, texts))) > 255:
        raise ValueError(f"a token's text must be at most 255 bytes for the C runtime, got {longest}")
    return b"".join(bytes([len(text)]) + text for text in texts)


def weight_file(model: KRUPreTrainedModel, tokenizer: Any = None, dtype: str = "fp32") -> bytes:
    """The bytes of ``model.kru``: the model as the C runtime reads it.

    Args:
        tokenizer: whose tokens the texts of the file are, for a language model; None: none.
        dtype: "fp32"; "int8", a scale for each row of a matrix (of a map's terms together); or "int4", the maps in 4
            bits and the rest in 8.

    Raises:
        ValueError: a model that cannot be run step by step (bidirectional, without a head, or with a chain over keys),
            or a dtype not named.
    """
    config: Any = model.config  # resolved: no size of it is None
    kind = type(model).__name__
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if kind not in HEADS:
        raise ValueError(f"model must be one of {', '.join(HEADS)}, got {kind}")
    if config.bidirectional:
        raise ValueError("a model that is run step by step must have bidirectional = False, got True")
    if config.linear:
        raise ValueError("the C runtime has no linear recurrence: cell_type must not be 'kru_linear'")
    if getattr(config, "frame_onsets", False):
        raise ValueError("the C runtime has no onsets: frame_onsets must be False, got True")
    body, cell, plain = model.model, BY_TYPE[config.cell_type], config.block_type == "plain"
    head = {"KRUForCausalLM": "lm_head", "KRUForPianoRoll": "key_head"}.get(kind, "score")
    output = getattr(model, head)
    texts = token_texts(tokenizer, config.vocab_size) if config.input_size is None else b""
    writer = _Writer(dtype)
    writer.array(np.array(config.factor_shapes), np.uint32)
    writer.raw(texts)
    if config.input_size is None:
        writer.rows(_numpy(body.embed_tokens.weight))
    else:
        writer.map(body.input_map)
    for layer in body.layers:
        if not plain:
            writer.numbers(layer.norm.weight)
            if layer.down is not None:
                writer.map(layer.down)
            writer.map(layer.in_proj)
        terms = [f if config.recurrent_terms > 1 else f.unsqueeze(0) for f in layer.recurrence.factors]  # (R, K, P, Q)
        for term in zip(*terms, strict=True):
            for factor in term:
                if cell.complex:  # an error of its eigenvalues grows with every step
                    writer.array(_numpy(factor), np.float32)
                else:
                    writer.rows(_numpy(factor))
        writer.numbers(layer.recurrence.bias)
        if not plain:
            writer.map(layer.out_proj)
            if layer.up is not None:
                writer.map(layer.up)
        if layer_ff := getattr(layer, "feed_forward", None):
            writer.numbers(layer_ff.norm.weight)
            writer.map(layer_ff.gate_up_proj)
            writer.map(layer_ff.down_proj)
    if not plain:
        writer.numbers(body.norm.weight)
    writer.map(output)
    if output.bias is not None:
        writer.numbers(output.bias)
    chain = getattr(model, "chain", None)
    if chain is not None:
        writer.map(chain.before)
        writer.rows(_numpy(chain.lower.weight).T)  # (keys, H)
        writer.rows(_numpy(chain.keys.weight))  # (keys, H)
        windows = chain.windows
        writer.rows(_numpy(windows.near).reshape(-1, windows.near.shape[-1]))  # (2 W, C)
        writer.rows(_numpy(windows.context.weight))  # (C, H)
        writer.numbers(windows.context.bias)
        writer.rows(_numpy(windows.out.weight))  # (1, C)
    writer.raw(bytes(SLACK))
    flags = PLAIN * plain | READOUT_NORM * config.readout_norm
    flags |= IDENTITY * (cell.complex and config.activation == "identity") | HEAD_BIAS * (output.bias is not None)
    fields = (
        *(DTYPES.index(dtype), HEADS.index(kind) if chain is None else CHAIN),
        *(config.vocab_size if config.input_size is None else 0, config.input_size or 0, output.out_features),
        *(config.embedding_size, config.hidden_size, config.state_size, CELL_ORDER.index(cell.name), flags),
        *(config.num_hidden_layers, config.recurrent_terms, len(config.factor_shapes)),
        *(config.kronecker_terms or 1, config.intermediate_size or 0, config.io_rank or 0),
        0 if chain is None else config.frame_head_channels,
    )
    rest = struct.pack(f"<{len(fields)}IfI", *fields, config.layer_norm_epsilon, len(texts)) + b"".join(writer.parts)
    return MAGIC + struct.pack("<II", len(rest) + 12, zlib.crc32(rest)) + rest
