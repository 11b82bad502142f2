"""The loader: batches that depend on the position alone, bad samples that keep their row, errors that arrive."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pairs import Lengths, write_pairs

from clipdist.config import Augment, Data
from clipdist.data.augment import Augmentation, View
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import CAPTION, EMPTY, NEGATIVE
from clipdist.data.catalog import Catalog
from clipdist.data.loader import HASH_MODULUS, Loader, ids_hash, open_loader
from clipdist.data.members import members_of
from clipdist.data.order import OrderKey
from clipdist.data.reader import Reader, StoredSample
from clipdist.data.texts import group_id
from clipdist.data.views import image_view, view_of


def loader(
    folder, rank=0, world=1, start=0, threads=2, tokenizer=None, skipped=(), two_views=False, **settings
) -> Loader:
    alone, mute = settings.pop("images_only", False), settings.pop("mute", False)
    more, pin = settings.pop("views", ()), settings.pop("pin", False)
    cfg = dataclasses.replace(Data(threads=threads), **settings)
    small = [View("small", 16, Augmentation(0.1))] if two_views else []
    return open_loader(
        Catalog.open([str(folder)], members=members_of(cfg)),
        OrderKey(0, 16, 4, 0),
        None if mute else tokenizer or Lengths(),
        cfg,
        views=[image_view(cfg, 24), *small, *more],
        images_only=alone,
        pin=pin,
        rank=rank,
        world=world,
        start=start,
        skipped=skipped,
    )


def take(count: int, *args, **settings):
    source = loader(*args, **settings)
    batches = [source.next() for _ in range(count)]
    source.close()
    return batches


def test_shapes_and_types(shards):
    (batch,) = take(1, shards / "train")
    assert batch.images["image"].shape == (16, 3, 24, 24)
    assert batch.images["image"].dtype == torch.uint8
    assert batch.images["image"].float().std() > 10
    assert batch.tokens.shape == (16, 2)
    assert batch.valid["image"].all()
    assert batch.sample_id.dtype == batch.group_id.dtype == torch.int64


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_depends_on_its_position_alone(shards, threads, world):
    reference = take(7, shards / "train")
    for rank in range(world):
        rows = slice(rank * 16 // world, (rank + 1) * 16 // world)
        mine = take(3, shards / "train", rank, world, 4, threads)
        for ours, whole in zip(mine, reference[4:]):
            assert ours.position == whole.position
            expected = whole.rows(rows.start, rows.stop)
            for name in ("tokens", "sample_id", "group_id"):
                assert torch.equal(getattr(ours, name), getattr(expected, name)), name
            for name in ("images", "valid"):
                theirs = getattr(expected, name)
                assert dict.fromkeys(theirs, True) == {
                    key: torch.equal(tensor, theirs[key]) for key, tensor in getattr(ours, name).items()
                }, name


def test_skipped_positions_are_never_drawn(shards, monkeypatch):
    reference = {batch.position: batch for batch in take(12, shards / "train")}
    source = loader(shards / "train", start=1, skipped=[[6, 9], [1, 3], [7, 10], [4, 4]])
    drawn = []
    draws = source.order.draws
    monkeypatch.setattr(source.order, "draws", lambda position, *args: drawn.append(position) or draws(position, *args))
    assert source.position == 3
    batches = [source.next() for _ in range(5)]
    assert [batch.position for batch in batches] == [3, 4, 5, 10, 11]
    assert source.position == 12
    source.close()
    assert not {1, 2, 6, 7, 8, 9} & set(drawn)
    for batch in batches:
        assert torch.equal(batch.images["image"], reference[batch.position].images["image"])
        assert torch.equal(batch.tokens, reference[batch.position].tokens)


def test_the_hash_of_a_batch_does_not_depend_on_the_ranks(shards):
    ids = torch.randint(0, 1 << 40, (64,), dtype=torch.int64)
    hashes = {
        sum(int(ids_hash(rows, rank * len(rows))) for rank, rows in enumerate(ids.chunk(world))) % HASH_MODULUS
        for world in (1, 2, 4, 64)
    }
    assert len(hashes) == 1
    assert ids_hash(ids, 0).dtype == torch.int64
    swapped = ids.clone()
    swapped[[3, 40]] = ids[[40, 3]]
    changed = ids.clone()
    changed[5] += 1
    assert len({*hashes, *(int(ids_hash(other, 0)) for other in (swapped, changed, ids.flip(0)))}) == 4
    assert len({int(ids_hash(batch.sample_id, 0)) for batch in take(8, shards / "train")}) == 8


def test_captions_and_crops_change_with_the_epoch(shards):
    seen: dict[int, set] = {}
    for batch in take(40, shards / "train"):
        for sample, tokens in zip(batch.sample_id.tolist(), batch.tokens.tolist()):
            seen.setdefault(sample, set()).add(tuple(tokens))
    assert sum(len(captions) == 2 for captions in seen.values()) > 60  # of 70, each with two captions
    firsts = {tuple(row) for batch in take(40, shards / "train", caption="first") for row in batch.tokens.tolist()}
    assert len(firsts) < sum(map(len, seen.values()))


def several(folder):
    """16 samples of two captions each, but one of five and one of one, and a bad one."""
    five = ["a", "bb", "ccc", "dddd", "eeeee"]
    return write_pairs(folder, 16, bad={7: b""}, more={3: {"captions": five}, 4: {"captions": ["one"]}}), five


def lengths(batch, sample):
    """The lengths of a sample's texts, and which of the places hold one."""
    row = batch.sample_id.tolist().index(sample)
    return batch.tokens[row, :, 0].tolist(), batch.roles[row].tolist(), batch.group_id[row].tolist()


