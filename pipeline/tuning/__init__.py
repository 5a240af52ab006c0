"""Sweeps: the same training again and again, with other values."""
