"""One rank of the proof that the moving average is that of the whole weights, and that it is used and left to the bit.

Prints as JSON, by cell: the relative errors of the average and of the features that it gives, against float64.
"""

from __future__ import annotations

import copy
import gc
import json

import torch
from guarded import data, everything
from torch import Tensor

from clipdist.config import load_config
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.ema import warmed_up
from clipdist.engine.step import Engine
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.objectives.make import make_objectives

BATCH, STEPS, MOMENTUM = 16, 6, 0.4  # (1 + n) / (10 + n) is below the momentum up to the fifth step
RESNET, VIT = "configs/models/tiny_rn.json", "configs/models/tiny_vit.json"
CELLS = [(stage, "fp32", RESNET, ()) for stage in range(4)]
CELLS_OF_SEVERAL_RANKS = [
    *((stage, "bf16", RESNET, ()) for stage in range(4)),
    (1, "bf16", VIT, ("train.micro_batch=4",)),  # DeepSpeed's BF16_Optimizer
    (2, "fp32", VIT, ("model.lock_image=true", "model.image_unlocked_groups=1")),
    (3, "bf16", VIT, ("engine.deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}",)),
]


def whole(engine: Engine) -> dict[str, Tensor]:
    """The weights and running statistics, whole, float64."""
    found = engine.zero.gather(lambda fragment: fragment.master, list(engine.zero.numel(trained_only=True)))
    buffers = {n: b for n, b in engine.zero.module.named_buffers() if n.rpartition(".")[2].startswith("running_")}
    return {name: tensor.double().flatten().clone() for name, tensor in (found | buffers).items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run_cell(stage: int, precision: str, name: str, more: tuple[str, ...], dist_env: DistEnv) -> dict[str, float]:
    words = [f"model.name={name}", f"engine.zero_stage={stage}", f"train.precision={precision}", *more]
    config = load_config(None, [*words, f"train.global_batch={BATCH}", f"train.ema={MOMENTUM}"])
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    reference = copy.deepcopy(model)
    engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
    assert engine.ema is not None
    copies: list[int] = []
    engine.before_update = lambda: copies.append(1)
    expected = whole(engine)
    spec = model.spec
    for step in range(STEPS):
        sizes = spec.context_length, spec.tokenizer["vocab_size"], spec.image_size
        batch = data(dist_env.rank, dist_env.world_size, step, *sizes)
        assert engine.train_step(batch, step=step, lr=1e-2).applied
        momentum = warmed_up(MOMENTUM, step + 1)
        now = whole(engine)
        expected = {name: momentum * old + (1 - momentum) * now[name] for name, old in expected.items()}
    assert momentum == MOMENTUM > warmed_up(MOMENTUM, 1)
    averages = dict(engine.ema.replicated()) if stage == 0 else {}
    assert stage or all(torch.equal(averages["ema/" + n].flatten(), a) for n, a in gathered(engine).items())
    found = gathered(engine) | {n: b.flatten() for n, b in engine.ema.buffers.items()}
    assert found.keys() == expected.keys()
    error = max(relative(found[name], tensor) for name, tensor in expected.items() if tensor.norm() > 0)

    before = everything(engine) | {"scale": engine.scalars["logit_scale"].clone()}
    own = engine.encode(batch.images["image"], batch.tokens)
    hidden = engine.encode_hidden(batch.images["image"])
    copies.clear()
    with engine.averaged():
        assert copies  # the writer of a checkpoint has copied the weights
        features = engine.encode(batch.images["image"], batch.tokens)
        scale = engine.logit_scale()
    after = everything(engine) | {"scale": engine.scalars["logit_scale"]}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = engine.encode(batch.images["image"], batch.tokens)
    assert all(torch.equal(x, y) for x, y in zip(own, again))
    assert abs(scale - float(expected["logit_scale"])) < 1e-6
    wanted = reference_features(reference, expected, batch, precision)
    moved = min(relative(x, y) for x, y in zip(own, wanted))
    result = {"average": error, "features": max(relative(x, y) for x, y in zip(features, wanted)), "moved": moved}
    result["hidden"] = relative(projected(hidden.double(), now), own[0])
    assert engine.train_step(batch, step=STEPS, lr=1e-2).applied  # and training goes on
    engine.close()
    return result


def projected(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What the image tower's projection, of a ViT or a ResNet, makes of the features before it."""
    if "visual.proj" in weights:
        return hidden @ weights["visual.proj"].view(hidden.shape[1], -1)
    layer = "visual.attnpool.c_proj."
    return hidden @ weights[f"{layer}weight"].view(-1, hidden.shape[1]).T + weights[f"{layer}bias"]


def gathered(engine: Engine) -> dict[str, Tensor]:
    return engine.zero.gather(engine.ema.read, list(engine.zero.numel(trained_only=True)))


@torch.no_grad()
def reference_features(model: DualEncoder, expected: dict[str, Tensor], batch, precision: str) -> list[Tensor]:
    """Of the model with the float64 average in place of its weights and statistics, in the run's precision."""
    state = model.state_dict()
    for name, tensor in expected.items():
        state[name].copy_(tensor.view_as(state[name]))
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).eval()
    return [model.encode_image(batch.images["image"]), model.encode_text(batch.tokens)]


def main() -> None:
    found = {}
    with joined_ranks("cpu") as dist_env:
        for cell in [*CELLS, *(CELLS_OF_SEVERAL_RANKS if dist_env.world_size > 1 else [])]:
            found[" ".join(map(str, cell))] = run_cell(*cell, dist_env)
            gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time
        if dist_env.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
