"""The machine: world, collectives, keyed randomness, stopping, console."""
