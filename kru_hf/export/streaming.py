"""A model outside PyTorch: the C runtime, through ctypes."""

import ctypes
import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from ..heads_kru import KRUForSequenceClassification, KRUForTokenClassification
from ..modeling_kru import KRUForCausalLM
from ..piano_roll_head import KRUForPianoRoll
from .weight_file import HEADS, weight_file

_CLASSES = (KRUForCausalLM, KRUForSequenceClassification, KRUForTokenClassification, KRUForPianoRoll)  # as HEADS
_KINDS = ("text", "sequence", "steps", "roll", "chain")  # enum kru_head


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled runtime; an ImportError says what to do if the install had no compiler."""
    spec = importlib.util.find_spec("kru_hf.export._runtime")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the C runtime is not installed: no C compiler was found when kru_hf was; "
            "install one and run pip install --force-reinstall --no-deps kru-hf"
        )
    found = ctypes.CDLL(spec.origin)
    pointer, size, count, real = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
    for name, result, arguments in (
        ("kru_check", ctypes.c_char_p, [pointer, size, pointer]),
        ("kru_open", pointer, [pointer, size, pointer]),
        ("kru_kind", count, [pointer]),
        ("kru_vocabulary", count, [pointer]),
        ("kru_inputs", count, [pointer]),
        ("kru_outputs", count, [pointer]),
        ("kru_sequence", count, [pointer, pointer, pointer, size, pointer]),
        ("kru_reset", None, [pointer]),
        ("kru_state_size", count, [pointer]),
        ("kru_get_state", None, [pointer, pointer]),
        ("kru_set_state", None, [pointer, pointer]),
        ("kru_rows", count, [pointer, count, pointer, pointer, pointer]),
        ("kru_generate", count, [pointer, count, real, real, pointer, pointer]),
        ("kru_draw", count, [pointer, real, real, count, count, pointer, pointer]),
        ("kru_nats", real, [pointer, pointer]),
        ("kru_text", pointer, [pointer, count, pointer]),
        ("kru_token", count, [pointer, ctypes.c_char_p, count, pointer]),
        ("kru_instructions", ctypes.c_char_p, []),
    ):
        function = getattr(found, name, None)
        if function is None:
            raise ImportError(f"{spec.origin} is of another version of kru_hf: run pip install -e . again")
        function.restype, function.argtypes = result, arguments
    return found


def instructions() -> str:
    """The vector instructions that the runtime uses on this processor: avx512, avx2, neon, simd128 or generic."""
    return library().kru_instructions().decode()


def load_model(source: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """The model of a folder or Hub id, in evaluation mode and of the class that its config names, and its tokenizer.

    The tokenizer is None for a model of frames.

    Raises:
        ValueError: the config names no class that the runtime knows.
    """
    config = AutoConfig.from_pretrained(source, **kwargs)
    kind = (getattr(config, "architectures", None) or [None])[0]
    if kind not in HEADS:
        raise ValueError(f"model must be one of {', '.join(HEADS)}, {source} holds {kind}")
    made: Any = _CLASSES[HEADS.index(kind)]
    model = made.from_pretrained(source, config=config, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs) if config.input_size is None else None
    return model, tokenizer


def _seed(seed: int | None) -> np.ndarray:
    """The state of the runtime's generator, (1,) uint64; None: another each time."""
    return np.random.SeedSequence(seed).generate_state(1, np.uint64)


