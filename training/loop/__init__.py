"""A run: its options, steps, checkpoints, figures and end."""
