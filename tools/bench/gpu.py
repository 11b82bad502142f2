"""Measure everything that needs a GPU, on one GPU, without a network, within some minutes: the most valuable first.

Correctness (the tests marked gpu), the losses beside open_clip's and memeff's, training beside open_clip_train, the
data engine, and Flickr8k where it is given. Each part is a process with a time limit; one that fails or is cut is a
line of the summary, and the next one begins. Its table is written when it ends, the summary after every part.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from typing import Any

from clipdist.errors import UserError, run_main, writing
from clipdist.monitor.provenance import commit
from tools.bench import harness
from tools.bench.processes import repository_environment, threads_per_rank

LEAST_S = 3.0  # that a part gets, or it does not begin
RESERVE_S = 25.0  # of a part's time, to save and to tell where it stops by itself
GRACE_S = 5.0  # for a part to end after SIGTERM
PATIENCE_S = 0.1
BATCHES = {"ViT-B-16": 512, "ViT-L-14": 256}  # fit 80 GB in bf16
MOST_WORKERS = 12  # open_clip_train's
EXAMPLES = """  sh tools/bench/gpu.sh 12 --out runs/gpu
  sh tools/bench/gpu.sh 9 --out runs/gpu --parts tests losses_8k losses_32k losses_128k train_vitb16
  sh tools/bench/gpu.sh 5 --out runs/gpu --parts flickr8k --flickr8k Flickr8k_Dataset.zip Flickr8k_text.zip
  sh tools/bench/gpu.sh --rehearse                 # all parts at tiny sizes on a CPU: are the commands right?

A part may take up to twice its share of the minutes that are left: what one does not need, the later ones get."""


@dataclass(frozen=True)
class Part:
    """A step of the day: commands one after the other, of which the last makes the table.

    Attributes:
        name: the theme, which its files begin with.
        weight: its share of the time, in the unit of the others' (about the seconds that it takes on an H100).
        commands: words of Python's command line; "OUT" stands for the path of the table, "TMP" for a scratch folder,
            "MINUTES" for what the part may take.
        missing: why it cannot run; "": it can.
    """

    name: str
    weight: float
    commands: list[list[str]]
    missing: str = ""


@dataclass
class Outcome:
    """How a part ended.

    Attributes:
        line: "done", or what went wrong.
        table: its file or folder, where it was written.
        record: what it answered as JSON.
    """

    part: Part
    line: str
    limit_s: float = 0.0
    took_s: float = 0.0
    table: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("minutes", nargs="?", type=float, default=12.0, metavar="MINUTES", help="for all parts (12)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these; a name that is none lists them")
    parser.add_argument("--flickr8k", nargs="+", metavar="PATH", help="shards (train/, val/) or the downloaded files")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    args = parser.parse(out="FOLDER", out_text="for tables, logs and the summary (runs/gpu)")
    if not 0.1 <= args.minutes <= 1440:
        parser.error(f"MINUTES {args.minutes:g}: must lie in 0.1 .. 1440")
    args.out = (args.out or harness.ROOT / "runs/gpu").resolve()
    for path in args.flickr8k or []:
        if not Path(path).exists():
            parser.error(f"--flickr8k {path}: does not exist")
    return args


def main() -> int:
    args = parse_args()
    device = "cpu" if args.rehearse else "cuda"
    stem = f"{require_gpu() if device == 'cuda' else 'cpu'}_{date.today().isoformat()}"
    parts = chosen(rehearsal_parts(args) if args.rehearse else gpu_parts(args), args.parts)
    with writing(f"--out {args.out}"):
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part in progress, too
    head = ["# A day on one GPU" if device == "cuda" else "# A rehearsal on a CPU", ""]
    head += harness.provenance(device, threads_per_rank(1), "triton", "transformers", "deepspeed", "numpy")
    summary = args.out / f"summary_{stem}_{time.strftime('%H%M%S')}.md"  # a later call adds another one
    outcomes: list[Outcome] = []
    ends = time.monotonic() + 60 * args.minutes
    for number, part in enumerate(parts):
        left_s = ends - time.monotonic()
        share = part.weight / max(1.0, sum(later.weight for later in parts[number:]))
        limit_s = left_s * min(1.0, 2 * share)  # what is measured first is worth more than what comes last
        outcomes.append(run_part(part, limit_s, args.out, stem))
        harness.write_lines(summary, [*head, "", *summary_table(outcomes, args.out)])
    print("\n".join([*head, "", *summary_table(outcomes, args.out)]))
    if args.json:
        print(json.dumps({outcome.part.name: {"line": outcome.line, **outcome.record} for outcome in outcomes}))
    return 1 if any(outcome.line.startswith("FAILED") for outcome in outcomes) else 0


def require_gpu() -> str:
    """Return the device's name in the form that files have: "h200", "a100-sxm4-80gb".

    Raises:
        UserError: torch sees no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device: run it where one is, or add --rehearse, which needs none")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia")).strip("-")


