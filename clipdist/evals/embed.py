"""Embed the images and captions of a catalog, in catalog order; each rank computes a slice."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import eval_image
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.members import Captions
from clipdist.data.reader import Reader, open_reader
from clipdist.data.transform import EvalTransform
from clipdist.distributed.collectives import all_gather_uneven, gather_json, rank_and_world
from clipdist.distributed.rank import moved
from clipdist.errors import UserError
from clipdist.evals.decode_ahead import decode_ahead
from clipdist.models.dual_encoder import DualEncoder

T = TypeVar("T")
# encode(uint8 [b,3,S,S] or None, tokens int64 [b,L] or None) -> (image features [b,D] or None, text features or None)
Encode = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]
IN_FLIGHT = 2  # batches whose features may still be under way on the device, so that it never waits for the next


@dataclass
class Embeddings:
    """Features as the projections give them (not normalised), on the CPU, n images and m captions."""

    image: Tensor  # fp32 [n, D]
    text: Tensor  # fp32 [m, D]
    text_image: Tensor  # int64 [m]: the row of the caption's image
    captions: list[str]  # m
    keys: list[str]  # n
    sample_ids: Tensor  # int64 [n], of the catalog
    bad: dict[str, list[str]]  # reason -> keys of the samples that are left out
    caption_sources: dict[str, int] = field(default_factory=dict)  # Captions.source -> samples, with bad ones


@dataclass(frozen=True)
class WorkShare:
    """How much of a set is computed here: a contiguous slice by each rank, in forward passes of `batch` rows."""

    rank: int = 0
    world: int = 1
    batch: int = 64
    threads: int = 2  # that decode images
    progress: bool = True  # a progress bar on rank 0, where stderr is a terminal

    def of(self, count: int) -> tuple[range, int]:
        """Return this rank's rows, and how many batches the rank with most of them needs."""
        mine = range(count * self.rank // self.world, count * (self.rank + 1) // self.world)
        return mine, _ceil(count, self.world * self.batch)

    def bar(self, batches: Iterable[T], what: str, calls: int) -> tqdm[T]:
        return tqdm(batches, what, calls, disable=None if self.progress and self.rank == 0 else True)


ALONE = WorkShare()


def model_encoder(model: DualEncoder, device: str | torch.device) -> Encode:
    """Return the encode function of a DualEncoder outside an engine; moves it to `device`, in evaluation mode."""
    model = model.to(device).eval()

    def encode(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        image_features = None if image is None else model.encode_image(moved(image, torch.device(device)))
        text_features = None if tokens is None else model.encode_text(tokens)
        return image_features, text_features

    return encode


def embed_catalog(
    encode: Encode,
    catalog: Catalog,
    tokenizer: Callable[[list[str]], Tensor],
    transform: EvalTransform,
    share: WorkShare = ALONE,
    texts: bool = True,
    data: config.Data | None = None,
    samples: Sequence[int] | None = None,
    most_captions: int | None = None,
    locked: Mapping[str, LockedFeatures] | None = None,
) -> Embeddings:
    """Embed this rank's contiguous slice of the catalog; the slices of ranks 0 .. world-1 in order are the catalog.

    `encode` always gets share.batch rows (the last ones padded with zeros), first images, then captions, and is called
    the same number of times on every rank, since under ZeRO-3 a forward pass is collective. A sample whose image
    cannot be decoded, or that lacks captions where they are asked for, is left out and named in `bad`.

    Args:
        tokenizer: captions -> int64 [b, L].
        transform: the model's evaluation transform.
        texts: False embeds images alone; `text` and `captions` are then empty.
        data: the cache for remote shards, and the pixel limit; None: as by default.
        samples: which samples, each once, in which order; None: all of the catalog.
        most_captions: an image's first ones; None: all.
        locked: features that `encode` gets in place of the images, or of the captions' tokens, by modality.
    """
    data, locked = data or config.Data(), locked or {}
    wanted = range(len(catalog)) if samples is None else samples
    rows, image_calls = share.of(len(wanted))
    mine = wanted[rows.start : rows.stop]
    reader = open_reader(catalog, data)

    def load(sample_id: int) -> Tensor:
        return eval_image(reader.sample(sample_id).image(), transform, data.max_pixels)

    try:
        sources: Counter[str] = Counter()
        captions, text_calls = _plan_captions(reader, wanted, share, most_captions, sources) if texts else ({}, 0)
        bad = {sample_id: "missing caption" for sample_id, own in captions.items() if not own}
        if "image" in locked:
            known = [_image_row(locked["image"], sample_id, bad) for sample_id in mine]
            images = _batches(known, locked["image"].width, share.batch, image_calls)
        else:
            decoded = decode_ahead(load, mine, transform.shape, share.batch, image_calls, share.threads, bad)
            images = (pixels for pixels, _ in decoded)
        image = encode_images(encode, share.bar(images, "pictures", image_calls))
        flat = [(sample_id, caption) for sample_id, own in captions.items() for caption in own]
        if "text" in locked:
            captioned = [(sample_id, len(own)) for sample_id, own in captions.items() if own]
            known = [row.features for one, count in captioned for row in locked["text"].rows(one)[:count]]
            tokens = _batches(known, locked["text"].width, share.batch, text_calls)
            encoded = forward_batches(lambda features: encode(None, features)[1], tokens)
        else:
            encoded = encode_texts(encode, tokenizer, [caption for _, caption in flat], share.batch, text_calls)
        parts = list(share.bar(encoded, "captions", text_calls))
        text = torch.cat(parts)[: len(flat)] if parts else torch.zeros(0, 0)  # no captions: of no width either
        keys = {sample_id: reader.key(sample_id) for sample_id in mine}
    finally:
        reader.close()
    return replace(_without_bad(image, text, flat, keys, bad), caption_sources=dict(sources))


def _image_row(features: LockedFeatures, sample_id: int, bad: dict[int, str]) -> Tensor:
    """Return the features of an image, fp32 [w]; zeros, with the reason in `bad`, if it has none."""
    try:
        return features.rows(sample_id)[0].features
    except BadSample as error:
        bad.setdefault(sample_id, error.reason)
        return torch.zeros(features.width)


def _batches(rows: Sequence[Tensor], width: int, batch: int, calls: int) -> Iterator[Tensor]:
    """Yield `calls` batches [batch, width] of the rows, filled up with zeros."""
    for first in range(0, calls * batch, batch):
        filled = torch.zeros(batch, width)
        for row, features in zip(filled, rows[first : first + batch]):
            row.copy_(features)
        yield filled


def encode_images(encode: Encode, batches: Iterable[Tensor]) -> Tensor:
    """Encode uint8 [b, 3, S, S] batches of any sizes: fp32 [sum of b, D] on the CPU.

    Raises:
        UserError: no batches.
    """
    parts = list(forward_batches(lambda images: encode(images, None)[0], batches))
    if not parts:
        raise UserError("nothing to embed: no pictures")
    return torch.cat(parts)


def encode_texts(
    encode: Encode, tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str], batch: int, calls: int
) -> Iterator[Tensor]:
    """Yield the features of the sentences, fp32 [<= batch, D] on the CPU, in exactly `calls` forward passes.

    Rows that pad a batch repeat the tokens of an empty sentence; their features are cut off.
    """
    parts = [list(texts[call * batch : (call + 1) * batch]) for call in range(calls)]
    tokens = (tokenizer(part + [""] * (batch - len(part))) for part in parts)
    for part, features in zip(parts, forward_batches(lambda ids: encode(None, ids)[1], tokens)):
        yield features[: len(part)]


def gather_embeddings(embeddings: Embeddings, process_group: dist.ProcessGroup | None = None) -> Embeddings:
    """Return all ranks' slices as one, in rank order, on every rank. Collective; strings go as JSON, not pickled."""
    if rank_and_world(process_group)[1] == 1:
        return embeddings
    image, text, text_image, sample_ids = (
        all_gather_uneven(tensor, process_group)
        for tensor in (embeddings.image, embeddings.text, embeddings.text_image, embeddings.sample_ids)
    )
    own = [embeddings.captions, embeddings.keys, embeddings.bad, embeddings.caption_sources]
    captions, keys, bad_of_ranks, sources = zip(*gather_json(own, process_group))
    bad: dict[str, list[str]] = {}
    for reason, names in chain.from_iterable(part.items() for part in bad_of_ranks):
        bad.setdefault(reason, []).extend(names)
    firsts = torch.tensor([0, *(len(part) for part in image[:-1])]).cumsum(0)  # a rank counted its images from 0
    return Embeddings(
        image=torch.cat(image),
        text=torch.cat(text),
        text_image=torch.cat([part + first for part, first in zip(text_image, firsts)]),
        captions=list(chain.from_iterable(captions)),
        keys=list(chain.from_iterable(keys)),
        sample_ids=torch.cat(sample_ids),
        bad=bad,
        caption_sources=dict(sum(map(Counter, sources), Counter())),
    )


def _without_bad(
    image: Tensor, text: Tensor, flat: list[tuple[int, str]], keys: dict[int, str], bad: dict[int, str]
) -> Embeddings:
    """Drop bad samples from `image` (a row per sample of `keys`) and `text` (a row per caption of `flat`)."""
    kept = [row for row, sample_id in enumerate(keys) if sample_id not in bad]
    ids = [sample_id for sample_id in keys if sample_id not in bad]
    row_of = {sample_id: row for row, sample_id in enumerate(ids)}
    rows = [row for row, (sample_id, _) in enumerate(flat) if sample_id in row_of]
    by_reason: dict[str, list[str]] = {}
    for sample_id in sorted(bad):
        by_reason.setdefault(bad[sample_id], []).append(keys[sample_id])
    return Embeddings(
        image=image[kept],
        text=text[rows],
        text_image=torch.tensor([row_of[flat[row][0]] for row in rows], dtype=torch.int64),
        captions=[flat[row][1] for row in rows],
        keys=[keys[sample_id] for sample_id in ids],
        sample_ids=torch.tensor(ids, dtype=torch.int64),
        bad=by_reason,
    )


def _plan_captions(
    reader: Reader, wanted: Sequence[int], share: WorkShare, most: int | None, sources: Counter[str]
) -> tuple[dict[int, list[str]], int]:
    """Return this rank's captions by sample, and the number of text batches of the rank that has most.

    Every rank reads all captions: it costs microseconds a sample, and no communication.

    Args:
        sources: counts where this rank's captions are from.
    """
    mine: dict[int, list[str]] = {}
    counts = []
    for rank in range(share.world):
        counts.append(0)
        rows, _ = replace(share, rank=rank).of(len(wanted))
        for sample_id in wanted[rows.start : rows.stop]:
            try:
                found = reader.sample(sample_id).find_captions()
            except BadSample:
                found = Captions([], "")
            captions = found.texts[:most]
            counts[rank] += len(captions)
            if rank == share.rank:
                mine[sample_id] = captions
                sources.update([found.source] if captions else [])
    return mine, _ceil(max(counts), share.batch)


@torch.no_grad()
def forward_batches(tower: Callable[[Tensor], Tensor | None], batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield every batch's features, fp32 on the CPU, while the device works on the next ones."""
    under_way: deque[Tensor] = deque()
    for inputs in batches:
        features = tower(inputs)
        assert features is not None  # what was given is encoded
        under_way.append(features.float())
        if len(under_way) > IN_FLIGHT:
            yield under_way.popleft().cpu()
    yield from (features.cpu() for features in under_way)


def _ceil(count: int, batch: int) -> int:
    return -(-count // batch)
