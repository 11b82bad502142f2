"""One rank of the proof that the temperature's bound holds on ZeRO's fp32 master, and that it is needed there."""

from __future__ import annotations

import math

import torch

from clipdist.config import load_config
from clipdist.data.batch import pair_batch
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine
from clipdist.models.build import build_model
from clipdist.objectives.clip import ClipObjective


def upward(image_features, text_features, logit_scale, logit_bias=None, **_):
    """A loss that only wants a higher temperature."""
    idle = 0 * (image_features.sum() + text_features.sum())
    return -logit_scale.float().sum() + idle, {"valid": logit_scale.detach().sum()}


def run(stage: int, precision: str, dist_env: DistEnv, bounded: bool) -> tuple[float, float]:
    """exp(t) of the fp32 master and of the module after ten steps."""
    overrides = [
        "model.name=configs/models/tiny_vit.json",
        f"engine.zero_stage={stage}",
        f"train.precision={precision}",
        "train.global_batch=8",
        "objectives.clip.logit_scale_init=4.5",
    ]
    config = load_config(None, overrides)
    torch.manual_seed(0)
    objective = ClipObjective(config.objectives.clip)
    objective.function = upward
    if not bounded:
        objective.upper_bounds = {}
    engine = Engine(build_model(config.model, config.objectives.clip), (objective,), config, dist_env)
    share = 8 // dist_env.world_size
    image = torch.zeros(share, 3, 32, 32, dtype=torch.uint8)
    tokens = torch.full((share, 16), 2047)
    batch = pair_batch(image, tokens, torch.ones(share, dtype=torch.bool), torch.arange(share))
    for step in range(10):
        engine.train_step(batch, step=step, lr=0.1)
    master = math.exp(engine.logit_scale())
    module = math.exp(float(engine.zero.forward(**batch.inputs())["logit_scale"]))
    engine.close()
    return master, module


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        for stage in range(4):
            for precision in ("fp32", "bf16"):
                master, module = run(stage, precision, dist_env, bounded=True)
                where = (stage, precision, master, module)
                assert 95 < master <= 100 * (1 + 1e-6), where
                assert 95 < module <= 100 * (1 + 1e-6), where
        master, _ = run(2, "bf16", dist_env, bounded=False)
        assert master > 110, master  # without the bound it does run away


if __name__ == "__main__":
    main()
