"""Compare clipdist's training with open_clip_train's (open_clip_torch 3.3.0): samples/s, MFU, peak memory and losses.

Both train the same model from the same weights on the same shards, with the same global batch, precision, optimiser and
number of processes, one after the other in turn. Two questions, answered separately:

- how fast: each side with its own data pipeline, data loading included, start-up left out;
- the same training: both on the same batches in fp32, step by step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import statistics
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from typing import Any

from clipdist.config import Config, load_config, to_yaml
from clipdist.config.batches import check_ranks
from clipdist.errors import run_main
from clipdist.storage import json_lines
from tools.bench import harness
from tools.bench.mfu import flops_per_pair, peak_flops, utilisation
from tools.bench.peak_memory import ProportionalSetSize
from tools.bench.peers.trainer import TrainingJob, check_comparable, flags, make_start, rank_report
from tools.bench.processes import repository_environment, run_ranks, threads_per_rank

DEFAULT_RECIPE = "configs/flickr8k_vit_tiny.yaml"
IMAGES = 512  # drawn at least
NEVER = 1 << 40  # steps
MEMORY_STEPS = 4  # of the run whose memory is watched
TOLERANCE = 1e-4  # of the losses
EXAMPLES = """  python tools/bench/train.py
  python tools/bench/train.py --config configs/demo.yaml --workers 1 2 4 --out bench.md
  python tools/bench/train.py --rounds 0 --loss-steps 50 train.global_batch=64      # the losses alone
  python tools/bench/train.py --loss-steps 0 model.name=ViT-B-32 train.precision=bf16   # any settings of a recipe

open_clip_train runs in its exact mode (--local-loss --gather-with-grad), once per round for every count of --workers;
the best count is what clipdist is compared with. On a CPU memory is watched in a run of its own, so that watching slows
none that is timed. The pictures are drawn. MFU is told for GPUs of known peak, in bf16 and fp16."""


@dataclass(frozen=True)
class TimedRun:
    """Samples/s of a run, and on a GPU the peak bytes that rank 0's torch allocated there."""

    rate: float
    peak_bytes: int | None


@dataclass
class TrainingResults:
    """None or empty: not measured."""

    rates: dict[str, list[float]] = field(default_factory=dict)  # side -> samples/s by round
    peak_bytes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    flops: float | None = None  # of one pair
    peak_flops: float | None = None  # FLOP/s of all devices

    def rate(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def best_peer(self) -> str:
        """open_clip_train at the count of workers that suits it best."""
        return max((side for side in self.rates if side != "clipdist"), key=self.rate)

    def mfu(self, side: str) -> float | None:
        return utilisation(self.rate(side), self.flops, self.peak_flops)

    def loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.losses["clipdist"], self.losses["open_clip"], strict=True))


def main() -> int:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    check_ranks(config, args.ranks)
    check_comparable(config)
    with harness.workspace() as folder:
        job = make_job(args, config, folder)
        results = measure(job, args)
    return harness.finish(args, report(job, results), summary(results))


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe ({DEFAULT_RECIPE})")
    parser.number("--ranks", 2, "N", "processes of each side")
    parser.number("--steps", 20, "S", "timed steps of a run")
    parser.number("--warmup", 10, "S", "steps before them")
    parser.number("--rounds", 3, "R", "runs of each side; 0: no rates", least=0)
    parser.number("--loss-steps", 50, "S", "losses to compare; 0: none", least=0)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="open_clip_train's, per rank (1 2)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the two runs that watch memory on a CPU")
    parser.add_argument("--compile", action="store_true", help="both models go through torch.compile")
    return parser.parse()


