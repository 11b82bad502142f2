"""Training steps on drawn numbers, for benchmarks of memory: everything of the engine that they use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed  # noqa: F401  what is imported counts as the baseline
import open_clip  # noqa: F401
import torch

from clipdist.config import Config
from clipdist.distributed.rank import joined_ranks
from clipdist.engine.step import Engine
from clipdist.evals.audit import RandomBatches
from clipdist.models.build import built_for
from clipdist.objectives.make import make_objectives, prepare_model
from clipdist.objectives.teacher import open_teacher
from tools.bench.harness import timed
from tools.bench.peak_memory import MemoryGrowth, trim_heap


@contextmanager
def training_steps(config: Config, device: str) -> Iterator[Callable[[int], Any]]:
    """Build a model and its engine on cpu or cuda. Yield what takes a step on this rank's rows of one drawn batch."""
    with joined_ranks(device) as dist_env:
        torch.manual_seed(config.train.seed)
        model = built_for(config)
        objectives = make_objectives(config.objectives, model.spec.image_size)
        prepare_model(model, objectives)
        model.text_kind = "whole"  # the most memory that texts need, as in the plan
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        drawn = RandomBatches(config, model.spec).batch(0)
        share = len(drawn) // dist_env.world_size
        mine = drawn.rows(dist_env.rank * share, (dist_env.rank + 1) * share)
        batch = mine.each(lambda tensor: tensor.clone()).to(dist_env.device)
        del drawn, mine
        teacher = open_teacher(config, dist_env)
        engine = Engine(model.to(dist_env.device), objectives, config, dist_env, teacher, config.train.steps)
        yield lambda step: engine.train_step(batch, step=step, lr=config.optim.lr)


class StepMemory:
    """The memory of steps, in a process of its own that trains as `job` says: (configuration, device)."""

    def __init__(self, job: tuple[Config, str]) -> None:
        self.config, self.device = job

    def whole_run(self, steps: int) -> int:
        """Build the model and take some steps. Return by how many bytes memory grew at its highest."""
        memory = MemoryGrowth(self.device)
        with training_steps(self.config, self.device) as take:
            for step in range(steps):
                take(step)
            grown = memory.peak()
            assert grown is not None  # require_resettable has been asked
            return grown

    def one_step(self, step: int) -> tuple[int, int, float]:
        """Take the steps before `step`, then that one. Return its (peak growth in bytes, features D, seconds)."""
        with training_steps(self.config, self.device) as take:
            for before in range(step):
                width = take(before).outputs["text"].shape[1]
            if self.device == "cpu":
                trim_heap()
            memory = MemoryGrowth(self.device)
            seconds, _ = timed(lambda: take(step))
            grown = memory.peak()
            assert grown is not None  # require_resettable has been asked
            return grown, width, seconds
