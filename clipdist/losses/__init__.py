"""Losses over the exact global batch, and the collectives that they use."""
