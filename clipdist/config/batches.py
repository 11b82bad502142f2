"""Compute how ranks share the global batch, and the number of steps of a run."""

from __future__ import annotations

from clipdist.config.schema import Config, Launch, Train
from clipdist.errors import UserError


def check_ranks(config: Config, world: int) -> None:
    """Check that `world` ranks divide the global batch, micro-batches a rank's share of it, and BatchNorm's groups fit.

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
    group = config.model.batchnorm_group
    if group and share % group and group % share:
        fits = [size for size in range(2, batch + 1) if batch % size == 0 and not (share % size and size % share)]
        raise UserError(
            f"model.batchnorm_group={group}: neither divides the {share} pairs of a rank (train.global_batch={batch} on"
            f" {world} ranks) nor is a multiple of them; set it to one of {', '.join(map(str, fits))}"
        )
    if group and config.objectives.moco is not None and config.objectives.moco.queue:
        check_interleaved(config, world)


def check_interleaved(config: Config, world: int) -> None:
    """Check that every forward pass has whole blocks of two groups, whose rows MoCo's shuffle exchanges.

    Raises:
        UserError: BatchNorm has no groups, or a forward pass is no multiple of two of them.
    """
    group = config.model.batchnorm_group
    rows = config.train.micro_batch or config.train.global_batch // world
    if group == 0 or group % 2 or rows % (2 * group):
        fits = [size for size in range(2, rows // 2 + 1, 2) if rows % (2 * size) == 0]
        advice = f"one of {', '.join(map(str, fits))}" if fits else "2, and let each rank take a multiple of 4 pairs"
        raise UserError(
            f"model.batchnorm_group={group}: keys are shuffled between pairs of groups, of which the {rows} pairs of a"
            f" forward pass hold no whole number; set it to {advice}"
        )


def launched_ranks(launch: Launch) -> int:
    """Return the number of ranks that launch/submit.py starts."""
    return 1 if launch.cluster == "debug" else launch.nodes * launch.gpus


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Return the steps of the whole run, from train.samples, train.steps or train.epochs."""
    if train.samples:
        return -(-train.samples // train.global_batch)
    return train.steps or train.epochs * steps_per_epoch
