"""From a score to a decision: calibration, intervals, reasons, segments, and the report."""
