"""Training steps on drawn numbers, for benchmarks of memory: everything of the engine that they use."""

from __future__ import annotations

from typing import Any

import deepspeed  # noqa: F401  what is imported counts as the baseline
import open_clip  # noqa: F401
import torch

from clipdist.config import Config
from clipdist.distributed.rank import joined_ranks
from clipdist.engine.step import Engine
from clipdist.evals.audit import RandomBatches
from clipdist.models.dual_encoder import build_model
from clipdist.objectives.make import make_objectives
from tools.bench.harness import timed
from tools.bench.peak_memory import MemoryGrowth, trim_heap


class TrainingSteps:
    """A model, its engine and this rank's rows of one drawn global batch.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, config: Config, device: str) -> None:
        self._ranks = joined_ranks(device)
        dist_env = self._ranks.__enter__()
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.clip)
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        drawn = RandomBatches(config, model.spec).batch(0)
        share = len(drawn) // dist_env.world_size
        mine = drawn.rows(dist_env.rank * share, (dist_env.rank + 1) * share)
        self.batch = mine.each(lambda tensor: tensor.clone()).to(dist_env.device)
        del drawn, mine
        self.engine = Engine(model.to(dist_env.device), make_objectives(config.objectives), config, dist_env)
        self.lr = config.optim.lr

    def close(self) -> None:
        self._ranks.__exit__(None, None, None)

    def take(self, step: int) -> Any:
        return self.engine.train_step(self.batch, step=step, lr=self.lr)


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
        return self._end(memory, training)

    def one_step(self, step: int) -> tuple[int, int, float]:
        """Take the steps before `step`, then that one. Return its (peak growth in bytes, features D, seconds)."""
        training = TrainingSteps(self.config, self.device)
        for before in range(step):
            width = training.take(before).outputs["text"].shape[1]
        if self.device == "cpu":
            trim_heap()
        memory = MemoryGrowth(self.device)
        seconds, _ = timed(lambda: training.take(step))
        return self._end(memory, training), width, seconds

    def _end(self, memory: MemoryGrowth, training: TrainingSteps) -> int:
        grown = memory.peak()
        assert grown is not None  # require_resettable has been asked
        training.close()
        return grown
