"""Training: state, step, losses, optimizer, metrics and checkpoints."""
