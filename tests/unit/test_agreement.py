"""What ranks compare, and how those that differ are named; the ranks themselves are in tests/dist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import clipdist
from clipdist.config import Config, Data, Model, Optim, Run
from clipdist.fault_tolerance.consistency import code_facts, config_facts, disagreement
from clipdist.fault_tolerance.replicas import checksums, divergence

NODES = ["node1", "node1", "node2", "node2"]


def test_the_minority_is_named():
    facts = [{"package torch": "2.15.0"} for _ in range(4)]
    facts[3] = {"package torch": "2.14.0"}
    told = disagreement(facts, NODES)
    assert "package torch: rank 3 on node2 has 2.14.0, the others have 2.15.0" in told


def test_without_a_majority_all_are_named():
    told = disagreement([{"tokenizer": value} for value in "aabb"], NODES)
    assert "tokenizer: ranks 0-1 on node1 have a, ranks 2-3 on node2 have b" in told
    told = disagreement([{"tokenizer": value} for value in "ab"], NODES)
    assert "rank 0 on node1 has a, rank 1 on node1 has b" in told
    told = disagreement([{"tokenizer": value} for value in "abcd"], NODES)
    assert all(f"has {value}" in told for value in "abcd")


def test_of_code_the_first_file_is_named_and_the_others_counted():
    same = {"Python": "3.11.7", **{f"clipdist/{name}.py": "1" for name in "abc"}}
    other = same | {"clipdist/b.py": "2", "clipdist/c.py": "2"}
    told = disagreement([same, same, same, other], NODES)
    assert "clipdist/b.py and 1 more files: rank 3 on node2 has 2, the others have 1" in told
    assert "c.py" not in told
    assert "Python" not in told
    missing = {name: value for name, value in same.items() if name != "clipdist/a.py"}
    assert "rank 0 on node1 has nothing, the others have 1" in disagreement([missing, same, same, same], NODES)


def test_the_code_is_this_package(tmp_path):
    found = code_facts(Path(clipdist.__file__).parent)
    assert "clipdist/data/order.py" in found
    package = tmp_path / "clipdist"
    package.mkdir()
    (package / "a.py").write_text("1")
    before = code_facts(package)
    (package / "a.py").write_text("2")
    (package / "b.pyc").write_text("2")
    assert before.keys() == code_facts(package).keys() == {"clipdist/a.py"}
    assert before != code_facts(package)


def test_settings_count_and_places_do_not():
    config = Config()
    elsewhere = dataclasses.replace(
        config,
        run=Run(root="/mnt/b"),
        data=Data(train=["/mnt/b/train"], cache="/local/b"),
        model=Model(weights="/mnt/b/RN50.pt"),
    )
    here = dataclasses.replace(
        config,
        run=Run(root="/mnt/a"),
        data=Data(train=["/mnt/a/train"], cache="/local/a"),
        model=Model(weights="/mnt/a/RN50.pt"),
    )
    assert config_facts(elsewhere) == config_facts(here) != config_facts(config)
    other = dataclasses.replace(here, optim=Optim(lr=1e-3))
    differing = {name for name, value in config_facts(other).items() if config_facts(here)[name] != value}
    assert differing == {"optim.lr"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_no_flipped_bit_escapes(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(40).to(dtype)
    before = checksums(tensor)
    data = tensor.view(torch.uint8)
    for byte in range(len(data)):
        for bit in range(1 if dtype == torch.bool else 8):
            data[byte] ^= 1 << bit
            assert not torch.equal(checksums(tensor), before), (byte, bit)
            data[byte] ^= 1 << bit
    assert torch.equal(checksums(tensor), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_swap_escapes(dtype):
    """Among values that are hard to tell apart in a sum: equal but for the sign, or for one power of two."""
    values = [1.0, -1.0, 2.0, -2.0, 0.0, -0.0, 2.0**-100, 3.0]
    tensor = torch.tensor([values[i % 8] for i in range(70_000)], dtype=dtype)  # more than a chunk
    before = checksums(tensor)
    for first, second in [(0, 1), (0, 65), (4, 5), (1, 32_768), (2, 32_771), (0, 65_537), (3, 69_999)]:
        if tensor[first].view(-1).view(torch.uint8).tolist() == tensor[second].view(-1).view(torch.uint8).tolist():
            continue
        tensor[[first, second]] = tensor[[second, first]]
        assert not torch.equal(checksums(tensor), before), (first, second)
        tensor[[first, second]] = tensor[[second, first]]
    assert torch.equal(checksums(tensor), before)


def test_a_rank_that_diverged_is_named_with_the_first_tensor():
    same = {"param/a": "1", "param/b": "1", "buffer/c": "1"}
    told = divergence(200, [same, same, same | {"param/b": "2", "buffer/c": "2"}, same], NODES)
    assert told.startswith("step 200: rank 2 on node2 holds other values than the other ranks")
    assert "in 2 of 3 tensors, first in param/b." in told
    told = divergence(200, [same, same | {"param/b": "2"}], NODES)
    assert told.startswith("step 200: ranks 0-1 on node1 hold different values")
