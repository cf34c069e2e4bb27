"""A trained model in other programs: exported, and behind HTTP."""
