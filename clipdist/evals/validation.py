"""Validate the model during training: retrieval on the validation shards, zero-shot classification, linear probe.

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
from clipdist.datasets.labelled import open_labelled
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings, WorkShare, embed_catalog
from clipdist.evals.probe import probe_of
from clipdist.evals.prompts import find_templates
from clipdist.evals.retrieval import distributed_retrieval
from clipdist.evals.sheet import retrieval_sheet
from clipdist.evals.zero_shot import zero_shot_of


class Encoder(Protocol):
    """The model as validation uses it; calls of `encode` are reported as progress, too."""

    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]: ...

    def logit_scale(self) -> float: ...

    def progress(self) -> None:
        """Report that the validation goes on, between two calls of `encode`."""


@dataclass(frozen=True)
class Findings:
    """Result of one validation.

    Attributes:
        values: metrics by name: t2i_r1 ...; width_64/t2i_r1 ...; zero_shot/top1 ...; probe/accuracy ... (only on
            rank 0); with train.ema also ema/t2i_r1 ...
        embeddings: of the validation shards, for the contact sheet; None: there are none.
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
    ) -> None:
        self._locked, self._widths = locked, widths
        self._cfg, self._data, self._val, self._tokenizer, self._transform = cfg, data, val, tokenizer, transform
        self._dist_env = dist_env
        self._labelled = open_labelled(cfg.labelled) if cfg.labelled else None
        self._templates = find_templates(cfg.templates)
        if cfg.probe and (self._labelled is None or self._labelled.train is None):
            raise UserError("eval.probe: needs eval.labelled with training pictures")

    def run(self, model: Encoder) -> Findings:
        """Validate the model. Collective."""
        env = self._dist_env
        threads = self._data.threads or default_threads()
        share = WorkShare(env.rank, env.world_size, self._cfg.batch, threads, progress=False)
        values: dict[str, float] = {}
        embeddings = None
        if self._val is not None:
            own = embed_catalog(
                model.encode, self._val, self._tokenizer, self._transform, share, data=self._data, locked=self._locked
            )
            measured, embeddings = distributed_retrieval(own, device=self._dist_env.device, widths=self._widths)
            values |= measured
        if self._labelled is not None:
            measured = zero_shot_of(
                model.encode,
                self._tokenizer,
                self._labelled,
                self._templates,
                self._transform,
                model.logit_scale(),
                share,
            )
            values |= {f"zero_shot/{name}": value for name, value in measured.items()}
            if self._cfg.probe:
                measured = probe_of(model.encode, self._labelled, self._transform, share, model.progress)
                values |= {f"probe/{name}": value for name, value in measured.items()}
        return Findings(values, embeddings)

    def sheet(self, findings: Findings) -> Image.Image | None:
        """The picture sheet: captions with the pictures that they find."""
        if self._val is None or findings.embeddings is None or not self._cfg.sheet:
            return None
        return retrieval_sheet(findings.embeddings, self._val, self._cfg.sheet)