def chosen(parts: list[Part], names: Sequence[str] | None) -> list[Part]:
    for name in names or []:
        if name not in (part.name for part in parts):
            raise UserError(f"--parts {name}: choose among {' '.join(part.name for part in parts)}")
    return [part for part in parts if not names or part.name in names]


# The parts


def gpu_parts(args: argparse.Namespace) -> list[Part]:
    def losses(name: str, n: int, weight: float, *words: str) -> Part:
        sizes = ["--n", str(n), "--d", "512", "--dtype", "bf16", "--device", "cuda"]
        return bench(name, weight, "loss", *sizes, *words)

    def training(name: str, model: str, weight: float, *words: str) -> Part:
        workers = min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) - 2))
        flags = ["--config", "configs/flickr8k_rn50.yaml", "--ranks", "1", "--rounds", "1", "--workers", str(workers)]
        flags += ["--steps", "30", "--loss-steps", "0", *words, "device=cuda", f"model.name={model}"]
        return bench(name, weight, "train", *flags, "train.precision=bf16", f"train.global_batch={BATCHES[model]}")

    peers = ["memeff"] if importlib.util.find_spec("memeff") else []
    return [
        gpu_tests(120),
        losses("losses_8k", 1 << 13, 50, "--op", "infonce", "--repeats", "5"),
        losses("losses_32k", 1 << 15, 50, "--repeats", "3"),
        losses("losses_128k", 1 << 17, 60, "--op", "infonce", "--repeats", "1"),
        training("train_vitb16", "ViT-B-16", 80),
        training("train_vitl14", "ViT-L-14", 100),
        training("train_vitb16_compiled", "ViT-B-16", 110, "--compile"),
        loading(90, 512, "--output", "224", "--batch", "256", "--seconds", "3"),
        flickr8k_part(args, 120, "--minutes", "MINUTES", "device=cuda"),
        training("train_vitl14_compiled", "ViT-L-14", 130, "--compile"),
        losses("losses_1m", 1 << 20, 120, "--op", "infonce", "--impl", "kernel", *peers, "--repeats", "1"),
    ]


def rehearsal_parts(args: argparse.Namespace) -> list[Part]:
    few = ["--rounds", "1", "--steps", "2", "--warmup", "1", "--workers", "1", "--loss-steps", "8", "--no-memory"]
    tiny = ["--config", "configs/tiny.yaml"]
    return [
        gpu_tests(1),
        bench("losses", 1, "loss", "--n", "64", "--d", "32", "--device", "cpu", "--op", "infonce", "--repeats", "1"),
        bench("train", 1, "train", *tiny, "--ranks", "1", *few),
        loading(1, 128, "--output", "32", "--batch", "16", "--seconds", "0.1", "--threads", "1"),
        flickr8k_part(args, 1, *tiny, "train.epochs=1"),
    ]


