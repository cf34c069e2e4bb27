"""Where metrics go: metrics.jsonl always, Weights & Biases and the screen beside it."""
