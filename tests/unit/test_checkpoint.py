"""The checkpoint's format: pieces of any ranks in, any slice out; what a kill or a bad disk leaves behind."""

from __future__ import annotations

import json

import pytest
import torch

from clipdist.checkpoint import (
    MANIFEST,
    CheckpointReader,
    Manifest,
    PartMissing,
    Piece,
    abandon_part,
    checkpoint_dir,
    list_checkpoints,
    load_full_weights,
    newest_checkpoint,
    read_manifest,
    write_manifest,
    write_part,
)
from clipdist.errors import UserError

SHAPES = {"param/visual.a": (5, 7), "param/text.b": (11,), "buffer/visual.mean": (3,), "exp_avg/visual.a": (5, 7)}


def whole(name, plus=0.0):
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32) + len(name) + plus


def write(run_dir, step, world=3, attempt="t", plus=0.0):
    """Cuts every tensor into `world` uneven runs, one per rank."""
    folder = checkpoint_dir(run_dir, step)
    for rank in range(world):
        pieces = []
        for name, shape in SHAPES.items():
            data = whole(name, plus)
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
    with pytest.raises(PartMissing, match="rank-00000"):
        write_manifest(folder, Manifest(1, 1, 8, 1, {}, {}, {}), attempt="today", timeout_s=0.05)
    assert list_checkpoints(tmp_path) == []


def test_a_hole_is_refused(tmp_path):
    folder = checkpoint_dir(tmp_path, 1)
    write_part(folder, 0, [Piece("param/text.b", (11,), 0, whole("param/text.b")[:10])], attempt="t")
    with pytest.raises(ValueError, match=r"text\.b"):
        write_manifest(folder, Manifest(1, 1, 8, 1, {}, {}, {}), attempt="t")
    assert list_checkpoints(tmp_path) == []


def test_a_rank_that_gave_up_is_not_waited_for(tmp_path):
    folder = checkpoint_dir(tmp_path, 1)
    write_part(folder, 0, [], attempt="t")
    write_part(folder, 1, [], attempt="t")
    abandon_part(folder, 1, attempt="t", reason="the disk is full")
    with pytest.raises(PartMissing, match="rank 1: the disk is full"):
        write_manifest(folder, Manifest(1, 1, 8, 2, {}, {}, {}), attempt="t", timeout_s=60)
    assert not list(folder.glob("rank-00001.safetensors"))


@pytest.mark.parametrize(
    ("damage", "says"), [("flip", "SHA-256"), ("cut", r"\d+ bytes instead of \d+"), ("gone", "missing")]
)
def test_damage_is_found_and_named(tmp_path, damage, says):
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
    reader = CheckpointReader(folder)
    with pytest.raises(UserError, match=f"rank-00001.*{says}"):
        reader.verify()
    if damage == "flip":
        reader.check_sizes()
    else:
        with pytest.raises(UserError, match=f"rank-00001.*{says}"):
            reader.check_sizes()


def test_ranks_share_the_verification(tmp_path):
    folder = write(tmp_path, 1, world=5)
    for number in (1, 4):
        file = folder / f"rank-{number:05d}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    found = []
    for rank in range(3):
        try:
            CheckpointReader(folder).verify(rank, 3)
        except UserError:
            found.append(rank)
    assert found == [1]  # files 1 and 4 are rank 1's share of 3


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"version": 1, "step": 3}'])
def test_a_bad_manifest_is_bad_input(tmp_path, text):
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(folder)


def test_a_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    """One of every byte: the file cannot be read, or its checksum does not fit, or it says the same (white space)."""
    path = write(tmp_path, 1, world=1) / MANIFEST
    good, manifest = path.read_bytes(), read_manifest(path.parent)
    noticed = 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 7]) + good[at + 1 :])
        try:
            assert read_manifest(path.parent) == manifest
        except UserError:
            noticed += 1
    assert noticed > 0.9 * len(good)


def test_a_manifest_without_a_checksum_still_loads(tmp_path):
    path = write(tmp_path, 1) / MANIFEST
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record))
    assert read_manifest(path.parent).step == 1


def test_all_kinds_of_numbers_come_back(tmp_path):
    data = {
        "buffer/count": torch.tensor([7]),
        "buffer/flags": torch.tensor([True, False, True]),
        "buffer/half": torch.tensor([1.5], dtype=torch.bfloat16),
        "buffer/none": torch.empty(0),
        "param/a": torch.randn(5),
        "buffer/double": torch.randn(3, dtype=torch.float64),
    }
    folder = checkpoint_dir(tmp_path, 1)
    write_part(folder, 0, [Piece(name, tuple(t.shape), 0, t) for name, t in data.items()], "t")
    reader = CheckpointReader(write_manifest(folder, Manifest(1, 1, 8, 1, {}, {}, {}), "t").parent)
    reader.verify()
    for name, tensor in data.items():
        for back in (reader.read(name), reader.read_full(name)):
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)


def test_a_step_saved_again_leaves_the_first_until_the_second_is_whole(tmp_path):
    folder = write(tmp_path, 3, world=2)
    write_part(folder, 0, [Piece("param/text.b", (11,), 0, torch.zeros(6))], attempt="again")  # and then a kill
    reader = CheckpointReader(folder)
    reader.verify()
    assert torch.equal(reader.read("param/text.b"), whole("param/text.b"))
    write(tmp_path, 3, world=1, attempt="once-more", plus=5.0)
    reader = CheckpointReader(folder)
    reader.verify()
    assert torch.equal(reader.read("param/text.b"), whole("param/text.b", plus=5.0))
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *reader.manifest.files}
    assert len(reader.manifest.files) == 1


def test_no_pickle_anywhere(tmp_path):
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    json.loads((folder / MANIFEST).read_text())
