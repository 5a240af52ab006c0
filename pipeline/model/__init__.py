"""Models. Plain torch; nothing here knows of Ray."""
