"""Find the images most similar to sentences or images, by features that are kept.

The features of a set of images are computed once for a model and kept in RUN/embeddings/KEY.safetensors, scaled to
unit length, so that a search is one product. KEY names the weights and the shards: another checkpoint or other shards
have another file, and an old one can be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import decode_pixels, eval_image
from clipdist.data.index import IMAGE_KINDS
from clipdist.data.reader import Reader
from clipdist.data.transform import EvalTransform
from clipdist.distributed.collectives import gather_json
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.embed import (
    Embeddings,
    Encode,
    WorkShare,
    embed_catalog,
    encode_images,
    encode_texts,
    gather_embeddings,
)
from clipdist.evals.locked import kept_features
from clipdist.evals.prompts import SLOT
from clipdist.evals.sheet import first_caption
from clipdist.evals.store import load_embeddings, read_kept, save_embeddings, write_kept
from clipdist.models.load import LoadedModel

TILE_IMAGES, TILE_QUERIES = 65_536, 256  # scored at a time: 64 MiB of scores
LAYOUT = "unit length 1"  # of a kept file; another number makes all of them anew


@dataclass(frozen=True)
class Query:
    """A sentence, or an image: then `text` is its file and `image` the file's bytes, which can be decoded."""

    text: str
    image: bytes | None = None


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: cosine with the query.
        shard: path or address of its tar.
        filename: what its .json calls it, "" where it says nothing.
        caption: its first, "" where it has none.
    """

    rank: int
    score: float
    key: str
    shard: str
    filename: str
    caption: str
    sample_id: int


def read_query(words: str) -> Query:
    """Read a query: a sentence as it stands, or the file of words that end like an image's (.jpg, .png ...).

    Raises:
        UserError: no words, no such file, or one that is no image.
    """
    if not words.strip():
        raise UserError("the sentence is empty; ask in words, or name a picture's file")
    path = Path(words)
    if path.suffix.lower().removeprefix(".") not in IMAGE_KINDS:
        return Query(words)
    try:
        data = path.read_bytes()
        decode_pixels(data)
    except OSError as error:
        raise UserError(f"the query {words}: {error.strerror}; a query that ends in {path.suffix} is a file") from None
    except BadSample as error:
        raise UserError(f"the query {words}: {error.reason}; name a whole JPEG, PNG, WebP, GIF or BMP file") from None
    return Query(words, data)


def read_queries(path: Path) -> list[Query]:
    """Read the queries of a file, one a line; empty lines are left out, an image's file is named as from here.

    Raises:
        UserError: the file cannot be read as UTF-8, holds no query, or one of them is no image.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a file of queries ({error})") from None
    queries = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                queries.append(read_query(line.strip()))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not queries:
        raise UserError(f"{path}: holds no query; write one a line")
    return queries


