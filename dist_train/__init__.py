"""Trains classifiers for financial risk on tables: distributed, exact, resumable."""

__version__ = "0.2.0"
