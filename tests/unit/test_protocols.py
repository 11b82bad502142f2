"""Published test sets: the split files in the wild, samples by file name or key, folds; refusals in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from clipdist.data.catalog import Catalog
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings
from clipdist.evals.protocols import (
    PROTOCOLS,
    RetrievalProtocol,
    folds_of,
    read_test_names,
    require_whole,
    select_samples,
)

SMALL = RetrievalProtocol("small", "small", 4, 2)
NAMES = ["9.jpg", "2.jpg", "5.jpg", "7.jpg"]


def catalog_of(path: Path, filenames: list[str | None]) -> Catalog:
    """A sample per name; None: a sample without .json, which only its key (its row) names."""
    samples = []
    for row, name in enumerate(filenames):
        members = {"txt": b"a caption"}
        if name is not None:
            members["json"] = json.dumps({"filename": name}).encode()
        samples.append(Sample(str(row), members))
    path.mkdir()
    write_shard(path / "00000.tar", samples)
    return Catalog.open([str(path)])


def karpathy(*splits: tuple[str, str]) -> str:
    return json.dumps({"images": [{"filename": name, "split": split, "sentences": []} for name, split in splits]})


@pytest.mark.parametrize(
    "text",
    [
        karpathy(("1.jpg", "train"), *((name, "test") for name in NAMES), ("3.jpg", "val")),
        "\ufeff" + "\r\n".join(NAMES) + "\r\n",
    ],
)
def test_split_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "split").write_text(text, encoding="utf-8", newline="")
    assert read_test_names(tmp_path / "split", SMALL) == NAMES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("9.jpg\n2.jpg\n", "2 different test pictures; small has 4"),
        ("9.jpg\n9.jpg\n2.jpg\n5.jpg", "3 different test pictures"),
        (karpathy(("9.jpg", "test")), "1 different test pictures"),
        ('{"images": 3}', "not a split file of Karpathy's (TypeError"),
        ('{"images": [{"split": "test"}]}', "not a split file of Karpathy's (KeyError: 'filename')"),
        ('{"images": [', "not a split file of Karpathy's (JSONDecodeError"),
        ("", "0 different test pictures"),
    ],
)
def test_split_files_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "split").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        read_test_names(tmp_path / "split", SMALL)


def test_a_split_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_test_names(tmp_path / "missing.json", SMALL)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_test_names(tmp_path / "binary", SMALL)


def test_samples_are_found_by_name_and_key(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path / "shards", ["7.jpg", "val2014/5.jpg", None, "other.jpg", "2.png"])
    found = select_samples(catalog, NAMES)
    assert list(found.items()) == [(2, 1), (1, 2), (0, 3)]  # in the split file's order; key 2 stands for 2.jpg


def test_a_name_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"9\.jpg: two samples have this file name, 0 and 2"):
        select_samples(catalog_of(tmp_path / "shards", ["9.jpg", "2.jpg", "9.jpg"]), NAMES)


def test_missing_pictures_are_refused() -> None:
    require_whole(SMALL, NAMES, range(4), "shards")
    with pytest.raises(UserError, match=r"shards: 2 of the 4 pictures of small .* \(9.jpg, 5.jpg\); --allow-missing"):
        require_whole(SMALL, NAMES, [1, 3], "shards")
    with pytest.raises(UserError, match=r"\(9.jpg, 2.jpg, 5.jpg, \.\.\.\)"):
        require_whole(SMALL, NAMES, [], "shards")


def some(pictures: int) -> Embeddings:
    return Embeddings(
        image=torch.arange(pictures).float()[:, None],
        text=torch.arange(2 * pictures).float()[:, None],
        text_image=torch.arange(pictures).repeat(2),
        captions=[""] * 2 * pictures,
        keys=[""] * pictures,
        sample_ids=torch.arange(pictures),
        bad={},
    )


def test_folds_keep_captions_with_their_pictures() -> None:
    first, second = folds_of(some(3), [1, 2, 3], SMALL)  # position 0 is missing
    assert [part.flatten().tolist() for part in first] == [[0], [0, 3], [0, 0]]
    assert [part.flatten().tolist() for part in second] == [[1, 2], [1, 2, 4, 5], [0, 1, 0, 1]]


def test_folds_that_cannot_be_told() -> None:
    with pytest.raises(UserError, match="no picture of fold 1 of 2"):
        folds_of(some(2), [2, 3], SMALL)
    for positions in ([], [0, 4], [-1, 0]):
        with pytest.raises(UserError, match="do not say which"):
            folds_of(some(2), positions, SMALL)


def test_the_published_sizes() -> None:
    sizes = {name: (protocol.images, protocol.folds) for name, protocol in PROTOCOLS.items()}
    assert sizes == {
        "flickr8k-1k": (1000, 1),
        "flickr30k-1k": (1000, 1),
        "coco-5k": (5000, 1),
        "coco-1k-folds": (5000, 5),
    }
