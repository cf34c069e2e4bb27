"""Checkpoints: files committed together, state by name, the run folder and its lock, the trained model."""
