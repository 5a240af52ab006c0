"""How good the vectors are, and what others can use: scores, a map, exports."""
