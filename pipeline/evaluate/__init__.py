"""How good the vectors are: retrieval metrics, BEIR folders, BM25 beside."""
