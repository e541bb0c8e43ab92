"""What people hang on linear maps reaches every one of them: hooks, adapters, pruning, quantization, offloading."""

import pytest
import torch
from helpers import GATED, LOGITS, WIRINGS, assert_near, tiny_model
from torch import nn
from torch.nn.utils import prune

from kru_hf import KRUForCausalLM
from kru_hf.kronecker_linear import KroneckerLinear

EVERY = pytest.mark.parametrize("options", [*WIRINGS, *GATED], ids=str)
EIGHT_BITS = 0.05  # of the largest logit
IDS = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def maps(model):
    """The linear maps of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, KroneckerLinear))}


class LowRankAdapter(nn.Module):
    """A map and a trained correction of rank 1, as LoRA puts it in the map's place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(1, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 1))

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.mT @ self.b.mT


@EVERY
def test_hooks_reach_every_map(options):
    model = tiny_model(**options)
    expected, seen = model(IDS).logits, set()
    for name, module in maps(model).items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.add(name))
    assert_near(model(IDS).logits, expected, LOGITS)
    assert seen == set(maps(model))


@EVERY
def test_adapters_of_every_map_are_trained(options):
    model = tiny_model(**options).requires_grad_(False)
    plain, names = model(IDS).logits, list(maps(model))
    for name in names:
        model.set_submodule(name, LowRankAdapter(model.get_submodule(name)))
    out = model(IDS, labels=IDS)
    assert (out.logits - plain).abs().max() > LOGITS
    out.loss.backward()
    for name in names:
        assert model.get_submodule(name).b.grad.abs().max() > 0, name
    for name in names:  # the correction is a change of the weight
        adapter = model.get_submodule(name)
        merged = nn.Linear(
            adapter.a.shape[1], adapter.b.shape[0], bias=getattr(adapter.base_layer, "bias", None) is not None
        )
        with torch.no_grad():
            merged.weight.copy_(adapter.base_layer.weight + adapter.b @ adapter.a)
            if merged.bias is not None:
                merged.bias.copy_(adapter.base_layer.bias)
        model.set_submodule(name, merged)
    assert_near(model(IDS).logits, out.logits, LOGITS)


class EmbeddingAdapter(nn.Module):
    """What adapters put in an embedding's place: a module with its weight, and no other attribute of it."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shift = nn.Parameter(torch.full((base_layer.embedding_dim,), 0.5))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, ids):
        return self.base_layer(ids) + self.shift


@EVERY
def test_an_adapter_of_the_embedding_is_trained(options):
    model = tiny_model(**options).requires_grad_(False)
    plain = model(IDS).logits
    model.set_input_embeddings(EmbeddingAdapter(model.get_input_embeddings()))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert (out.logits - plain).abs().max() > LOGITS
    assert model.get_input_embeddings().shift.grad.abs().max() > 0
    with pytest.raises(ValueError, match="input_ids must be in"):
        model(IDS + 1000)


def test_pruned_weights_count_at_the_first_call():
    model = tiny_model(wiring="plain")
    prune.random_unstructured(model.lm_head, "weight", amount=0.5)
    with torch.no_grad():
        model.lm_head.weight_orig.mul_(2)  # the weight itself is made anew by a hook, when the map is called
    pruned = model(IDS).logits
    prune.remove(model.lm_head, "weight")
    assert_near(pruned, model(IDS).logits, LOGITS)


class Int8Linear(nn.Module):
    """A map as quantizers put it in a dense one's place: weights in 8 bits, no parameter."""

    def __init__(self, base):
        super().__init__()
        self.scale, self.bias = base.weight.detach().abs().max() / 127, base.bias
        self.register_buffer("codes", (base.weight.detach() / self.scale).round().to(torch.int8))

    def weight(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.bias)


@pytest.mark.parametrize("options", [{"wiring": "residual"}, {"wiring": "plain", "io_rank": 3}, {"wiring": "plain"}])
def test_quantized_maps_are_called(options):
    model = tiny_model(**options)
    expected = model(IDS).logits
    for name, module in maps(model).items():
        model.set_submodule(name, Int8Linear(module))
    found = model(IDS).logits
    assert not torch.equal(found, expected)
    assert_near(found, expected, EIGHT_BITS)


@EVERY
@pytest.mark.parametrize("place", ["all", "layers"])
def test_weights_on_disk_give_the_same_logits(options, place, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "model")
    devices = {"": "disk"} if place == "all" else {"model.layers": "disk", "lm_head": "cpu"}
    if place == "layers":
        devices |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "readout")}
    loaded = KRUForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "weights", dtype=torch.float32
    )
    assert loaded.model.layers[0].recurrence.bias.is_meta
    with torch.no_grad():
        assert_near(loaded(IDS).logits, model(IDS).logits, LOGITS)
    assert_near(loaded.unitary_loss(), model.unitary_loss(), LOGITS)
