"""Batch inference over the cluster, and the stores that vectors go to."""
