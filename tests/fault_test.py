"""Kill runs and compare them with an uninterrupted one: sample order, losses, weights, memory and open files.

A killed process gets SIGKILL; the other ranks must end by themselves; then the same command resumes, until the run is
finished.
"""

from __future__ import annotations

import os

# Processes with threads cannot be forked safely: see rehearsal.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from rehearsal import Failed, Point, attempt, differences, expect, history, records, warm_up
from tqdm import tqdm

from clipdist.checkpoint.format import MANIFEST
from clipdist.datasets.shard_writer import Sample, sample_key, shard_name, write_shard
from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

EXAMPLE = """examples:
  python tests/fault_test.py --kills 40 --out docs/benchmarks/faults_cpu.md
  python tests/fault_test.py --kills 0 --steps 2000      the named points, other rank counts and stages, the soak

Exit code 0: every run ended as the undisturbed one. 1: one did not."""
RANDOM_STEPS = 150  # of a run that is killed at random moments
POINT_STEPS = 40
ELASTIC_STEPS = 40
KILLED = -signal.SIGKILL
POINTS = (
    Point("waiting for data", "clipdist.data.loader:Loader", "next", rank=1, call=4),
    Point("in the step, before the forward pass", "clipdist.engine.step:Engine", "_forward_whole", rank=0, call=4),
    Point("before the optimiser's step", "clipdist.checkpoint.saver:Saver", "wait_copied", rank=1, call=5),
    Point("after the optimiser's step", "clipdist.engine.zero:Zero", "clamp", rank=0, call=5),
    Point(
        "a rank's part written, not yet announced",
        "clipdist.checkpoint.writer",
        "_write_safetensors",
        rank=1,
        after=True,
    ),
    Point("all parts written, no manifest yet", "clipdist.checkpoint.writer", "write_manifest", rank=0),
    Point("manifest in place, older checkpoints still there", "clipdist.checkpoint.writer", "prune", rank=0),
    Point("in validation", "clipdist.evals.validation:Validation", "run", rank=1, call=1),
    Point("restoring a checkpoint", "clipdist.engine.zero:Zero", "restore", rank=0, call=1),
)


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    what: str
    setting: str
    found: str
    more: str
    good: bool


