"""Which members of a sample are its image and its captions: the same for training, validation and every tool."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import write_pairs
from PIL import Image

from clipdist.config import Data, load_config
from clipdist.data.catalog import Catalog
from clipdist.data.loader import open_loader
from clipdist.data.members import members_of
from clipdist.data.order import OrderKey
from clipdist.data.reader import Reader
from clipdist.data.transform import EvalTransform
from clipdist.data.views import image_view
from clipdist.datasets.describe import describe_samples, open_shards
from clipdist.datasets.examine import read_samples
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError
from clipdist.evals.embed import embed_catalog
from clipdist.evals.sheet import first_caption
from clipdist.run_plan import check_data
from clipdist.train import train


def image(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 20, 200)).save(file, form)
    return file.getvalue()


def record(value: object) -> bytes:
    return json.dumps(value).encode()


FIVE = [f"caption {row}" for row in range(5)]
BROKEN = "a title\nand more"
NESTED = {"url": "https://host", "meta": {"alt_text": "alt"}, "annotations": [{"caption": "x"}, {"caption": "y"}]}
FORMS = {
    "lines": {"png": image(), "txt": "\r\n".join([*FIVE, ""]).encode()},  # the published retrieval shards
    "img2dataset": {"png": image(), "txt": BROKEN.encode(), "json": record({"caption": BROKEN, "url": "https://host"})},
    "own": {"png": image(), "txt": b"one", "json": record({"caption": "one", "captions": ["one", "two"]})},
    "field": {"png": image(), "json": record({"caption": "only here"})},
    "nested": {"png": image(), "json": record(NESTED)},
    "list": {"png": image(), "json": record(["x", "", "y"])},
    "cap": {"png": image(), "cap": b"a dog", "cls": b"3"},
    "img": {"img": image(), "txt": b"a dog"},
    "tif": {"tif": image("TIFF"), "txt": b"a dog"},
    "dots": {"v2.png": image(), "v2.txt": b"a dog"},
    "mute": {"png": image(), "txt": b" \n"},
}


class Recorder:
    """A tokenizer that keeps what it is given."""

    context_length, vocab_size = 1, 2

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        return torch.ones(len(texts), 1, dtype=torch.int64)

    def fingerprint(self) -> str:
        return "0" * 16


def made(folder: Path, form: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_shard(folder / "0.tar", [Sample(f"{row:04d}", FORMS[form]) for row in range(20)])
    return folder


@pytest.mark.parametrize(
    ("form", "settings", "captions", "source"),
    [
        ("lines", {}, FIVE, "lines of .txt"),
        ("lines", {"caption_lines": "whole"}, ["\r\n".join(FIVE)], ".txt with its line breaks as one caption"),
        ("img2dataset", {}, [BROKEN], ".txt with its line breaks as one caption"),
        ("img2dataset", {"caption_lines": "split"}, BROKEN.split("\n"), "lines of .txt"),
        ("own", {}, ["one", "two"], "json:captions"),
        ("own", {"caption_members": [".TXT"]}, ["one"], ".txt"),
        ("field", {}, ["only here"], "json:caption"),
        ("nested", {"caption_members": ["json:meta.alt_text"]}, ["alt"], "json:meta.alt_text"),
        ("nested", {"caption_members": ["cap", "json:annotations.caption"]}, ["x", "y"], "json:annotations.caption"),
        ("list", {"caption_members": ["json"]}, ["x", "y"], "json"),
        ("cap", {"caption_members": ["cap"]}, ["a dog"], ".cap"),
        ("img", {"image_members": ["img"]}, ["a dog"], ".txt"),
        ("dots", {"image_members": ["v2.png"], "caption_members": ["v2.txt"]}, ["a dog"], ".v2.txt"),
    ],
)
def test_everybody_takes_the_same_captions(tmp_path, form, settings, captions, source) -> None:
    cfg = Data(train=[str(made(tmp_path / "set", form))], **settings)
    catalog = Catalog.open(cfg.train, members=members_of(cfg))
    loader = open_loader(catalog, OrderKey(0, 20, 1, 0), Recorder(), cfg, views=[image_view(cfg, 8)], rank=0, world=1)
    batches = [loader.next() for _ in range(2)]
    loader.close()
    assert all(batch.valid["image"].all() and batch.valid["text"].all() for batch in batches)
    assert set(loader.tokenizer.texts) == set(captions)

    embeddings = embed_catalog(encode, catalog, Recorder(), EvalTransform(8))
    assert embeddings.captions == captions * 20
    assert embeddings.caption_sources == {source: 20}

    reader = Reader(open_shards(cfg.train, catalog.members).catalog)
    described = describe_samples(reader, np.arange(20))
    assert (described["captions"]["count"], described["captions"]["sources"]) == (20 * len(captions), {source: 20})
    assert described["unusable"] == {}
    assert first_caption(reader, 3) == captions[0]
    reader.close()

    verified = read_samples(catalog.table(0), True, catalog.members).columns
    assert verified["defect"].tolist() == [0] * 20
    assert verified["caption_length"].tolist() == [len(captions[0])] * 20

    words = [f"data.{key}={str(value).replace(' ', '')}" for key, value in settings.items()]
    plan = check_data(load_config("configs/tiny.yaml", [f"data.train={tmp_path / 'set'}", "data.val=", *words]))[0]
    kind = next(kind for kind in FORMS[form] if FORMS[form][kind] == image())
    assert plan.contents == f"16 samples looked at: images are .{kind}; captions are {source}, {len(captions)} each"


def test_negatives_are_looked_for_where_they_are_asked_for(tmp_path) -> None:
    words = ["configs/tiny.yaml", [f"data.train={tmp_path}", "data.val=", "data.negatives=2"]]
    write_pairs(tmp_path, 20, more={row: {"negatives": [f"{row}"] * row} for row in range(4)})
    assert check_data(load_config(*words))[0].contents.endswith("; 3 have negatives: json:negatives, at most 3 each")
    words[1].append("data.negative_members=[neg]")
    told = r"^data.train: of 16 samples looked at none has negatives \(neg looked for\); their members are .*png"
    with pytest.raises(UserError, match=told):
        check_data(load_config(*words))


def encode(images: torch.Tensor | None, tokens: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None if images is None else torch.ones(len(images), 2), None if tokens is None else tokens.float())


LOOKED_FOR = r"none has a caption \(json:captions, txt, json:caption looked for\); their members are "
NO_IMAGE = r"none has an image \(jpg, jpeg, png, webp, gif, bmp looked for\); their members are "


@pytest.mark.parametrize(
    ("form", "words", "text"),
    [
        ("cap", [], LOOKED_FOR + r"png, cap, cls; name them: data\.caption_members=cap$"),
        ("nested", [], LOOKED_FOR + r"png, json; text is in json:url, json:meta.alt_text, json:annotations.caption;"),
        ("nested", [], r"; name them: data\.caption_members=json:meta.alt_text$"),
        ("list", [], LOOKED_FOR + r"png, json; text is in json; name them: data\.caption_members=json$"),
        ("mute", [], LOOKED_FOR + r"png, txt; data\.caption_members names others$"),
        ("own", ["data.caption_members=json:text"], r"\(json:text looked for\).*data\.caption_members=txt$"),
        ("img", [], NO_IMAGE + r"img, txt; name them: data\.image_members=img$"),
        ("tif", [], NO_IMAGE + "tif, txt; TIFFs are not decoded: convert them to PNG or JPEG$"),
        ("tif", ["data.image_members=tif"], r"\(tif looked for\).*; TIFFs are not decoded"),
        (
            "dots",
            [],
            NO_IMAGE + r"v2.png, v2.txt \(a member's name is a key up to its first dot.*members=v2.png$",
        ),
        ("dotted", [], NO_IMAGE + r"0.png, 0.txt, 1.png.*, \.\.\. .*; write names without further dots$"),
        ("remote", [], LOOKED_FOR + r"png, cap, cls; data\.caption_members names others$"),
    ],
)
def test_what_training_could_not_use_is_refused_before_a_model_is_built(
    tmp_path, monkeypatch, form, words, text
) -> None:
    monkeypatch.setattr("clipdist.models.build.assemble", lambda *_, **__: pytest.fail("a model was built"))
    folder = made(tmp_path / "set", "cap" if form in ("remote", "dotted") else form)
    if form == "dotted":
        with tarfile.open(folder / "0.tar", "w") as archive:
            for name in (f"photo.{row}.{kind}" for row in range(20) for kind in ("png", "txt")):
                member = tarfile.TarInfo(name)
                member.size = len(image()) if name.endswith("png") else 3
                archive.addfile(member, io.BytesIO(image() if name.endswith("png") else b"dog"))
    source = f"{(folder / '0.tar').as_uri()}" if form == "remote" else folder
    config = load_config("configs/tiny.yaml", [f"data.train={source}", f"run.root={tmp_path}", "device=cpu", *words])
    asked = "^" if NO_IMAGE in text or form == "tif" else r"^objectives\.clip needs captions: "
    with pytest.raises(UserError, match=asked + r"data\.train: .*/set.*: of \d+ samples looked at .*" + text):
        train(config)


def test_captions_are_not_looked_for_where_no_objective_needs_them(tmp_path: Path) -> None:
    source = made(tmp_path / "set", "mute")
    config = load_config("configs/tiny.yaml", [f"data.train={source}", f"data.val={source}", "train.global_batch=4"])
    with pytest.raises(UserError, match=r"^objectives\.clip needs captions: data\.train"):
        check_data(config)
    words = ["objectives.clip=null", "objectives.simclr={}"]
    for catalog in check_data(dataclasses.replace(config, objectives=load_config(None, words).objectives)):
        assert catalog is not None
        assert catalog.contents == "16 samples looked at: images are .png"


def test_several_sources_are_looked_at_one_by_one(tmp_path: Path) -> None:
    sources = [str(made(tmp_path / name, name)) for name in ("lines", "img2dataset", "mute")]
    words = ["data.val=", f"data.train=[{','.join(sources[:2])}]"]
    told = check_data(load_config("configs/tiny.yaml", words))[0].contents
    assert "captions are lines of .txt (16 samples), .txt with its line breaks as one caption (16 samples)" in told
    assert told.endswith(", 1 to 5 each")
    address = (tmp_path / "lines" / "0.tar").as_uri()
    told = check_data(load_config("configs/tiny.yaml", ["data.val=", f"data.train={address}"]))[0].contents
    assert told == "16 samples looked at: images are .png; captions of remote shards are not looked at"
    text = f"data.val: {re.escape(sources[2])}: of 16 samples looked at none has a caption"
    with pytest.raises(UserError, match=text):
        check_data(load_config("configs/tiny.yaml", [words[1], f"data.val=[{sources[0]},{sources[2]}]"]))
