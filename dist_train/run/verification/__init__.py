"""Runs are replayed and compared with what they claim: whole, in windows, and against a witness."""
