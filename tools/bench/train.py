"""A recipe in; samples/s, peak memory and losses of clipdist's training beside open_clip_train's out.

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
import io
import json
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from clipdist.config import Config, load_config, to_yaml
from clipdist.config.checks import check_ranks
from clipdist.data.catalog import Catalog
from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

if TYPE_CHECKING:
    from tools.bench.peers.trainer import Start

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_RECIPE = "configs/flickr8k_vit_tiny.yaml"
PICTURES = 512  # drawn at least
SIDES = (128, 224)  # of a drawn picture, pixels
NEVER = 1 << 40  # steps
MEMORY_STEPS = 4  # of the run whose memory is watched
WATCH_S = 0.05
TOLERANCE = 1e-4  # of the losses
EXAMPLE = """examples:
  python tools/bench/train.py
  python tools/bench/train.py data/flickr8k/train --ranks 2 --out bench.md
  python tools/bench/train.py --rounds 0 --loss-steps 50 train.global_batch=64      # the losses alone
  python tools/bench/train.py --loss-steps 0 model.name=ViT-B-32 train.precision=bf16   # any settings of a recipe

open_clip_train runs in its exact mode (--local-loss --gather-with-grad), once per round for every count of --workers;
the best count is what clipdist is compared with. Memory is watched in a run of its own, so that watching slows none
that is timed. Without SHARDS pictures are drawn."""


@dataclass(frozen=True)
class Job:
    """What is common to all runs of one benchmark."""

    config: Config
    words: list[str]  # --config and the overrides, for clipdist's training command
    shards: list[Path]
    start: Start
    folder: Path
    ranks: int
    steps: int  # timed
    warmup: int  # steps before
    device: str
    precision: str

    @property
    def batch(self) -> int:
        return self.config.train.global_batch


@dataclass
class Results:
    """None or empty: not measured."""

    rates: dict[str, list[float]] = field(default_factory=dict)  # side -> samples/s by round
    peak_bytes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def best_peer(self) -> str:
        """open_clip_train at the count of workers that suits it best."""
        return max((side for side in self.rates if side != "clipdist"), key=self.rate)

    def loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.losses["clipdist"], self.losses["open_clip"], strict=True))


class RunFailed(Exception):
    """A process of a run ended with an exit code that is not 0; the text is the end of what it said."""


def main() -> int:
    arguments = parse_arguments()
    shards, overrides = split_words(arguments.words)
    config = load_config(arguments.config, overrides)
    check_ranks(config, arguments.ranks)
    named = shards or (config.data.train if any(word.startswith("data.train=") for word in overrides) else [])
    catalog = Catalog.open(named, "SHARDS") if named else None
    if catalog:
        check_shares(catalog, config, arguments)

    from tools.bench.peers.trainer import check_comparable

    check_comparable(config)
    try:
        with workspace(arguments.work) as (kept, scratch):
            catalog = catalog or Catalog.open([draw_shards(kept, config, arguments)], "drawn pictures")
            job = make_job(arguments, config, overrides, catalog, scratch)
            results = measure(job, arguments)
    except RunFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    text = report(job, results, arguments, catalog)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(summary(results)))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Training speed, memory and losses beside open_clip_train (open_clip_torch 3.3.0).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="SHARDS | section.key=value", help="shards, and recipe settings")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe ({DEFAULT_RECIPE})")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of each side (2)")
    parser.add_argument("--steps", type=int, default=20, metavar="S", help="timed steps of a run (20)")
    parser.add_argument("--warmup", type=int, default=10, metavar="S", help="steps before them (10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="runs of each side; 0: no rates (3)")
    parser.add_argument("--loss-steps", type=int, default=50, metavar="S", help="losses to compare; 0: none (50)")
    parser.add_argument(
        "--workers", type=whole_numbers, default=[1, 2], metavar="N,N", help="open_clip_train's, per rank (1,2)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the two runs that watch memory")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where drawn pictures stay; default: removed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as markdown, too")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_intermixed_args()
    for name, least in (("ranks", 1), ("steps", 1), ("warmup", 1), ("rounds", 0), ("loss_steps", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")
    return arguments


def whole_numbers(text: str) -> list[int]:
    """ "1,2" to [1, 2]."""
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers, such as 1,2")
    return [int(word) for word in text.split(",")]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(shards, overrides); what is there as a file or folder is no override."""
    shards = [word for word in words if "=" not in word or Path(word).exists()]
    return shards, [word for word in words if word not in shards]


