"""The checkpoint format: read any slice of pieces that any ranks wrote; kills and bad disks."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
from pathlib import Path

import pytest
import torch

from clipdist.checkpoint import reader as module
from clipdist.checkpoint.format import (
    MANIFEST,
    Manifest,
    Piece,
    checkpoint_dir,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
)
from clipdist.checkpoint.reader import CheckpointReader, load_full_weights
from clipdist.checkpoint.writer import PartMissing, abandon_part, write_manifest, write_part
from clipdist.errors import Fault, UserError

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
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=r"; the newest of this run is .*/checkpoints/step-00000001$"):
            read_manifest(folder)
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


def test_a_manifest_s_checksum_is_that_of_sorted_json(tmp_path):
    """So that any program can compute it, however the file is laid out."""
    record = json.loads((write(tmp_path, 1) / MANIFEST).read_text())
    stated = record.pop("checksum")
    assert stated == hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    assert {} in record.values()  # empty ones are written in another way


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


@pytest.fixture
def storage(monkeypatch):
    """Refuses to read files whose name holds a text, so many times: a list of (text, times, error number)."""
    refusals = []

    def refuse(path):
        for refusal in refusals:
            if refusal[0] in os.fspath(path) and refusal[1] > 0:
                refusal[1] -= 1
                raise OSError(refusal[2], os.strerror(refusal[2]), os.fspath(path))

    real_stat, real_open, real_map = os.stat, io.open, module.safe_open

    def stat(path, **settings):
        refuse(path) if isinstance(path, Path) else None  # not a descriptor
        return real_stat(path, **settings)

    def opened(path, *mode, **settings):
        refuse(path)
        return real_open(path, *mode, **settings)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(io, "open", opened)  # Path.read_bytes
    monkeypatch.setattr(module, "open", opened, raising=False)
    monkeypatch.setattr(module, "safe_open", lambda path, **k: (refuse(path), real_map(path, **k))[1])
    return refusals


def test_a_refusal_is_outlasted(tmp_path, storage, capsys):
    folder = write(tmp_path, 3)
    storage += [[MANIFEST, 2, errno.EIO], ["rank-00000", 1, errno.ESTALE], ["rank-00001", 1, errno.EACCES]]
    reader = CheckpointReader(folder, retry_s=30)
    reader.verify()
    storage += [["rank-00001", 1, errno.ENOTCONN]]
    assert torch.equal(reader.read("param/text.b"), whole("param/text.b"))
    assert all(times == 0 for _, times, _ in storage)
    assert "rank-00000.safetensors: can be read again" in capsys.readouterr().err


@pytest.mark.parametrize("retry_s", [0.0, 0.3])
def test_a_refusal_that_lasts_is_no_damage(tmp_path, storage, retry_s):
    folder = write(tmp_path, 3)
    reader = CheckpointReader(folder, retry_s)
    storage += [["rank-00001", 10**9, errno.EIO], [MANIFEST, 10**9, errno.EACCES]]
    for work in (reader.check_sizes, reader.verify, lambda: reader.read("param/text.b")):
        with pytest.raises(Fault, match=r"rank-00001.*Input/output error"):
            work()
    for work in (lambda: read_manifest(folder, retry_s), lambda: list_checkpoints(tmp_path, retry_s)):
        with pytest.raises(Fault, match="Permission denied"):
            work()


def test_a_folder_that_is_gone_means_storage_that_is_away(tmp_path):
    folder = write(tmp_path, 3)
    reader = CheckpointReader(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(Fault, match="No such file"):
        reader.verify()


@pytest.mark.parametrize("where", ["nowhere", "runs/x/checkpoints/step-00000001"])
def test_a_mistyped_folder_is_bad_input_at_once(tmp_path, where):
    with pytest.raises(UserError, match="not a checkpoint") as raised:
        CheckpointReader(tmp_path / where, retry_s=600)
    assert not isinstance(raised.value, Fault)


def test_what_is_damaged_stays_bad_input_with_patience(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "rank-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank-00002.*missing") as raised:
        CheckpointReader(folder, retry_s=600).verify()
    assert not isinstance(raised.value, Fault)


def test_names_that_users_give_are_no_checkpoints(tmp_path):
    for step in (3, 100_000_000, 99_999_999):
        write(tmp_path, step)
    for stray in ("step-00000100-good", "step-12", "step-", "good-step-00000100", "step-00000100.bak"):
        write(tmp_path, 3).rename(tmp_path / "checkpoints" / stray)
    write(tmp_path, 3)
    names = [folder.name for folder in list_checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-99999999", "step-100000000"]


def mapped(folder):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_closed_and_loaded_files_are_given_back(tmp_path):
    folder = write(tmp_path, 3, world=1)
    reader = CheckpointReader(folder)
    for _ in range(2):  # again after close()
        assert torch.equal(reader.read("param/text.b"), whole("param/text.b"))
        assert mapped(folder)
        reader.close()
        assert not mapped(folder)
    module_of = torch.nn.Linear(7, 5, bias=False)
    weights = load_full_weights(folder)
    module_of.load_state_dict({"weight": weights["visual.a"]})
    assert mapped(folder)
    del weights
    gc.collect()
    assert not mapped(folder)
    assert torch.equal(module_of.weight.data, whole("param/visual.a").view(5, 7))


def test_one_listing_serves_all_ranks(tmp_path, monkeypatch):
    folder, world = checkpoint_dir(tmp_path, 1), 60
    for rank in range(world - 1):
        write_part(folder, rank, [], attempt="t")
    listings = []
    real = os.listdir

    def listdir(path):
        listings.append(path)
        if len(listings) == 3:
            write_part(folder, world - 1, [], attempt="t")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    write_manifest(folder, Manifest(1, 1, 8, world, {}, {}, {}), attempt="t", timeout_s=60)
    assert len(CheckpointReader(folder).manifest.files) == world
    assert len([path for path in listings if path == folder]) <= 3 + 1  # cleaning up lists once more
