"""Checks and measurements on a machine with one GPU. README.md says how they are started."""