@contextmanager
def workspace(work: Path | None) -> Iterator[tuple[Path, Path]]:
    """(a folder for drawn pictures, a new one for the runs); the second is gone afterwards, the first unless named."""
    try:
        if work:
            work.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=work))
    except OSError as error:
        raise UserError(f"--work {work}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield work or scratch, scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# Data


def draw_shards(folder: Path, config: Config, arguments: argparse.Namespace) -> str:
    """Draws captioned pictures into shards of one size, a whole number of batches for every loader. Returns the folder.

    open_clip_train throws away the last, partial batch of each pass over a worker's shards: there is none here.
    """
    from clipdist.datasets.shard_writer import is_whole, shard_name, write_shard, write_side_files

    loaders = arguments.ranks * max(1, *arguments.workers)
    per_rank = config.train.global_batch // arguments.ranks
    per_shard = per_rank * -(-PICTURES // (per_rank * loaders))
    out = folder / f"pictures-{loaders}x{per_shard}"
    if not is_whole(out):
        print(f"drawing {loaders * per_shard} pictures", flush=True)
        out.mkdir(exist_ok=True)
        facts = []
        for shard in range(loaders):
            samples = (draw_sample(shard, row, shard * per_shard + row) for row in range(per_shard))
            facts.append(write_shard(out / shard_name(shard), samples))
        write_side_files(out, "bench", facts)
    return str(out)


def draw_sample(shard: int, row: int, number: int) -> Any:
    """Picture `number`: a scene of its own size, JPEG, with five captions."""
    import numpy as np

    from clipdist.datasets import scenes
    from clipdist.datasets.shard_writer import Sample, sample_key

    rng = np.random.default_rng(number)
    scene = scenes.sample_scene(rng)
    file = io.BytesIO()
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    scenes.render_scene(scene, rng, side).save(file, "JPEG", quality=scenes.JPEG_QUALITY)
    captions, key = scenes.write_captions(scene, rng), sample_key(shard, row)
    record = json.dumps({"key": key, "captions": captions}).encode()
    return Sample(key, {"jpg": file.getvalue(), "txt": captions[0].encode(), "json": record})


def check_shares(catalog: Catalog, config: Config, arguments: argparse.Namespace) -> None:
    """Raises UserError where a loader of open_clip_train could not fill a batch: it would wait for ever."""
    loaders = arguments.ranks * max(1, *arguments.workers)
    shards = len(catalog.shards)
    if arguments.rounds and shards < loaders:
        raise UserError(
            f"SHARDS: {shards} shards for {loaders} loaders of open_clip_train (--ranks x --workers); give more"
            " shards, or fewer --workers"
        )
    sizes = sorted(shard.count for shard in catalog.shards)
    least, batch = sum(sizes[: shards // loaders]), config.train.global_batch // arguments.ranks
    if arguments.rounds and least < batch:
        raise UserError(
            f"SHARDS: a loader of open_clip_train may get {least} samples, fewer than a rank's batch of {batch}; lower"
            " train.global_batch, or --workers"
        )
    if len(catalog) < config.train.global_batch:
        raise UserError(f"SHARDS: {len(catalog)} samples, fewer than train.global_batch={config.train.global_batch}")


# Runs


def make_job(
    arguments: argparse.Namespace, config: Config, overrides: list[str], catalog: Catalog, scratch: Path
) -> Job:
    from clipdist.distributed.rank import resolve_device, resolve_precision
    from tools.bench.peers.trainer import make_start

    device = resolve_device(config.device)
    precision = resolve_precision(config.train.precision, device)
    shards = [Path(shard.tar).resolve() for shard in catalog.shards]
    start = make_start(config, scratch)
    common = {
        "data.train": json.dumps([str(shard) for shard in shards]),
        "data.val": "[]",
        "device": device,
        "model.weights": start.weights,
        "run.root": scratch,
        "train.resume": "never",
        "train.save_every": NEVER,
        "eval.every": NEVER,
    }
    words = ["--config", arguments.config, *overrides, *(f"{name}={value}" for name, value in common.items())]
    return Job(
        config,
        words,
        shards,
        start,
        scratch,
        ranks=arguments.ranks,
        steps=arguments.steps,
        warmup=arguments.warmup,
        device=device,
        precision=precision,
    )


def measure(job: Job, arguments: argparse.Namespace) -> Results:
    """All runs, the sides in turn."""
    results = Results()
    for number in range(1, arguments.rounds + 1):
        sides: list[int | None] = [None, *arguments.workers]
        for workers in sides:
            side = side_name(workers)
            rate = run_timed(job, f"{side.replace(' ', '-')}-{number}", workers)
            results.rates.setdefault(side, []).append(rate)
            print(f"round {number}  {side:<24}{rate:9.1f} samples/s", flush=True)
    if arguments.rounds and not arguments.no_memory:
        best = next(workers for workers in arguments.workers if side_name(workers) == results.best_peer())
        for side, count in (("clipdist", None), ("open_clip", best)):
            results.peak_bytes[side] = run_watched(job, f"{side}-memory", count)
            print(f"memory   {side:<24}{results.peak_bytes[side] / 1e6:9.0f} MB", flush=True)
    if arguments.loss_steps:
        results.losses = run_losses(job, arguments.loss_steps)
    return results


def side_name(workers: int | None) -> str:
    return "clipdist" if workers is None else f"open_clip {workers} workers"


def run_timed(job: Job, name: str, workers: int | None) -> float:
    """Samples/s over the steps after the warm-up. workers None: clipdist's run; else open_clip_train's."""
    total = job.warmup + job.steps
    log_every = min(job.config.train.log_every, job.steps)
    if workers is None:
        run_all(job, name, our_command(job, name, total, log_every))
        times = [(record["samples"], record["time"]) for record in our_records(job, name)]
    else:
        run_all(job, name, their_command(job, name, total, log_every, workers))
        times = [(int(samples), seconds) for samples, seconds in their_reports(job, name)[0]["times"]]
    steady = [(samples, seconds) for samples, seconds in times if samples >= job.warmup * job.batch]
    (first, began), (last, ended) = steady[0], steady[-1]
    return (last - first) / (ended - began)


def run_watched(job: Job, name: str, workers: int | None) -> int:
    """Peak bytes of a short run, the last step's checkpoint included.

    On a GPU, what rank 0's torch allocated there; on a CPU, the proportional set sizes of all processes, workers too.
    """
    with ProportionalSetSize() as watch:
        if workers is None:
            run_all(job, name, our_command(job, name, MEMORY_STEPS, 1), watch)
        else:
            run_all(job, name, their_command(job, name, MEMORY_STEPS, 1, workers), watch)
    if job.device == "cpu":
        return watch.peak_bytes
    if workers is None:
        return int(our_records(job, name)[-1]["memory_gb"] * 1e9)
    return int(their_reports(job, name)[0]["peak_bytes"])


def run_losses(job: Job, steps: int) -> dict[str, list[float]]:
    """The losses of both on the same batches, fp32, step by step; of all ranks together."""
    warmup = min(job.config.optim.warmup_steps, steps // 4)
    same = [
        f"train.steps={steps}",
        f"optim.warmup_steps={warmup}",
        "train.precision=fp32",
        "train.log_every=1",
        "train.micro_batch=0",  # open_clip's accumulation counts the temperature's gradient once per part
        "loss.group_positives=false",  # open_clip's loss knows no second positive
    ]
    ours, theirs = "clipdist-losses", "open_clip-losses"
    env = {"NVIDIA_TF32_OVERRIDE": "0"}  # open_clip_train switches TF32 on
    command = [sys.executable, "-m", "tools.bench.peers.trainer", "ours", *job.words, *same, f"run.name={ours}"]
    run_all(job, ours, command, env=env)
    config = load_config(job.words[1], [*job.words[2:], *same, f"run.name={theirs}"])
    recipe = job.folder / "batches.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    run_all(job, theirs, their_command(job, theirs, steps, steps, 0, config, recipe), env=env)
    by_rank = [record["losses"] for record in their_reports(job, theirs)]
    return {
        "clipdist": [record["loss"] for record in our_records(job, ours)],
        "open_clip": [statistics.fmean(losses) for losses in zip(*by_rank, strict=True)],
    }


def our_command(job: Job, name: str, steps: int, log_every: int) -> list[str]:
    settings = (f"train.steps={steps}", f"train.log_every={log_every}", f"run.name={name}")
    return [sys.executable, str(ROOT / "clipdist/train.py"), *job.words, *settings]


def their_command(
    job: Job,
    name: str,
    steps: int,
    log_every: int,
    workers: int,
    config: Config | None = None,
    batches: Path | None = None,
) -> list[str]:
    from tools.bench.peers.trainer import flags

    words = flags(
        config or job.config,
        job.start,
        job.shards,
        world=job.ranks,
        steps=steps,
        workers=workers,
        device=job.device,
        precision="fp32" if batches else job.precision,
        log_every=log_every,
        logs=job.folder / f"{name}-logs",
    )
    files = [their_report(job, name), job.start.model_json or "-", batches or "-"]
    return [sys.executable, "-m", "tools.bench.peers.trainer", "theirs", *map(str, files), *words]


def our_records(job: Job, name: str) -> list[dict[str, Any]]:
    lines = (job.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == "train"]


def their_report(job: Job, name: str) -> Path:
    return job.folder / f"{name}.json"


def their_reports(job: Job, name: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    from tools.bench.peers.trainer import rank_report

    paths = [rank_report(their_report(job, name), rank) for rank in range(job.ranks)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


class ProportionalSetSize:
    """Peak of the sum of PSS over processes and all below them: a page that k processes share counts 1/k in each."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProportionalSetSize:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            self.peak_bytes = max(self.peak_bytes, sum(map(tree_bytes, self.pids)))


def tree_bytes(pid: int) -> int:
    import psutil

    total = 0
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def run_all(
    job: Job, name: str, command: list[str], watch: ProportionalSetSize | None = None, env: dict[str, str] | None = None
) -> None:
    """Runs `command` on all ranks, with the environment that torchrun gives; what they print goes to a file.

    Raises:
        RunFailed: a rank failed; the others are ended.
    """
    log = job.folder / f"{name}.log"
    processes: list[subprocess.Popen] = []
    with open(log, "w", encoding="utf-8") as out:
        try:
            for rank_env in rank_environments(job, env or {}):
                processes.append(subprocess.Popen(command, env=rank_env, stdout=out, stderr=out))
            if watch:
                watch.pids = [process.pid for process in processes]
            while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
                time.sleep(0.05)
        finally:
            end(processes)
    if any(process.returncode for process in processes):
        tail = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-20:])
        raise RunFailed(f"{tail}error: a process of {name} failed: {shlex.join(command)}")


def rank_environments(job: Job, env: dict[str, str]) -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "OMP_NUM_THREADS": str(threads_per_rank(job.ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for work take the cores from those that decode, on both sides
        "DS_ACCELERATOR": job.device,
    }
    if job.device == "cpu":
        common["CUDA_VISIBLE_DEVICES"] = ""
    for rank in range(job.ranks):
        yield {**common, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def threads_per_rank(ranks: int) -> int:
    """For computing: the cores divided among the ranks, unless the caller's environment says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, len(os.sched_getaffinity(0)) // ranks)


def end(processes: list[subprocess.Popen]) -> None:
    """Sees to it that all have ended, with what they started."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):  # clipdist saves at the first, leaves at the second
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue


# What is told


def summary(results: Results) -> dict[str, float | int | None]:
    """The JSON line; None where nothing was measured."""
    timed = bool(results.rates)
    ours = results.rate("clipdist") if timed else None
    theirs = results.rate(results.best_peer()) if timed else None
    return {
        "ours": ours,
        "open_clip": theirs,
        "ratio": ours / theirs if ours and theirs else None,
        "loss_max_diff": results.loss_difference() if results.losses else None,
        "ours_peak_bytes": results.peak_bytes.get("clipdist"),
        "open_clip_peak_bytes": results.peak_bytes.get("open_clip"),
    }


def report(job: Job, results: Results, arguments: argparse.Namespace, catalog: Catalog) -> str:
    """Markdown: tables, then what they were measured with."""
    lines = ["# Training beside open_clip_train", ""]
    if results.rates:
        lines += rate_table(results, summary(results))
    if results.losses:
        lines += loss_lines(results)
    packages = ("clipdist", "torch", "open_clip_torch", "deepspeed", "webdataset")
    lines += [
        f"- command: `{shlex.join(['python', 'tools/bench/train.py', *sys.argv[1:]])}`",
        f"- commit: {commit()}",
        f"- hardware: {hardware(job.device, job.ranks * threads_per_rank(job.ranks))}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in packages)}; Python {platform.python_version()}",
        f"- training: {job.config.model.name}, {job.ranks} processes with {threads_per_rank(job.ranks)} threads each,"
        f" global batch {job.batch}, {job.precision}, ZeRO {job.config.engine.zero_stage} here,"
        " --local-loss --gather-with-grad there",
        f"- data: {len(catalog)} pictures in {len(job.shards)} shards",
    ]
    return "\n".join(lines)


def rate_table(results: Results, told: dict[str, float | int | None]) -> list[str]:
    best = results.best_peer()
    rows = [("", "samples/s, median", "rounds", "peak memory")]
    for side, rates in results.rates.items():
        peak = results.peak_bytes.get({"clipdist": "clipdist", best: "open_clip"}.get(side, ""))
        rounds = " ".join(f"{rate:.1f}" for rate in rates)
        rows.append((side, f"{results.rate(side):.1f}", rounds, f"{peak / 1e6:.0f} MB" if peak else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return [*lines, "", f"clipdist / {best}: {told['ratio']:.3f}", ""]


def loss_lines(results: Results) -> list[str]:
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
