"""Validate the model during training: retrieval on the validation shards; zero-shot, linear probe and kNN on labels.

It runs the code of the offline tools, on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image
from torch import Tensor

from clipdist import config
from clipdist.checkpoint.format import EMA
from clipdist.data.catalog import Catalog
from clipdist.data.loader import default_threads
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.tokens import Tokenizer
from clipdist.data.transform import EvalTransform
from clipdist.datasets.labelled import LabelledSet, open_labelled
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings, WorkShare, embed_catalog, gather_embeddings
from clipdist.evals.knn import knn_of
from clipdist.evals.probe import probe_of
from clipdist.evals.prompts import find_templates
from clipdist.evals.retrieval import distributed_retrieval
from clipdist.evals.sheet import retrieval_sheet
from clipdist.evals.spread import effective_rank
from clipdist.evals.zero_shot import zero_shot_of


class Encoder(Protocol):
    """The model as validation uses it; calls of `encode` are reported as progress, too."""

    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]: ...

    def encode_hidden(self, image: Tensor) -> Tensor:
        """Return the image features before the projection, as DualEncoder.encode_hidden."""

    def logit_scale(self) -> float: ...

    def progress(self) -> None:
        """Report that the validation goes on, between two calls of `encode`."""


@dataclass(frozen=True)
class Findings:
    """Result of one validation.

    Attributes:
        values: metrics by name: t2i_r1 ...; width_64/t2i_r1 ...; effective_rank; zero_shot/top1 ...; knn_20,
            knn_200; probe/accuracy ... (only on rank 0); with train.ema also ema/t2i_r1 ...
        embeddings: of the validation shards, for the contact sheet; None: there are none, or no captions.
    """

    values: dict[str, float]
    embeddings: Embeddings | None

    def with_average(self, average: Findings) -> Findings:
        """Return these, and as ema/t2i_r1 ... those of the weights' moving average, but for the numbers of the data."""
        own = ("candidates", "captions", "pictures", "classes", "chance")
        kept = {name: value for name, value in average.values.items() if name.rpartition("/")[2] not in own}
        theirs = {f"{EMA}{name}": value for name, value in kept.items()}
        return replace(self, values=self.values | theirs)


class Validation:
    """Runs the validations of a run.

    Args:
        val: the validation shards, if any.
        transform: the model's evaluation transform.
        locked: features of the validation shards: see embed_catalog.
        widths: of features at which retrieval is measured too.
        has_text: whether the model has a text tower; without one nothing is measured that needs captions or prompts.

    Raises:
        UserError: eval.labelled cannot be read, or a setting needs it.
    """

    def __init__(
        self,
        cfg: config.Eval,
        data: config.Data,
        val: Catalog | None,
        tokenizer: Tokenizer,
        transform: EvalTransform,
        dist_env: DistEnv,
        locked: Mapping[str, LockedFeatures] | None = None,
        widths: Sequence[int] = (),
        has_text: bool = True,
    ) -> None:
        self._has_text = has_text
        self._locked, self._widths = locked, widths
        self._cfg, self._data, self._val, self._tokenizer, self._transform = cfg, data, val, tokenizer, transform
        self._dist_env = dist_env
        self._labelled = open_labelled(cfg.labelled) if cfg.labelled else None
        self._templates = find_templates(cfg.templates)
        for name, wanted in (("probe", cfg.probe), ("knn", cfg.knn)):
            if wanted and (self._labelled is None or self._labelled.train is None):
                raise UserError(f"eval.{name}: needs eval.labelled with training pictures")
        if self._labelled and not (has_text or cfg.knn or cfg.probe):
            raise UserError(
                f"eval.labelled={cfg.labelled}: measures nothing, for there is no text tower to name classes; set"
                " eval.knn=true or eval.probe=true"
            )

    def run(self, model: Encoder) -> Findings:
        """Validate the model. Collective."""
        env = self._dist_env
        threads = self._data.threads or default_threads()
        share = WorkShare(env.rank, env.world_size, self._cfg.batch, threads, progress=False)
        values: dict[str, float] = {}
        embeddings = None
        if self._val is not None:
            values, embeddings = self._of_shards(model, self._val, share)
        if self._labelled is not None:
            values |= self._of_labelled(model, self._labelled, share)
        return Findings(values, embeddings)

    def _of_shards(self, model: Encoder, val: Catalog, share: WorkShare) -> tuple[dict[str, float], Embeddings | None]:
        """Return what is measured on the validation shards, and their embeddings where they have captions."""
        own = embed_catalog(
            model.encode,
            val,
            self._tokenizer,
            self._transform,
            share,
            texts=self._has_text,
            data=self._data,
            locked=self._locked,
        )
        if not self._has_text:
            return {"effective_rank": effective_rank(gather_embeddings(own).image)}, None
        measured, whole = distributed_retrieval(own, device=self._dist_env.device, widths=self._widths)
        return measured | {"effective_rank": effective_rank(whole.image)}, whole

    def _of_labelled(self, model: Encoder, data: LabelledSet, share: WorkShare) -> dict[str, float]:
        values: dict[str, float] = {}
        if self._has_text:
            scale = model.logit_scale()
            measured = zero_shot_of(model.encode, self._tokenizer, data, self._templates, self._transform, scale, share)
            values |= {f"zero_shot/{name}": value for name, value in measured.items()}
        if self._cfg.knn:

            def hidden(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
                return None if image is None else model.encode_hidden(image), None

            values |= knn_of(hidden, data, self._transform, share, self._dist_env.device)
        if self._cfg.probe:
            measured = probe_of(model.encode, data, self._transform, share, model.progress)
            values |= {f"probe/{name}": value for name, value in measured.items()}
        return values

    def sheet(self, findings: Findings) -> Image.Image | None:
        """The picture sheet: captions with the pictures that they find."""
        if self._val is None or findings.embeddings is None or not self._cfg.sheet:
            return None
        return retrieval_sheet(findings.embeddings, self._val, self._cfg.sheet)