class StreamingModel:
    """One stream of a KRU model, run step by step by the C runtime: no PyTorch, one thread, a fixed piece of memory.

    >>> model = StreamingModel.from_pretrained("folder-or-hub-id", dtype="int8")
    >>> model.generate("The meaning of ", 80)

    Attributes:
        kind: what the outputs are: "text" (logits of the next token), "sequence" (of the classes, given all steps so
            far), "steps" (of the classes of a step), "roll" (of each key in the next frame) or "chain" (what the keys
            of the next frame are drawn from, each given the lower ones).
        vocab_size, input_size: V, 0 for a model of frames; width of a frame, 0 for a model of tokens.
        num_outputs: numbers that a step gives.
        data: the weight file's bytes.
    """

    def __init__(self, data: bytes, name: str = "the weight file") -> None:
        self._library = library()
        self.data, self._file = data, np.frombuffer(data, np.uint8).copy()
        needed = ctypes.c_size_t()
        wrong = self._library.kru_check(self._file.ctypes.data, len(data), ctypes.byref(needed))
        if wrong:
            raise ValueError(f"{name}: {wrong.decode()}")
        self._memory = np.empty(needed.value // 8 + 1, np.uint64)
        self._k = self._library.kru_open(self._file.ctypes.data, len(data), self._memory.ctypes.data)
        self.kind = _KINDS[self._library.kru_kind(self._k)]
        self.vocab_size, self.input_size = self._library.kru_vocabulary(self._k), self._library.kru_inputs(self._k)
        self.num_outputs = self._library.kru_outputs(self._k)
        self._steps = 0
        self._output = np.empty(self.num_outputs, np.float32)
        self._at = self._output.ctypes.data
        self._token = (ctypes.c_int32 * 1)()

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: str = "fp32", **kwargs: Any) -> "StreamingModel":
        """The model of a folder or a Hub id, converted. dtype: "fp32", "int8" or "int4"; kwargs: ``revision``, …

        Raises:
            ValueError: a model that cannot be run step by step, or a dtype that is not one of these.
        """
        return cls(weight_file(*load_model(model, **kwargs), dtype), str(model))

    @classmethod
    def load(cls, path: str | Path) -> "StreamingModel":
        """The model of a weight file, ``model.kru``; a file that is not whole or not sound is a ValueError."""
        return cls(Path(path).read_bytes(), str(path))

    def save(self, path: str | Path) -> None:
        """Write the weight file, ``model.kru``."""
        Path(path).write_bytes(self.data)

    def step(self, inputs: int | Sequence[float] | np.ndarray) -> np.ndarray:
        """Read a token, or a frame (input_size) of numbers: the outputs (num_outputs,) float32 after it.

        Raises:
            ValueError: a token that the model does not have, or a frame of another width.
        """
        if self.input_size:
            return self.run(np.asarray(inputs, np.float32)[None])[0]
        if not 0 <= inputs < self.vocab_size:  # type: ignore[operator]
            raise ValueError(f"a token must be at least 0 and below {self.vocab_size}, got {inputs}")
        self._token[0] = int(inputs)  # type: ignore[arg-type]
        self._library.kru_sequence(self._k, self._token, None, 1, self._at)
        self._steps += 1
        return self._output.copy()

    def run(self, inputs: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read tokens (T,) or frames (T, input_size): the outputs after each, (T, num_outputs) float32.

        Raises:
            ValueError: as :meth:`step`; nothing is read then.
        """
        if self.input_size:
            steps = np.ascontiguousarray(inputs, np.float32)
            if steps.ndim != 2 or steps.shape[1] != self.input_size:
                raise ValueError(f"frames must have the shape (T, {self.input_size}), got {steps.shape}")
            given: tuple[int | None, int | None] = (None, steps.ctypes.data)
        else:
            whole = np.asarray(inputs)
            if whole.ndim != 1 or (whole.size and not (whole.min() >= 0 and whole.max() < self.vocab_size)):
                raise ValueError(f"tokens must be (T,) numbers from 0 to {self.vocab_size - 1}, got {whole!r}")
            steps = np.ascontiguousarray(whole, np.int32)
            given = (steps.ctypes.data, None)
        outputs = np.empty((len(steps), self.num_outputs), np.float32)
        self._library.kru_sequence(self._k, *given, len(steps), outputs.ctypes.data)
        self._steps += len(steps)
        return outputs

    def step_rows(self, tokens: np.ndarray, states: np.ndarray) -> np.ndarray:
        """One step of several streams whose states the caller keeps: the outputs (B, num_outputs) float32.

        Args:
            tokens: (B,) int64. states: (L, B, S, N) float32, contiguous; they are replaced. The model's own state is
                then that of the last stream.

        Raises:
            ValueError: a token that the model does not have; nothing is read then.
        """
        outputs = np.empty((len(tokens), self.num_outputs), np.float32)
        given = (np.ascontiguousarray(tokens).ctypes.data, states.ctypes.data, outputs.ctypes.data)
        if self._library.kru_rows(self._k, len(tokens), *given):
            raise ValueError(f"tokens must be at least 0 and below {self.vocab_size}, got {tokens!r}")
        self._steps += 1
        return outputs

    def reset(self) -> None:
        """Back to the state before the first step."""
        self._library.kru_reset(self._k)
        self._steps = 0

    @property
    def state(self) -> np.ndarray:
        """A copy of the state, (layers · S · N,) float32: what the model knows of all it has read. It can be set."""
        state = np.empty(self._library.kru_state_size(self._k), np.float32)
        self._library.kru_get_state(self._k, state.ctypes.data)
        return state

    @state.setter
    def state(self, state: np.ndarray) -> None:
        state = np.ascontiguousarray(state, np.float32)
        if state.shape != (size := (self._library.kru_state_size(self._k),)):
            raise ValueError(f"state must have the shape {size}, got {state.shape}")
        self._library.kru_set_state(self._k, state.ctypes.data)
        self._steps = 0  # the outputs are those of another state until the next step

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text; a character that the model does not know is a ValueError that names it."""
        self._need_text()
        data, found, size = text.encode(), [], ctypes.c_int()
        while data:
            token = self._library.kru_token(self._k, data, len(data), ctypes.byref(size))
            if token < 0:
                raise ValueError(f"the model does not know {data.decode()[0]!r}, which stands in {text!r}")
            found.append(token)
            data = data[size.value :]
        return found

    def text(self, token: int) -> str:
        """The text of a token."""
        self._need_text()
        size = ctypes.c_int()
        at = self._library.kru_text(self._k, token, ctypes.byref(size))
        return ctypes.string_at(at, size.value).decode(errors="replace") if at else ""

    def stream(
        self,
        prompt: str,
        length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        burst: int = 1,
    ) -> Iterator[str]:
        """What :meth:`generate` returns, in pieces of ``burst`` tokens as they are drawn."""
        if not prompt and not self._steps:
            raise ValueError("prompt must hold at least one character: the model has read nothing yet")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        tokens = self.tokens(prompt)
        return self._stream(tokens, length, temperature, top_p, seed, burst)

    def _stream(
        self, tokens: list[int], length: int, temperature: float, top_p: float, seed: int | None, burst: int
    ) -> Iterator[str]:
        if tokens:
            self.run(tokens)
        drawn = _seed(seed)
        texts = [self.text(token) for token in range(self.vocab_size)]
        for start in range(0, length, burst):
            found = (ctypes.c_int32 * min(burst, length - start))()
            self._library.kru_generate(self._k, len(found), temperature, top_p, drawn.ctypes.data, found)
            yield "".join(texts[token] for token in found)

    def generate(
        self, prompt: str, length: int, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None
    ) -> str:
        """Continue a text by ``length`` tokens: only what is new is returned, and the state stays at its end.

        Args:
            prompt: read first, from the present state; empty: continue from there.
            temperature: divides the logits; 0 takes the most probable token.
            top_p: tokens are drawn from the most probable ones that have this much probability together.
            seed: of the draws; None: another each time.

        Raises:
            ValueError: an argument outside what is allowed, or a character that the model does not know.
        """
        return "".join(self.stream(prompt, length, temperature, top_p, seed, burst=max(length, 1)))

    def draw(
        self, temperature: float = 1.0, top_p: float = 1.0, voices: tuple[int, int] = (0, 128), seed: int | None = None
    ) -> tuple[np.ndarray, bool]:
        """The next frame of a piano roll, drawn after what was read; it is not read: give it to :meth:`step`.

        Args: as ``KRUForPianoRoll.stream_piano_roll``; voices: least and most keys.

        Returns:
            the frame (input_size,) of zeros and ones, and whether the limits on the voices had to be built into the
            draw, as 64 free ones did not meet them.
        """
        self._need_roll()
        seed_at, frame = _seed(seed), np.empty(self.input_size, np.float32)
        args = (temperature, top_p, *voices, seed_at.ctypes.data, frame.ctypes.data)
        return frame, bool(self._library.kru_draw(self._k, *args))

    def nats(self, frame: np.ndarray) -> float:
        """-log p of the frame (input_size,) of zeros and ones that comes after what was read."""
        self._need_roll()
        frame = np.ascontiguousarray(frame, np.float32)
        if frame.shape != (self.input_size,):
            raise ValueError(f"a frame must have the shape ({self.input_size},), got {frame.shape}")
        return self._library.kru_nats(self._k, frame.ctypes.data)

    def _need_roll(self) -> None:
        if self.kind not in ("roll", "chain"):
            raise ValueError(f"this model draws no frames: its outputs are of the kind {self.kind!r}")

    def _need_text(self) -> None:
        if self.kind != "text":
            raise ValueError(f"this model reads and writes no text: its outputs are of the kind {self.kind!r}")
        size = ctypes.c_int()
        if self._library.kru_text(self._k, 0, ctypes.byref(size)) is None:
            raise ValueError("the weight file holds no texts of tokens: export it from a folder with a tokenizer")

    def __repr__(self) -> str:
        return f"StreamingModel(kind={self.kind!r}, outputs={self.num_outputs}, bytes={len(self.data):,})"
