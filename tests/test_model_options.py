"""Whatever the options: finite outputs, padding without effect, folders that load, streams, gradients everywhere."""

import tempfile
from dataclasses import dataclass

import torch
from helpers import LOGITS, RELATIVE, assert_near, loud, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification, KRUModel
from kru_hf.cells import STARTS, TRANSITIONS
from kru_hf.configuration_kru import CELL_TYPES

EXAMPLES = 80
WIDTH, CLASSES, TOKENS = 5, 3, 11
STREAMED = (KRUForCausalLM, KRUForPianoRoll)
AUTO = {
    KRUForCausalLM: AutoModelForCausalLM,
    KRUForSequenceClassification: AutoModelForSequenceClassification,
    KRUForTokenClassification: AutoModelForTokenClassification,
    KRUForPianoRoll: AutoModel,
}
SHAPES = [[[4, 4]], [[2, 2], [3, 3]], [[2, 3], [3, 2]], [[1, 4], [2, 2], [4, 1]], [[2, 2]] * 4]


@dataclass
class Case:
    """A model of drawn options and a batch of sequences for it."""

    head: type
    options: dict
    lengths: list[int]
    left: int  # steps of padding before each of them, as far as there is room
    seed: int

    def model(self):
        torch.manual_seed(self.seed)
        # Scales at which the states show in the logits, and the order of tokens in the states.
        return loud(self.head(tiny_config(initializer_range=0.5, **self.options))).eval()

    def sequences(self) -> tuple[str, torch.Tensor]:
        """Name and values of the inputs: tokens (B, T), or frames of values in [0, 1] (B, T, width)."""
        size, generator = (len(self.lengths), max(self.lengths)), torch.Generator().manual_seed(self.seed)
        if self.options.get("input_size"):
            return "input_values", torch.rand(*size, WIDTH, generator=generator)
        return "input_ids", torch.randint(1, TOKENS, size, generator=generator)

    def real(self) -> torch.Tensor:
        """Which steps (B, T) are no padding."""
        steps, lengths = torch.arange(max(self.lengths)), torch.tensor(self.lengths)[:, None]
        begins = (max(self.lengths) - lengths).clamp(max=self.left)
        return (steps >= begins) & (steps < begins + lengths)

    def targets(self) -> dict[str, torch.Tensor]:
        """Labels for every sequence or step."""
        _, x = self.sequences()
        if self.head is KRUForPianoRoll:
            return {"shift_labels": x.flip(-1)}
        if self.head is KRUForCausalLM:
            return {"labels": x, "shift_labels": x.flip(0)}
        steps = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % CLASSES  # (B, T)
        return {"labels": steps[:, 0] if self.head is KRUForSequenceClassification else steps}


