"""Predict the caption of an image, token by token: CoCa (arXiv:2205.01917), SimVLM (2108.10904), CapPa (2306.07915)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.caption_targets import NO_TARGET, Marks, caption_lengths, caption_targets
from clipdist.data.order import sample_uniforms
from clipdist.data.tokens import Tokenizer, make_tokenizer
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.errors import UserError
from clipdist.losses.global_batch import global_statistics
from clipdist.models.caption_decoder import CAPTION, DECODERS, DecoderSizes, open_clip_sizes
from clipdist.models.spec import ModelSpec
from clipdist.objectives.objective import Given, Moment, Objective, Term


class CaptionObjective(Objective):
    """The mean cross-entropy of all tokens of the global batch's captions, whichever rank has them. See Objective.

    Attributes:
        marks: of the model's tokenizer, which say where a caption ends.
    """

    name = CAPTION
    modalities = ("image", "text")
    additive = True
    reads_image_tokens = True

    marks: Marks

    def __init__(self, cfg: config.Caption) -> None:
        self.cfg = cfg

    def fit(self, spec: ModelSpec) -> None:
        """See Objective.fit.

        Raises:
            UserError: the tokenizer marks no end or has no padding, or CoCa's text tower is not causal.
        """
        check_caption(self.cfg, spec)
        tokenizer = make_tokenizer(spec)
        self.spec, self.marks = spec, tokenizer.marks()
        self.vocabulary = _vocabulary(self.cfg, spec, tokenizer)
        if self.cfg.kind == "coca" and self.marks.start is None:
            raise UserError(
                f"objectives.caption.kind=coca: texts of {spec.name} have no start mark; take another tokenizer, or"
                " kind=cappa"
            )

    def head(self, width: int) -> nn.Module:
        """Return the decoder. See Objective.head; `width` is that of the image's tokens."""
        cfg, described = self.cfg, self.spec.decoder if self.cfg.kind == "coca" else None
        own = self.spec.model["text_cfg"].get("width", 512) if cfg.kind == "coca" else width
        sizes = {"width": cfg.width or own, "layers": cfg.layers or 6, "heads": cfg.heads or 8}
        if described is not None:
            sizes |= open_clip_sizes(described)
        where = "objectives.caption" if described is None else f"{self.spec.name}: multimodal_cfg"
        if cfg.kind == "coca" and sizes["width"] != own:
            raise UserError(f"{where}.width={sizes['width']}: must be that of the text tower, {own}")
        if sizes["width"] % sizes["heads"]:
            raise UserError(f"{where}.heads={sizes['heads']}: must divide the decoder's width, {sizes['width']}")
        length = self.spec.context_length
        return DECODERS[cfg.kind](
            DecoderSizes(**sizes, vocabulary=self.vocabulary, length=length, image_width=width),
            self.marks,
            cfg.label_smoothing,
        )

    def noise(self, batch: Batch, at: Moment) -> Mapping[str, Tensor]:
        """Return what the decoder takes beside tokens: the targets [b, T], and what is drawn for each sample."""
        targets, drawn = self._targets(batch, at)
        return {f"{CAPTION}/targets": targets} | {f"{CAPTION}/{name}": value for name, value in drawn.items()}

    def _targets(self, batch: Batch, at: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the targets of a batch's rows, and SimVLM's prefixes, or which rows CapPa predicts in parallel."""
        tokens = batch.tokens
        valid = batch.valid_in(self.modalities).cpu()
        targets = caption_targets(tokens, self.marks).where(valid[:, None], NO_TARGET)
        if self.cfg.kind == "coca":
            return targets, {}
        ids = batch.sample_id.cpu().numpy()
        uniform = torch.from_numpy(sample_uniforms(_KEY, np.full(len(ids), at.step), ids, 1)[:, 0])
        if self.cfg.kind == "cappa":
            return targets, {"parallel": uniform < self.cfg.parallel}
        # At least the start, at most all but the end: then the end alone is predicted.
        most = caption_lengths(tokens, self.marks) - int(self.marks.start is not None)
        prefix = 1 + (uniform * most).long()
        place = torch.arange(targets.shape[1])
        return targets.where(place >= prefix[:, None] - 1, NO_TARGET), {"prefix": prefix}

    def given(self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor], at: Moment) -> Given:
        """Return the number of targets in the global batch. See Objective.given."""
        own = self._targets(batch, at)[0].ne(NO_TARGET).sum().float().to(batch.valid["text"].device)
        return Given(shared={f"{CAPTION}/count": all_reduce_sum(own).clamp_(min=1)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over the targets of the rows, in nats. See Objective.loss."""
        valid = batch.valid_in(self.modalities).sum().float()
        return Term(outputs[CAPTION], outputs[f"{CAPTION}/count"], self.cfg.weight, {"valid": valid})

    def metrics(self, outputs: Mapping[str, Tensor], batch: Batch, term: Term) -> dict[str, float]:
        """Return the number of predicted tokens, too. See Objective.metrics."""
        return {**global_statistics({**term.statistics}), "caption_tokens": float(term.count)}


def _vocabulary(cfg: config.Caption, spec: ModelSpec, tokenizer: Tokenizer) -> int:
    """Return how many words the decoder chooses from: as many as CoCa's text tower embeds, or the tokenizer has."""
    embedded = spec.model["text_cfg"].get("vocab_size", 0) if cfg.kind == "coca" else 0
    return max(embedded, tokenizer.vocab_size)


def check_caption(cfg: config.Caption, spec: ModelSpec) -> None:
    """Raise UserError for a model whose description does not go with a decoder of captions."""
    if cfg.kind != "coca":
        return
    if spec.hf_text or spec.own_text or spec.model["text_cfg"].get("no_causal_mask"):
        raise UserError(
            f"objectives.caption.kind=coca: the text tower of {spec.name} sees what it is to predict; take one with a"
            " causal mask, or kind=cappa"
        )
    if spec.decoder is not None and (cfg.width or cfg.layers or cfg.heads):
        raise UserError(
            f"objectives.caption: width, layers and heads are those of multimodal_cfg in {spec.name}; leave them out"
        )


_KEY = 0xCAB  # of the random numbers, beside the seeds of data orders
