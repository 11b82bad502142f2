"""Encode an image as a normal distribution, and decode it (VAE, Kingma and Welling, arXiv:1312.6114): a baseline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.order import sample_uniforms
from clipdist.data.views import views_of
from clipdist.models.heads import VariationalHead
from clipdist.objectives.objective import Moment, Objective, Term


class VaeObjective(Objective):
    """Negative log-likelihood of the pixels plus the divergence of the code from N(0, 1). See Objective."""

    name = "vae"
    additive = True

    def __init__(self, cfg: config.Vae, image_size: int) -> None:
        self.cfg = cfg
        self.views = views_of(self.name, cfg.views, image_size)

    def head(self, width: int) -> nn.Module:
        """Return the code's mean and variance, and the decoder."""
        return VariationalHead(width, self.cfg.latent, self.cfg.size, self.cfg.width)

    def noise(self, batch: Batch, at: Moment) -> Mapping[str, Tensor]:
        """Return standard normal numbers [b, latent] of each sample in this step (Box and Muller)."""
        ids = batch.sample_id.numpy()
        uniforms = sample_uniforms(_KEY, np.full(len(ids), at.step), ids, 2 * self.cfg.latent)
        radius = np.sqrt(-2 * np.log1p(-uniforms[:, ::2]))
        return {self.views[0].name: torch.from_numpy(radius * np.cos(2 * np.pi * uniforms[:, 1::2])).float()}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over valid rows, in nats for each decoded value. See Objective.loss.

        Gaussian pixels of a fixed deviation (without its constant), and the closed form of the divergence (appendix B).
        """
        cfg, name = self.cfg, self.views[0].name
        values = 3 * cfg.size**2
        mean, log_variance, decoded = outputs[name].float().split([cfg.latent, cfg.latent, values], dim=1)
        target = F.adaptive_avg_pool2d(batch.images[name].float() / 255, cfg.size).flatten(1)
        missed = (decoded - target).square().sum(1) / (2 * cfg.deviation**2)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        valid = batch.valid_in(self.modalities)
        total = torch.where(valid, (missed + cfg.beta * divergence) / values, 0.0).sum()
        return Term(total, outputs["vae/count"], cfg.weight, {"valid": valid.sum().float()})


_KEY = 0x5AE  # of the noise, beside the seeds of data orders
