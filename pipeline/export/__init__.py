"""What a trained model becomes for others: a folder of sentence-transformers, ONNX, an embedding matrix."""
