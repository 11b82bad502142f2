"""One rank of the gradient proof: engine gradients on W ranks against one process on the whole batch.

Writes, on rank 0, JSON rows {"model", "world", "stage", "precision", "part", "norm_ratio", "error", ...}.

The reference: one process runs every rank's rows with that rank's random state (dropout) and BatchNorm grouping,
concatenates the features, applies the dense formula in float64 and averages over the valid rows.
"""

from __future__ import annotations

import json
import math
import sys

import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm

from clipdist.config import Config, load_config
from clipdist.engine import distributed
from clipdist.engine.engine import Engine, seed_step
from clipdist.engine.fragments import fragments, gradient, loss_scale, part_of
from clipdist.loss.contrastive import info_nce
from clipdist.model.dual_encoder import DualEncoder, build_model

BATCH = 16
PARTS = ("image", "text", "temperature")


def make_batch(model: DualEncoder) -> dict[str, torch.Tensor]:
    """A global batch with two bad rows and two pairs of equal captions, the same on every rank."""
    draw = torch.Generator().manual_seed(5)
    side, context = model.spec.image_size, model.spec.context_length
    tokens = torch.randint(1, 500, (BATCH, context), generator=draw)
    tokens[:, -1] = model.spec.tokenizer["vocab_size"] - 1  # the end of text: the position that the tower reads
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[3, 12]] = False
    group_id = torch.arange(BATCH)
    group_id[9], group_id[14] = group_id[1], group_id[2]
    image = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=draw)
    return {"image": image, "tokens": tokens, "valid": valid, "group_id": group_id}


def dense_loss(
    images: torch.Tensor, texts: torch.Tensor, t: torch.Tensor, valid: torch.Tensor, group_id: torch.Tensor
) -> torch.Tensor:
    """The formula, on the whole batch, in the dtype of the features."""
    images = images / images.norm(dim=1, keepdim=True)
    texts = texts / texts.norm(dim=1, keepdim=True)
    logits = (t.exp() * images @ texts.T)[valid][:, valid]
    positive = (group_id[valid][:, None] == group_id[valid][None, :]).to(logits.dtype)
    target = positive / positive.sum(1, keepdim=True)
    rows = -(target * logits.log_softmax(1)).sum(1)
    columns = -(target * logits.T.log_softmax(1)).sum(1)
    return (rows.mean() + columns.mean()) / 2


def reference(config: Config, batch: dict[str, torch.Tensor], world: int, step: int) -> dict[str, torch.Tensor]:
    """Gradients by part, flattened, float64; and the loss under "loss"."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, config.loss).train()
    share = BATCH // world
    images, texts = [], []
    for rank in range(world):
        seed_step(config.train.seed, step, rank)
        rows = slice(rank * share, (rank + 1) * share)
        image_features, text_features, t = model(batch["image"][rows], batch["tokens"][rows])
        images.append(image_features.double())
        texts.append(text_features.double())
    loss = dense_loss(torch.cat(images), torch.cat(texts), t.double(), batch["valid"], batch["group_id"])
    loss.backward()
    return collect({name: p.grad for name, p in model.named_parameters()}) | {"loss": loss.detach()}


def collect(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        part: torch.cat([g.double().view(-1) for name, g in gradients.items() if part_of(name) == part])
        for part in PARTS
    }


def engine_gradients(config: Config, place: distributed.Place, batch: dict[str, torch.Tensor], step: int) -> dict:
    """The reduced gradients of the engine, made whole, by part; and the mean loss over ranks."""
    torch.manual_seed(config.train.seed)
    engine = Engine(build_model(config.model, config.loss), info_nce, config, place)
    share = BATCH // place.world
    rows = slice(place.rank * share, (place.rank + 1) * share)
    seen: dict[str, torch.Tensor] = {}

    def look() -> dict[str, float]:  # train_step asks for norms between backward and step: the place to look
        stage = engine.engine.zero_optimization_stage()
        for name, parameter in engine.engine.module.named_parameters():
            seen[name] = torch.zeros(parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel())
        for fragment in fragments(engine.engine):
            piece = gradient(engine.engine, fragment).float() / loss_scale(engine.engine)
            seen[fragment.name][fragment.start : fragment.start + fragment.numel] = piece
        if stage > 0:
            for tensor in seen.values():
                dist.all_reduce(tensor)
        return norms()

    norms = engine.grad_norms
    engine.grad_norms = look  # type: ignore[method-assign]
    mine = {name: tensor[rows] for name, tensor in batch.items()}
    result = engine.train_step(**mine, step=step, lr=0.0, want_norms=True)
    value = result.value.clone()
    dist.all_reduce(value)
    whole = collect(seen)
    for part in PARTS:  # the engine's own report of the norms, which goes to the metrics
        assert math.isclose(result.grad_norms[part], float(whole[part].norm()), rel_tol=1e-3), (part, result.grad_norms)
    engine.engine.destroy()
    return whole | {"loss": value / place.world}


def main() -> None:
    out, *cases = sys.argv[1:]
    place = distributed.start("cpu")
    rows = []
    for case in cases:
        model, stage, precision = case.split(":")
        config = load_config(
            None,
            [
                f"model.name={model}",
                f"engine.zero_stage={stage}",
                f"train.precision={precision}",
                f"train.global_batch={BATCH}",
                "optim.grad_clip=0",
                # tiny parameters are partitioned, too, as large ones are
                "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
            ],
        )
        torch.manual_seed(config.train.seed)
        batch = make_batch(build_model(config.model))
        ours = engine_gradients(config, place, batch, step=7)
        theirs = reference(config, batch, place.world, step=7)
        for part in (*PARTS, "loss"):
            a, b = ours[part].double(), theirs[part].double()
            rows.append(
                {
                    "model": model,
                    "world": place.world,
                    "stage": int(stage),
                    "precision": precision,
                    "part": part,
                    "norm_ratio": float(a.norm() / b.norm()),
                    "error": float((a - b).norm() / b.norm()),
                    "reference": float(b.norm()),
                }
            )
    if place.rank == 0:
        with open(out, "w") as file:
            json.dump(rows, file)
    deepspeed_comm.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
