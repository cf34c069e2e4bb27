"""The commands of a checkout. `launch/VERB.py` runs the same code as `dist-train VERB`."""
