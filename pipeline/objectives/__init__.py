"""What the model learns from. Plain torch; nothing here knows of Ray."""
