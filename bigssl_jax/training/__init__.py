"""Training: one step, one loop, and what they need: state, optimizers, checkpoints, metrics."""