@st.composite
def cases(draw) -> Case:
    heads = [KRUForSequenceClassification, KRUForTokenClassification, *STREAMED]
    head = draw(st.sampled_from(heads))
    frames = head is KRUForPianoRoll or (head is not KRUForCausalLM and draw(st.booleans()))
    options = {
        "cell_type": draw(st.sampled_from(CELL_TYPES)),
        "block_type": draw(st.sampled_from(["residual", "plain"])),
        "bidirectional": head not in STREAMED and draw(st.booleans()),
        "factor_shapes": draw(st.sampled_from(SHAPES)),
        "readout_norm": draw(st.booleans()),
        "input_size": WIDTH if frames else None,
        "num_labels": CLASSES,
    }
    if options["cell_type"] == "kru":
        options["activation"] = draw(st.sampled_from(["modrelu", "identity"]))
        square = all(p == q for p, q in options["factor_shapes"])
        options["recurrent_init"] = draw(st.sampled_from([name for name in STARTS if square or name != "slow"]))
    elif options["cell_type"] == "kru_linear":
        options["factor_shapes"] = draw(st.sampled_from([s for s in SHAPES if all(p == q for p, q in s)]))
        options["num_heads"], options["decay"] = draw(st.integers(1, 2)), draw(st.booleans())
        options["transition"] = draw(st.sampled_from(TRANSITIONS))
    else:
        options["chrono_max_length"] = draw(st.sampled_from([None, 20]))
    if options["block_type"] == "residual":
        options["num_hidden_layers"] = draw(st.integers(1, 3))
        options["hidden_size"] = draw(st.sampled_from([4, 9]))
        options["intermediate_size"] = draw(st.sampled_from([None, 5]))
        options["io_rank"] = draw(st.sampled_from([None, 3]))
        if draw(st.booleans()):
            terms = {"io_rank": None, "kronecker_terms": 2, "hidden_size": 4, "intermediate_size": 6}
            options |= {**terms, "factor_shapes": SHAPES[1]}
            options.pop("transition", None)  # the width of what selective ones read may be odd
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    return Case(head, options, lengths, draw(st.integers(0, 6)), draw(st.integers(0, 100)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(cases())
@torch.no_grad()
def test_padding_and_saving_change_nothing(case):
    model, (name, x), real = case.model(), case.sequences(), case.real()
    # Padding holds tokens and frames like any other: the mask alone says that they do not count.
    padded = {name: x, "attention_mask": real.long()}
    found = model(**padded).logits
    assert found.isfinite().all()
    for row, kept in enumerate(real):
        alone = model(**{name: x[row : row + 1, kept]}).logits[0]
        assert_near(found[row] if case.head is KRUForSequenceClassification else found[row, kept], alone, LOGITS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AUTO[case.head].from_pretrained(folder).eval()
        body, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is case.head and not told["missing_keys"]
    assert type(body) is (KRUForPianoRoll if case.head is KRUForPianoRoll else KRUModel)
    for written, read in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert written[0] == read[0] and torch.equal(written[1], read[1]), written[0]
    # Loaded tensors lie elsewhere in memory, and a product of another alignment may round another way.
    assert_near(loaded(**padded).logits, found, RELATIVE[torch.float32])


@settings(max_examples=EXAMPLES, deadline=None)
@given(cases(), st.integers(1, 5))
@torch.no_grad()
def test_two_pieces_of_a_sequence_equal_the_whole(case, cut):
    if case.options["bidirectional"]:
        return
    model, (name, x) = case.model(), case.sequences()
    cut = min(cut, x.shape[1] - 1)
    whole = model(**{name: x}, use_cache=True)
    first = model(**{name: x[:, :cut]}, use_cache=True) if cut else None
    state = first.past_key_values if cut else None
    given = [tensor.clone() for tensor in state.states] if cut else []
    carried = state.states[:] if cut else []
    rest = model(**{name: x[:, cut:]}, past_key_values=state, use_cache=True)
    if case.head is KRUForSequenceClassification:
        assert_near(rest.logits, whole.logits, LOGITS)
    else:
        assert_near(rest.logits, whole.logits[:, cut:], LOGITS)
    for found, expected in zip(rest.past_key_values.states, whole.past_key_values.states, strict=True):
        assert_near(found, expected, LOGITS)
    assert all(map(torch.equal, carried, given))  # what a call is given stays as it is


@settings(max_examples=EXAMPLES, deadline=None)
@given(cases())
def test_every_trained_parameter_gets_a_gradient(case):
    model, (name, x) = case.model().train(), case.sequences()
    loss = model(**{name: x}, **case.targets()).loss
    assert loss.isfinite()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        factors = ".factors." in parameter_name
        # A head that forgets has nothing to forget in the first step.
        forgets = parameter_name.endswith((".decay", ".first_state"))
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        # Of one step from the zero state the factors see nothing but the penalty, whose gradient is 0 at unitary ones.
        unread = (forgets or factors) and x.shape[1] == 1
        assert unread or parameter.grad.abs().max() > 0, parameter_name
