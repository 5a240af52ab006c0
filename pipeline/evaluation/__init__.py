"""Evaluation scores, a map of the vectors, and exports."""
