"""Test sets in CLIP_benchmark's WebDataset form, a suite of them, and tiny models as run folders."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from pairs import COLOURS, draw_pair
from PIL import Image

from clipdist import config
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.models.build import build_model
from clipdist.models.interpolate import save_run

ROOT = Path(__file__).parents[1]
KINDS = (("webp", "WEBP"), ("png", "PNG"), ("jpg", "JPEG"))
CLASSES = [*COLOURS, "mauve thing"]  # no test image has the last; with five, CLIP_benchmark gives a top 5
SUITE = "colours: {data: colours, task: [zero_shot, probe]}\npairs: pairs\n"


def write_run(folder: Path, seed: int, model: str = "tiny_vit", scale: float = 1.5) -> Path:
    """A run folder with one checkpoint of random weights."""
    torch.manual_seed(seed)
    built = build_model(config.Model(name=str(ROOT / f"configs/models/{model}.json"))).eval()
    for parameter in built.parameters():
        parameter.data.mul_(scale)
    save_run(folder, built, {})
    return folder


def write_sets(folder: Path) -> Path:
    """colours/ (labels, train and test, images not square), pairs/ (captions), and suite.yaml, which is returned."""
    for split, numbers in (("train", range(30)), ("test", range(100, 150))):
        labels = {number: list(COLOURS).index(draw_pair(number)[1][0].split()[1]) for number in numbers}
        labels |= {0: CLASSES.index("mauve thing")} if split == "train" else {}
        write_split(folder / "colours" / split, {n: {"cls": str(label).encode()} for n, label in labels.items()})
    (folder / "colours/classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "colours/zeroshot_classification_templates.txt").write_text("a {c} square.\nthe colour {c}\n")
    captions = {number: [f"{number} {caption}" for caption in draw_pair(number)[1]] for number in range(200, 240)}
    write_split(folder / "pairs/test", {n: {"txt": "\n".join(own).encode()} for n, own in captions.items()})
    (folder / "pairs/dataset_type.txt").write_text("retrieval\n")
    (folder / "suite.yaml").write_text(SUITE)
    return folder / "suite.yaml"


def write_split(folder: Path, members: dict[int, dict[str, bytes]], per_shard: int = 20) -> None:
    folder.mkdir(parents=True)
    rows = list(members.items())
    parts = [rows[begin : begin + per_shard] for begin in range(0, len(rows), per_shard)]
    for shard, part in enumerate(parts):
        samples = [Sample(f"s{number:07d}", _image(number) | own) for number, own in part]
        write_shard(folder / f"{shard}.tar", samples)
    (folder / "nshards.txt").write_text(f"{len(parts)}\n")


def _image(number: int) -> dict[str, bytes]:
    suffix, kind = KINDS[number % len(KINDS)]
    file = io.BytesIO()
    image = Image.open(io.BytesIO(draw_pair(number)[0])).resize((41, 36))
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return {suffix: file.getvalue()}
