"""Ranks: joining them, their collectives, what they decide together."""
