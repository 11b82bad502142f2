"""Checkpoints: their format, reading, writing, and which of them are kept."""
