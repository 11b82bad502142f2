"""Evaluation: model and data in, numbers out."""
