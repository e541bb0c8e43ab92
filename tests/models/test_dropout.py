"""Each dropout zeroes what its name says, in training only."""

import pytest
import torch
from helpers import BLOCKS, GATED, tiny_model

EVERY = pytest.mark.parametrize("options", [*BLOCKS, *GATED], ids=str)
RESIDUAL = pytest.mark.parametrize("options", [w for w in [*BLOCKS, *GATED] if w["block_type"] == "residual"], ids=str)
ALL = 1 - 1e-9  # the probability 1 is not allowed
IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])


def seen_by(module, model):
    """The first argument of a module's calls while the model reads the tokens."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(IDS)
    handle.remove()
    return torch.cat(seen)


@EVERY
def test_state_dropout_hides_the_states_from_the_readout(options):
    model = tiny_model(state_dropout=ALL, **options)
    layer = model.model.layers[0]
    reader = layer.out_proj if options["block_type"] == "residual" else model.lm_head
    assert seen_by(reader, model).any()
    assert not seen_by(reader, model.train()).any()


@RESIDUAL
def test_hidden_dropout_leaves_nothing_but_the_residual_stream(options):
    model = tiny_model(hidden_dropout=ALL, **options)
    embedded = model.model.embed_tokens(IDS)
    assert not torch.equal(seen_by(model.model.norm, model), embedded)
    assert torch.equal(seen_by(model.model.norm, model.train()), embedded)


@RESIDUAL
def test_hidden_dropout_acts_on_both_branches(options):
    """Half of the entries stay as they came, of the recurrence's branch and of the feed-forward's."""
    model = tiny_model(hidden_dropout=0.5, **options).train()
    for layer in model.model.layers:
        for branch in filter(None, (layer.up or layer.out_proj, layer.feed_forward)):
            branch.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    layer = model.model.layers[0]
    hidden = torch.zeros(64, 5, 8)
    added = layer(hidden, None, None)[0]  # what is kept counts double
    branches = 1 if layer.feed_forward is None else 2
    assert set(added.unique().tolist()) == {2.0 * n for n in range(branches + 1)}
