"""Fine-tune two pre-trained towers in the usual ways: what each gains on the target, what it keeps, what it costs.

The image tower is EfficientNet-Lite0 (ImageNet), the text tower MiniLM; their projections are new. The target is
retrieval on captioned images that are not trained on. What shall be kept is measured on labelled images of another
kind: zero-shot classification, and a linear probe of the image tower, for a locked one that of the pre-trained tower.
Every number comes from the commands that users type; the cost of a row is that of its training process.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import Any

from clipdist.checkpoint.format import newest_checkpoint
from clipdist.config import Config, load_config, to_yaml
from clipdist.data.catalog import Catalog
from clipdist.errors import Fault, UserError, run_main
from clipdist.storage import write_text
from tools.bench import harness
from tools.bench.processes import repository_environment, threads_per_rank

EXAMPLES = """  python tools/bench/finetune.py data/flickr8k --keep cifar-10-batches-py --out finetune.md
  python tools/bench/finetune.py data/flickr8k --keep cifar-10-batches-py --ways lp-ft wise-ft --samples 6000
  python tools/bench/finetune.py data/mine --keep pets --model ViT-B-32.json --json     a model JSON of yours

Runs stay in --work: the same command goes on where it was interrupted, and measures what is missing."""
# What a locked tower gives is computed once, from whole images.
LOCK_IMAGE = ["model.lock_image=true", "data.cache_features=true", "data.crop_scale_min=1"]
LOCK = [*LOCK_IMAGE, "model.lock_text=true"]
FROM_PROJECTIONS = ["model.weights=RUNS/projections"]  # as model.weights of another run: its newest checkpoint
WISE = "wise-ft"


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    Attributes:
        title: in the table.
        words: settings of its run.
        times: of --samples: projections on kept features cost next to nothing.
    """

    title: str
    words: list[str]
    times: int = 1


WAYS = {
    "projections": Way("projections alone, towers locked", [*LOCK, "optim.lr=1e-3", "optim.warmup_steps=20"], 20),
    "lit": Way("LiT: image tower locked", [*LOCK_IMAGE, "optim.lr=3e-4"]),
    "lora": Way("LoRA, rank 8", ["model.lora={}", "optim.lr=1e-3"]),
    "full": Way("full, from new projections", ["optim.lr=3e-4"]),
    "lp-lit": Way("projections, then LiT", [*FROM_PROJECTIONS, *LOCK_IMAGE, "optim.lr=1e-4"]),
    "lp-lora": Way("projections, then LoRA", [*FROM_PROJECTIONS, "model.lora={}", "optim.lr=3e-4"]),
    "lp-ft": Way("projections, then full (LP-FT)", [*FROM_PROJECTIONS, "optim.lr=1e-5"]),
    WISE: Way("WiSE-FT between the first and LP-FT", []),
}
NEEDS = {
    "lp-lit": ["projections"],
    "lp-lora": ["projections"],
    "lp-ft": ["projections"],
    WISE: ["projections", "lp-ft"],
}
RECALLS = tuple(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))


