"""Training: the loop, its checkpoints, the Ray worker that runs it, and sweeps."""
