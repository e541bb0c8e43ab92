"""torch.func, forward-mode and second derivatives: the definition has them, and no engine drops one silently."""

import pytest
import torch
from helpers import BLOCKS, GATED, LOGITS, RELATIVE, assert_near, loud, tiny_config, tiny_model
from problems import problem
from torch.autograd import forward_ad

from kru_hf import KRUForPianoRoll, KRUForSequenceClassification, kron_scan
from kru_hf.cells import CELLS
from kru_hf.maps import normed_linear

IDS = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(0))
P = problem("kru", [(2, 2), (3, 3)], 2, 4)
INPUTS, FACTORS, BIAS = P.inputs.float(), [f.float() for f in P.factors], P.bias.float()


def scan_of(cell):
    """inputs (B, T, 2, N), backend -> states, by factors that are not trained; further gates read the planes' sum."""
    further = CELLS[cell].planes - 2
    factors = [torch.cat((factor, *[factor[:1]] * further)) for factor in FACTORS]
    bias = BIAS.expand(CELLS[cell].bias_shape(len(BIAS)))

    def scan(inputs, backend):
        planes = torch.cat((inputs, *[inputs.sum(2, keepdim=True)] * further), 2)
        return kron_scan(planes, factors, bias, cell=cell, backend=backend)[0]

    return scan


EVERY_CELL = pytest.mark.parametrize("function", [pytest.param(scan_of(cell), id=cell) for cell in CELLS])


@EVERY_CELL
def test_forward_mode_equals_reverse_mode(function):
    inputs, tangent = INPUTS, torch.randn(INPUTS.shape)
    weights = torch.randn(function(inputs, "reference").shape)
    leaf = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(leaf, "auto") * weights).sum(), leaf)
    expected = (gradient * tangent).sum()
    with forward_ad.dual_level():
        states = function(forward_ad.make_dual(inputs, tangent), "auto")
        found = (forward_ad.unpack_dual(states).tangent * weights).sum()
    assert_near(found, expected, RELATIVE[torch.float32])
    found = torch.func.jvp(lambda x: (function(x, "auto") * weights).sum(), (inputs,), (tangent,))[1]
    assert_near(found, expected, RELATIVE[torch.float32])


@pytest.mark.parametrize("backend", ["portable", "cpu"])
@EVERY_CELL
def test_other_engines_refuse(function, backend):
    inputs = INPUTS
    message = f"backend '{backend}' has no forward-mode derivatives and no torch.func"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(inputs, inputs), backend)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: function(x, backend).sum())(inputs)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(lambda x: function(x, backend))(inputs.expand(3, *inputs.shape))


@pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
def test_functional_gradient_of_a_model(options):
    model = tiny_model(**options)
    model(IDS, labels=IDS).loss.backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (IDS,), {"labels": IDS}).loss

    gradient = torch.func.grad(loss)(parameters)
    for name, parameter in model.named_parameters():
        assert_near(gradient[name], parameter.grad, LOGITS)
    tangent = {name: torch.randn_like(p) for name, p in parameters.items()}
    expected = sum((gradient[name] * tangent[name]).sum() for name in parameters)
    assert_near(torch.func.jvp(loss, (parameters,), (tangent,))[1], expected, LOGITS)


def test_samples_of_a_model_by_vmap():
    """Per-sample gradients: values cannot be looked at in there, and are not checked."""
    model, mask = tiny_model(), torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, ids, mask):
        inputs = {"labels": ids[None], "attention_mask": mask[None], "use_cache": False}
        return torch.func.functional_call(model, values, (ids[None],), inputs).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, IDS, mask)
    for sample in range(2):
        expected = torch.func.grad(loss)(parameters, IDS[sample], mask[sample])
        for name in parameters:
            assert_near(found[name][sample], expected[name], LOGITS)
    roll = KRUForPianoRoll(tiny_config(input_size=3)).eval()
    frames = torch.randint(2, (4, 5, 3)).float()
    each = torch.func.vmap(lambda x: roll(x[None], use_cache=False).logits[0])(frames)
    assert_near(each, roll(frames).logits, LOGITS)


def test_vmap_over_masks():
    masks = torch.tensor([[[1, 1, 0, 1]] * 2, [[0, 1, 1, 0]] * 2]).bool()
    inputs, factors, bias = (INPUTS, FACTORS, BIAS)
    found = torch.func.vmap(lambda mask: kron_scan(inputs, factors, bias, None, mask)[0])(masks)
    for mask, states in zip(masks, found, strict=True):
        assert_near(states, kron_scan(inputs, factors, bias, None, mask)[0], RELATIVE[torch.float32])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("backend", ["portable", "cpu"])
@EVERY_CELL
def test_second_derivatives_are_refused(function, backend, power):
    """Also those of a sum, whose gradient is a constant that nothing differentiates on the way in."""
    inputs = INPUTS.requires_grad_()
    (gradient,) = torch.autograd.grad(function(inputs, backend).pow(power).sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_of_a_model(power, choose_backend):
    """A penalty on gradients, with everything between the recurrence and the loss, against finite differences."""
    choose_backend("reference")
    torch.manual_seed(0)
    config = tiny_config(block_type="plain", num_labels=2)
    model = loud(KRUForSequenceClassification(config)).eval().double()
    x = torch.randn(2, 3, config.hidden_size, dtype=torch.float64, requires_grad=True)

    def penalty():
        logits = model(inputs_embeds=x).logits.pow(power).sum()
        return torch.autograd.grad(logits, x, create_graph=True)[0].square().sum()

    penalty().backward()
    for parameter in (model.score.weight, model.model.layers[0].recurrence.factors[1]):
        step = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-5 * step
            with torch.enable_grad():
                above = penalty().item()
            parameter -= 2e-5 * step
            with torch.enable_grad():
                below = penalty().item()
            parameter += 1e-5 * step
        slope = (parameter.grad * step).sum().item()
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_second_derivatives_of_a_normed_map():
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, weight: normed_linear(x, module, 1e-6), (x, module.weight))
