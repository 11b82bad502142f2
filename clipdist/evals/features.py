"""Compute frozen features of labelled images, on every rank, and keep them in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.decode import eval_pixels
from clipdist.data.tensor_file import load_tensors, save_tensors
from clipdist.data.transform import EvalTransform
from clipdist.datasets.labelled import LabelledSet, Split
from clipdist.distributed.collectives import gather_json, sum_over_ranks
from clipdist.errors import UserError
from clipdist.evals.decode_ahead import decode_ahead
from clipdist.evals.embed import ALONE, Encode, WorkShare, encode_images
from clipdist.evals.store import read_kept
from clipdist.models.build import assemble
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.towers import find_projection
from clipdist.models.weights import weights_checksum

FORMAT = "clipdist features 1"
Kind = Literal["projected", "tower"]
PIXEL_SIDE = 32  # of the images whose raw pixels are the baseline
RANDOM_SEED = 0  # of the baseline's weights


@dataclass(frozen=True)
class SplitFeatures:
    """The images of a split that could be decoded, in its order; equal on all ranks."""

    image: Tensor  # fp32 [n, D], as the projection gives them, on the CPU
    labels: Tensor  # int64 [n]
    left_out: int  # images that could not be decoded


@dataclass(frozen=True)
class Features:
    """Both splits' features on the CPU. Tensors are empty on the ranks that do not fit."""

    train: SplitFeatures
    test: SplitFeatures


def frozen_encoder(model: DualEncoder, device: str | torch.device, kind: Kind) -> Encode:
    """Return a frozen model's encode function: "projected" gives unit length, "tower" what precedes the projection.

    Of a tower without a projection (timm's with timm_proj none, such as SigLIP's, or of a model without a text tower)
    "tower" gives its output as it is.

    Raises:
        UserError: "tower" of a tower without a projection that is known.
    """
    model = model.to(device).eval().requires_grad_(False)
    known = find_projection(model.visual) is not None
    known = known or hasattr(model.visual, "trunk") or not model.spec.has_text  # timm's may have none
    if kind == "tower" and not known:  # heard of before images are decoded
        name = type(model.visual).__name__
        raise UserError(f"the image tower {name} has no projection that is known; take --features projected")

    def encode(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert image is not None  # the probe has no sentences
        return image_features(model, image.to(device, non_blocking=True), kind), None

    return encode


def image_features(model: DualEncoder, image: Tensor, kind: Kind) -> Tensor:
    """Return the features of uint8 [b, 3, S, S]: [b, D], or [b, width] before the projection; see frozen_encoder."""
    if kind == "projected":
        return F.normalize(model.encode_image(image).float(), dim=1)
    return model.encode_hidden(image)


def pixel_encoder(image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the baseline's features, the pixels themselves: uint8 [b, 3, h, w] -> fp32 [b, 3 * h * w] in [0, 1]."""
    assert image is not None
    return image.flatten(1).float() / 255, None


def random_twin(model: DualEncoder) -> DualEncoder:
    """Return the same architecture with weights freshly drawn, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return assemble(model.spec, tower_weights=False).eval()


def embed_split(encode: Encode, split: Split, transform: EvalTransform, share: WorkShare = ALONE) -> SplitFeatures:
    """Return the features of all images on every rank; each computes a contiguous slice, in full batches. Collective.

    Args:
        transform: the model's evaluation transform.

    Raises:
        UserError: not one image can be decoded.
    """
    mine, calls = share.of(len(split))
    if not calls:
        raise UserError("no pictures to classify")
    bad: dict[int, str] = {}
    images = decode_split(split, mine, transform, share.batch, calls, share.threads, bad)
    features = encode_images(encode, share.bar(images, "pictures", calls))[: len(mine)]
    every = torch.zeros(len(split), features.shape[1])
    every[mine.start : mine.stop] = features
    good = torch.zeros(len(split), dtype=torch.int64)
    good[[row for row in mine if row not in bad]] = 1
    kept = sum_over_ranks(good).bool()
    if not kept.any():
        raise UserError(f"not one of {len(split)} pictures can be decoded")
    return SplitFeatures(sum_over_ranks(every)[kept], torch.from_numpy(split.labels)[kept], int((~kept).sum()))


def embed_set(
    encode: Encode, data: LabelledSet, transform: EvalTransform, share: WorkShare = ALONE, cache: Path | None = None
) -> Features:
    """Return the features of both splits, from the cache where it has them. Collective: each rank computes a slice.

    Args:
        transform: the evaluation transform of the images that `encode` takes.
        cache: the file that keeps them (features_path); None: none. Rank 0 reads it and writes it; where it is found,
            the other ranks get no features.

    Raises:
        UserError: the set has no training images, or none of a split can be decoded.
    """
    if data.train is None:
        raise UserError(f"{data.name}: the probe needs training pictures as well: DIR/train beside DIR/test")
    found = read_kept(cache, load_features) if cache and share.rank == 0 else None
    if cache and gather_json(found is not None)[0]:
        nothing = SplitFeatures(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), 0)
        return found or Features(nothing, nothing)
    train, test = (embed_split(encode, split, transform, share) for split in (data.train, data.test))
    if cache and share.rank == 0:
        with suppress(UserError):  # a full disk or a run that may not be written to: they are computed again next time
            save_features(cache, Features(train, test))
    return Features(train, test)


def features_path(folder: Path, model: DualEncoder, data: LabelledSet, kind: Kind) -> Path | None:
    """Return the cache's file of a model's features of a set; None where the set's images have no digest.

    Its name is made of all weights, of the evaluation transform, of the images, and of the kind of features.
    """
    splits = [split for split in (data.train, data.test) if split is not None]
    if not all(split.digest for split in splits):
        return None
    spec = model.spec
    pixels = [asdict(spec.transform), spec.image_mean, spec.image_std]
    facts = [weights_checksum(model), pixels, spec.quick_gelu, spec.model]
    text = json.dumps([kind, facts, [split.digest for split in splits]], sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def save_features(path: Path, features: Features) -> None:
    """Keep both splits' features in one file.

    Raises:
        UserError: it cannot be written.
    """
    parts = {"train": features.train, "test": features.test}
    tensors = {f"{name}.image": part.image for name, part in parts.items()}
    tensors |= {f"{name}.labels": part.labels for name, part in parts.items()}
    save_tensors(path, FORMAT, tensors, {"left_out": {name: part.left_out for name, part in parts.items()}})


def load_features(path: Path) -> Features:
    """Return what save_features wrote.

    Raises:
        UserError: as load_tensors; a damaged file.
    """
    tensors, head = load_tensors(path, FORMAT)
    try:
        train, test = (
            SplitFeatures(tensors[f"{name}.image"], tensors[f"{name}.labels"], int(head["left_out"][name]))
            for name in ("train", "test")
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged") from None
    return Features(train, test)


def decode_split(
    split: Split,
    rows: Sequence[int],
    transform: EvalTransform,
    batch: int,
    calls: int,
    threads: int,
    bad: dict[int, str],
) -> Iterator[Tensor]:
    """Yield exactly `calls` batches uint8 [batch, *transform.shape] of these rows; see decode_ahead."""

    def load(row: int) -> Tensor:
        return eval_pixels(split.read(row), transform)

    return (images for images, _ in decode_ahead(load, rows, transform.shape, batch, calls, threads, bad))
