"""A configuration that does not fit in; settings that may make it fit out, the kindest first.

Kind is what costs no speed and changes least: smaller micro-batches, activations computed twice, state divided among
ranks, state in the host's memory, more nodes. Where none of them is enough alone they are added up in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from clipdist.config import Config

MOST_NODES = 64
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
Change = tuple[Config, list[str]]  # and the settings in words of the command line


def remedies(config: Config, world: int, device: str) -> Iterator[Change]:
    """Changes to try, one after the other."""
    single = [
        *micro_batches(config, world),
        *checkpointing(config),
        *stages(config),
        *offloads(config, device),
        *nodes(config, world),
    ]
    yield from single
    yield from _together(config, world, device)


def _together(config: Config, world: int, device: str) -> Iterator[Change]:
    changed, said = config, list[str]()
    steps = (
        lambda: micro_batches(changed, world)[-1:],
        lambda: checkpointing(changed),
        lambda: stages(changed)[-1:],
        lambda: offloads(changed, device),
    )
    for step in steps:
        for changed_more, words in step():
            changed, said = changed_more, [*said, *words]
            yield changed, said
    for more, words in nodes(changed, world):
        yield more, [*said, *words]


def micro_batches(config: Config, world: int) -> list[Change]:
    """Smaller ones, largest first."""
    share = config.train.global_batch // world
    now = config.train.micro_batch or share
    smaller = [size for size in range(now - 1, 0, -1) if share % size == 0]
    return [
        (replace(config, train=replace(config.train, micro_batch=size)), [f"train.micro_batch={size}"])
        for size in smaller
    ]


def checkpointing(config: Config) -> list[Change]:
    if config.engine.activation_checkpointing:
        return []
    engine = replace(config.engine, activation_checkpointing=True)
    return [(replace(config, engine=engine), ["engine.activation_checkpointing=true"])]


def stages(config: Config) -> list[Change]:
    every: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    return [
        (replace(config, engine=replace(config.engine, zero_stage=stage)), [f"engine.zero_stage={stage}"])
        for stage in every
        if stage > config.engine.zero_stage
    ]


def offloads(config: Config, device: str) -> list[Change]:
    if device == "cpu" or "offload_optimizer" in (config.engine.deepspeed.get("zero_optimization") or {}):
        return []
    zero = {**(config.engine.deepspeed.get("zero_optimization") or {}), **OFFLOAD["zero_optimization"]}
    stage = max(1, config.engine.zero_stage)
    engine = replace(config.engine, deepspeed={**config.engine.deepspeed, "zero_optimization": zero}, zero_stage=stage)
    words = ["engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    if stage != config.engine.zero_stage:
        words.append(f"engine.zero_stage={stage}")
    return [(replace(config, engine=engine), words)]


def nodes(config: Config, world: int) -> list[Change]:
    """More nodes, as far as the global batch can be divided among their ranks."""
    found, count, batch = [], config.launch.nodes * 2, config.train.global_batch
    while count <= MOST_NODES and batch % (world // config.launch.nodes * count) == 0:
        launch = replace(config.launch, nodes=count)
        share = batch // (world // config.launch.nodes * count)
        micro = config.train.micro_batch
        train = replace(config.train, micro_batch=micro if micro and share % micro == 0 else 0)
        words = [f"launch.nodes={count}"] + ([] if train.micro_batch == micro else ["train.micro_batch=0"])
        found.append((replace(config, launch=launch, train=train), words))
        count *= 2
    return found
