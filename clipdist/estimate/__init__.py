"""Predict a run's parameters, memory, traffic, time and disk from its configuration, before it queues."""

from clipdist.estimate.estimate import Estimate, make_estimate
from clipdist.estimate.table import full_table, summary

__all__ = ["Estimate", "full_table", "make_estimate", "summary"]
