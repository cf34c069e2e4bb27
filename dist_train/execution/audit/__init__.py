"""The audit of the exact mode: steps are computed again by other ranks, and a rank that computes wrongly is named."""