def encode_queries(
    encode: Encode,
    tokenizer: Callable[[list[str]], Tensor],
    transform: EvalTransform,
    queries: Sequence[Query],
    prompts: Sequence[str] = (SLOT,),
    batch: int = 64,
) -> Tensor:
    """Return unit vectors fp32 [q, D]: of a sentence, the direction of its prompts' mean; of an image, its own.

    Args:
        prompts: sentences with the slot {}; each prompt's feature is scaled to unit length before the mean is taken
            (Radford et al. 2021, section 3.1.4).

    Raises:
        UserError: features that are not finite.
    """
    sentences = [query.text for query in queries if query.image is None]
    given = [query.image for query in queries if query.image is not None]
    texts, images = torch.zeros(0, 0), torch.zeros(0, 0)
    if sentences:
        filled = [prompt.replace(SLOT, sentence) for sentence in sentences for prompt in prompts]
        rows = min(batch, len(filled))
        parts = encode_texts(encode, tokenizer, filled, rows, -(-len(filled) // rows))
        texts = unit(torch.cat(list(parts))).unflatten(0, (-1, len(prompts))).mean(1)
    if given:
        starts = range(0, len(given), batch)
        images = unit(encode_images(encode, (_pixels(given[start : start + batch], transform) for start in starts)))
    of_sentences, of_images = iter(texts), iter(images)
    return unit(torch.stack([next(of_sentences if query.image is None else of_images) for query in queries]))


def unit(features: Tensor) -> Tensor:
    """Return the rows scaled to unit length, fp32.

    Raises:
        UserError: features that are not finite.
    """
    if not torch.isfinite(features).all():
        raise UserError("the features are not finite: the weights have diverged; take an older checkpoint")
    return F.normalize(features.float(), dim=1)


def nearest(images: Tensor, queries: Tensor, k: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Search exactly: return rows int64 [q, min(k, n)] of the highest cosines, best first, and the cosines, fp32.

    Memory beyond the results is one tile, so that `images` may be mapped from a file larger than memory. Of images
    that score alike the first in the catalog comes first.

    Args:
        images, queries: unit vectors fp32 [n, D] and [q, D].
        device: where the products are taken.
    """
    found = [_nearest(images, part.to(device), k) for part in queries.split(TILE_QUERIES)]
    return torch.cat([rows for rows, _ in found]), torch.cat([scores for _, scores in found])


def cache_file(loaded: LoadedModel, catalog: Catalog) -> Path:
    """Return where the features are kept: beside the run, or in the home folder for a model that has none."""
    folder = (loaded.run_dir or Path.home() / ".cache" / "clipdist") / "embeddings"
    names = "\n".join(_facts(loaded, catalog).values())
    return folder / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.safetensors"


def read_cache(path: Path, loaded: LoadedModel, catalog: Catalog) -> Embeddings | None:
    """Return the kept features, or None where there are none of use; see read_kept."""

    def read(path: Path) -> Embeddings:
        embeddings, facts = load_embeddings(path)
        if facts != _facts(loaded, catalog):
            raise UserError(f"{path}: of another model or other shards")
        return embeddings

    return read_kept(path, read)


def write_cache(path: Path, loaded: LoadedModel, catalog: Catalog, embeddings: Embeddings) -> None:
    """Keep features of unit length; see write_kept."""
    write_kept(lambda: save_embeddings(path, embeddings, _facts(loaded, catalog)))


def image_embeddings(
    loaded: LoadedModel, encode: Encode, catalog: Catalog, share: WorkShare, keep: bool, dist_env: DistEnv
) -> tuple[Embeddings | None, bool]:
    """Return the images' features, of unit length, on rank 0, and whether they were kept from an earlier search.

    Rank 0 alone looks for the file, so that all ranks agree on whether there is work to share. Collective.

    Args:
        keep: read the file that keeps them, or write it.

    Raises:
        UserError: no image can be decoded, or features that are not finite.
    """
    path, asked = cache_file(loaded, catalog), keep and share.rank == 0
    kept = read_cache(path, loaded, catalog) if asked else None
    if gather_json(kept is not None)[0]:
        return kept, True
    transform = loaded.model.spec.transform
    locked = kept_features(loaded, catalog, dist_env, text=False)
    own = embed_catalog(encode, catalog, loaded.tokenizer, transform, share, texts=False, locked=locked)
    embeddings = gather_embeddings(own)
    if not len(embeddings.image):
        raise UserError("no picture in the shards could be decoded")
    embeddings = replace(embeddings, image=unit(embeddings.image))
    if asked:
        write_cache(path, loaded, catalog, embeddings)
    return embeddings, False


def describe_hits(reader: Reader, sample_ids: Iterable[int], scores: Iterable[float]) -> list[Hit]:
    """Return what the shards say of the images that were found, best first."""
    return [
        Hit(
            rank=rank,
            score=round(score, 6),
            key=reader.key(sample_id),
            shard=str(reader.catalog.shards[reader.catalog.locate(sample_id)[0]].tar),
            filename=_filename(reader, sample_id),
            caption=first_caption(reader, sample_id),
            sample_id=sample_id,
        )
        for rank, (sample_id, score) in enumerate(zip(sample_ids, scores), start=1)
    ]


def _filename(reader: Reader, sample_id: int) -> str:
    try:
        return str(reader.sample(sample_id).metadata().get("filename", ""))
    except BadSample:  # its image is good all the same
        return ""


def _facts(loaded: LoadedModel, catalog: Catalog) -> dict[str, str]:
    facts = {"model": loaded.fingerprint, "pictures": catalog.fingerprint(), "features": LAYOUT}
    images = ",".join(catalog.members.images)
    return facts if catalog.members.images == IMAGE_KINDS else facts | {"members": images}


def _pixels(images: list[bytes], transform: EvalTransform) -> Tensor:
    try:
        return torch.stack([eval_image(data, transform) for data in images])
    except BadSample as error:  # a long strip: it can be decoded, but not enlarged
        raise UserError(f"a picture among the queries: {error.reason}") from None


def _nearest(images: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(len(queries), 0, dtype=torch.int64)
    scores = torch.zeros(len(queries), 0)
    for begin in range(0, len(images), TILE_IMAGES):
        tile = images[begin : begin + TILE_IMAGES].to(queries.device)
        found, columns = highest(queries @ tile.T, min(k, len(tile)))
        rows = torch.cat([rows, columns.cpu() + begin], 1)
        scores = torch.cat([scores, found.cpu()], 1)
        in_order = rows.argsort(dim=1)  # so that the stable sort below leaves equal scores in catalog order
        rows, scores = rows.gather(1, in_order), scores.gather(1, in_order)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        rows, scores = rows.gather(1, best), scores.gather(1, best)
    return rows, scores


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest values of each row of [q, n], and their columns, int64 [q, k].

    Of values that are equal those in the first columns are taken, where topk takes any.
    """
    further = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # whether the next one is equal to the last of them
    values, columns = further.values[:, :k].clone(), further.indices[:, :k].clone()
    least = values[:, -1:]
    tied = (further.values[:, k:] == least).flatten().nonzero().flatten()
    if len(tied):
        part, edge = scores[tied], least[tied]
        above, equal = part > edge, part == edge
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns[tied] = taken.nonzero()[:, 1].view(-1, k)
        values[tied] = part.gather(1, columns[tied])
    return values, columns
