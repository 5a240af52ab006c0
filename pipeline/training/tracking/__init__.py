"""Where training's metrics go: metrics.jsonl always, TensorBoard, Weights & Biases and Ray's endpoint when asked."""
