"""Select the samples and folds of a published retrieval protocol by the user's copy of its split file.

The protocols of the literature since Karpathy and Fei-Fei (2015): 1000 test images of Flickr8k and of Flickr30k,
5000 of COCO, each with its first five captions; COCO 1K is the mean over five folds of 1000 images, taken in the
order of the split file. Images are found by file name, as shards keep it in their .json, or by key.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.reader import open_reader
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings

CAPTIONS = 5  # of an image, its first ones
MOST_SPLIT_BYTES = 1 << 30  # dataset_coco.json has 0.15e9


@dataclass(frozen=True)
class RetrievalProtocol:
    """What is published: `images` of the test split of `dataset`, in `folds` of equal size."""

    name: str
    dataset: str
    images: int
    folds: int

    @property
    def files(self) -> str:
        """The split files that name the images."""
        text = " or Flickr_8k.testImages.txt" if self.dataset == "flickr8k" else ""
        return f"Karpathy's dataset_{self.dataset}.json{text}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        RetrievalProtocol("flickr8k-1k", "flickr8k", 1000, 1),
        RetrievalProtocol("flickr30k-1k", "flickr30k", 1000, 1),
        RetrievalProtocol("coco-5k", "coco", 5000, 1),
        RetrievalProtocol("coco-1k-folds", "coco", 5000, 5),
    )
}
CAPTION_PROTOCOLS = {  # of captioning: the same test images, every one of whose captions is a reference
    "coco": PROTOCOLS["coco-5k"],
    "flickr8k": PROTOCOLS["flickr8k-1k"],
    "flickr30k": PROTOCOLS["flickr30k-1k"],
}


def read_test_names(path: Path, protocol: RetrievalProtocol) -> list[str]:
    """Return the file names of the test images, in the file's order.

    Args:
        path: Karpathy's JSON (the images of split "test"), or a text file with a name a line.

    Raises:
        UserError: no such file, or neither of these, or not as many images as the protocol has.
    """
    try:
        if path.stat().st_size > MOST_SPLIT_BYTES:
            raise UserError(f"--split-file {path}: too large for a split file; expected {protocol.files}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split-file {path}: cannot be read ({error}); expected {protocol.files}") from None
    names = _karpathy_names(text, path) if text.lstrip().startswith("{") else text.split()
    if len(names) != protocol.images or len(set(names)) != len(names):
        raise UserError(
            f"--split-file {path}: {len(set(names))} different test pictures; {protocol.name} has {protocol.images}"
            f" (expected {protocol.files})"
        )
    return names


def select_samples(catalog: Catalog, names: Sequence[str]) -> dict[int, int]:
    """Find the samples whose "filename" or key is among the names: {sample id: its place there}, in that order.

    Raises:
        UserError: two samples have the same name.
    """
    wanted = {name: position for position, name in enumerate(names)}
    by_key = {posixpath.splitext(name)[0]: position for name, position in wanted.items()}
    found: dict[int, int] = {}
    reader = open_reader(catalog)
    try:
        for sample_id in range(len(catalog)):
            key = reader.key(sample_id)
            try:
                filename = reader.sample(sample_id).metadata().get("filename")
            except BadSample:
                filename = None
            position = wanted.get(posixpath.basename(filename)) if isinstance(filename, str) else by_key.get(key)
            if position is None:
                continue
            if position in found:
                first = reader.key(found[position])
                raise UserError(f"{names[position]}: two samples have this file name, {first} and {key}; name one set")
            found[position] = sample_id
    finally:
        reader.close()
    return {found[position]: position for position in sorted(found)}


def require_whole(protocol: RetrievalProtocol, names: Sequence[str], positions: Collection[int], where: str) -> None:
    """Raise UserError where names have no sample: numbers over fewer candidates are not the published ones."""
    if missing := [name for position, name in enumerate(names) if position not in positions]:
        shown = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        raise UserError(
            f"{where}: {len(missing)} of the {protocol.images} pictures of {protocol.name} are missing or unusable"
            f" ({shown}); --allow-missing evaluates the others"
        )


def folds_of(
    embeddings: Embeddings, positions: Sequence[int], protocol: RetrievalProtocol
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return image features, text features and text_image of each fold.

    Args:
        positions: the place in the split file of each image of `embeddings`.

    Raises:
        UserError: a fold has no image at all, or the positions do not belong to the embeddings.
    """
    if len(positions) != len(embeddings.image) or any(not 0 <= place < protocol.images for place in positions):
        raise UserError(f"{protocol.name}: the embeddings do not say which of its pictures they are; save them again")
    size = protocol.images // protocol.folds
    fold_of_image = torch.tensor(positions, dtype=torch.int64) // size
    folds = []
    for fold in range(protocol.folds):
        images = fold_of_image == fold
        if not images.any():
            raise UserError(f"{protocol.name}: no picture of fold {fold + 1} of {protocol.folds} is there")
        row = images.cumsum(0) - 1
        captions = images[embeddings.text_image]
        folds.append((embeddings.image[images], embeddings.text[captions], row[embeddings.text_image[captions]]))
    return folds


def _karpathy_names(text: str, path: Path) -> list[str]:
    try:
        return [str(image["filename"]) for image in json.loads(text)["images"] if image["split"] == "test"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--split-file {path}: not a split file of Karpathy's ({reason})") from None
