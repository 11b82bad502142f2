"""Write captions by a trained decoder: load it with its model, and run it over files or shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipdist import config
from clipdist.checkpoint.format import checkpoint_of, read_manifest
from clipdist.checkpoint.reader import load_full_weights
from clipdist.data.catalog import Catalog
from clipdist.data.decode import eval_image
from clipdist.data.reader import open_reader
from clipdist.errors import UserError
from clipdist.evals.decode_ahead import decode_ahead
from clipdist.evals.embed import WorkShare
from clipdist.models.caption_decoder import CAPTION, DECODER
from clipdist.models.generate import generate
from clipdist.models.image_tokens import tokens_shape
from clipdist.models.load import LoadedModel, add_open_clip_decoder
from clipdist.objectives.caption import CaptionObjective


class Caption(NamedTuple):
    """A caption of an image, ln p of its tokens, and how many they are, the end mark included."""

    key: str
    caption: str
    log_probability: float
    tokens: int


def add_decoder(loaded: LoadedModel, source: str, ema: bool = False) -> None:
    """Put the decoder of captions behind the model that was loaded without it, unless it has one, in place.

    Args:
        source: that it was loaded from.

    Raises:
        UserError: it was trained without one, or loaded weights have none.
    """
    model, folder = loaded.model, Path(source)
    if model.decoder is not None:
        return
    if model.decoder_weights and model.spec.decoder:  # of open_clip
        add_open_clip_decoder(model)
        assert model.decoder is not None
        model.decoder.load_state_dict(model.decoder_weights)
        model.eval()
        return
    lacks = f"{source}: has no decoder of captions; take a run with objectives.caption, or a CoCa of open_clip"
    if not folder.is_dir() or not loaded.manifest_sha256:
        raise UserError(lacks)
    checkpoint = checkpoint_of(folder, loaded.step)
    saved = config.saved_config(read_manifest(checkpoint).config)
    if saved is None or saved.objectives.caption is None:
        raise UserError(lacks)
    objective = CaptionObjective(saved.objectives.caption)
    objective.fit(model.spec)
    decoder = objective.head(tokens_shape(model.visual, model.spec.image_size)[1])
    weights = load_full_weights(checkpoint, ema=ema)
    own = {name.removeprefix(DECODER): value for name, value in weights.items() if name.startswith(DECODER)}
    decoder.load_state_dict(own)
    model.add_heads({CAPTION: decoder}, projects=model.spec.has_text)
    model.eval()


def caption_pixels(loaded: LoadedModel, keys: Sequence[str], pixels: Tensor) -> list[Caption]:
    """Return captions of images uint8 [b, 3, S, S] on the model's device, in their order."""
    assert loaded.model.decoder is not None
    found, end = generate(loaded.model, pixels), loaded.model.decoder.marks.end
    captions = []
    for key, row, probability in zip(keys, found.tokens.tolist(), found.log_probability.tolist()):
        length = row.index(end) + 1 if end in row else len(row)
        text = loaded.tokenizer.text_of(row[:length])
        captions.append(Caption(key, text, probability, length))
    return captions


def caption_files(
    loaded: LoadedModel, files: Sequence[Path], batch: int, device: str | torch.device
) -> Iterator[Caption]:
    """Iterate over captions of image files, whose names are the keys.

    Raises:
        UserError: a file cannot be read as an image.
    """
    for first in range(0, len(files), batch):
        part = files[first : first + batch]
        pixels = torch.stack([loaded.preprocess(path) for path in part]).to(device)
        yield from caption_pixels(loaded, [path.name for path in part], pixels)


def caption_catalog(
    loaded: LoadedModel, catalog: Catalog, share: WorkShare, device: str | torch.device, bad: dict[int, str]
) -> Iterator[Caption]:
    """Iterate over captions of the images of shards, by the samples' keys, in their order.

    Args:
        bad: gets the reasons for samples that are left out, by sample id.
    """
    data, transform = config.Data(), loaded.model.spec.transform
    reader = open_reader(catalog, data)
    try:
        wanted = range(len(catalog))
        calls = -(-len(wanted) // share.batch)

        def load(sample_id: int) -> Tensor:
            return eval_image(reader.sample(sample_id).image(), transform, data.max_pixels)

        decoded = decode_ahead(load, wanted, transform.shape, share.batch, calls, share.threads, bad)
        for pixels, own in share.bar(decoded, "pictures", calls):
            keys = [reader.key(sample_id) for sample_id in own]
            captions = caption_pixels(loaded, keys, pixels[: len(own)].to(device))
            yield from (caption for sample_id, caption in zip(own, captions) if sample_id not in bad)
    finally:
        reader.close()


def as_record(caption: Caption) -> Mapping[str, str | float | int]:
    """Return a line of the file, as tools/eval_captions.py reads it."""
    return {**caption._asdict(), "log_probability": round(caption.log_probability, 4)}
