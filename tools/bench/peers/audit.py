"""Audit open_clip's own losses against the reference of tools/audit_gradients.py.

Its loss classes run as they are; around them stands what open_clip_train does with them: features normalised by the
model, torch DDP's mean of gradients over ranks, and for accum_freq its feature cache (open_clip_train/train.py). They
know neither bad rows nor equal captions, so both sides take every pair as valid and a group of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch, pair_batch
from clipdist.distributed.rank import DistEnv
from clipdist.engine.step import seed_step
from clipdist.evals.audit import Audit, AuditRow, compare
from clipdist.evals.reference import LossAndGradients
from clipdist.models.dual_encoder import DualEncoder

Features = dict[str, torch.Tensor]
PeerLoss = Callable[..., torch.Tensor]
ACCUM_FREQ = 4


@dataclass(frozen=True)
class OpenClipWay:
    """One way of open_clip to train: a loss with its flags, and how many batches its feature cache joins."""

    name: str
    loss: PeerLoss
    accum_freq: int = 1


def peers_of(loss_name: str, dist_env: DistEnv) -> list[OpenClipWay]:
    """Return the ways that compute the configured loss: ClipLoss for infonce, SigLipLoss for sigmoid."""
    from open_clip.loss import ClipLoss, SigLipLoss

    ranks = {"rank": dist_env.rank, "world_size": dist_env.world_size}
    if loss_name == "sigmoid":
        ways = [SigLipLoss(dist_impl=impl, **ranks) for impl in ("bidir", "shift", "reduce", "gather")]
        names = [f"open_clip SigLipLoss dist_impl={way.dist_impl}" for way in ways]
        peers = [OpenClipWay(name, way) for name, way in zip(names, ways)]
        return [*peers, OpenClipWay(f"open_clip SigLipLoss accum_freq={ACCUM_FREQ}", ways[0], ACCUM_FREQ)]
    flags = {
        "default flags": {},
        "--local-loss": {"local_loss": True},
        "--gather-with-grad": {"gather_with_grad": True},
        "--local-loss --gather-with-grad": {"local_loss": True, "gather_with_grad": True},
    }
    clip = {name: ClipLoss(**chosen, **ranks) for name, chosen in flags.items()}
    best = "--local-loss --gather-with-grad"
    peers = [OpenClipWay(f"open_clip {name}", way) for name, way in clip.items()]
    return [*peers, OpenClipWay(f"open_clip {best} --accum-freq {ACCUM_FREQ}", clip[best], ACCUM_FREQ)]


def audit_peers(audit: Audit, batch: Batch, step: int) -> list[AuditRow]:
    """Compare every way on one global batch, from the weights that the audit's reference has at this time.

    Returns:
        on rank 0 the rows; elsewhere nothing. A feature cache whose batches do not divide a rank's rows is left out.
    """
    dist_env, clip, rows_of_batch = audit.dist_env, audit.cfg.clip, len(batch)
    # As code sees it that knows neither bad rows nor equal captions.
    everything = torch.ones(rows_of_batch, dtype=torch.bool)
    batch = pair_batch(batch.images[IMAGE], batch.tokens, everything, torch.arange(rows_of_batch))
    share = rows_of_batch // dist_env.world_size
    plain = replace(clip, weight=1.0, label_smoothing=0.0)
    references: dict[int, LossAndGradients] = {}
    rows: list[AuditRow] = []
    for peer in peers_of(clip.loss, dist_env):
        if share % peer.accum_freq:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # open_clip's collectives are deprecated in torch
            ours = _measure(peer, audit, batch, step)
        if dist_env.rank == 0:
            if peer.accum_freq not in references:
                micro = share // peer.accum_freq
                references[peer.accum_freq] = audit.reference.measure(batch, step, micro=micro, clip=plain)[0]
            reference = references[peer.accum_freq]
            rows += compare(ours, reference, audit.precision, step=step + 1, part_of=audit.part_of, impl=peer.name)
    return rows


def _measure(peer: OpenClipWay, audit: Audit, batch: Batch, step: int) -> LossAndGradients:
    """Return the loss of one way, and its gradients as DDP leaves them on every rank."""
    dist_env, model = audit.dist_env, audit.reference.model
    share = len(batch) // dist_env.world_size
    mine = batch.rows(dist_env.rank * share, (dist_env.rank + 1) * share)
    # As parameters in fp32: what rounds them in low precision is not under audit here.
    scalars = {name: value.detach().float().requires_grad_() for name, value in audit.reference.scalars.items()}
    model.zero_grad(set_to_none=True)
    if peer.accum_freq == 1:
        seed_step(audit.cfg.train.seed, step, dist_env.rank, 0)
        value = peer.loss(**_forward(model, mine, dist_env), **_scales(scalars))
        value.backward()
    else:
        value = _accumulate(peer, audit.cfg, model, mine, scalars, dist_env, step)
    held = {name: scalars.get(name, p) for name, p in model.named_parameters() if p.requires_grad}
    gradients = {
        name: torch.zeros(p.numel(), device=dist_env.device) if p.grad is None else p.grad.float().view(-1)
        for name, p in held.items()
    }
    model.zero_grad(set_to_none=True)
    return _mean_over_ranks(value.detach().float(), gradients, dist_env.world_size)


def _accumulate(
    peer: OpenClipWay, cfg: Config, model: DualEncoder, mine: Batch, scalars: Features, dist_env: DistEnv, step: int
) -> torch.Tensor:
    """Train as open_clip_train's feature cache: each batch again, its features in place of the cached, a backward each.

    The caching pass draws the reference's random numbers; the second pass goes on drawing, as nothing sets it back.
    """
    size = len(mine) // peer.accum_freq
    batches = [mine.rows(j * size, (j + 1) * size) for j in range(peer.accum_freq)]
    cached: list[Features] = []
    for j, batch in enumerate(batches):
        seed_step(cfg.train.seed, step, dist_env.rank, j)
        with torch.no_grad():
            cached.append(_forward(model, batch, dist_env))
    value = torch.zeros(())
    for j, batch in enumerate(batches):
        fresh = [*cached[:j], _forward(model, batch, dist_env), *cached[j + 1 :]]
        joined = {name: torch.cat([features[name] for features in fresh]) for name in fresh[0]}
        value = peer.loss(**joined, **_scales(scalars))
        value.backward()
    return value


def _forward(model: DualEncoder, batch: Batch, dist_env: DistEnv) -> Features:
    """Return normalised features [b, D], as open_clip's models give them to their losses; in fp32."""
    outputs = model(**batch.to(dist_env.device).inputs())
    return {
        "image_features": F.normalize(outputs[IMAGE].float(), dim=-1),
        "text_features": F.normalize(outputs["text"].float(), dim=-1),
    }


def _scales(scalars: Features) -> Features:
    """Return exp(t) and the bias by the names of open_clip's losses."""
    scales = {"logit_scale": scalars["logit_scale"].exp()}
    return scales | ({"logit_bias": scalars["logit_bias"]} if "logit_bias" in scalars else {})


def _mean_over_ranks(value: torch.Tensor, gradients: Features, world: int) -> LossAndGradients:
    """Average gradients as DDP does; the loss is averaged for the table alone."""
    flat = torch.cat([value.view(1), *gradients.values()])
    dist.all_reduce(flat)
    flat /= world
    mean = flat[1:].split([grad.numel() for grad in gradients.values()])
    return LossAndGradients(float(flat[0]), dict(zip(gradients, mean)))
