"""Read what the locked part of a tower gives for the samples of a catalog; clipdist.evals.locked computes it.

One file a shard, named by what decides its content, so that runs share the files and a longer catalog reuses them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.tensor_file import load_tensors, save_tensors

FORMAT = "clipdist locked-features 1"
MOST_OPEN = 64  # files that stay mapped


def features_folder(cfg: config.Data) -> Path:
    """Return the folder of the files: beside the cache of remote shards."""
    return (Path(cfg.cache) if cfg.cache else Path.home() / ".cache" / "clipdist") / "features"


@dataclass(frozen=True)
class ShardFeatures:
    """The features of one shard's images or captions.

    Attributes:
        features: fp32 [m, w]: one row an image, or one a caption.
        starts: int64 [n+1]: sample i has the rows starts[i] .. starts[i+1]; none if it is bad.
        groups: int64 [m]: of a caption, as Batch.group_id; zeros for images.
        bad: reason by sample, for those without rows.
    """

    features: Tensor
    starts: Tensor
    groups: Tensor
    bad: dict[int, str]


class Row(NamedTuple):
    """One row of ShardFeatures: features fp32 [w], and the group."""

    features: Tensor
    group: int


class LockedFeatures:
    """The features of one tower for all samples of a catalog. Thread-safe.

    Args:
        key: what decides the features besides the shards: weights, transform, tokenizer.
    """

    def __init__(self, catalog: Catalog, folder: Path, key: str) -> None:
        self.catalog = catalog
        facts = [f"{key} {shard.count} {shard.digest.hex()}" for shard in catalog.shards]
        names = [hashlib.sha256(fact.encode()).hexdigest()[:32] for fact in facts]
        self.paths = [folder / f"{name}.safetensors" for name in names]
        self._open: OrderedDict[int, ShardFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def missing(self) -> list[int]:
        """Return the numbers of the shards whose features are not there."""
        return [number for number, path in enumerate(self.paths) if not path.is_file()]

    def write(self, shard: int, found: ShardFeatures) -> None:
        """Keep the features of a shard.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {"features": found.features, "starts": found.starts, "groups": found.groups}
        save_tensors(self.paths[shard], FORMAT, tensors, {"bad": {str(row): why for row, why in found.bad.items()}})

    @property
    def width(self) -> int:
        """The width w of the features."""
        return self._shard(0).features.shape[1]

    def rows(self, sample_id: int) -> list[Row]:
        """Return the rows of a sample: one of an image, one a caption.

        Raises:
            BadSample: it has none.
            UserError: the file is missing or damaged.
        """
        number, row = self.catalog.locate(sample_id)
        shard = self._shard(number)
        if row in shard.bad:
            raise BadSample(shard.bad[row])
        first, end = shard.starts[row : row + 2].tolist()
        return [Row(shard.features[i], int(shard.groups[i])) for i in range(first, end)]

    def _shard(self, number: int) -> ShardFeatures:
        with self._lock:
            if number not in self._open:
                tensors, head = load_tensors(self.paths[number], FORMAT)
                bad = {int(row): why for row, why in head["bad"].items()}
                self._open[number] = ShardFeatures(**tensors, bad=bad)
                while len(self._open) > MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]
