"""How a step is computed: one object per mode, chosen in `choose.py`."""