def main() -> int:
    args = parse_arguments()
    try:
        with workplace(args.keep) as folder:
            warm_up()
            findings = [
                *random_kills(folder, args.kills, random.Random(args.seed)),
                named_points(folder),
                elastic(folder),
                *soak(folder, args.steps),
            ]
    except Failed as failed:
        print(f"FAIL: {failed}", file=sys.stderr)
        if args.json:
            print(json.dumps({"good": False, "error": str(failed)}))
        return 1
    table = render(findings)
    print(table)
    if args.out:
        args.out.write_text(table)
    good = all(finding.good for finding in findings)
    print("PASS" if good else "FAIL: see above; --keep DIR keeps runs and logs")
    if args.json:
        print(json.dumps({"good": good, "findings": [asdict(finding) for finding in findings]}))
    return 0 if good else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="kills at random moments (40)")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="steps of the soak; 0: none (2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this empty folder and keep runs and logs")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    for name in ("kills", "steps", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: a folder, or in one that does not exist; name a file")
    if args.keep and args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        raise UserError(f"--keep {args.keep}: not an empty folder")
    return args


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """A folder with shards, for runs and logs."""
    folder = keep or Path(tempfile.mkdtemp(prefix="clipdist-faults-"))
    try:
        write_pictures(folder / "train", 300)
        write_pictures(folder / "val", 40)
        yield folder.resolve()
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


# The scenarios


def random_kills(folder: Path, kills: int, draw: random.Random) -> list[Finding]:
    """One rank, or all, at moments that are spread over start-up, steps and the writing of checkpoints: from when the
    ranks have met on. One that is lost before is its launcher's to notice."""
    if not kills:
        return []
    words = command(folder, steps=RANDOM_STEPS, stage=2, model="tiny_rn", save_every=3)
    whole, first_step_s = undisturbed(folder, "random-whole", words)
    ends: list[float] = []
    both, writing, runs = 0, 0, 0
    different = ""
    with tqdm(total=kills, unit="kill", desc="random moments", disable=None) as bar:
        while len(ends) < kills:
            runs += 1
            run = folder / f"random-{runs}"
            finished = False
            while not finished and len(ends) < kills:
                victims = [0, 1] if draw.random() < 0.5 else [draw.randrange(2)]
                during = KillLater(run, victims, draw.uniform(0, first_step_s + 2.5))
                ended = attempt([*words, f"run.name={run.name}"], 2, log_of(run), during=during)
                finished = ended.codes == [0, 0]
                if not finished:
                    if [ended.codes[rank] for rank in victims] != [KILLED] * len(victims):
                        raise Failed(f"{run.name}: exit codes {ended.codes}\n{ended.log[-3000:]}")
                    ends.append(ended.others_s)
                    both += len(victims) == 2
                    writing += half_written(run)
                    bar.update()
            if not finished:
                expect(attempt([*words, f"run.name={run.name}"], 2, log_of(run)), [0, 0], run.name)
            different = different or differences(run, whole)
    setting = f"2 ranks, ZeRO 2, fp32, BatchNorm, {RANDOM_STEPS} steps, a checkpoint every 3"
    what = f"{kills} kills at random moments: of both ranks {both}, of one {kills - both}; {runs} runs"
    more = f"{writing} left a half-written checkpoint; {others(ends)}"
    return [Finding(what, setting, verdict(different), more, not different)]


def named_points(folder: Path) -> Finding:
    """One run, killed at every point in turn."""
    words = command(folder, steps=POINT_STEPS, stage=2, model="tiny_rn", save_every=2, eval_every=3)
    whole, _ = undisturbed(folder, "points-whole", words)
    run = folder / "points"
    ends: list[float] = []
    for point in tqdm(POINTS, unit="kill", desc="named points", disable=None):
        ended = attempt([*words, "run.name=points"], 2, log_of(run), prepare=point.lay)
        if ended.codes[point.rank] != KILLED:
            raise Failed(f"{point.name}: not reached; exit codes {ended.codes}\n{ended.log[-3000:]}")
        ends.append(ended.others_s)
    expect(attempt([*words, "run.name=points"], 2, log_of(run)), [0, 0], run.name)
    different = differences(run, whole)
    what = f"{len(POINTS)} kills of one rank: " + "; ".join(point.name for point in POINTS)
    setting = f"2 ranks, ZeRO 2, fp32, BatchNorm, {POINT_STEPS} steps, a checkpoint every 2"
    more = others(ends)
    return Finding(what, setting, verdict(different), more, not different)


def elastic(folder: Path) -> Finding:
    """The number of ranks, the ZeRO stage and the micro-batch change at every restart."""
    settings = [(2, 1, 0), (1, 2, 4), (2, 3, 0), (4, 1, 2)]  # ranks, stage, micro-batch
    words = command(folder, steps=ELASTIC_STEPS, stage=1, model="tiny_vit", save_every=2)
    whole, _ = undisturbed(folder, "elastic-whole", words)
    run = folder / "elastic"
    stop = Point("after some steps", "clipdist.engine.zero:Zero", "clamp", rank=0, call=10)
    for number, (world, stage, micro) in enumerate(tqdm(settings, unit="start", desc="elastic", disable=None)):
        here = [*words, "run.name=elastic", f"engine.zero_stage={stage}", f"train.micro_batch={micro}"]
        stops = number < len(settings) - 1
        ended = attempt(here, world, log_of(run), prepare=stop.lay if stops else None)
        if ended.codes[0] != (KILLED if stops else 0):
            raise Failed(f"{world} ranks, stage {stage}: exit codes {ended.codes}\n{ended.log[-3000:]}")
    ours, theirs = history(run), history(whole)
    same_order = {step: order for step, (order, _) in ours.items()} == {step: o for step, (o, _) in theirs.items()}
    worst = max(abs(ours[step][1] / theirs[step][1] - 1) for step in theirs) if same_order else float("inf")
    what = "restarts with " + ", then ".join(f"{world} ranks at stage {stage}" for world, stage, _ in settings)
    setting = f"fp32, no BatchNorm, {ELASTIC_STEPS} steps; micro-batches of 4 and 2 at the second and the last"
    found = f"sample order {'equal' if same_order else 'DIFFERS'}; losses within {worst:.1e}, relatively"
    return Finding(what, setting, found, "required: 1e-5", worst <= 1e-5)


def soak(folder: Path, steps: int) -> list[Finding]:
    """A long run: memory and open files after warm-up."""
    if not steps:
        return []
    words = command(folder, steps=steps, stage=2, model="tiny_vit", save_every=20, eval_every=500)
    seen: list[tuple[list[int], list[int]]] = []

    def look(pids: list[int], seconds: float) -> None:
        if seconds > len(seen) / 2:
            seen.append(([resident_bytes(pid) for pid in pids], [open_files(pid) for pid in pids]))

    run = folder / "soak"
    expect(attempt([*words, "run.name=soak"], 2, log_of(run), during=look, limit_s=1200), [0, 0], "soak")
    third = len(seen) // 3
    second, last = seen[third : 2 * third], seen[2 * third : -4]  # while a rank ends it closes files
    grown = max(median(s[0][rank] for s in last) / median(s[0][rank] for s in second) - 1 for rank in range(2))
    files = max(max(s[1][rank] for s in last) - max(s[1][rank] for s in second) for rank in range(2))
    setting = "2 ranks, ZeRO 2, a checkpoint every 20 steps, a validation every 500"
    found = f"last third beside the second: resident memory {100 * grown:+.2f} %, open files {files:+d}"
    more = f"{max(last[-1][0]) / 1e6:.0f} MB and {max(last[-1][1])} files a rank; required: below +2 % and +0"
    return [Finding(f"{steps} steps without an accident", setting, found, more, grown < 0.02 and files <= 0)]


# Runs


def command(folder: Path, steps: int, stage: int, model: str, save_every: int, eval_every: int = 10**6) -> list[str]:
    given = {
        "run.root": folder,
        "data.train": folder / "train",
        "data.val": folder / "val",
        "model.name": f"configs/models/{model}.json",
        "engine.zero_stage": stage,
        "train.steps": steps,
        "train.save_every": save_every,
        "eval.every": eval_every,
    }
    return ["--config", "configs/tiny.yaml", *(f"{key}={value}" for key, value in given.items())]


def undisturbed(folder: Path, name: str, words: list[str]) -> tuple[Path, float]:
    """The run without an accident, and the seconds from its start to its first step."""
    began = time.time()
    expect(attempt([*words, f"run.name={name}"], 2, log_of(folder / name)), [0, 0], name)
    first = next(record for record in records(folder / name) if record["type"] == "train")
    return folder / name, first["time"] - began


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


class KillLater:
    """To be called while a run goes on: kills some ranks once the ranks have met, and so many seconds have gone by."""

    def __init__(self, run: Path, victims: list[int], after_s: float) -> None:
        self._lock, self._victims, self._after_s = run / ".lock", victims, after_s
        self._before = self._touched()

    def __call__(self, pids: list[int], seconds: float) -> None:
        met = self._touched()  # rank 0 takes the run folder's lock as soon as all ranks are there
        if met > self._before and time.time() - met > self._after_s:
            for rank in self._victims:
                os.kill(pids[rank], signal.SIGKILL)

    def _touched(self) -> float:
        return self._lock.stat().st_mtime if self._lock.exists() else 0.0


def half_written(run: Path) -> bool:
    return any(not (folder / MANIFEST).exists() for folder in run.glob("checkpoints/step-*"))


def others(ends: list[float]) -> str:
    return f"the others ended after {median(ends):.1f} s, at most {max(ends):.1f} s"


def verdict(different: str) -> str:
    return (
        f"DIFFERENT: {different}" if different else "sample order, losses, weights, moments, buffers: equal to the bit"
    )


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def write_pictures(folder: Path, count: int) -> None:
    """A shard of noise with captions."""
    draw = np.random.default_rng(count)
    samples = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        caption = f"picture {number} of {draw.integers(100)}"
        samples.append(Sample(sample_key(0, number), {"png": file.getvalue(), "txt": caption.encode()}))
    folder.mkdir(parents=True)
    write_shard(folder / shard_name(0), samples)


def render(findings: list[Finding]) -> str:
    lines = [
        "# Runs that are killed, beside undisturbed ones",
        "",
        "    " + " ".join(["python", "tests/fault_test.py", *sys.argv[1:]]),
        f"    commit {commit()}; {hardware('cpu', 1)}",
        "",
        "| what | setting | found | |",
        "|---|---|---|---|",
        *(f"| {f.what} | {f.setting} | {f.found} | {f.more} |" for f in findings),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
