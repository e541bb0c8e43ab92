"""Training of Kronecker recurrent models and of their baselines: one loop, one file a task, one YAML a recipe."""