def gpu_tests(weight: float) -> Part:
    """Return the tests marked gpu; files without one are not even collected."""
    files = [path for path in sorted((harness.ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    names = [str(path.relative_to(harness.ROOT)) for path in files]
    missing = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    return Part("tests", weight, [["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *names]], missing)


def bench(name: str, weight: float, tool: str, *words: str) -> Part:
    return Part(name, weight, [[f"tools/bench/{tool}.py", *words, "--out", "OUT", "--json"]])


def loading(weight: float, images: int, *words: str) -> Part:
    """Return the data engine on images that are drawn, for a short time; nothing is installed for it."""
    draw = ["--make-640x480", "TMP/photographs", "--pictures", str(images)]
    short = ["--rounds", "1", "--starts", "1", "--peer-webdataset", version("webdataset")]
    part = bench("data", weight, "data", "TMP/photographs", *short, *words)
    return replace(part, commands=[["tools/bench/data.py", *draw], *part.commands])


def flickr8k_part(args: argparse.Namespace, weight: float, *words: str) -> Part:
    if not args.flickr8k:
        return Part("flickr8k", 0, [], "--flickr8k names no data")
    return bench("flickr8k", weight, "flickr8k", *map(os.path.abspath, args.flickr8k), *words)


# Running them


def run_part(part: Part, limit_s: float, out: Path, stem: str) -> Outcome:
    """Run the commands of a part within the limit, and say how it went on stderr."""
    outcome = Outcome(part, "done", limit_s)
    log = out / f"logs/{part.name}_{stem}.log"
    table = out / (f"{part.name}_{stem}" if part.name.startswith("losses") else f"{part.name}_{stem}.md")
    if part.missing:
        outcome.line = f"not run: {part.missing}"
    elif limit_s < LEAST_S:
        outcome.line = "not run: no time is left"
    else:
        harness.say(f"{part.name}: up to {limit_s:.0f} s; {log}")
        began, before = time.monotonic(), written_at(table)
        with harness.workspace() as scratch:
            places = {"OUT": str(table), "TMP": str(scratch), "MINUTES": f"{max(1.0, limit_s - RESERVE_S) / 60:.2f}"}
            outcome.line = run_commands(part, began + limit_s, log, places)
        outcome.took_s = time.monotonic() - began
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if part.name == "tests":
            harness.write_lines(table, test_report(part, said, stem))
            outcome.line += f": {said[-1].strip('= ')}" if outcome.line == "done" and said else ""
        elif said and said[-1].startswith("{"):
            outcome.record = json.loads(said[-1])
        if outcome.line.startswith("FAILED") and outcome.record.get("notes"):  # a loss of ours; its table has the rest
            outcome.line = f"FAILED: {'; '.join(outcome.record['notes'])}"
        outcome.table = table if written_at(table) != before else None
    harness.say(f"{part.name}: {outcome.line} ({outcome.took_s:.0f} s)")
    return outcome


def written_at(table: Path) -> int:
    """Return when a table was written, ns; 0 where there is none. Of the losses it is a file in a folder."""
    file = table / "table.md" if table.is_dir() else table
    return file.stat().st_mtime_ns if file.exists() else 0


def run_commands(part: Part, deadline: float, log: Path, places: dict[str, str]) -> str:
    """Return "done", or why the part ended before: "cut after 30 s", "FAILED (exit code 1): its last line"."""
    # A look for the network would take its time.
    environment = repository_environment() | {"TMPDIR": places["TMP"], "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as written:
        for command in part.commands:
            words = [re.sub(r"^(OUT|TMP|MINUTES)(?=$|/)", lambda place: places[place[1]], word) for word in command]
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=harness.ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,  # all that it starts can be ended together
            )
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"cut after {time.monotonic() - began:.0f} s"
            finally:
                end_group(process)
            if code:
                return f"FAILED (exit code {code}): {last_words(log)}"
    return "done"


def end_group(process: subprocess.Popen) -> None:
    """End a process and everything that it started and left behind: nothing may hold the GPU's memory."""
    for number, limit_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        until = time.monotonic() + limit_s
        while time.monotonic() < until and group_lives(process):
            time.sleep(PATIENCE_S)


def group_lives(process: subprocess.Popen) -> bool:
    process.poll()  # a child that has ended is in its group until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def last_words(log: Path) -> str:
    """Return the last line that a program wrote about its end."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["it said nothing"])[-1][:300]


# What is written


def test_report(part: Part, said: list[str], stem: str) -> list[str]:
    """Return Markdown: the command and the end of pytest's output, which names what failed."""
    command = " ".join(["python", *part.commands[0]])
    head = [f"# Tests marked gpu, {stem.replace('_', ', ')}", "", f"- command: `{command}`", f"- commit: {commit()}"]
    return [*head, "", "```", *said[-60:], "```"]


def summary_table(outcomes: list[Outcome], out: Path) -> list[str]:
    rows = [
        [
            outcome.part.name,
            outcome.line.replace("|", "/"),
            str(outcome.table.relative_to(out)) if outcome.table else "-",
            f"{outcome.took_s:.0f}",
            f"{outcome.limit_s:.0f}",
        ]
        for outcome in outcomes
    ]
    return harness.markdown_table(["part", "how it went", "table", "seconds", "limit"], rows, left=3)


if __name__ == "__main__":
    run_main(main)
