"""Trackers of metrics: metrics.jsonl always, Weights & Biases and the terminal beside it."""
