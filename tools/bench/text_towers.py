"""Compare text towers, a Transformer, an LSTM and CBOW, with and without word vectors: retrieval and cost.

All are trained by one recipe (the image tower of configs/flickr8k_rn10.yaml at 64 pixels), from scratch, on the same
pairs in the same order. The word vectors are trained on the captions of the training images. Every number comes from
the commands that users type; the cost of a row is that of its training process.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from clipdist.config import Config, load_config, to_yaml
from clipdist.data.catalog import Catalog
from clipdist.errors import Fault, UserError, run_main
from clipdist.storage import write_text
from tools.bench import finetune, harness
from tools.bench.processes import repository_environment, threads_per_rank

EXAMPLES = """  python tools/bench/text_towers.py data/flickr8k --samples 24000 train.precision=bf16 --out towers.md
  python tools/bench/text_towers.py data/flickr8k --towers lstm lstm+vectors --json

Runs stay in --work: the same command goes on where it was interrupted, and measures what is missing."""
RECIPE = "configs/flickr8k_rn10.yaml"
RECALLS = finetune.RECALLS


@dataclass(frozen=True)
class Tower:
    """A row: its title, the model JSON, and whether its embedding starts from word vectors."""

    title: str
    model: str
    vectors: bool = False


TOWERS = {
    "transformer": Tower("Transformer, 2 layers", "configs/models/rn10_transformer.json"),
    "lstm": Tower("LSTM, 1 layer, both directions", "configs/models/rn10_lstm.json"),
    "lstm+vectors": Tower("LSTM, word vectors", "configs/models/rn10_lstm.json", vectors=True),
    "cbow": Tower("CBOW", "configs/models/rn10_cbow.json"),
    "cbow+vectors": Tower("CBOW, word vectors", "configs/models/rn10_cbow.json", vectors=True),
}


def main() -> int:
    args = parse_args()
    args.train, args.val = str(args.shards / "train"), str(args.shards / "val")
    args.vectors = args.work / "vectors.txt"
    configs = {name: load_config(RECIPE, settings(args, name)) for name in args.towers}
    for part in (args.train, args.val):
        Catalog.open([part], "SHARDS")
    args.work.mkdir(parents=True, exist_ok=True)
    if any(TOWERS[name].vectors for name in args.towers) and not args.vectors.is_file():
        words = ["tools/train_word_vectors.py", args.train, "--out", str(args.vectors), "--seed", str(args.seed)]
        finetune.command(words)
    rows = [row_of(args, name, config) for name, config in configs.items()]
    return harness.finish(args, report(args, configs, rows), {"rows": rows})


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder with train/ and val/, as flickr8k's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings of {RECIPE}")
    what = f"({' '.join(TOWERS)})"
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), metavar="TOWER", help=what)
    parser.number("--samples", 239_880, "N", "pairs that each trains on")
    parser.number("--seed", 0, "N", "of the weights, the order and the word vectors", 0)
    parser.add_argument("--work", type=Path, default=Path("runs/text-towers"), metavar="DIR", help="(%(default)s)")
    return parser.parse()


def settings(args: argparse.Namespace, name: str) -> list[str]:
    """Return what a run sets beside the recipe."""
    tower = TOWERS[name]
    return [
        "device=cpu",
        f"run.root={args.work}",
        f"run.name={name}",
        f"data.train={json.dumps([args.train])}",
        "data.val=[]",
        f"data.seed={args.seed}",
        f"model.name={tower.model}",
        *([f"model.word_vectors={args.vectors}"] if tower.vectors else []),
        f"train.seed={args.seed}",
        f"train.samples={args.samples}",
        *args.overrides,
    ]


def row_of(args: argparse.Namespace, name: str, config: Config) -> dict[str, Any]:
    """Train a tower and measure retrieval on SHARDS/val, unless that was done."""
    recipe, kept = args.work / f"{name}.yaml", args.work / f"{name}.retrieval.json"
    if recipe.is_file() and recipe.read_text() != to_yaml(config):
        raise UserError(f"{recipe}: measured with other settings; choose another --work, or remove {args.work}")
    write_text(recipe, to_yaml(config))
    cost = finetune.measured(args, name, ["clipdist/train.py", "--config", str(recipe)])
    if not kept.is_file():
        words = ["tools/eval_retrieval.py", str(args.work / name), args.val, "--resamples", "0", "--json"]
        program = [sys.executable, str(harness.ROOT / words[0]), *words[1:]]
        ended = subprocess.run(program, env=repository_environment(), stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            raise Fault(f"exit code {ended.returncode} from: {' '.join(words)}")
        write_text(kept, ended.stdout.splitlines()[-1])
    found = json.loads(kept.read_text())
    figures = {metric: found[metric] for metric in (*RECALLS, "rsum", "candidates")}
    return {"tower": name, "text_parameters": text_parameters(config), **asdict(cost), **figures}


def text_parameters(config: Config) -> int:
    from clipdist.estimate.activations import meta_model

    text = meta_model(config)[0].text
    assert text is not None
    return sum(parameter.numel() for parameter in text.parameters())


def report(args: argparse.Namespace, configs: dict[str, Config], rows: list[dict[str, Any]]) -> list[str]:
    """Return the report as Markdown: what it was measured with, and the table."""
    header = ["text tower", "its parameters, M", *(f"{way} R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))]
    header += ["CPU, s", "time, s", "peak, GB"]
    body = []
    for row in rows:
        cost = [f"{row['cpu_s']:.0f}", f"{row['wall_s']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        figures = [f"{row[name]:.1f}" for name in RECALLS]
        body.append([TOWERS[row["tower"]].title, f"{row['text_parameters'] / 1e6:.2f}", *figures, *cost])
    config = next(iter(configs.values()))
    return [
        "# Text towers, from scratch",
        "",
        f"R@K of {rows[0]['candidates']:g} held-out images, percent (chance, R@1: {100 / rows[0]['candidates']:.1f}).",
        "",
        *harness.markdown_table(header, body),
        "",
        *harness.provenance("cpu", threads_per_rank(1)),
        f"- {RECIPE}: {args.samples} pairs for each in batches of {config.train.global_batch}, one seed ({args.seed}),"
        f" {config.train.precision}",
        "- word vectors: skip-gram on the captions of the training images, tools/train_word_vectors.py",
        "- one learning rate for all, that of the recipe, which was chosen for CBOW",
        "- CPU, time and peak memory are those of the training process, its start included; the machine was shared",
    ]


if __name__ == "__main__":
    run_main(main)