@dataclass(frozen=True)
class Cost:
    """Of a training process, its start and its checkpoint included."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def main() -> int:
    args = parse_args()
    check(args)
    args.work.mkdir(parents=True, exist_ok=True)
    args.given = args.model
    args.model = args.model or prepare_model(args)
    configs = {name: load_config(None, settings(args, name)) for name in args.ways if name != WISE}
    costs = {name: train(args, name, config) for name, config in configs.items()}
    if WISE in args.ways:
        costs[WISE] = interpolate(args)
    found = evaluate(args)
    rows = [row_of(name, configs.get(name), costs[name], figures) for name, figures in zip(args.ways, found)]
    return harness.finish(args, report(args, rows), {"rows": rows})


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder with train/ and val/, as flickr8k's")
    what = "labelled images: CIFAR's archive, DIR/{train,test}/CLASS/*, or shards"
    parser.add_argument("--train", metavar="SHARDS", help="captioned shards to train on (SHARDS/train)")
    parser.add_argument("--target", type=Path, metavar="SHARDS", help="captioned shards to measure on (SHARDS/val)")
    parser.add_argument("--keep", required=True, type=Path, metavar="PATH", help=what)
    parser.add_argument("--templates", default="cifar10", metavar="NAME", help="prompts for --keep (cifar10)")
    parser.add_argument("--no-probe", action="store_true", help="leave out the linear probe of the image tower")
    parser.add_argument("--model", default="", metavar="FILE.json", help="default: tools/prepare_pretrained.py's")
    parser.number("--image-size", 128, "S", "of that model, pixels", 32)
    parser.number("--tokens", 24, "L", "of a caption, the rest is cut; Flickr8k's have 14 on average", 4)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"({' '.join(WAYS)})"
    )
    parser.number("--samples", 2048, "N", "pairs that a way trains on")
    parser.number("--batch", 128, "B", "pairs of a step")
    parser.number("--alpha", 0.5, "A", "of WiSE-FT", 0, 1)
    parser.number("--seed", 0, "N", "of the order, the new projections and adapters", 0)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-finetune"), metavar="DIR", help="(%(default)s)")
    return parser.parse()


def check(args: argparse.Namespace) -> None:
    """Add the ways that others start from, and raise UserError for data that is not there."""
    needed = {need for name in args.ways for need in NEEDS.get(name, [])}
    args.ways = [name for name in WAYS if name in {*args.ways, *needed}]
    from clipdist.evals.suite import open_set

    args.target = args.target or args.shards / "val"
    args.train = args.train or str(args.shards / "train")
    args.images = len(Catalog.open([args.train], "--train"))
    open_set("--target", "retrieval", str(args.target))
    open_set("--keep", "zero_shot" if args.no_probe else "probe", str(args.keep))


def prepare_model(args: argparse.Namespace) -> str:
    folder = args.work / "pretrained"
    if not (folder / "model.json").is_file():
        sizes = ["--image-size", str(args.image_size), "--context-length", str(args.tokens)]
        command(["tools/prepare_pretrained.py", "--out", str(folder), *sizes])
    return str(folder / "model.json")


def settings(args: argparse.Namespace, name: str) -> list[str]:
    """Return the settings of a run; what is not said here is the project's default."""
    way = WAYS[name]
    return [
        "device=cpu",
        f"run.root={args.work}",
        f"run.name={name}",
        f"data.train={json.dumps([args.train])}",
        "data.val=[]",
        f"data.cache={args.work / 'cache'}",
        f"data.seed={args.seed}",
        f"model.name={args.model}",
        "engine.zero_stage=0",
        "optim.weight_decay=0.1",
        "optim.warmup_steps=5",
        f"train.seed={args.seed}",
        f"train.global_batch={args.batch}",
        f"train.samples={args.samples * way.times}",
        "train.precision=fp32",
        *(word.replace("RUNS", str(args.work)) for word in way.words),
    ]


def train(args: argparse.Namespace, name: str, config: Config) -> Cost:
    """Write the recipe of a way and train it, unless that was done; return what that cost."""
    recipe = args.work / f"{name}.yaml"
    if recipe.is_file() and recipe.read_text() != to_yaml(config):
        raise UserError(f"{recipe}: measured with other settings; choose another --work, or remove {args.work}")
    write_text(recipe, to_yaml(config))
    return measured(args, name, ["clipdist/train.py", "--config", str(recipe)])


def interpolate(args: argparse.Namespace) -> Cost:
    """Write the run between both ends; no set is looked at, so that none chooses alpha."""
    ends = [str(args.work / name) for name in NEEDS[WISE]]
    return measured(
        args, WISE, ["tools/interpolate.py", *ends, "--alpha", str(args.alpha), "--out", str(args.work / WISE)]
    )


def measured(args: argparse.Namespace, name: str, words: list[str]) -> Cost:
    """Run a command that writes the run of a way; the cost is kept beside the run, and taken from there."""
    kept = args.work / f"{name}.json"
    if kept.is_file() and newest_checkpoint(args.work / name):
        return Cost(**json.loads(kept.read_text()))
    shutil.rmtree(args.work / name, ignore_errors=True)  # a part of a run has not the cost of the whole
    cost = command(words)
    write_text(kept, json.dumps(asdict(cost)))
    return cost


