"""The checkpoint's format: pieces of any ranks in, any slice out; what a kill or a bad disk leaves behind."""

from __future__ import annotations

import json

import pytest
import torch

from clipdist.checkpoint import (
    MANIFEST,
    CheckpointReader,
    Manifest,
    Piece,
    checkpoint_dir,
    list_checkpoints,
    load_full_weights,
    newest_checkpoint,
    prune,
    read_manifest,
    write_manifest,
    write_part,
)
from clipdist.errors import UserError

SHAPES = {"param/visual.a": (5, 7), "param/text.b": (11,), "buffer/visual.mean": (3,), "exp_avg/visual.a": (5, 7)}


def whole(name):
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32) + len(name)


def write(run_dir, step, world=3, attempt="t"):
    """Cuts every tensor into `world` uneven runs, one per rank."""
    folder = checkpoint_dir(run_dir, step)
    for rank in range(world):
        pieces = []
        for name, shape in SHAPES.items():
            data = whole(name)
            first, last = (len(data) * r * r // (world * world) for r in (rank, rank + 1))
            if first < last:
                pieces.append(Piece(name, shape, first, data[first:last].clone()))
        write_part(folder, rank, pieces, attempt)
    manifest = Manifest(step, step, step * 8, world, {"model": {}}, {}, {})
    write_manifest(folder, manifest, attempt, timeout_s=5)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_slice_comes_back(tmp_path, world):
    reader = CheckpointReader(write(tmp_path, 4, world))
    reader.verify()
    for name, shape in SHAPES.items():
        assert torch.equal(reader.read_full(name), whole(name).view(shape))
        for start, numel in ((0, 1), (2, 1), (1, 2), (0, 3)):
            assert torch.equal(reader.read(name, start, numel), whole(name)[start : start + numel])


def test_full_weights_have_the_modules_names(tmp_path):
    weights = load_full_weights(write(tmp_path, 1))
    assert weights.keys() == {"visual.a", "text.b", "visual.mean"}
    assert weights["visual.a"].shape == (5, 7)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    with pytest.raises(UserError, match="not a checkpoint"):
        read_manifest(checkpoint_dir(tmp_path, 2))
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_stale_part_is_not_taken(tmp_path):
    folder = checkpoint_dir(tmp_path, 1)
    write_part(folder, 0, [Piece("param/text.b", (11,), 0, whole("param/text.b"))], attempt="yesterday")
    with pytest.raises(TimeoutError, match="rank-00000"):
        write_manifest(folder, Manifest(1, 1, 8, 1, {}, {}, {}), attempt="today", timeout_s=0.05)
    assert list_checkpoints(tmp_path) == []


def test_a_hole_is_refused(tmp_path):
    folder = checkpoint_dir(tmp_path, 1)
    write_part(folder, 0, [Piece("param/text.b", (11,), 0, whole("param/text.b")[:10])], attempt="t")
    with pytest.raises(ValueError, match=r"text\.b"):
        write_manifest(folder, Manifest(1, 1, 8, 1, {}, {}, {}), attempt="t")
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found(tmp_path, damage):
    folder = write(tmp_path, 1)
    file = folder / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match="rank-00001"):
        CheckpointReader(folder).verify()


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"version": 1, "step": 3}'])
def test_a_bad_manifest_is_bad_input(tmp_path, text):
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(folder)


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (checkpoint_dir(tmp_path, 2) / MANIFEST).unlink()  # an interrupted writer's
    write_part(checkpoint_dir(tmp_path, 9), 0, [], "t")  # a writer that is at work
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-00000009",
    ]


def test_no_pickle_anywhere(tmp_path):
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    json.loads((folder / MANIFEST).read_text())
