"""Models and their losses, on disk and in memory. Plain torch; no Ray."""
