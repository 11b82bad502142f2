"""Show how runs stand: state, step, rate, time left, restarts, last error, logs.

Reads files and asks Slurm where there is one, so it works on any machine that sees the run folder. Imports no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import glob
import json
import platform
import re
import shutil
import subprocess
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from clipdist.checkpoint.format import newest_checkpoint, run_folder, step_of
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.storage import json_lines, lock

EXAMPLES = """examples:
  python launch/status.py runs/*
  python launch/status.py runs/flickr8k_rn50 --follow
"""
RECENT = 20  # logged steps that the rate is taken from
FRESH_S = 120  # a run that wrote within so long is taken to be running, where no lock tells
NO_WORDS = "no process works on it any more, and none said why: killed from outside, out of memory, or a crash"
LOG_BYTES = 64_000  # of a log's end that is looked through
FOLLOW_S = 5.0  # between two looks
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. None: not known."""

    run: str
    state: str  # queued, running, finished, interrupted, failed, unknown
    job: str | None = None
    slurm: str | None = None  # Slurm's own word, with its reason
    step: int | None = None
    steps: int | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    restarts: int = 0  # starts of the training that went on from a checkpoint
    faults: int = 0  # of the restarts, those that Slurm jobs made after a fault
    rollbacks: int = 0
    skips: int = 0
    error: str | None = None
    written_s: float | None = None  # since the last record
    snapshot: str | None = None
    logs: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Shows how runs stand.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, patterns allowed")
    parser.add_argument("--follow", action="store_true", help="show again as things change, until no run goes on")
    parser.add_argument("--json", action="store_true", help="end in one JSON object on the last line")
    args = parser.parse_args(argv)
    folders = find_runs(args.runs)
    shown: list[str] | None = None
    while True:
        statuses = [status(folder) for folder in folders]
        lines = [line for each in statuses for line in describe(each)]
        if lines != shown:
            print("\n".join(lines), flush=True)
        shown = lines
        if not args.follow or not any(each.state in ("queued", "running") for each in statuses):
            break
        time.sleep(FOLLOW_S)
    if args.json:
        print(json.dumps({"runs": [asdict(each) for each in statuses]}))
    return 0


def find_runs(words: list[str]) -> list[Path]:
    """Return folders in the order given; of a pattern, those that are run folders.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    for word in words:
        if Path(word).is_dir():
            found.append(run_folder(Path(word)))
            continue
        matches = [Path(name) for name in sorted(glob.glob(word))]
        runs = [path for path in matches if any((path / mark).exists() for mark in ("jobs.jsonl", "metrics.jsonl"))]
        if not runs:
            raise UserError(f"{word}: no run folder; they lie below run.root, such as runs/flickr8k_rn50")
        found += runs
    return list(dict.fromkeys(found))


def status(folder: Path) -> RunStatus:
    """Combine what the run folder, Slurm and the newest job's logs say."""
    run = RunFiles(folder)
    slurm = ask_slurm(str(run.job["job"])) if run.job.get("job") else None
    step, steps = run.progress()
    rate = run.steps_per_s()
    state = judge(run, slurm, step is not None and step == steps)
    return RunStatus(
        run=str(folder),
        state=state,
        job=run.job.get("job"),
        slurm=slurm,
        step=step,
        steps=steps,
        samples_per_s=run.train[-1].get("samples_per_s") if run.train else None,
        eta_s=(steps - step) / rate if rate and steps and step is not None and state == "running" else None,
        restarts=run.kinds.count("restart"),
        faults=len(run.note("faults").splitlines()),
        rollbacks=run.kinds.count("rollback"),
        skips=run.kinds.count("skip"),
        error=run.last_error(state) if state in ("failed", "unknown", "queued") else None,
        written_s=time.time() - run.written if run.written else None,
        snapshot=run.job.get("snapshot"),
        logs=[str(log) for log in run.logs],
    )


def judge(run: RunFiles, slurm: str | None, all_steps_done: bool) -> str:
    """Return the state, by the surest source first: Slurm on queued and running jobs, locks, how the run ended."""
    word = (slurm or "").split(" ")[0]
    if word in QUEUED:
        return "queued"
    held = run.is_held()
    if word in ACTIVE or held:
        return "running"
    fault = run.kinds[-1:] == ["fault"]
    if not fault and (all_steps_done or re.search(r"^finished \d+ steps", run.log, re.M)):
        return "finished"
    given_up = re.search(r"^fault \(", run.log, re.M)  # the last line of launch/after.sh
    if run.kinds[-1:] == ["interrupted"] and not given_up:
        return "interrupted"
    if given_up or fault or re.search(r"^(error\b|Traceback)", run.log, re.M) or word in FAILED:
        # To Slurm every exit code but 0 is a failure; the ranks' own note tells an interruption.
        return "interrupted" if run.note("code").strip() == str(EXIT_INTERRUPTED) else "failed"
    if word in ("CANCELLED", "TIMEOUT", "PREEMPTED"):
        return "interrupted"
    if held is False:
        return "failed"
    return "running" if run.written and time.time() - run.written < FRESH_S else "unknown"


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds a lock on a file; None where there is no such file, or the system has no locks."""
    try:
        with open(path) as file:
            lock(file, shared=True, wait_s=0)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def ask_slurm(job: str) -> str | None:
    """Return the job's state, with Slurm's reason where it waits; None where Slurm does not know the job."""
    questions = (
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %r"],
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State"],
    )
    for words in questions:
        if shutil.which(words[0]) is None:
            continue
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run(words, capture_output=True, text=True, timeout=30)
            lines = [line.strip() for line in said.stdout.splitlines() if line.strip()]
            if said.returncode == 0 and lines:
                return lines[-1].removesuffix(" None")
    return None


class RunFiles:
    """What a run folder and the logs of its newest job hold.

    Attributes:
        job: the newest line of jobs.jsonl; empty without one.
        train, events: of metrics.jsonl, the last logged steps and all events.  kinds: of the events.
        logs: of the newest job, rank 0 first.  log: the end of the first, as far as it is of the job's newest start.
        written, step: time and step of the last record; None without one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = deque([{}, *json_lines(folder / "jobs.jsonl")], maxlen=1)[0]
        self.train: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.events: list[dict[str, Any]] = []
        self.step: int | None = None
        for record in json_lines(folder / "metrics.jsonl"):
            if record.get("type") == "train":
                self.train.append(record)
            elif record.get("type") == "event":
                self.events.append(record)
            self.step = record.get("step", self.step)
        self.kinds = [event.get("event") for event in self.events]
        times = [record["time"] for record in (*self.train, *self.events) if "time" in record]
        self.written = max(times, default=None)
        self.logs = find_logs(Path(self.job.get("log", folder / "submitit")))
        # launch/after.sh ends the log of every start before the newest
        starts = r"^.*: job \S+ (?:is queued again|starts again, .*)$"
        self.log = re.split(starts, tail(self.logs[0]), flags=re.M)[-1] if self.logs else ""

    def is_held(self) -> bool | None:
        """Return whether a process works on the run; None where that is not known.

        A trainer locks .lock, submit.py --cluster local jobs.jsonl. Only on the trainer's machine is no lock sure to
        mean no process: some network file systems keep locks to one machine.
        """
        trainer, launcher = (is_locked(self.folder / name) for name in (".lock", "jobs.jsonl"))
        if trainer or launcher:
            return True
        with suppress(ValueError, AttributeError):
            host = json.loads(read(self.folder / "environment.json")).get("host")
            return False if trainer is False and host == platform.node() else None
        return None

    def progress(self) -> tuple[int | None, int | None]:
        """Return (steps done, steps in all).

        Steps done from the metrics and the checkpoints, else from the log's "step 12/400"; all from the events, the
        log, or the configuration.
        """
        said = re.findall(r"^step (\d+)/(\d+)", self.log, re.M)
        step = self.step
        with suppress(UserError):
            newest = newest_checkpoint(self.folder)
            step = max(step or 0, step_of(newest) or 0) if newest else step
        if step is None and said:
            step = int(said[-1][0])
        named = [event["steps"] for event in self.events if "steps" in event]
        if named or said:
            return step, int(named[-1] if named else said[-1][1])
        found = re.search(r"^train:\n(?:  .*\n)*?  steps: (\d+)$", read(self.folder / "config.yaml"), re.M)
        return step, int(found[1]) or None if found else None

    def steps_per_s(self) -> float | None:
        """Return the rate of the last logged steps, validations included; None across a restart."""
        rows = [(record["step"], record["time"]) for record in self.train if "step" in record and "time" in record]
        if len(rows) < 2:
            return None
        (first, began), (step, now) = rows[0], rows[-1]
        return (step - first) / (now - began) if step > first and now > began else None

    def note(self, name: str) -> str:
        """Return what a Slurm job left beside its logs: "code", "faults"; empty where there is none."""
        return read(self.logs[0].parent / f"{self.job['job']}.{name}") if self.logs and self.job.get("job") else ""

    def last_error(self, state: str) -> str | None:
        """Return the recorded fault; else the last line of any rank's log that begins with "error", or the end of a
        traceback."""
        if self.kinds[-1:] == ["fault"]:
            return self.events[-1].get("error")
        for pattern in (r"^(error\b.*)$", r"^Traceback .*(?:\n\s.*)*\n(\S.*)$", r"^(fault \(.*)$"):
            for log in self.logs:
                found = re.findall(pattern, tail(log), re.M)
                if found:
                    return found[-1]
        return NO_WORDS if state == "failed" else None


def find_logs(log: Path) -> list[Path]:
    """Return all logs of a job.

    Args:
        log: that of rank 0, or the folder of jobs on this machine, of which the newest counts.
    """
    if log.is_dir():
        log = max(log.glob("*_0_log.out"), key=lambda path: path.stat().st_mtime, default=log)
    if not log.is_file():
        return []
    others = sorted(log.parent.glob(f"{log.name.removesuffix('0_log.out')}*_log.*"))
    return [log, *(path for path in others if path != log)]


def read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def tail(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return re.sub(r"^\[rank\d+\]: ", "", file.read().decode(errors="replace"), flags=re.M)  # of torch's tracebacks
    return ""


def describe(each: RunStatus) -> list[str]:
    """Return a few lines for people."""
    done = "no step yet" if each.step is None else f"step {each.step}{f'/{each.steps}' if each.steps else ''}"
    parts = [each.state, done]
    if each.samples_per_s:
        parts.append(f"{each.samples_per_s:.4g} samples/s")
    if each.eta_s is not None:
        parts.append(f"{clock(each.eta_s)} to go")
    counted = {"restarts": each.restarts, "after faults": each.faults, "rollbacks": each.rollbacks, "skips": each.skips}
    parts += [f"{name} {count}" for name, count in counted.items() if count]
    lines = [f"{each.run}: {'  '.join(parts)}"]
    if each.job:
        lines.append(f"  job   {each.job}{f' ({each.slurm})' if each.slurm else ''}")
    if each.error:
        lines.append(f"  error {each.error}")
    if each.logs:
        more = f" and {len(each.logs) - 1} more beside it" if len(each.logs) > 1 else ""
        lines.append(f"  log   {each.logs[0]}{more}")
    return lines


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    run_main(main)
