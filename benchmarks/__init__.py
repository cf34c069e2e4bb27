"""What is measured, and with whom it is compared: `python -m benchmarks`, or `make bench`."""
