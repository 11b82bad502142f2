"""One rank of the proof that ranks find out what they do not have in common: at the start, and while they train.

Words: precisions to train in, such as fp32 bf16.
"""

from __future__ import annotations

import sys

import torch

from clipdist.config import load_config
from clipdist.data.batch import pair_batch
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine
from clipdist.errors import Fault, UserError
from clipdist.fault_tolerance.consistency import compare
from clipdist.fault_tolerance.replicas import compare_replicas
from clipdist.models.build import build_model
from clipdist.objectives.make import make_objectives

STRANGE = 1  # the rank that is made to differ
BATCH = 12


def check_facts(dist_env: DistEnv) -> None:
    facts = {"package torch": "2.15.0", "clipdist/a.py": "01", "clipdist/b.py": "02"}
    compare(facts, dist_env)
    if dist_env.rank == STRANGE:
        facts |= {"package torch": "2.14.0", "clipdist/b.py": "03"}
    told = raised(compare, facts, dist_env)
    assert type(told) is UserError
    assert f"package torch: rank {STRANGE} on " in str(told), told
    assert "has 2.14.0, the others have 2.15.0" in str(told), told
    assert "clipdist/b.py" in str(told), told
    assert "clipdist/a.py" not in str(told), told


def check_stage(stage: int, precision: str, dist_env: DistEnv) -> None:
    """Three steps without a false alarm; then one bit is flipped on one rank."""
    engine = trained(stage, precision, dist_env)
    compare_replicas(engine, dist_env, 3)
    names = [name for name, _ in engine.replicated()]
    assert any(name.startswith("param/visual.") for name in names), names
    assert any(name.endswith("running_mean") for name in names), names
    for kind in ("exp_avg/", "ema/visual.conv1"):
        assert any(name.startswith(kind) for name in names) == (stage == 0), names
    parameters = [name for name in names if name.startswith("param/")]
    averages = [name for name in names if name.startswith("ema/")]
    for target in (parameters[-1], averages[-1], names[-1 - len(names) // 2]):
        (tensor,) = (tensor for name, tensor in engine.replicated() if name == target)
        flip(tensor, dist_env)
        told = raised(compare_replicas, engine, dist_env, 3)
        assert type(told) is Fault
        assert f"step 3: rank {STRANGE} on " in str(told), told
        assert f"in 1 of {len(names)} tensors, first in {target}." in str(told), told
        flip(tensor, dist_env)
        compare_replicas(engine, dist_env, 3)
    engine.close()


def flip(tensor: torch.Tensor, dist_env: DistEnv) -> None:
    """The lowest bit of the last element: a change far below any tolerance."""
    if dist_env.rank == STRANGE:
        tensor.view(-1)[-1:].view(torch.uint8)[0] ^= 1


def trained(stage: int, precision: str, dist_env: DistEnv) -> Engine:
    words = [
        "model.name=configs/models/tiny_rn.json",
        f"engine.zero_stage={stage}",
        f"train.precision={precision}",
        "train.ema=0.9",
        f"train.global_batch={BATCH}",
        f"train.micro_batch={BATCH // dist_env.world_size // (2 if stage in (1, 3) else 1)}",
    ]
    config = load_config(None, words)
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
    share = BATCH // dist_env.world_size
    for step in range(3):
        torch.manual_seed(100 * step + dist_env.rank)
        image = torch.randint(0, 256, (share, 3, 32, 32), dtype=torch.uint8)
        tokens = torch.randint(1, 2000, (share, 16))
        batch = pair_batch(
            image, tokens, torch.ones(share, dtype=torch.bool), torch.arange(share) + dist_env.rank * share
        )
        engine.train_step(batch, step=step, lr=0.01)
    return engine


def raised(call, *args) -> Exception:
    try:
        call(*args)
    except UserError as error:
        return error
    raise AssertionError(f"{call.__name__} found nothing")


if __name__ == "__main__":
    with joined_ranks("cpu") as here:
        check_facts(here)
        for wanted in sys.argv[1:]:
            for zero in range(4):
                check_stage(zero, wanted, here)
