"""Training of reward models: data, model, loop, checkpoints, export."""
