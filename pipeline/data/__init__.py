"""Data: sources, prepared records and token shards, and the training feed."""
