"""Compute how ranks share the global batch, and the number of steps of a run."""

from __future__ import annotations

from clipdist.config.schema import Config, Launch, Train
from clipdist.errors import UserError


def check_ranks(config: Config, world: int) -> None:
    """Check that `world` ranks divide the global batch, and micro-batches a rank's share of it.

    Raises:
        UserError: they do not; suggests a value that does.
    """
    batch = config.train.global_batch
    if batch % world:
        below = max(b for b in range(1, batch + 1) if b % world == 0) if batch >= world else world
        raise UserError(
            f"train.global_batch={batch} cannot be divided among {world} ranks; set it to a multiple, such as {below}"
        )
    share, micro = batch // world, config.train.micro_batch
    if micro and share % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} pairs of a rank (train.global_batch={batch} on"
            f" {world} ranks); set it to one of {', '.join(str(m) for m in range(1, share + 1) if share % m == 0)}"
        )


def launched_ranks(launch: Launch) -> int:
    """Return the number of ranks that launch/submit.py starts."""
    return 1 if launch.cluster == "debug" else launch.nodes * launch.gpus


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Return the steps of the whole run, from train.samples, train.steps or train.epochs."""
    if train.samples:
        return -(-train.samples // train.global_batch)
    return train.steps or train.epochs * steps_per_epoch
