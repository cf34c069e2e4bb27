"""Classifiers, and what makes them train alike on any number of ranks: BatchNorm over ranks, keyed dropout."""
