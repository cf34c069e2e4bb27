"""The optimizer step, the loop around it, and evaluation. Its rooms are handed to it as arguments."""
