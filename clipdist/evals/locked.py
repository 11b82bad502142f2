"""Compute what the locked parts of the towers give for all samples of a catalog, once, and keep it in files.

A tower of which at most a projection trains gives the same features in every epoch: a step then runs the projection
alone, and no image is decoded (as in LiT, Zhai et al., arXiv:2111.07991, section 3, where image features are computed
ahead).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import eval_image
from clipdist.data.loader import Interrupted, default_threads
from clipdist.data.locked_features import LockedFeatures, ShardFeatures, features_folder
from clipdist.data.members import Members
from clipdist.data.reader import Reader, open_reader
from clipdist.data.texts import group_id
from clipdist.data.tokens import Tokenizer
from clipdist.distributed.collectives import gather_json
from clipdist.distributed.node import ranks_per_node
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.decode_ahead import decode_ahead
from clipdist.evals.embed import encode_images, encode_texts
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.load import LoadedModel

LOG_S = 15.0  # between lines of progress
ROWS = 64  # images or captions per forward pass: always as many, so that a file does not depend on settings


class LockedTowers:
    """Computes and opens the features of a model's locked towers.

    Args:
        model: fp32, on this rank's device, with its locks set.
        cfg: names the cache's folder.
        tick: called at every forward pass; may raise Interrupted.
        log: tells what is computed.

    Raises:
        UserError: no tower is locked.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Tokenizer,
        cfg: config.Data,
        dist_env: DistEnv,
        tick: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not model.locked:
            raise UserError(
                "data.cache_features=true: no tower is locked (but for its projection); set model.lock_image or"
                " model.lock_text, without unlocked groups or layers"
            )
        self._model, self._tokenizer, self._cfg, self._dist_env = model, tokenizer, cfg, dist_env
        self._tick, self._log = tick, log
        spec = model.spec
        facts: dict[str, list[Any]] = {
            "image": [asdict(spec.transform), spec.image_mean, spec.image_std, cfg.max_pixels],
            "text": [tokenizer.fingerprint()],
        }
        self._facts = {name: [model.locked_checksum(name), spec.quick_gelu, *facts[name]] for name in model.locked}

    def features(self, catalog: Catalog, text: bool = True) -> dict[str, LockedFeatures] | None:
        """Return the features of a catalog by tower; compute what is missing first. Collective.

        Every rank computes some of the shards. Where nodes have folders of their own, each then completes its own.

        Args:
            text: whether those of captions are wanted too.

        Returns:
            None if an interruption left some to be computed, on any rank.

        Raises:
            UserError: a file cannot be written.
        """
        folder = features_folder(self._cfg)
        names = [name for name in self._facts if text or name != "text"]
        found = {name: LockedFeatures(catalog, folder, self._key(name, catalog.members)) for name in names}
        env = self._dist_env
        for rank, ranks in ((env.rank, env.world_size), (env.local_rank, ranks_per_node())):
            wanted = gather_json({name: features.missing() for name, features in found.items()})
            with suppress(Interrupted):
                for name, features in found.items():
                    shards = sorted({shard for of_rank in wanted for shard in of_rank[name]})
                    self._compute(name, features, shards[rank::ranks])
        complete = not any(features.missing() for features in found.values())
        return found if all(gather_json(complete)) else None

    def _key(self, name: str, members: Members) -> str:
        """Return what decides the features of a tower besides the shards, 64 hex digits."""
        read = [members.images] if name == "image" else [members.captions, members.lines]
        return sha256(json.dumps(self._facts[name] + read).encode()).hexdigest()

    def _compute(self, name: str, features: LockedFeatures, shards: list[int]) -> None:
        """Compute and keep the features of those shards that are missing here."""
        reader = open_reader(features.catalog, self._cfg)
        starts = features.catalog.starts.tolist()
        told = time.monotonic()
        try:
            for done, shard in enumerate(shards):
                if features.paths[shard].is_file():
                    continue
                if not done or time.monotonic() - told > LOG_S:
                    told = time.monotonic()
                    self._log(
                        f"features of the locked {name} tower for {starts[-1]} samples: shard {done + 1} of"
                        f" this rank's {len(shards)}"
                    )
                samples = range(starts[shard], starts[shard + 1])
                features.write(shard, (self._images if name == "image" else self._texts)(reader, samples))
        finally:
            reader.close()

    def _images(self, reader: Reader, samples: range) -> ShardFeatures:
        transform, limit = self._model.spec.transform, self._cfg.max_pixels
        bad: dict[int, str] = {}

        def load(sample_id: int) -> Tensor:
            return eval_image(reader.sample(sample_id).image(), transform, limit)

        calls = -(-len(samples) // ROWS)
        threads = self._cfg.threads or default_threads()
        decoded = decode_ahead(load, samples, transform.shape, ROWS, calls, threads, bad)
        rows = encode_images(self._encode, (images for images, _ in decoded))[: len(samples)]
        counts = [int(sample not in bad) for sample in samples]
        kept = rows[torch.tensor(counts, dtype=torch.bool)]
        reasons = {sample - samples.start: why for sample, why in bad.items()}
        return ShardFeatures(kept, _starts(counts), torch.zeros(len(kept), dtype=torch.int64), reasons)

    def _texts(self, reader: Reader, samples: range) -> ShardFeatures:
        texts: list[str] = []
        counts = []
        bad: dict[int, str] = {}
        for row, sample in enumerate(samples):
            own: list[str] = []
            try:
                own = reader.sample(sample).captions()
            except BadSample as error:
                bad[row] = error.reason
            texts += own
            counts.append(len(own))
        calls = max(1, -(-len(texts) // ROWS))  # of no captions, one call tells the width
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # texts of a batch are equally long
        ordered = [texts[number] for number in order]
        found = torch.cat(list(encode_texts(self._encode, self._tokenizer, ordered, ROWS, calls)))
        rows = torch.empty_like(found)
        rows[torch.tensor(order, dtype=torch.int64)] = found
        groups = torch.tensor([group_id(text) for text in texts], dtype=torch.int64)
        return ShardFeatures(rows, _starts(counts), groups, bad)

    def _encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        self._tick()
        features = None if image is None else self._model.locked_features(image.to(self._dist_env.device))
        return features, None if tokens is None else self._model.locked_features(tokens)


def kept_features(
    loaded: LoadedModel, catalog: Catalog, dist_env: DistEnv, text: bool = True
) -> Mapping[str, LockedFeatures]:
    """Return the features of a catalog by tower, for a model whose run keeps them; {} for others. Collective.

    What training computed is not computed again, and what is computed here is kept in the same place.

    Args:
        text: whether those of captions are wanted too.
    """
    if loaded.kept is None:
        return {}
    model = loaded.model.to(dist_env.device)
    return LockedTowers(model, loaded.tokenizer, loaded.kept, dist_env).features(catalog, text) or {}


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
