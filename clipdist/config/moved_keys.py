"""Keys of older configurations, and where their values go now."""

from __future__ import annotations

MOVED = {
    "launch.qos": "launch.slurm.qos",
    "launch.constraint": "launch.slurm.constraint",
    "launch.exclude": "launch.slurm.exclude",
    "launch.dependency": "launch.slurm.dependency",
    "launch.comment": "launch.slurm.comment",
    "launch.container": "launch.slurm.container-image",
}
