"""What people hang on linear maps reaches every one of them: hooks, adapters, pruning, quantization, offloading."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, assert_near, loud, tiny_config, tiny_model
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from kru_hf import (
    KRULSTM,
    KRUForCausalLM,
    KRUForPianoRoll,
    KRUForSequenceClassification,
    KRUForTokenClassification,
    kroneckerize,
)
from kru_hf.maps import KroneckerLinear, _as_installed, is_bare
from kru_hf.recurrence import KRURecurrence

EVERY = pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
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


class EmbeddingAdapter(nn.Module):
    """What adapters put in an embedding's place: a module with its weight, and no other attribute of it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.b = nn.Parameter(torch.full((base.embedding_dim,), 0.5))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, ids):
        return self.base_layer(ids) + self.b


@EVERY
def test_adapters_are_trained(options):
    model = tiny_model(**options).requires_grad_(False)
    model.set_input_embeddings(EmbeddingAdapter(model.get_input_embeddings()))
    shifted, names = model(IDS).logits, list(maps(model))
    assert (shifted - tiny_model(**options)(IDS).logits).abs().max() > LOGITS
    for name in names:
        model.set_submodule(name, LowRankAdapter(model.get_submodule(name)))
    out = model(IDS, labels=IDS)
    assert (out.logits - shifted).abs().max() > LOGITS
    out.loss.backward()
    assert all(module.b.grad.abs().max() > 0 for module in model.modules() if hasattr(module, "base_layer"))
    with pytest.raises(ValueError, match="input_ids must be in"):
        model(IDS + 1000)
    for name in names:  # the correction is a change of the weight
        adapter = model.get_submodule(name)
        bias = getattr(adapter.base_layer, "bias", None)
        merged = nn.Linear(adapter.base_layer.in_features, adapter.base_layer.out_features, bias=bias is not None)
        merged.weight = nn.Parameter(adapter.base_layer.weight + adapter.b @ adapter.a)
        merged.bias = bias
        model.set_submodule(name, merged)
    assert_near(model(IDS).logits, out.logits, LOGITS)


def test_pruned_weights_count_at_the_first_call():
    model = tiny_model(block_type="plain")
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
        self.scale, self.bias = base.weight.detach().abs().max() / 127, getattr(base, "bias", None)
        self.register_buffer("codes", (base.weight.detach() / self.scale).round().to(torch.int8))

    def weight(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.bias)


@EVERY
@pytest.mark.parametrize("place", ["all", "layers"])
def test_weights_on_disk_give_the_same_logits(options, place, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "model")
    devices = {"": "disk"} if place == "all" else {"model.layers": "disk", "lm_head": "cpu"}
    if place == "layers":
        devices |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm")}
    loaded = KRUForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "weights", dtype=torch.float32
    )
    assert loaded.model.layers[0].recurrence.bias.is_meta
    with torch.no_grad():
        assert_near(loaded(IDS).logits, model(IDS).logits, LOGITS)
    assert_near(loaded.unitary_loss(), model.unitary_loss(), LOGITS)


def every_head(**options):
    """Each head with an input for it: its linear maps are all that a call has to reach."""
    ids, frames = {"input_ids": IDS}, {"input_values": (torch.rand(2, 5, 7) < 0.5).float()}
    options = {"num_labels": 3} | options
    yield tiny_model(**options), ids | {"labels": IDS}
    for head, labels in ((KRUForSequenceClassification, IDS[:, 0] % 3), (KRUForTokenClassification, IDS % 3)):
        for more in ({}, {"bidirectional": True}, {"input_size": 7}):
            inputs = frames if "input_size" in more else ids
            yield loud(head(tiny_config(**options, **more))), inputs | {"labels": labels}
    yield loud(KRUForPianoRoll(tiny_config(**options, input_size=7))), frames


KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@contextlib.contextmanager
def of_all_modules(**given):
    """Hooks of all modules, by their kinds."""
    handles = [getattr(hooks, f"register_module_{kind}")(hook) for kind, hook in given.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore:.*[Bb]ackward hook")
@EVERY
def test_hooks_reach_every_map(options):
    """Those of all modules, and forward hooks of each map."""
    for model, inputs in every_head(**options):
        expected, seen = model.train()(**inputs), {kind: set() for kind in (*KINDS, "own")}
        for kind in KINDS:  # one alone: each has to be looked for
            with of_all_modules(**{kind: lambda module, *_, to=seen[kind]: to.add(module)}):
                out = model(**inputs)
                out.loss.backward()
            assert_near(out.logits, expected.logits, LOGITS)
        for module in maps(model).values():
            module.register_forward_hook(lambda module, *_, to=seen["own"]: to.add(module))
        assert_near(model(**inputs).logits, expected.logits, LOGITS)
        for kind, modules in seen.items():
            missing = {name for name, module in maps(model).items() if module not in modules}
            assert not missing, f"{type(model).__name__}, {kind}"


def test_what_a_hook_of_all_modules_returns_counts():
    model = tiny_model(block_type="plain")
    with of_all_modules(forward_hook=lambda module, args, output: 2 * output if module is model.lm_head else None):
        doubled = model(IDS).logits
    assert_near(doubled, 2 * model(IDS).logits, LOGITS)


def test_layers_and_shrunk_rnns_call_their_maps():
    layer, lstm = KRULSTM(4, 6, factor_size=2, num_layers=2, bidirectional=True), nn.LSTM(4, 6)
    kroneckerize(lstm, factor_shapes=[(2, 2), (3, 3)])
    seen = set()
    with of_all_modules(forward_hook=lambda module, *_: seen.add(module)):
        layer(torch.randn(3, 2, 4))
        lstm(torch.randn(3, 2, 4))
    assert {*layer.input_maps, *layer.recurrences, *lstm.parametrizations["weight_hh_l0"]} <= seen


def test_a_plain_map_is_bare():
    """Else the states would be copied for each readout."""
    assert is_bare(nn.Linear(3, 4)) and is_bare(KroneckerLinear(4, 4, 2))


@EVERY
@pytest.mark.parametrize("place", ["nn.Linear.forward", "F.linear", "function mode"])
def test_a_replaced_product_is_used(options, place):
    """Every map of half its weight: as the whole model with halved weights."""

    class Halved(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out / 2 if function is torch._C._nn.linear else out

    forward, linear = nn.Linear.forward, nn.functional.linear
    replacements = {
        "nn.Linear.forward": mock.patch.object(nn.Linear, "forward", lambda self, x: forward(self, x) / 2),
        "F.linear": mock.patch.object(nn.functional, "linear", lambda *args: linear(*args) / 2),
        "function mode": Halved(),
    }
    model = tiny_model(**options)
    with torch.no_grad(), replacements[place]:
        found = model(IDS).logits
    for module in maps(model).values():
        if not isinstance(module, KroneckerLinear):
            halved = [module.weight, module.bias]
        else:  # its forward is its own, its product is F.linear's
            halved = [] if place == "nn.Linear.forward" else [module.blocks]
        for parameter in filter(lambda parameter: parameter is not None, halved):
            parameter.data /= 2
    assert_near(found, model(IDS).logits, LOGITS)


def test_a_forward_that_was_replaced_before_the_import_is_known():
    @functools.wraps(nn.Linear.forward)
    def watched(self, x):
        return x

    assert _as_installed(watched, nn.modules.linear) is None
    assert _as_installed(nn.Linear.forward, nn.modules.linear) is nn.Linear.forward


class Coded(torch.Tensor):
    """Whole numbers and a scale a row, which only F.linear understands, as quantizing libraries make of a weight."""

    @staticmethod
    def __new__(cls, weight):
        new = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        new.scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        new.numbers = (weight / new.scale).round().to(torch.int8)
        return new

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(*(a.numbers * a.scale if isinstance(a, Coded) else a for a in args))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Coded does not know {function}")


@EVERY
@pytest.mark.parametrize("part", ["module", "weight", "bias"])
def test_quantized_maps_are_called(options, part):
    for model, inputs in every_head(**options):
        for module in maps(model).values():
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
        expected = model.eval()(**inputs).logits
        for name, module in maps(model).items():
            if part == "module":
                model.set_submodule(name, Int8Linear(module))
            elif getattr(module, part, None) is not None and isinstance(module, nn.Linear):
                setattr(module, part, nn.Parameter(Coded(getattr(module, part).detach()), requires_grad=False))
        found = model(**inputs).logits
        assert not torch.equal(found, expected)
        assert_near(found, expected, EIGHT_BITS)
        if isinstance(model, KRUForPianoRoll):
            assert model.generate_piano_roll(num_frames=2, seed=0).shape == (1, 2, 7)


def test_a_quantized_rnn_is_not_shrunk():
    lstm = nn.LSTM(4, 6)
    lstm.weight_hh_l0 = nn.Parameter(Coded(lstm.weight_hh_l0.detach()), requires_grad=False)
    with pytest.raises(ValueError, match="weight_hh_l0 is a Coded, no plain parameter: kroneckerize before"):
        kroneckerize(lstm, factor_shapes=[(2, 2), (3, 3)])


class LowRankSum(nn.Module):
    """LoRA on a parameter: W + B A for each plane of a factor."""

    def __init__(self, weight):
        super().__init__()
        self.a = nn.Parameter(torch.randn(*weight.shape[:-2], 1, weight.shape[-1]))
        self.b = nn.Parameter(0.1 * torch.randn(*weight.shape[:-1], 1))

    def forward(self, weight):
        return weight + self.b @ self.a


class FactorsAdapter(nn.Module):
    """As peft puts it in the place of a module whose parameters it adapts: called with an input, and only so."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.b = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, *args, **kwargs):
        assert isinstance(x, torch.Tensor)
        return [factor * self.b for factor in self.base_layer(x, *args, **kwargs)]


@EVERY
@pytest.mark.parametrize("place", ["parameter", "module"])
def test_an_adapter_of_the_factors_is_trained(options, place):
    model = tiny_model(**options).train().requires_grad_(False)
    plain, adapters = model(IDS, labels=IDS), []
    for cell in [module for module in model.modules() if isinstance(module, KRURecurrence)]:
        if place == "module":
            cell.factors = FactorsAdapter(cell.factors)
            adapters.append(cell.factors)
            continue
        for index, factor in enumerate(list(cell.factors)):
            adapters.append(LowRankSum(factor))
            parametrize.register_parametrization(cell.factors, str(index), adapters[-1])
    out = model(IDS, labels=IDS)
    assert (out.logits - plain.logits).abs().max() > LOGITS
    out.loss.backward()
    assert all(adapter.b.grad.abs().max() > 0 for adapter in adapters)
    if not model.config.gated:
        assert out.unitary_loss != plain.unitary_loss
    for module in model.modules():  # the adapters are a change of the factors
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    assert_near(model(IDS).logits, out.logits, LOGITS)