def test_all_captions_of_an_image_are_in_its_row(tmp_path):
    folder, five = several(tmp_path)
    (batch,) = take(1, folder, caption="all")
    assert batch.tokens.shape == (16, 5, 2)
    assert batch.roles.shape == batch.group_id.shape == (16, 5)
    assert lengths(batch, 3) == ([1, 2, 3, 4, 5], [CAPTION] * 5, [group_id(text) for text in five])
    assert lengths(batch, 4)[:2] == ([3, 0, 0, 0, 0], [CAPTION, *[EMPTY] * 4])
    assert lengths(batch, 7)[1] == [EMPTY] * 5
    assert batch.roles.sum() == 13 * 2 + 5 + 1
    assert (~batch.valid["text"]).nonzero().tolist() == [[batch.sample_id.tolist().index(7)]]
    ranks = [part for rank in (0, 1) for part in take(1, folder, rank=rank, world=2, caption="all")]
    assert {part.tokens.shape[1] for part in ranks} == {5, 2}  # as many as an image of the rank has
    whole = torch.cat([part.with_places(5).tokens for part in ranks])
    assert torch.equal(whole[batch.roles > 0], batch.tokens[batch.roles > 0])


def test_a_number_of_captions_is_drawn_without_replacement(tmp_path):
    folder, _ = several(tmp_path)
    epochs = take(30, folder, caption=3)
    drawn = [tuple(lengths(batch, 3)[0]) for batch in epochs]
    assert all(len(set(own)) == 3 for own in drawn)
    assert len({frozenset(own) for own in drawn}) == 10  # of 5 any 3
    assert all(lengths(batch, 4)[0] == [3, *[0] * (batch.tokens.shape[1] - 1)] for batch in epochs)
    ranks = [take(30, folder, rank=rank, world=2, caption=3) for rank in (0, 1)]
    for batch, *parts in zip(epochs, *ranks):
        for part in parts:
            if 3 in part.sample_id:
                assert lengths(part, 3) == lengths(batch, 3)


def test_negatives_follow_the_captions_and_are_drawn(tmp_path):
    texts = ["n", "nn", "nnn", "nnnn"]
    write_pairs(tmp_path, 16, more={3: {"negatives": texts}, 4: {"negatives": "single", "captions": []}})
    epochs = take(20, tmp_path, caption="first", negatives=2)
    assert epochs[0].tokens.shape == (16, 3, 2)
    drawn = [lengths(batch, 3) for batch in epochs]
    assert all(roles == [CAPTION, NEGATIVE, NEGATIVE] for _, roles, _ in drawn)
    assert len({frozenset(own[1:]) for own, _, _ in drawn}) == 6  # of 4 any 2
    assert drawn[0][2][1] == group_id("n" * drawn[0][0][1])
    assert lengths(epochs[0], 5)[1] == [CAPTION, EMPTY, EMPTY]
    whole = take(1, tmp_path, caption="first")[0].tokens
    assert torch.equal(epochs[0].tokens[:, 0], whole)


