"""What makes a step the same on any number of ranks: keyed randomness, slices, BatchNorm over ranks."""
