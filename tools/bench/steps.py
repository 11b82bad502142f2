"""Training steps on drawn numbers, for benchmarks of memory: everything of the engine that they use."""

from __future__ import annotations

from typing import Any

import deepspeed  # noqa: F401  what is imported counts as the baseline
import open_clip  # noqa: F401
import torch

from clipdist.config import Config
from clipdist.distributed import rank as distributed
from clipdist.engine.step import Engine
from clipdist.evals.audit import DrawnPairs
from clipdist.losses.make import make_loss
from clipdist.models.dual_encoder import build_model
from tools.bench.harness import timed
from tools.bench.peak_memory import MemoryGrowth, trim_heap


class TrainingSteps:
    """A model, its engine and this rank's rows of one drawn global batch.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, config: Config, device: str) -> None:
        dist_env = distributed.start(device)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss)
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        pairs = DrawnPairs(config, model.spec).pairs(0)
        share = len(pairs.image) // dist_env.world_size
        rows = slice(dist_env.rank * share, (dist_env.rank + 1) * share)
        drawn = (pairs.image, pairs.tokens, pairs.valid, pairs.group_id)
        del pairs
        self.batch: list[Any] = [None if x is None else x[rows].clone().to(dist_env.device) for x in drawn]
        del drawn
        self.engine = Engine(model.to(dist_env.device), make_loss(config.loss), config, dist_env)
        self.lr = config.optim.lr

    def take(self, step: int) -> Any:
        return self.engine.train_step(*self.batch, step=step, lr=self.lr)


class StepMemory:
    """The memory of steps, in a process of its own that trains as `job` says: (configuration, device)."""

    def __init__(self, job: tuple[Config, str]) -> None:
        self.config, self.device = job

    def whole_run(self, steps: int) -> int:
        """Build the model and take some steps. Return by how many bytes memory grew at its highest."""
        memory = MemoryGrowth(self.device)
        training = TrainingSteps(self.config, self.device)
        for step in range(steps):
            training.take(step)
        return self._end(memory)

    def one_step(self, step: int) -> tuple[int, int, float]:
        """Take the steps before `step`, then that one. Return its (peak growth in bytes, features D, seconds)."""
        training = TrainingSteps(self.config, self.device)
        for before in range(step):
            width = training.take(before).features[0].shape[1]
        if self.device == "cpu":
            trim_heap()
        memory = MemoryGrowth(self.device)
        seconds, _ = timed(lambda: training.take(step))
        return self._end(memory), width, seconds

    def _end(self, memory: MemoryGrowth) -> int:
        grown = memory.peak()
        assert grown is not None  # require_resettable has been asked
        distributed.stop()
        return grown
