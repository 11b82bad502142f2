"""A number of pictures in; how long a repeated search among their kept features takes, in a fresh process, out.

Shards of tiny pictures, a run of a model with random weights and random features are made in a temporary folder. What
is timed is tools/search_images.py as people start it, from its start to its end, less the time of its imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import io
import json
import statistics
import subprocess
import tempfile
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from clipdist import config
from clipdist.checkpoint.format import Manifest, Piece, checkpoint_dir
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.data.catalog import Catalog
from clipdist.datasets.shard_writer import Sample, sample_key, shard_name, shard_sizes, write_shard
from clipdist.errors import Fault, run_main
from clipdist.evals.embed import Embeddings
from clipdist.evals.search import cache_file, unit, write_cache
from clipdist.models.dual_encoder import build_model
from clipdist.models.load import load_model

EXAMPLE = """example:
  python tools/bench/search.py --pictures 100000 --model ViT-B-32 --json"""
PER_SHARD = 10_000
LOOKS = 32  # different pictures
TOOL = Path(__file__).with_name("search_images.py")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="clipdist-") as name:
        folder = Path(name)
        write_pictures(folder / "shards", arguments.pictures)
        write_run(folder / "run", arguments.model)
        keep_random_features(folder / "run", folder / "shards")
        rounds = [search(folder, number, arguments.device) for number in tqdm(range(arguments.rounds), disable=None)]
    record = {"pictures": arguments.pictures, "model": arguments.model, "rounds": arguments.rounds}
    for key in rounds[0]:
        values = [times[key] for times in rounds]
        record |= {key: round(statistics.median(values), 4), f"least_{key}": round(min(values), 4)}
    print(table(record))
    if arguments.json:
        print(json.dumps(record))


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    looks = []
    for level in range(LOOKS):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (7 * level, 128, 255 - 7 * level)).save(file, "JPEG")
        looks.append(file.getvalue())
    for shard, size in enumerate(tqdm(shard_sizes(count, PER_SHARD), "shards", disable=None)):
        samples = []
        for row in range(size):
            key = sample_key(shard, row)
            record = json.dumps({"key": key, "captions": [f"picture {key}"], "filename": f"{key}.jpg"})
            samples.append(Sample(key, {"jpg": looks[row % LOOKS], "json": record.encode()}))
        write_shard(folder / shard_name(shard), samples)


def write_run(folder: Path, name: str) -> None:
    """A run folder with one checkpoint, of random weights."""
    torch.manual_seed(0)
    model = build_model(config.Model(name=name))
    buffers = dict(model.named_buffers())
    pieces = [
        Piece(f"{'buffer' if key in buffers else 'param'}/{key}", tuple(tensor.shape), 0, tensor.detach().flatten())
        for key, tensor in model.state_dict().items()
    ]
    checkpoint = checkpoint_dir(folder, 1)
    write_part(checkpoint, 0, pieces, attempt="bench")
    write_manifest(checkpoint, Manifest(1, 1, 1, 1, {}, {}, {"model": model.spec.to_dict()}), attempt="bench")


def keep_random_features(run: Path, shards: Path) -> None:
    """What a first search would keep, without its forward passes."""
    loaded, catalog = load_model(str(run)), Catalog.open([str(shards)])
    random = torch.Generator().manual_seed(0)
    embeddings = Embeddings(
        image=unit(torch.randn(len(catalog), loaded.model.spec.embed_dim, generator=random)),
        text=torch.zeros(0, 0),
        text_image=torch.zeros(0, dtype=torch.int64),
        captions=[],
        keys=[str(key) for shard in range(len(catalog.shards)) for key in catalog.table(shard).keys],
        sample_ids=torch.from_numpy(np.arange(len(catalog))),
        bad={},
    )
    write_cache(cache_file(loaded, catalog), loaded, catalog, embeddings, tell=_fail)


def _fail(line: str) -> None:
    raise Fault(line)


def search(folder: Path, number: int, device: str) -> dict[str, float]:
    """Seconds of one search in a fresh process; every round asks another sentence.

    Raises:
        Fault: the search failed, or did not take the features that were kept.
    """
    words = [
        str(folder / "run"),
        str(folder / "shards"),
        f"a dog on beach number {number}",
        "--device",
        device,
        "--json",
    ]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - began
    if done.returncode:
        raise Fault(f"{TOOL.name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not record["kept"]:
        raise Fault(f"{TOOL.name} made the features anew: {done.stderr.strip()[-300:]}")
    times = {name: record[name] for name in ("encode_s", "search_s", "import_s")}
    return {"after_imports_s": wall_s - record["import_s"], **times}


def table(record: dict[str, Any]) -> str:
    lines = [f"{record['pictures']} pictures, {record['model']}, {record['rounds']} searches, seconds"]
    lines.append(f"{'':34}{'median':>9}{'least':>9}")
    for title, key in (
        ("whole process, less its imports", "after_imports_s"),
        ("the text tower's forward pass", "encode_s"),
        ("the search in the features", "search_s"),
        ("imports", "import_s"),
    ):
        lines.append(f"{title:34}{record[key]:9.3f}{record[f'least_{key}']:9.3f}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000, metavar="N", help="(100000)")
    parser.add_argument("--model", default="ViT-B-32", metavar="NAME", help="open_clip name or model JSON (ViT-B-32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="searches (5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    for name in ("pictures", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    return arguments


if __name__ == "__main__":
    run_main(main)
