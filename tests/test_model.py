"""The language model behaves as transformers' own models do."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, RELATIVE, assert_near, tiny_config, tiny_model
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kru_hf import KRUForCausalLM, KRUModel

EVERY = pytest.mark.parametrize("options", BLOCKS + GATED, ids=lambda w: "-".join(map(str, w.values())))
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_in_a_dtype_is_trainable_with_an_fp32_recurrence(options, dtype, tmp_path):
    tiny_model(**options).save_pretrained(tmp_path)
    model = KRUForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and not parameter.is_complex()
        assert parameter.dtype == (torch.float32 if "recurrence" in name else dtype)
    output = model(IDS, labels=IDS, use_cache=True)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(state.dtype == torch.float32 for state in output.past_key_values.states)
    reference = KRUForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_near(model.eval()(IDS).logits.float(), reference(IDS).logits, RELATIVE[dtype])


@EVERY
def test_autocast(options):
    model = tiny_model(**options).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=IDS, use_cache=True)
    output.loss.backward()
    assert all(state.dtype == torch.float32 for state in output.past_key_values.states)
    assert_near(output.logits.float(), model(IDS).logits, RELATIVE[torch.bfloat16])


def test_autocast_leaves_the_residual_stream_of_frames_in_fp32():
    model = KRUModel(tiny_config(block_type="residual", input_size=3)).train()
    seen = []
    model.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_values=torch.randn(2, 5, 3))
    assert seen == [torch.float32]


@EVERY
def test_resize_embeddings(options, tmp_path):
    model = tiny_model(**options)
    before = model(IDS).logits
    model.resize_token_embeddings(15)
    after = model(IDS).logits
    assert after.shape[-1] == 15 and model.config.vocab_size == 15
    assert_near(after[..., :11], before, LOGITS)
    model.save_pretrained(tmp_path)
    loaded = KRUForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, after)


@EVERY
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_windows_state_and_gradients(options, reentrant):
    model = tiny_model(**options).train()

    def windows():
        model.zero_grad()
        state, losses = None, []
        for part, detached in zip(IDS.split(2, 1), (False, True, False), strict=True):
            out = model(input_ids=part, labels=part, past_key_values=state, use_cache=True)
            state = out.past_key_values.detach() if detached else out.past_key_values
            losses.append(out.loss)
        sum(losses).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        return [loss.item() for loss in losses], state.states, grads

    losses, states, grads = windows()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    found, found_states, found_grads = windows()
    assert found == pytest.approx(losses, abs=LOGITS)
    for state, expected in zip(found_states, states, strict=True):
        assert_near(state, expected, LOGITS)
    for name, grad in grads.items():
        assert_near(found_grads[name], grad, RELATIVE[torch.float32])
    assert model(input_ids=IDS).past_key_values.get_seq_length() == IDS.shape[1]  # the config's default
    assert model(input_ids=IDS, use_cache=False).past_key_values is None


@EVERY
def test_hidden_states_embeds_and_tuple(options):
    model = tiny_model(**options)
    output = model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(hidden.shape[:2] == IDS.shape for hidden in output.hidden_states)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, output.logits)
    width = embeds.shape[-1]
    for wrong in (embeds[:, :0], embeds[..., :-1], embeds[0]):
        with pytest.raises(ValueError, match=rf"inputs_embeds must have the shape \(B, T, {width}\), got \("):
            model(inputs_embeds=wrong)
    assert torch.equal(model(IDS, return_dict=False)[0], output.logits)
    assert_near(model(IDS, logits_to_keep=1).logits, output.logits[:, -1:], LOGITS)


@EVERY
def test_gradient_through_windows_is_that_of_the_whole(options):
    model = tiny_model(**options)
    targets = IDS.roll(-1, 1)
    expected = gradients(model, input_ids=IDS, labels=targets, shift_labels=targets)
    model.zero_grad()
    first = model(IDS[:, :3], labels=targets[:, :3], shift_labels=targets[:, :3], use_cache=True)
    second = model(
        IDS[:, 3:], labels=targets[:, 3:], shift_labels=targets[:, 3:], past_key_values=first.past_key_values
    )
    ((first.loss + second.loss) / 2).backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name], RELATIVE[torch.float32])


@EVERY
def test_loss_and_penalty(options):
    penalised = "cell_type" not in options  # gated cells have no penalty
    model = tiny_model(**({"unitary_loss_coef": 0.5} if penalised else {}), **options)
    output = model(IDS, labels=IDS)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_near(output.loss, expected, RELATIVE[torch.float32])
    assert (output.unitary_loss > 0) == penalised
    trained = model.train()(IDS, labels=IDS)
    assert_near(trained.loss, expected + 0.5 * output.unitary_loss, RELATIVE[torch.float32])


class Sequences(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 1)) % 10 + 1
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_stock_trainer_counts_the_penalty_once_a_step(accumulation, tmp_path):
    """One SGD step over the 8 sequences: the update does not depend on how they are split."""
    model = tiny_model(unitary_loss_coef=0.5, initializer_range=0.02).train()
    batch = [Sequences()[index] for index in range(8)]
    ids = torch.stack([row["input_ids"] for row in batch])
    expected = gradients(model, input_ids=ids, labels=ids)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Sequences()).train()
    for name, parameter in model.named_parameters():
        assert_near((before[name] - parameter) / 0.1, expected[name], LOGITS)


def test_trainer_with_defaults_saves_and_evaluates(tmp_path):
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(tiny_model(), arguments, train_dataset=Sequences(), eval_dataset=Sequences())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("bad", [-1, 11])
def test_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, 11\), got {bad}"):
        tiny_model()(torch.tensor([[1, bad]]))


def test_bad_inputs_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    for shape in ((1, 0), (0, 1), (5,), (1, 2, 3)):
        with pytest.raises(ValueError, match="input_ids must have the shape .* at least one token"):
            model(torch.zeros(shape, dtype=torch.long))
    for shape in ((len(IDS), IDS.shape[1] - 1), (1, IDS.shape[1]), (len(IDS), 1, IDS.shape[1])):
        with pytest.raises(ValueError, match="attention_mask must have the shape"):
            model(IDS, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="holds a state of the shape"):
        model(IDS, past_key_values=model(IDS[:1], use_cache=True).past_key_values)


def test_counts_of_the_papers_network():
    model = KRUForCausalLM(tiny_config(block_type="plain"))
    assert model.num_recurrent_parameters() == 2 * (4 + 9)
    # The paper's counts: complex input map, N biases, factors, real readout with its bias.
    assert sum(p.numel() for p in model.parameters()) == 11 * 12 + 6 + 26 + 12 * 11 + 11


@pytest.mark.parametrize("options", [{"block_type": "residual"}, {"block_type": "plain"}, *GATED], ids=str)
def test_compiles_without_a_break(options):
    model = tiny_model(**options).train()
    expected = gradients(model, input_ids=IDS, labels=IDS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    for name, value in expected.items():
        assert_near(model.get_parameter(name).grad, value, LOGITS)
