"""Rules over text: plain functions that know nothing of Ray or torch."""
