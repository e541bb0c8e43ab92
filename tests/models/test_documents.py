"""Packed batches and masks of every kind: each document of a row as if it stood alone, or an error."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, loud, tiny_config, tiny_model
from transformers import DataCollatorWithFlattening

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification, KRUModel
from kru_hf.cache_kru import KRUCache

EVERY = pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
DOCUMENTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7], [4]]
LENGTHS = [len(document) for document in DOCUMENTS]
TOTAL = sum(LENGTHS)
ROW = torch.tensor([sum(DOCUMENTS, [])])
BOUNDS = [0, 5, 8, 14, 15]
NEAR = 1e-5
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
MARKS = {
    "positions": {"position_ids": POSITIONS},
    "positions of a row": {"position_ids": POSITIONS[0]},
    "positions from 2": {"position_ids": POSITIONS + 2},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "bounds": {"cu_seq_lens_q": torch.tensor(BOUNDS, dtype=torch.int32)},
    "bounds by another name": {"cu_seqlens": BOUNDS},
    "segments": {"attention_mask": NUMBERS + 1},
    "segments in floats": {"attention_mask": (NUMBERS + 1).float()},
    "collator": {
        name: value
        for name, value in DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
            [{"input_ids": document} for document in DOCUMENTS]
        ).items()
        if name not in ("input_ids", "labels")
    },
}


def build(head, seed=0, **options):
    torch.manual_seed(seed)
    model = loud(head(tiny_config(**({"num_labels": 3} | options)))).double().eval()
    for name in ("lm_head", "score", "key_head"):
        if hasattr(model, name):
            torch.nn.init.normal_(getattr(model, name).weight)
    return model


def alone(model, labels=None, **options):
    """The outputs of the documents one by one; ``labels`` has an entry for each."""
    each = [{"labels": one} for one in labels] if labels is not None else [{}] * len(DOCUMENTS)
    return [model(torch.tensor([d]), **one, **options) for d, one in zip(DOCUMENTS, each, strict=True)]


def assert_same(together, single, counts=None, dim=1):
    """Logits of a row are those of its documents; with ``counts`` the loss is their mean by what each scores."""
    assert_near(together.logits, torch.cat([one.logits for one in single], dim), NEAR)
    if counts is not None:
        total = sum(one.loss * n for one, n in zip(single, counts, strict=True) if n)
        assert_near(together.loss, total / sum(counts), NEAR)


@EVERY
@pytest.mark.parametrize("kind", ["positions", "collator"])
def test_documents_of_a_row_are_single_runs(options, kind):
    model = build(KRUForCausalLM, **options)
    single = alone(model, use_cache=True)
    out = model(ROW, use_cache=True, **MARKS[kind])
    assert_same(out, single)
    for state, last in zip(out.past_key_values.states, single[-1].past_key_values.states, strict=True):
        assert_near(state, last, NEAR)
    assert out.past_key_values.get_seq_length() == TOTAL


@pytest.mark.parametrize("kind", MARKS)
def test_every_way_to_mark_documents(kind):
    model = build(KRUForCausalLM)
    single = alone(model, [torch.tensor([document]) for document in DOCUMENTS])
    assert_same(model(ROW, labels=ROW, **MARKS[kind]), single, [n - 1 for n in LENGTHS])


@EVERY
def test_gradients_are_those_of_single_runs(options):
    model = build(KRUForCausalLM, **options)
    weights = torch.randn(1, TOTAL, 11, dtype=torch.double)
    together = torch.autograd.grad((model(ROW, position_ids=POSITIONS).logits * weights).sum(), model.parameters())
    logits = torch.cat([one.logits for one in alone(model)], 1)
    apart = torch.autograd.grad((logits * weights).sum(), model.parameters())
    for one, other in zip(together, apart, strict=True):
        assert_near(one, other, NEAR)


@pytest.mark.parametrize("bidirectional", [False, True])
@EVERY
def test_classifiers_see_each_document_alone(options, bidirectional):
    options = options | {"bidirectional": bidirectional}
    model, labels = build(KRUForTokenClassification, **options), torch.randint(3, (1, TOTAL))
    assert_same(model(ROW, labels=labels, position_ids=POSITIONS), alone(model, labels.split(LENGTHS, 1)), LENGTHS)
    model, labels = build(KRUForSequenceClassification, **options), torch.tensor([2, 0, 1, 2])
    assert_same(model(ROW, labels=labels, position_ids=POSITIONS), alone(model, labels.split(1)), [1] * 4, dim=0)


@pytest.mark.parametrize("options", [{}, {"block_type": "plain", "cell_type": "kru_gru"}], ids=str)
def test_pieces_of_music_in_a_row(options):
    model = build(KRUForPianoRoll, input_size=7, **options)
    frames = (torch.rand(1, TOTAL, 7, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    single = [model(part) for part in frames.split(LENGTHS, 1)]
    assert_same(model(frames, position_ids=POSITIONS), single, [n - 1 for n in LENGTHS])


def test_hidden_states_keep_the_shape_of_the_batch():
    model = build(KRUModel)
    out = model(ROW, position_ids=POSITIONS, output_hidden_states=True)
    expected = [model(torch.tensor([d]), output_hidden_states=True).hidden_states for d in DOCUMENTS]
    for index, hidden in enumerate(out.hidden_states):
        assert_near(hidden, torch.cat([one[index] for one in expected], 1), NEAR)


@pytest.mark.parametrize("options", [{}, {"block_type": "plain"}, {"cell_type": "kru_lstm"}], ids=str)
def test_rows_of_several_documents_with_padding_and_a_carried_state(options):
    """The state belongs to the first document of a row, wherever its first step that counts stands."""
    model = build(KRUForCausalLM, **options)
    before = torch.tensor([[7, 8], [6, 2]])
    state = model(before, use_cache=True).past_key_values
    ids = torch.tensor([[0, 3, 1, 4, 9, 2, 0], [5, 3, 0, 0, 5, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 1, 1, 1]])
    positions = torch.tensor([[1, 0, 1, 2, 0, 1, 1], [2, 3, 1, 1, 0, 1, 2]])

    def single(row, part, carried):
        cache = KRUCache.from_states([s[row : row + 1] for s in state.states]) if carried else None
        return model(torch.tensor([part]), past_key_values=cache, use_cache=True)

    parts = [single(0, [3, 1, 4], True), single(0, [9, 2], False), single(1, [5, 3], True), single(1, [5, 8, 9], False)]
    expected = torch.cat([part.logits[0] for part in parts])
    numbered = mask + torch.tensor([[0] * 7, [0, 0, 0, 0, 1, 1, 1]])
    for given in ({"attention_mask": mask.bool(), "position_ids": positions}, {"attention_mask": numbered}):
        out = model(ids, past_key_values=KRUCache.from_states(state.states), use_cache=True, **given)
        assert_near(out.logits[mask > 0], expected, NEAR)
        for index, found in enumerate(out.past_key_values.states):
            last = torch.cat([parts[1].past_key_values.states[index], parts[3].past_key_values.states[index]])
            assert_near(found, last, NEAR)


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": torch.arange(TOTAL)[None]},
        {"position_ids": torch.arange(40, 40 + TOTAL)},
        {"position_ids": torch.arange(TOTAL + 9)[None]},
        {"seq_idx": torch.full((1, TOTAL), 3)},
        {"cu_seq_lens_q": [0, TOTAL]},
        {"attention_mask": torch.full((1, TOTAL), 5)},
        {"max_length_q": 3},
    ],
    ids=str,
)
def test_marks_of_one_document_change_nothing(marks):
    model = build(KRUForCausalLM)
    assert torch.equal(model(ROW, **marks).logits, model(ROW).logits)


def test_positions_that_count_on_under_padding_and_over_windows():
    model = build(KRUForCausalLM)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    expected = model(ROW, attention_mask=mask).logits
    of_tokens = (mask.cumsum(1) - 1).clamp(min=0)
    for positions in (of_tokens, of_tokens.masked_fill(mask == 0, 1), torch.arange(TOTAL)[None]):
        assert torch.equal(model(ROW, attention_mask=mask, position_ids=positions).logits, expected)
    cache, pieces = None, []
    for piece, positions in zip(ROW.split(5, 1), (0, 0, 10), strict=True):
        positions = torch.arange(positions, positions + 5)
        out = model(piece, past_key_values=cache, use_cache=True, position_ids=positions)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert_near(torch.cat(pieces, 1), model(ROW).logits, NEAR)


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mask",
    [
        [-torch.inf, -torch.inf, 0, 0, -torch.inf, 0],
        [LEAST, LEAST, -0.0, -0.0, LEAST, -0.0],
        [-1e9, -1e9, 0, 0, -1e9, 0],
        [-10000.0, -10000.0, 0, 0, -10000.0, 0],
        [0.0, 0, 1, 1, 0, 1],
        [False, False, True, True, False, True],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "head", [KRUForCausalLM, KRUForSequenceClassification, KRUForTokenClassification, KRUForPianoRoll]
)
def test_masks_of_floats_are_read_as_what_they_are(mask, dtype, head):
    frames = head is KRUForPianoRoll
    model = build(head, **({"input_size": 3} if frames else {}))
    x = (torch.rand(1, 6, 3) < 0.5).double() if frames else ROW[:, :6]
    labels = {KRUForCausalLM: x, KRUForSequenceClassification: torch.tensor([1])}
    labels = {} if frames else {"labels": labels.get(head, x % 3)}
    expected = model(x, attention_mask=torch.tensor([[0, 0, 1, 1, 0, 1]]), **labels)
    mask = torch.tensor([mask]) if isinstance(mask[0], bool) else torch.tensor([mask]).to(dtype)
    out = model(x, attention_mask=mask, **labels)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, -1, 1, 1, 1]])}, "attention_mask must hold 0 and 1, the numbers"),
        ({"attention_mask": torch.tensor([[0.0, 0, -1, 0, 0, 0]])}, "got -1 to 0"),
        ({"attention_mask": torch.tensor([[0.0, 0, -1e9, 0, 1, 0]])}, "attention_mask must hold"),
        ({"attention_mask": torch.tensor([[1, 1, 0.5, 1, 1, 1]])}, "got 0.5 to 1"),
        ({"attention_mask": torch.tensor([[1, 1, torch.nan, 1, 1, 1]])}, "got nan to nan"),
        ({"attention_mask": torch.tensor([[1, 1, torch.inf, 1, 1, 1]])}, "got 1 to inf"),
        ({"attention_mask": torch.zeros(1, 6)}, "got 0 to 0"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, r"the shape \(1, 6\) or be longer, got \(1, 1, 6, 6\)"),
        ({"attention_mask": torch.ones(1, 5)}, r"the shape \(1, 6\) or be longer, got \(1, 5\)"),
        ({"position_ids": torch.zeros(1, 5).long()}, r"position_ids must have the shape \(1, 6\), got \(1, 5\)"),
        ({"position_ids": torch.zeros(3, 1, 6).long()}, r"position_ids must have the shape \(1, 6\), got \(3, 1, 6\)"),
        ({"position_ids": torch.zeros(1, 6)}, "position_ids must hold integers, got torch.float32"),
        ({"seq_idx": torch.zeros(2, 6).long()}, r"seq_idx must have the shape \(1, 6\), got \(2, 6\)"),
        ({"cu_seq_lens_q": [0, 3, 9]}, r"cu_seq_lens_q must rise from 0 to at most T = 6, got \[0, 3, 9\]"),
        ({"cu_seqlens": [2, 6]}, "cu_seqlens must rise from 0"),
        ({"cu_seq_lens_k": [[0, 6]]}, "must be 1-D and the batch"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(marks, message):
    with pytest.raises(ValueError, match=message):
        build(KRUForCausalLM)(ROW[:, :6], **marks)
    with pytest.raises(ValueError, match=r"must be 1-D and the batch \(1, T\), got \(2,\) and \(2, 3\)"):
        build(KRUForCausalLM)(ROW[:, :6].view(2, 3), cu_seq_lens_q=[0, 3])


def test_generate_reads_one_document_a_row():
    model = tiny_model()
    with pytest.raises(ValueError, match="generate.* one text per row: attention_mask must hold 0 and 1 alone"):
        model.generate(ROW, attention_mask=NUMBERS + 1, max_new_tokens=2)


@pytest.mark.slow
def test_compiled_models_read_documents_and_masks():
    torch.compiler.reset()
    model = build(KRUForCausalLM).float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    masks = [{"attention_mask": mask} for mask in (torch.tensor([[0] * 5 + [1] * 10]), NUMBERS + 1)]
    for marks in (*masks, {"position_ids": torch.arange(TOTAL)[None]}, {"position_ids": POSITIONS}):
        assert_near(compiled(ROW, **marks).logits, model(ROW, **marks).logits, LOGITS)
    pooled = torch.compile(build(KRUForSequenceClassification).float(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="packed documents cannot be compiled"):
        pooled(ROW, position_ids=POSITIONS)
    with pytest.raises(RuntimeError, match="attention_mask must hold 0 and 1"):
        compiled(ROW, attention_mask=-NUMBERS)
