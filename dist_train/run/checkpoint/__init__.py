"""Keeping what was trained: parts committed together, state by name, the run folder and its lock."""
