"""Embeddings saved and read again: the same to the bit; files that are none, or damaged, are told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings
from clipdist.evals.store import FORMAT, load_embeddings, save_embeddings


def some(texts: bool = True) -> Embeddings:
    return Embeddings(
        image=torch.randn(3, 5),
        text=torch.randn(4, 5) if texts else torch.zeros(0, 0),
        text_image=torch.tensor([0, 0, 2, 1] if texts else [], dtype=torch.int64),
        captions=["a dog", "naïve ☃", 'a "quote"', "two\nlines"] if texts else [],
        keys=["0", "1", "ключ"],
        sample_ids=torch.tensor([4, 7, 9]),
        bad={"truncated image": ["8"]},
    )


@pytest.mark.parametrize("texts", [True, False])
def test_what_is_saved_is_read(tmp_path: Path, texts: bool) -> None:
    saved = some(texts)
    path = tmp_path / "deep" / "features.safetensors"
    save_embeddings(path, saved, {"model": "demo, step 12"})
    read, facts = load_embeddings(path)
    assert facts == {"model": "demo, step 12"}
    for name in ("image", "text", "text_image", "sample_ids"):
        assert torch.equal(getattr(read, name), getattr(saved, name))
    assert (read.captions, read.keys, read.bad) == (saved.captions, saved.keys, saved.bad)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path: Path) -> None:
    saved = some()
    saved.image = torch.randn(5, 300).T[:3]  # neither contiguous nor alone in its memory
    path = tmp_path / "features.safetensors"
    save_embeddings(path, saved, {})
    assert torch.equal(load_embeddings(path)[0].image, saved.image)
    assert path.stat().st_size < 2000


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"folder\.safetensors: the embeddings cannot be written"):
        save_embeddings(tmp_path / "folder.safetensors", some(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["folder.safetensors"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_embeddings(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="a folder; name a file"):
        load_embeddings(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a whole"):
        load_embeddings(tmp_path / "text")
    save_file({"image": torch.ones(2, 2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="not a file of embeddings"):
        load_embeddings(tmp_path / "weights")
    path = tmp_path / "whole"
    save_embeddings(path, some(), {})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="not a whole"):
        load_embeddings(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_image", torch.tensor([0, 0, 3, 1])),
        ("text_image", torch.tensor([0, 0, -1, 1])),
        ("image", torch.ones(2, 5)),
        ("image", torch.ones(3, 6)),
        ("captions", torch.tensor([91], dtype=torch.uint8)),
        ("keys", None),
    ],
)
def test_parts_that_disagree(tmp_path: Path, name: str, value: torch.Tensor | None) -> None:
    path = tmp_path / "features"
    save_embeddings(path, some(), {})
    tensors = load_file(path)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    save_file(tensors, path, {"format": FORMAT, "bad": "{}", "facts": "{}"})
    with pytest.raises(UserError, match="damaged file of embeddings"):
        load_embeddings(path)