def test_a_bad_sample_keeps_its_row(tmp_path):
    write_pairs(tmp_path, 16, bad={3: b"", 7: b"no picture"})
    (batch,) = take(1, tmp_path)
    assert batch.valid["image"].sum() == 14
    assert sorted(batch.bad) == [(3, "missing image"), (7, "not an image")]
    for row in (~batch.valid["image"]).nonzero().flatten().tolist():
        assert batch.sample_id[row] in (3, 7)
        assert batch.images["image"][row].max() == 0


def test_an_image_without_a_caption_counts_where_images_are_of_use_alone(tmp_path):
    write_pairs(tmp_path, 16, bad={3: b""}, without_caption={5, 9})
    (pairs_only,) = take(1, tmp_path)
    assert sorted(pairs_only.bad) == [(3, "missing image"), (5, "missing caption"), (9, "missing caption")]
    assert torch.equal(pairs_only.valid["image"], pairs_only.valid["text"])
    (batch,) = take(1, tmp_path, images_only=True)
    assert batch.bad == [(3, "missing image")]
    assert set(batch.sample_id[~batch.valid["image"]].tolist()) == {3}
    assert set(batch.sample_id[~batch.valid["text"]].tolist()) == {3, 5, 9}
    assert batch.images["image"].flatten(1).any(1).sum() == 15
    assert torch.equal(batch.valid_in(("image", "text")), pairs_only.valid["text"])


def test_a_second_view_changes_nothing_of_the_first(shards):
    (one,), (two,) = take(1, shards / "train"), take(1, shards / "train", two_views=True)
    assert torch.equal(one.images["image"], two.images["image"])
    assert two.images["small"].shape == (16, 3, 16, 16)
    assert two.inputs().keys() == {"image", "small", "tokens"}
    pieces = two.split(6)
    assert [len(piece) for piece in pieces] == [6, 6, 4]
    assert torch.equal(torch.cat([piece.images["small"] for piece in pieces]), two.images["small"])


SIMCLR = Augment(jitter=[0.8, 0.8, 0.8, 0.2], grayscale=0.2, blur=0.5)
BYOL = [
    Augment(jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2, blur=1.0),
    Augment(jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.2, blur=0.1, solarise=0.2, size=16),
]


def test_a_view_is_described_by_the_recipe() -> None:
    view = view_of("byol/1", BYOL[1], 24)
    assert (view.name, view.size, view_of("byol/0", BYOL[0], 24).size) == ("byol/1", 16, 24)
    assert view.augmentation == Augmentation(
        0.08,
        flip=0.5,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grayscale=0.2,
        blur=0.1,
        solarise=0.2,
    )
    local = view_of("dino/local/0", Augment(crop_scale=[0.05, 0.4]), 24).augmentation
    assert (local.crop_scale_min, local.crop_scale_max, local.jitter) == (0.05, 0.4, (0, 0, 0, 0))


@pytest.mark.parametrize("several", [{}, {"caption": 2}])
def test_views_with_blur_are_a_function_of_position_and_view(shards, several):
    """Whatever the ranks, the threads, later views and texts; and the image and its texts stay as they are alone."""
    views = [view_of("simclr/0", SIMCLR, 24), *(view_of(f"byol/{i}", view, 24) for i, view in enumerate(BYOL))]
    whole = take(2, shards / "train", views=views)
    alone = take(2, shards / "train", **several)
    fewer = take(2, shards / "train", views=views[:1], **several)
    ranks = [take(1, shards / "train", rank, 2, 1, 3, views=views, **several)[0] for rank in (0, 1)]
    for name, images in whole[1].images.items():
        assert torch.equal(torch.cat([rank.images[name] for rank in ranks]), images)
    assert torch.equal(fewer[1].images["simclr/0"], whole[1].images["simclr/0"])
    for ours, theirs in zip(fewer, alone):
        for name in ("tokens", "group_id"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.images["image"], theirs.images["image"])
    seen = [batch.images[view.name] for batch in whole for view in views[:2]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_colours_that_the_device_changes_are_those_that_threads_change(shards, monkeypatch):
    """On a GPU the loader leaves colours, blur and solarisation to Batch.to."""
    views = [view_of(f"byol/{i}", view, 24) for i, view in enumerate(BYOL)]
    (changed,) = take(1, shards / "train", views=views)
    for name in ("zeros", "empty"):  # no pinned memory without a GPU
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, real=real, pin_memory=False, **words: real(*shape, **words))
    (left,) = take(1, shards / "train", views=views, pin=True)
    assert left.colour.keys() == {"byol/0", "byol/1"}
    moved = left.to(torch.device("cpu"))
    for name, images in changed.images.items():
        assert torch.equal(moved.images[name], images)
        assert torch.equal(left.images[name], images) == (name == "image")


