"""What the ranks of one machine share. No torch."""

from __future__ import annotations

import os


def ranks_per_node() -> int:
    """Return how many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def cores_of_rank() -> int:
    """Return how many CPU cores this rank may use: its share of the node's, at most those that it is bound to.

    The node's are those that Slurm gave the job, else those of the process that started this one. A rank may be bound
    by Slurm, numactl or deepspeed --bind_cores_to_rank.
    """
    own = len(os.sched_getaffinity(0))
    together = int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(os.getppid())))
    return max(1, min(own, together // ranks_per_node()))
