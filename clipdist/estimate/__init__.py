"""What a run will need, known before it queues: a configuration in, parameters, memory, traffic, time and disk out."""

from clipdist.estimate.estimate import Estimate, make_estimate

__all__ = ["Estimate", "make_estimate"]
