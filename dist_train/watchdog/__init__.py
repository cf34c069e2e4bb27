"""Finds the rank that failed, hangs or has gone, and reports what every rank was doing."""
