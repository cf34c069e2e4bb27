"""Trained models score rows: in one call, in files of any size, on several ranks; and say what moved a score."""
