"""Models: baselines, heads, sizes from a budget, from options to a model, optimizers."""
