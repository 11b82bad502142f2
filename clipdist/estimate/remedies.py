"""Changes to a configuration that may make it fit into memory, those that change training least first.

The order: smaller micro-batches, activation checkpointing, a higher ZeRO stage, the optimiser in the host's memory,
more nodes; then these together, added up in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from clipdist.config import Config

MOST_NODES = 64
Remedy = tuple[Config, list[str]]  # and its settings as words of the command line


def remedies(config: Config, world: int, device: str) -> Iterator[Remedy]:
    """Yield the changes to try, one after the other."""
    kinds = (partial(micro_batches, world=world), checkpointing, stages, partial(offloads, device=device))
    for kind in kinds:
        yield from kind(config)
    yield from nodes(config, world)
    together, words = config, list[str]()
    for kind in kinds:
        if found := kind(together):
            together, words = found[-1][0], [*words, *found[-1][1]]
            yield together, words
    for changed, more in nodes(together, world):
        yield changed, [*words, *more]


def micro_batches(config: Config, world: int) -> list[Remedy]:
    """Return smaller micro-batches, largest first."""
    share = config.train.global_batch // world
    now = config.train.micro_batch or share
    return [
        (replace(config, train=replace(config.train, micro_batch=size)), [f"train.micro_batch={size}"])
        for size in range(now - 1, 0, -1)
        if share % size == 0 and size % (config.model.batchnorm_group or 1) == 0
    ]


def checkpointing(config: Config) -> list[Remedy]:
    if config.engine.activation_checkpointing:
        return []
    engine = replace(config.engine, activation_checkpointing=True)
    return [(replace(config, engine=engine), ["engine.activation_checkpointing=true"])]


def stages(config: Config) -> list[Remedy]:
    return [
        (replace(config, engine=replace(config.engine, zero_stage=stage)), [f"engine.zero_stage={stage}"])
        for stage in (1, 2, 3)
        if stage > config.engine.zero_stage
    ]


def offloads(config: Config, device: str) -> list[Remedy]:
    engine = config.engine
    zero = engine.deepspeed.get("zero_optimization") or {}
    if device == "cpu" or "offload_optimizer" in zero:
        return []
    if config.optim.name != "adamw" or config.optim.clip_each:
        return []
    settings = {**engine.deepspeed, "zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}
    changed = replace(engine, deepspeed=settings, zero_stage=max(1, engine.zero_stage))
    words = ["engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    if engine.zero_stage == 0:
        words.append("engine.zero_stage=1")
    return [(replace(config, engine=changed), words)]


def nodes(config: Config, world: int) -> list[Remedy]:
    """Return more nodes, as far as their ranks divide the global batch."""
    found, count, per_node = [], config.launch.nodes * 2, world // config.launch.nodes
    batch, micro = config.train.global_batch, config.train.micro_batch
    while count <= MOST_NODES and batch % (per_node * count) == 0:
        words, train = [f"launch.nodes={count}"], config.train
        share, group = batch // (per_node * count), config.model.batchnorm_group or 1
        if micro and share % micro:
            words, train = [*words, "train.micro_batch=0"], replace(train, micro_batch=0)
        if share % group and group % share:
            break
        found.append((replace(config, launch=replace(config.launch, nodes=count), train=train), words))
        count *= 2
    return found