def command(words: list[str]) -> Cost:
    """Run one of the project's programs.

    Raises:
        UserError, Fault: it ended with exit code 2, or another one that is not 0.
    """
    harness.say(f"$ {shlex.join(['python', *words])}")
    began = time.monotonic()
    program = [sys.executable, str(harness.ROOT / words[0]), *words[1:]]
    process = subprocess.Popen(program, env=repository_environment(), stdout=sys.stderr)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        kind = UserError if process.returncode == 2 else Fault
        raise kind(f"exit code {process.returncode} from: {shlex.join(words)}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss << 10)


def evaluate(args: argparse.Namespace) -> list[dict[str, float]]:
    """Measure all runs on the three sets, in one process; figures of earlier calls are taken from the runs."""
    suite, answer = args.work / "suite.yaml", args.work / "suite.json"
    sets = {
        "target": {"data": str(args.target.absolute()), "task": "retrieval"},
        "zero_shot": {"data": str(args.keep.absolute()), "task": "zero_shot", "templates": args.templates},
    }
    if not args.no_probe:
        sets["probe"] = {"data": str(args.keep.absolute()), "task": "probe"}
    write_text(suite, json.dumps(sets, indent=2))  # JSON is YAML
    runs = [str(args.work / name) for name in args.ways]
    words = ["tools/eval_suite.py", *runs, "--suite", str(suite), "--json"]
    harness.say(f"$ {shlex.join(['python', *words])}")
    program = [sys.executable, str(harness.ROOT / words[0]), *words[1:]]
    ended = subprocess.run(program, env=repository_environment(), stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise Fault(f"exit code {ended.returncode} from: {shlex.join(words)}")
    write_text(answer, ended.stdout)
    models = json.loads(ended.stdout.splitlines()[-1])["models"]
    return [figures_of(model["results"]) for model in models]


def figures_of(results: list[dict[str, Any]]) -> dict[str, float]:
    target, zero_shot, *probes = results
    kept = {"zero_shot": zero_shot["top1"], "chance": zero_shot["chance"]}
    if probes:
        kept["probe"] = probes[0]["accuracy"]
    return {name: target[name] for name in (*RECALLS, "rsum", "candidates")} | kept


def row_of(name: str, config: Config | None, cost: Cost, figures: dict[str, float]) -> dict[str, Any]:
    """Return a row; an interpolation trains nothing."""
    trained = trained_parameters(config) if config else 0
    return {"way": name, "trained": trained, **asdict(cost), **figures}


def trained_parameters(config: Config) -> int:
    from clipdist.estimate.activations import meta_model

    model, _ = meta_model(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[str]:
    """Return the report as Markdown: what it was measured with, and the table."""
    candidates, chance = rows[0]["candidates"], rows[0]["chance"]
    header = ["way", "trained, M", *(f"{way} R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))]
    kept = [name for name in ("zero_shot", "probe") if name in rows[0]]
    header += [*(name.replace("_", "-") for name in kept), "CPU, s", "time, s", "peak, GB"]
    probe = " and of a linear probe of the image tower" if "probe" in kept else ""
    body = []
    for row in rows:
        figures = [f"{row[name]:.1f}" for name in (*RECALLS, *kept)]
        cost = [f"{row['cpu_s']:.0f}", f"{row['wall_s']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        trained = f"{row['trained'] / 1e6:.2f}" if row["trained"] else "-"
        body.append([WAYS[row["way"]].title, trained, *figures, *cost])
    return [
        "# Ways to fine-tune two pre-trained towers",
        "",
        f"R@K of {candidates:g} held-out images (chance, t2i R@1: {100 / candidates:.1f}), and what is kept on"
        f" {args.keep.name}: accuracy of",
        f"the zero-shot classifier (chance {chance:.0f}){probe}; percent.",
        "",
        *harness.markdown_table(header, body),
        "",
        *harness.provenance("cpu", threads_per_rank(1)),
        *notes(args),
    ]


def notes(args: argparse.Namespace) -> list[str]:
    """Return in words what the rows have in common, and what their costs leave out."""
    rates = [f"{name} {word[9:]}" for name in args.ways for word in WAYS[name].words if word.startswith("optim.lr=")]
    times = WAYS["projections"].times
    sizes = f"images of {args.image_size} x {args.image_size} pixels, captions cut to {args.tokens} tokens"
    model = args.given or sizes
    return [
        f"- {args.images} images to train on",
        f"- equal samples: {args.samples} pairs in batches of {args.batch} for every way, but {times} times as many for"
        " the projections alone",
        "- what locked towers give is computed once, in the first row that needs it; a way that starts from the"
        " projections costs these, too",
        f"- one learning rate for each way, not searched: {', '.join(rates)}",
        f"- {model}; fp32, one process",
        "- CPU, time and peak memory are those of the training process, its start included; the machine was shared",
        f"- WiSE-FT trains nothing: the weights in the middle, alpha {args.alpha:g}; its cost is that of the average",
    ]


if __name__ == "__main__":
    run_main(main)
