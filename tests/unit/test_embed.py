"""Embedding a catalog: rows in order, damage named, fixed batches, the same calls on every rank, gathering."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdist.data.catalog import Catalog
from clipdist.data.transform import EvalTransform
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings, WorkShare, embed_catalog, encode_images, gather_embeddings

SIZE = 8


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (level, level, level)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]


def write_shard(path: Path, first: int, samples: list[tuple[bytes, list[str]]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (image, captions) in enumerate(samples, start=first):
            record = {"key": f"k{row:03d}", "captions": captions}
            for kind, data in (("jpg", image), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"k{row:03d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Eleven samples in two shards, grey level 10 * row; 2 is truncated, 7 no picture, 5 without captions."""
    samples = [(jpeg(10 * row), [f"{row} {n}" for n in range(1 + row % 3)]) for row in range(11)]
    samples[2] = (truncated_jpeg(), samples[2][1])
    samples[7] = (b"version https://git-lfs", samples[7][1])
    samples[5] = (samples[5][0], [])
    write_shard(tmp_path / "00000.tar", 0, samples[:6])
    write_shard(tmp_path / "00001.tar", 6, samples[6:])
    return Catalog.open([str(tmp_path)])


def tokenizer(texts: list[str]) -> torch.Tensor:
    """The two numbers of a caption; the empty one is -1, -1."""
    return torch.tensor([[int(word) for word in text.split()] or [-1, -1] for text in texts])


class Recorder:
    """Encodes a picture as (its mean, 1), a caption as its tokens, and keeps the shapes of what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __call__(
        self, image: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert not torch.is_grad_enabled()
        assert (image is None) != (tokens is None)
        if image is not None:
            assert image.dtype == torch.uint8
            self.calls.append(("image", tuple(image.shape)))
            mean = image.float().mean((1, 2, 3))
            return torch.stack([mean, torch.ones_like(mean)], 1).bfloat16(), None
        assert tokens is not None
        self.calls.append(("text", tuple(tokens.shape)))
        return None, tokens.to(torch.bfloat16)


def embed(
    catalog: Catalog, recorder: Recorder, batch: int = 4, rank: int = 0, world: int = 1, threads: int = 2, **wanted
) -> Embeddings:
    share = WorkShare(rank, world, batch, threads)
    return embed_catalog(recorder, catalog, tokenizer, EvalTransform(SIZE), share, **wanted)


def test_rows_are_in_catalog_order_and_damage_is_named(catalog: Catalog) -> None:
    recorder = Recorder()
    result = embed(catalog, recorder)
    kept = [0, 1, 3, 4, 6, 8, 9, 10]
    assert result.sample_ids.tolist() == kept
    assert result.keys == [f"k{row:03d}" for row in kept]
    assert result.bad == {"truncated image": ["k002"], "missing caption": ["k005"], "not an image": ["k007"]}
    assert result.image.dtype == result.text.dtype == torch.float32
    assert torch.allclose(result.image[:, 0], torch.tensor([10.0 * row for row in kept]), atol=1.5)
    assert result.captions == [f"{row} {n}" for row in kept for n in range(1 + row % 3)]
    assert [kept[row] for row in result.text_image.tolist()] == [int(c.split()[0]) for c in result.captions]
    assert result.text.tolist() == [[float(word) for word in caption.split()] for caption in result.captions]


def test_every_call_gets_a_full_batch(catalog: Catalog) -> None:
    recorder = Recorder()
    embed(catalog, recorder, batch=4)
    captions = sum(1 + row % 3 for row in range(11) if row != 5)  # of damaged pictures too
    assert recorder.calls == [("image", (4, 3, SIZE, SIZE))] * 3 + [("text", (4, 2))] * -(-captions // 4)


@pytest.mark.parametrize("world", [2, 3, 4, 13])
def test_slices_make_up_the_catalog_with_equal_calls(catalog: Catalog, world: int) -> None:
    whole = embed(catalog, Recorder())
    recorders = [Recorder() for _ in range(world)]
    parts = [embed(catalog, recorder, 2, rank=rank, world=world) for rank, recorder in enumerate(recorders)]
    assert all(recorder.calls == recorders[0].calls for recorder in recorders)
    assert recorders[0].calls
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.equal(torch.cat([part.text for part in parts]), whole.text)
    assert [key for part in parts for key in part.keys] == whole.keys
    assert sum(len(keys) for part in parts for keys in part.bad.values()) == 3


def test_pictures_alone(catalog: Catalog) -> None:
    recorder = Recorder()
    result = embed(catalog, recorder, texts=False)
    assert {what for what, _ in recorder.calls} == {"image"}
    assert len(result.image) == 9  # the picture without captions is as good as any
    assert len(result.text) == len(result.captions) == len(result.text_image) == 0


def test_an_error_of_the_model_ends_it(catalog: Catalog) -> None:
    def broken(image, tokens):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        embed_catalog(broken, catalog, tokenizer, EvalTransform(SIZE))


def test_no_pictures_at_all() -> None:
    with pytest.raises(UserError, match="no pictures"):
        encode_images(Recorder(), [])


def test_chosen_samples_in_the_order_asked(catalog: Catalog) -> None:
    chosen = [9, 0, 4, 7, 3]
    result = embed(catalog, Recorder(), samples=chosen, most_captions=1)
    assert result.sample_ids.tolist() == [9, 0, 4, 3]
    assert result.captions == ["9 0", "0 0", "4 0", "3 0"]
    assert result.text_image.tolist() == [0, 1, 2, 3]
    assert torch.allclose(result.image[:, 0], torch.tensor([90.0, 0, 40, 30]), atol=1.5)
    parts = [embed(catalog, Recorder(), samples=chosen, rank=rank, world=2) for rank in range(2)]
    assert [part.sample_ids.tolist() for part in parts] == [[9, 0], [4, 3]]


def test_more_threads_than_a_batch_has_pictures(catalog: Catalog) -> None:
    assert torch.equal(embed(catalog, Recorder(), batch=1, threads=4).image, embed(catalog, Recorder(), batch=16).image)


def test_gathering_alone_is_nothing() -> None:
    mine = Embeddings(
        torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), ["a"], ["k"], torch.ones(1), {}
    )
    assert gather_embeddings(mine) is mine
