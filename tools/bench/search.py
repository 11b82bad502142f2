"""Time a repeated search among the kept features of many pictures, in fresh processes.

Shards of tiny pictures, a run of a model with random weights and random features are made in a temporary folder. What
is timed is tools/search_images.py as people start it, from its start to its end, less the time of its imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import statistics
import subprocess
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import trange

from clipdist import config
from clipdist.checkpoint.format import Manifest, Piece, checkpoint_dir
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.data.catalog import Catalog
from clipdist.datasets.shard_writer import shard_sizes
from clipdist.distributed.rank import resolve_device
from clipdist.errors import Fault, run_main
from clipdist.evals.embed import Embeddings
from clipdist.evals.search import cache_file, unit, write_cache
from clipdist.models.build import build_model
from clipdist.models.load import load_model
from tools.bench import harness
from tools.bench.images import write_drawn_shards
from tools.bench.processes import repository_environment

EXAMPLES = """  python tools/bench/search.py --pictures 100000 --model ViT-B-32 --json"""
PER_SHARD = 10_000
TOOL = harness.ROOT / "tools/search_images.py"
TIMES = {  # JSON key: row of the table
    "after_imports_s": "whole process, less its imports",
    "encode_s": "the text tower's forward pass",
    "search_s": "the search in the features",
    "import_s": "imports",
}


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.number("--pictures", 100_000, "N", "")
    parser.add_argument("--model", default="ViT-B-32", metavar="NAME", help="open_clip name or model JSON (ViT-B-32)")
    parser.number("--rounds", 5, "N", "searches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse()


def main() -> int:
    args = parse_args()
    with harness.workspace() as folder:
        write_drawn_shards(folder / "shards", "bench-search", shard_sizes(args.pictures, PER_SHARD), draw_tiny)
        write_run(folder / "run", args.model)
        keep_random_features(folder / "run", folder / "shards")
        rounds = [search(folder, number, args.device) for number in trange(args.rounds, desc="rounds", disable=None)]
    times = {key: [found[key] for found in rounds] for key in TIMES}
    record: dict[str, Any] = {"pictures": args.pictures, "model": args.model, "rounds": args.rounds}
    for key, values in times.items():
        record |= {key: round(statistics.median(values), 4), f"least_{key}": round(min(values), 4)}
    lines = [
        f"# A search among {args.pictures} pictures, {args.model}",
        "",
        f"Seconds; {args.rounds} searches.",
        "",
        *harness.markdown_table(
            ["", "least", "median", "most"],
            [[TIMES[key], *harness.spread(values, ".3f")] for key, values in times.items()],
        ),
        "",
        *harness.provenance(resolve_device(args.device), torch.get_num_threads()),
    ]
    return harness.finish(args, lines, record)


def draw_tiny(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    return Image.new("RGB", (8, 8), tuple(rng.integers(0, 256, 3).tolist())), ["a colour"]


def write_run(folder: Path, name: str) -> None:
    """Write a run folder with one checkpoint, of random weights."""
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
    """Write what a first search would keep, without its forward passes."""
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
    write_cache(cache_file(loaded, catalog), loaded, catalog, embeddings)


def search(folder: Path, number: int, device: str) -> dict[str, float]:
    """Time one search in a fresh process, with a sentence of its own. Return seconds by the keys of TIMES.

    Raises:
        Fault: the search failed, or did not take the features that were kept.
    """
    words = [folder / "run", folder / "shards", f"a dog on beach number {number}", "--device", device, "--json"]
    command = [sys.executable, str(TOOL), *map(str, words)]
    run = partial(subprocess.run, command, env=repository_environment(), capture_output=True, text=True)
    wall_s, done = harness.timed(run)
    if done.returncode:
        raise Fault(f"{TOOL.name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not record["kept"]:
        raise Fault(f"{TOOL.name} made the features anew: {done.stderr.strip()[-300:]}")
    return {"after_imports_s": wall_s - record["import_s"]} | {key: record[key] for key in TIMES if key in record}


if __name__ == "__main__":
    run_main(main)