def draw_shards(folder: Path, config: Config, args: argparse.Namespace) -> tuple[list[Path], int]:
    """Draw captioned images into shards of one size, a whole number of batches for every loader.

    open_clip_train throws away the last, partial batch of each pass over a worker's shards: there is none here.

    Returns:
        The shards, and the number of images.
    """
    from tools.bench.images import draw_scene, write_drawn_shards

    loaders = args.ranks * max(1, *args.workers)
    per_rank = config.train.global_batch // args.ranks
    per_shard = per_rank * -(-IMAGES // (per_rank * loaders))
    facts = write_drawn_shards(folder / "pictures", "bench", [per_shard] * loaders, draw_scene)
    return [folder / "pictures" / shard.name for shard in facts], per_shard * loaders


def make_job(args: argparse.Namespace, config: Config, folder: Path) -> TrainingJob:
    """Draw the images and the weights, and resolve what both sides are to be told alike."""
    from clipdist.distributed.rank import resolve_device, resolve_precision

    device = resolve_device(config.device)
    precision = resolve_precision(config.train.precision, device)
    start = make_start(config, folder)
    shards, images = draw_shards(folder, config, args)
    common = {
        "data.train": json.dumps(list(map(str, shards))),
        "data.val": "[]",
        "device": device,
        "model.weights": start.weights,
        "run.root": folder,
        "train.resume": "never",
        "train.save_every": NEVER,
        "eval.every": NEVER,
    }
    if args.compile and has_compile(config):
        common["engine.compile"] = "true"
    words = ["--config", args.config, *args.overrides, *(f"{name}={value}" for name, value in common.items())]
    return TrainingJob(
        config,
        words,
        shards,
        images,
        start,
        folder,
        ranks=args.ranks,
        steps=args.steps,
        warmup=args.warmup,
        device=device,
        precision=precision,
        compiled=args.compile,
    )


def has_compile(config: Config) -> bool:
    """Return whether this version of clipdist can compile its model."""
    return any(setting.name == "compile" for setting in fields(config.engine))


def measure(job: TrainingJob, args: argparse.Namespace) -> TrainingResults:
    """Run all, the sides in turn."""
    results = TrainingResults()
    number = count(1)
    workers_of: dict[str, int | None] = {side_name(workers): workers for workers in [None, *args.workers]}

    def run(side: str) -> TimedRun:
        timed = run_timed(job, f"{side.replace(' ', '-')}-{next(number)}", workers_of[side])
        harness.say(f"{side:<24}{timed.rate:9.1f} samples/s")
        return timed

    if args.rounds:
        runs = harness.take_turns({side: partial(run, side) for side in workers_of}, args.rounds)
        results.rates = {side: [run.rate for run in of_side] for side, of_side in runs.items()}
        if job.device == "cuda":
            add_gpu_figures(job, runs, results)
    if args.rounds and job.device == "cpu" and not args.no_memory:
        for side, workers in (("clipdist", None), ("open_clip", workers_of[results.best_peer()])):
            results.peak_bytes[side] = run_watched(job, f"{side}-memory", workers)
            harness.say(f"memory   {side:<24}{results.peak_bytes[side] / 1e6:9.0f} MB")
    if args.loss_steps:
        results.losses = run_losses(job, args.loss_steps)
    return results


def add_gpu_figures(job: TrainingJob, runs: dict[str, list[TimedRun]], results: TrainingResults) -> None:
    """Add peak memory, and in half precision what the MFU is computed from."""
    import torch

    for name, side in (("clipdist", "clipdist"), ("open_clip", results.best_peer())):
        results.peak_bytes[name] = max(run.peak_bytes or 0 for run in runs[side])
    if job.precision != "fp32":
        peak = peak_flops(torch.cuda.get_device_name())
        results.peak_flops = peak and peak * job.ranks
        results.flops = flops_per_pair(job.config)


def side_name(workers: int | None) -> str:
    return "clipdist" if workers is None else f"open_clip {workers} workers"


def run_timed(job: TrainingJob, name: str, workers: int | None) -> TimedRun:
    """Measure samples/s over the steps after the warm-up. workers None: clipdist's run; else open_clip_train's."""
    run_side(job, name, workers, job.warmup + job.steps, min(job.config.train.log_every, job.steps))
    if workers is None:
        times = [(record["samples"], record["time"]) for record in our_records(job, name)]
    else:
        times = [(int(samples), seconds) for samples, seconds in their_reports(job, name)[0]["times"]]
    steady = [(samples, seconds) for samples, seconds in times if samples >= job.warmup * job.batch]
    (first, began), (last, ended) = steady[0], steady[-1]
    return TimedRun((last - first) / (ended - began), gpu_peak(job, name, workers))


def gpu_peak(job: TrainingJob, name: str, workers: int | None) -> int | None:
    """Return the peak bytes that rank 0's torch allocated on its GPU in a run that has ended."""
    if job.device == "cpu":
        return None
    if workers is None:
        return int(our_records(job, name)[-1]["memory_gb"] * 1e9)
    return int(their_reports(job, name)[0]["peak_bytes"])


def run_watched(job: TrainingJob, name: str, workers: int | None) -> int:
    """Return the peak bytes of a short run on a CPU, the last step's checkpoint included.

    Those are the proportional set sizes of all processes, workers too.
    """
    with ProportionalSetSize() as watch:
        run_side(job, name, workers, MEMORY_STEPS, 1, watch)
    return watch.peak_bytes


def run_side(
    job: TrainingJob,
    name: str,
    workers: int | None,
    steps: int,
    log_every: int,
    watch: ProportionalSetSize | None = None,
) -> None:
    """Run clipdist (workers None) or open_clip_train on its own data."""
    if workers is None:
        settings = (f"train.steps={steps}", f"train.log_every={log_every}", f"run.name={name}")
        command = [sys.executable, str(harness.ROOT / "clipdist/train.py"), *job.words, *settings]
    else:
        command = their_command(job, name, steps, log_every, workers)
    run_all(job, name, command, watch)


def run_losses(job: TrainingJob, steps: int) -> dict[str, list[float]]:
    """Return the losses of both on the same batches, fp32, step by step; of all ranks together."""
    warmup = min(job.config.optim.warmup_steps, steps // 4)
    same = [
        f"train.steps={steps}",
        f"optim.warmup_steps={warmup}",
        "train.precision=fp32",
        "train.log_every=1",
        "train.micro_batch=0",  # open_clip's accumulation counts the temperature's gradient once per part
        "objectives.clip.group_positives=false",  # open_clip's loss knows no second positive
    ]
    ours, theirs = "clipdist-losses", "open_clip-losses"
    command = [sys.executable, "-m", "tools.bench.peers.trainer", "ours", *job.words, *same, f"run.name={ours}"]
    run_all(job, ours, command, tf32=False)
    config = load_config(job.words[1], [*job.words[2:], *same, f"run.name={theirs}"])
    recipe = job.folder / "batches.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    run_all(job, theirs, their_command(job, theirs, steps, steps, 0, config, recipe), tf32=False)
    by_rank = [record["losses"] for record in their_reports(job, theirs)]
    return {
        "clipdist": [record["loss"] for record in our_records(job, ours)],
        "open_clip": [statistics.fmean(losses) for losses in zip(*by_rank, strict=True)],
    }


def their_command(
    job: TrainingJob,
    name: str,
    steps: int,
    log_every: int,
    workers: int,
    config: Config | None = None,
    batches: Path | None = None,
) -> list[str]:
    words = flags(
        job,
        config or job.config,
        steps=steps,
        workers=workers,
        precision="fp32" if batches else job.precision,
        log_every=log_every,
        logs=job.folder / f"{name}-logs",
    )
    files = [their_report(job, name), job.start.model_json or "-", batches or "-"]
    return [sys.executable, "-m", "tools.bench.peers.trainer", "theirs", *map(str, files), *words]


def our_records(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    return [record for record in json_lines(job.folder / name / "metrics.jsonl") if record["type"] == "train"]


def their_report(job: TrainingJob, name: str) -> Path:
    return job.folder / f"{name}.json"


def their_reports(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    """Read what each rank wrote."""
    paths = [rank_report(their_report(job, name), rank) for rank in range(job.ranks)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def run_all(
    job: TrainingJob,
    name: str,
    command: list[str],
    watch: ProportionalSetSize | None = None,
    tf32: bool = True,
) -> None:
    """Run a command on all ranks (without TF32, where it shall be fp32). Raise a Fault where one failed."""
    environment = repository_environment() | {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads_per_rank(job.ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for work take the cores from those that decode, on both sides
        "DS_ACCELERATOR": job.device,
    }
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if not tf32:  # open_clip_train switches it on
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    run_ranks(command, job.ranks, environment, job.folder / f"{name}.log", watch)


def summary(results: TrainingResults) -> dict[str, float | int | None]:
    """Return the JSON line; None where nothing was measured."""
    timed = bool(results.rates)
    ours = results.rate("clipdist") if timed else None
    theirs = results.rate(results.best_peer()) if timed else None
    return {
        "ours": ours,
        "open_clip": theirs,
        "ratio": ours / theirs if ours and theirs else None,
        "ours_mfu": results.mfu("clipdist") if timed else None,
        "open_clip_mfu": results.mfu(results.best_peer()) if timed else None,
        "flops_per_pair": results.flops,
        "loss_max_diff": results.loss_difference() if results.losses else None,
        "ours_peak_bytes": results.peak_bytes.get("clipdist"),
        "open_clip_peak_bytes": results.peak_bytes.get("open_clip"),
    }


def report(job: TrainingJob, results: TrainingResults) -> list[str]:
    """Return Markdown: tables, then what they were measured with."""
    lines = ["# Training beside open_clip_train", ""]
    if results.rates:
        lines += rate_table(results, summary(results))
    if results.losses:
        lines += loss_lines(results)
    threads = threads_per_rank(job.ranks)
    lines += [
        *harness.provenance(job.device, job.ranks * threads, "open_clip_torch", "deepspeed", "webdataset"),
        f"- training: {job.config.model.name}, {job.ranks} processes with {threads} threads each,"
        f" global batch {job.batch}, {job.precision}, ZeRO {job.config.engine.zero_stage} here,"
        " --local-loss --gather-with-grad there",
        f"- data: {job.images} pictures in {len(job.shards)} shards",
    ]
    if job.compiled:
        sides = "both sides" if has_compile(job.config) else "open_clip_train alone; clipdist has no engine.compile yet"
        lines.append(f"- torch.compile: {sides}")
    if results.flops and results.peak_flops:
        lines.append(
            f"- MFU: {results.flops / 1e9:.1f} GFLOP per pair, forward and backward, by torch's FlopCounterMode; peak"
            f" {results.peak_flops / 1e12:.0f} TFLOPS, dense bf16, by the data sheet"
        )
    return lines


def rate_table(results: TrainingResults, told: dict[str, float | int | None]) -> list[str]:
    best = results.best_peer()
    rows = []
    for side, rates in results.rates.items():
        peak = results.peak_bytes.get({"clipdist": "clipdist", best: "open_clip"}.get(side, ""))
        mfu = results.mfu(side)
        cells = [side, f"{results.rate(side):.1f}", harness.by_round(rates, ".1f")]
        rows.append([*cells, harness.percent(mfu) if mfu else "-", f"{peak / 1e6:.0f} MB" if peak else ""])
    table = harness.markdown_table(["", "samples/s, median", "rounds", "MFU", "peak memory"], rows)
    return [*table, "", f"clipdist / {best}: {told['ratio']:.3f}", ""]


def loss_lines(results: TrainingResults) -> list[str]:
    differences = [abs(a - b) for a, b in zip(results.losses["clipdist"], results.losses["open_clip"])]
    worst = max(range(len(differences)), key=differences.__getitem__)
    ours = results.losses["clipdist"]
    verdict = "agree" if differences[worst] <= TOLERANCE else "DO NOT agree"
    return [
        f"Losses of the first {len(ours)} steps on the same batches, fp32, from {ours[0]:.4f} to {ours[-1]:.4f}: they"
        f" {verdict} to {TOLERANCE:g}. The largest difference is {differences[worst]:.1e}, at step {worst + 1}.",
        "",
    ]


if __name__ == "__main__":
    run_main(main)
