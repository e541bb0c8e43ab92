"""float16, whose numbers end at 65,504: results and gradients stay finite where states are small or large."""

import pytest
import torch
from helpers import BLOCKS, GATED, tiny_config
from torch import nn
from torch.nn import functional as F

from kru_hf import KRUForTokenClassification
from kru_hf.maps import normed_linear

HALF = 2e-3  # of the largest entry: two units in the last place of float16


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 3000.0])
def test_a_normed_map_is_that_of_float32(size):
    torch.manual_seed(0)
    module = nn.Linear(64, 5).half()
    x = (size * torch.randn(7, 64)).half().requires_grad_()
    normed_linear(x, module, 1e-6).float().square().sum().backward()
    wide = x.detach().float().requires_grad_()
    expected = F.linear(F.rms_norm(wide, (64,), eps=1e-6), module.weight.float(), module.bias.float())
    expected.square().sum().backward()
    found = normed_linear(x, module, 1e-6).float()
    assert (found - expected).abs().max() <= HALF * expected.abs().max()
    assert (x.grad.float() - wide.grad).abs().max() <= 5 * HALF * wide.grad.abs().max()


# Not residual blocks of gated cells: all is zero there until the first pixel, and the gradient of one norm after
# another at zero, 10^6 with this epsilon, is no number of float16 either way.
@pytest.mark.parametrize("options", [*BLOCKS, GATED[1]], ids=str)
def test_gradients_are_finite_where_the_input_begins_with_silence(options):
    torch.manual_seed(0)
    model = KRUForTokenClassification(tiny_config(input_size=1, num_labels=4, **options)).train()
    values = torch.cat([torch.zeros(2, 10, 1), torch.rand(2, 10, 1)], 1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_values=values, labels=torch.ones(2, 20, dtype=torch.long)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