@pytest.mark.parametrize("caption", ["random", "all"])
def test_images_without_captions_are_read_alone(tmp_path, monkeypatch, caption):
    """Where no objective needs text there are no tokens, and no caption is looked for."""
    write_pairs(tmp_path / "mixed", 16, bad={3: b""}, without_caption={5, 9})
    write_pairs(tmp_path / "mute", 16, without_caption=range(16))
    reference = take(1, tmp_path / "mixed", images_only=True)[0]
    monkeypatch.setattr(StoredSample, "find_captions", lambda sample: pytest.fail("a caption was read"))
    (mixed,) = take(1, tmp_path / "mixed", images_only=True, mute=True, caption=caption)
    (mute,) = take(1, tmp_path / "mute", images_only=True, mute=True, caption=caption)
    assert mute.valid["image"].all()
    assert not mute.valid["text"].any()
    assert (mixed.bad, mute.bad) == ([(3, "missing image")], [])
    for batch in (mixed, mute):
        assert batch.tokens.shape == (16, 0)
        assert batch.tokens.dtype == torch.int64
        assert len(batch) == 16
        assert batch.inputs().keys() == {"image"}
        assert [len(piece) for piece in batch.split(6)] == [6, 6, 4]
        assert batch.roles is None
    assert torch.equal(mixed.images["image"], reference.images["image"])


def test_an_error_in_a_thread_reaches_the_consumer(shards, monkeypatch):
    source = loader(shards / "train")
    monkeypatch.setattr(source.reader, "samples", lambda sample_ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source.next()
    source.close()


def test_group_ids_ignore_case_space_and_the_full_stop():
    assert group_id("A dog  runs .") == group_id("a dog runs")
    assert group_id("a dog runs") != group_id("a dog ran")
    assert -(2**63) <= group_id("x") < 2**63


def test_reader_names_what_is_missing(shards, tmp_path):
    reader = Reader(Catalog.open([str(shards / "train")]))
    assert reader.sample(0).read("nothing") is None
    assert len(reader.sample(0).captions()) == 2
    assert reader.key(21) == "000010003"
    assert reader.shard_name(21) == "00001.tar"
    tar = write_pairs(tmp_path, 3) / "00000.tar"
    cut = Reader(Catalog.open([str(tmp_path)]))
    with open(tar, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(BadSample):
        cut.sample(2).image()
    reader.close()
    cut.close()


def test_captions_of_a_small_set_are_read_in_the_first_epoch_alone(shards, monkeypatch):
    reads = []
    captions = StoredSample.captions
    monkeypatch.setattr(StoredSample, "captions", lambda sample: reads.append(sample) or captions(sample))
    kept = take(40, shards / "train", threads=1)
    assert len(reads) == 70  # samples, in ten epochs
    monkeypatch.setattr("clipdist.data.texts.KEPT_BYTES", 0)
    read_again = take(40, shards / "train", threads=1)
    assert len(reads) >= 70 + 40 * 16
    for ours, theirs in zip(kept, read_again):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.group_id, theirs.group_id)


def test_samples_are_read_together_as_one_by_one(shards):
    reader = Reader(Catalog.open([str(shards / "train")]))
    ids = np.array([69, 0, 21, 69, 3])  # of several shards, one of them twice
    together = reader.samples(ids)
    assert [(sample.image(), sample.captions()) for sample in together] == [
        (reader.sample(number).image(), reader.sample(number).captions()) for number in ids.tolist()
    ]
    assert reader.samples(ids[:0]) == []
    reader.close()
