"""Faster implementations for one machine, each equal to what it replaces; they step aside where they do not apply."""
