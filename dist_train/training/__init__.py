"""The optimizer step, the loop around it, and evaluation. Data, models and checkpoints come as arguments."""
