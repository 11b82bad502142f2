"""Search millions of image features by a faiss index that is kept beside them: nearly exact, in milliseconds.

The index is an inverted file (IVF): k-means cells, of which a query looks into the nearest. How many is found by asking
with captions of the images themselves until the answers agree with the exact ones; how well they agree on other
captions is kept with the index and shown with every answer. faiss is an optional package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipdist.errors import UserError
from clipdist.evals.search import nearest
from clipdist.evals.store import read_kept, write_kept
from clipdist.storage import replacing

AGREE = 95.0  # percent of the exact ten best that an index must find
CUTOFFS = (1, 10, 100)  # of the recall
POINTS_PER_CELL = 39  # that k-means learns from; faiss warns below
ROUNDS = 10  # of k-means
ADD = 65_536  # rows that are added at a time
SEED = 0
SAMPLES = 256  # captions that an index is tuned and measured with


@dataclass(frozen=True)
class IndexFacts:
    """What is known of an index.

    Attributes:
        cells, looked_into: of how many cells a query looks into how many.
        recall: cut-off k -> percent of the exact k best that are among the index' k best.
        asked: with what the recall was measured, such as "128 captions".
    """

    pictures: int
    cells: int
    looked_into: int
    recall: dict[str, float]
    asked: str

    def __str__(self) -> str:
        recall = ", ".join(f"@{k} {value:.1f} %" for k, value in self.recall.items())
        return f"faiss, {self.looked_into} of {self.cells} cells; of the exact answer on {self.asked}: recall {recall}"


@dataclass(frozen=True)
class ApproximateIndex:
    """A faiss index over n unit vectors; the rows it answers with are theirs."""

    index: Any
    facts: IndexFacts

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return rows int64 [q, min(k, n)], best first, and cosines fp32; -1 where the cells hold fewer images."""
        scores, rows = self.index.search(queries.numpy(), min(k, self.facts.pictures))
        return torch.from_numpy(rows), torch.from_numpy(scores)


def require_faiss() -> Any:
    """Import faiss.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "--index faiss: faiss is not installed; `pip install faiss-cpu`, or leave --index out"
        ) from None
    return faiss


def build_index(images: Tensor, samples: Tensor, asked: str, progress: bool = True) -> ApproximateIndex:
    """Train the cells, add the images, and find how many cells to look into.

    Args:
        images: unit vectors fp32 [n, D], which may be mapped from a file; the index holds a copy in memory.
        samples: queries to tune and measure with, unit vectors fp32 [s, D], at least two: every other one tunes.
        asked: what they are, in the plural, for IndexFacts.asked.
    """
    faiss = require_faiss()
    n, width = images.shape
    cells = max(1, min(int(2 * math.sqrt(n)), n // POINTS_PER_CELL))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.spherical = ROUNDS, SEED, True
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))[: cells * POINTS_PER_CELL]
    index.train(images[drawn.sort().values].numpy())
    for begin in tqdm(range(0, n, ADD), "index", disable=None if progress else True):
        index.add(images[begin : begin + ADD].numpy())
    exact, _ = nearest(images, samples, max(CUTOFFS))
    tuning, measured = samples[::2], samples[1::2]
    index.nprobe = 1
    while index.nprobe < cells and _recall(index, tuning, exact[::2], 10) < AGREE:
        index.nprobe = min(2 * index.nprobe, cells)
    recall = {str(k): round(_recall(index, measured, exact[1::2], k), 2) for k in CUTOFFS if k <= n}
    return ApproximateIndex(index, IndexFacts(n, cells, index.nprobe, recall, f"{len(measured)} {asked}"))


def kept_index(
    path: Path,
    images: Tensor,
    captions: Callable[[], Sequence[str]],
    encode: Callable[[Sequence[str]], Tensor],
    keep: bool,
) -> ApproximateIndex:
    """Return the index that was kept in `path`, or build one, tuned with captions or with images where there are none.

    Args:
        captions: returns some captions; called where an index is built.
        encode: captions -> unit vectors.
        keep: read and write the file.
    """
    if keep and (kept := read_kept(path, partial(read_index, images=images))):
        return kept
    sentences = captions()
    if len(sentences) > 1:
        index = build_index(images, encode(sentences), "captions")
    else:
        index = build_index(images, spread(images), "pictures of its own")
    if keep:
        write_kept(partial(write_index, path, index))
    return index


def spread(rows: Any) -> Any:
    """Return up to SAMPLES items, evenly spread."""
    return rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]


def write_index(path: Path, index: ApproximateIndex) -> None:
    """Write path and, last, path.json with its facts and size: without that the index is not whole.

    Raises:
        UserError: the files cannot be written.
    """
    facts = path.with_name(f"{path.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts.unlink(missing_ok=True)  # the old facts must not stand beside the new index
        with replacing(path, shared=True) as partial:
            require_faiss().write_index(index.index, str(partial))
        with replacing(facts, shared=True) as partial:
            partial.write_text(json.dumps(asdict(index.facts) | {"bytes": path.stat().st_size}))
    except (OSError, RuntimeError) as error:  # faiss raises the latter
        raise UserError(f"{path}: the index cannot be written ({error}); is there room on the disk?") from None


def read_index(path: Path, images: Tensor) -> ApproximateIndex:
    """Return the kept index over these images.

    Raises:
        UserError: it is not whole, or of others.
    """
    facts = path.with_name(f"{path.name}.json")
    try:
        record = json.loads(facts.read_text())
        if record.pop("bytes") != path.stat().st_size:
            raise ValueError("not whole")
        index = ApproximateIndex(require_faiss().read_index(str(path)), IndexFacts(**record))
        if (index.index.ntotal, index.index.d) != tuple(images.shape):
            raise ValueError("of other pictures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be used ({' '.join(str(error).split())[:100]})") from None
    return index


def _recall(index: Any, queries: Tensor, exact: Tensor, k: int) -> float:
    """Return the percentage of the exact k best, rows int64 [q, >= k], that the index has among its k best."""
    _, rows = index.search(queries.numpy(), k)
    right = exact[:, :k]
    return 100.0 * (right[:, :, None] == torch.from_numpy(rows)[:, None, :]).any(2).double().mean().item()
