"""torch.func and forward-mode derivatives: the definition takes them, and no engine drops a tangent without a word."""

import pytest
import torch
from helpers import GATED, LOGITS, RELATIVE, WIRINGS, assert_near, random_problem, tiny_model
from torch.autograd import forward_ad

from kru_hf import kru_gated_scan, kru_scan

IDS = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(0))
PROBLEM = random_problem([(2, 2), (3, 3)], 2, 4)


def scan(inputs, backend):
    """States of the complex cell with factors that are not trained."""
    return kru_scan(inputs, [f.detach() for f in PROBLEM.factors], PROBLEM.bias.detach(), backend=backend)[0]


def gated_scan(inputs, backend):
    """The same for the GRU, whose three gates read the planes of the inputs and their sum."""
    planes = torch.cat((inputs, inputs.sum(2, keepdim=True)), 2)
    factors = [torch.cat((f, f[:1])).detach() for f in PROBLEM.factors]
    return kru_gated_scan(planes, factors, PROBLEM.bias.detach().expand(4, -1), cell="gru", backend=backend)[0]


@pytest.mark.parametrize("function", [scan, gated_scan])
def test_forward_mode_equals_reverse_mode(function):
    inputs, tangent = PROBLEM.inputs.detach(), torch.randn(PROBLEM.inputs.shape)
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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("function", [scan, gated_scan])
def test_other_engines_refuse(function, backend):
    inputs = PROBLEM.inputs.detach()
    message = f"backend '{backend}' has no forward-mode derivatives and no torch.func"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(inputs, inputs), backend)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: function(x, backend).sum())(inputs)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(lambda x: function(x, backend))(inputs.expand(3, *inputs.shape))


@pytest.mark.parametrize("options", [*WIRINGS, *GATED], ids=str)
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
