"""Training: the loop, its checkpoints, and the Ray worker round it."""
