"""In: run folders. Out: how each stands: state, step, rate, time left, restarts, last error, logs.

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
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.storage import lock

EXAMPLES = """examples:
  python launch/status.py runs/*
  python launch/status.py runs/flickr8k_rn50 --follow
"""
RECENT = 20  # logged steps that the rate is taken from
FRESH_S = 120  # a run that wrote within so long is taken to be running, where nothing else says so
LOG_BYTES = 64_000  # of a log's end that is looked through
FOLLOW_S = 5.0  # between two looks
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class Status:
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
    """Folders, in the order given; of a pattern those that are run folders.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    for word in words:
        if Path(word).is_dir():
            found.append(Path(word))
            continue
        matches = [Path(name) for name in sorted(glob.glob(word))]
        runs = [path for path in matches if any((path / mark).exists() for mark in ("jobs.jsonl", "metrics.jsonl"))]
        if not runs:
            raise UserError(f"{word}: no run folder; they lie below run.root, such as runs/flickr8k_rn50")
        found += runs
    return list(dict.fromkeys(found))


def status(folder: Path) -> Status:
    """What the run folder, Slurm and the last job's log say together."""
    job: dict[str, Any] = {}
    for line in records(folder / "jobs.jsonl"):
        job = line
    train, events = metrics(folder / "metrics.jsonl")
    logs = find_logs(folder, job)
    end = this_start(tail(logs[0])) if logs else ""
    slurm = ask_slurm(str(job["job"])) if job.get("job") else None
    last = train[-1] if train else {}
    step, steps = progress(folder, last, events, end)
    rate = steps_per_s(train)
    written = max([record["time"] for record in [*train, *events] if "time" in record], default=None)
    state = judge(folder, slurm, step, steps, events, end, written)
    if state == "failed" and exit_note(logs, job) == EXIT_INTERRUPTED:
        state = "interrupted"  # to Slurm every exit code but 0 is a failure
    kinds = [event.get("event") for event in events]
    return Status(
        run=str(folder),
        state=state,
        job=job.get("job"),
        slurm=slurm,
        step=step,
        steps=steps,
        samples_per_s=last.get("samples_per_s"),
        eta_s=(steps - step) / rate if rate and steps and step is not None and state == "running" else None,
        restarts=kinds.count("restart"),
        faults=count_faults(logs[0], job) if logs and job.get("job") else 0,
        rollbacks=kinds.count("rollback"),
        skips=kinds.count("skip"),
        error=last_error(logs) if state in ("failed", "unknown", "queued") else None,
        written_s=time.time() - written if written else None,
        snapshot=job.get("snapshot"),
        logs=[str(log) for log in logs],
    )


def judge(
    folder: Path,
    slurm: str | None,
    step: int | None,
    steps: int | None,
    events: list[dict[str, Any]],
    end: str,
    written: float | None,
) -> str:
    """The state, from the surest witness down: Slurm on what is queued or runs, the folder on how a run ended."""
    word = (slurm or "").split(" ")[0]
    if word in QUEUED:
        return "queued"
    if word in ACTIVE or is_locked(folder):
        return "running"
    done = "finished" in (event.get("event") for event in events) or re.search(r"^finished \d+ steps", end, re.M)
    if done or (step is not None and step == steps):
        return "finished"
    given_up = re.search(r"^fault \(", end, re.M)  # the last word of launch/after.sh
    if events and events[-1].get("event") == "interrupted" and not given_up:
        return "interrupted"
    if given_up or re.search(r"^(error\b|Traceback)", end, re.M) or word in ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY"):
        return "failed"
    if word in ("CANCELLED", "TIMEOUT", "PREEMPTED"):
        return "interrupted"
    if written and time.time() - written < FRESH_S:
        return "running"
    return "unknown"


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run folder. Seen from other machines where the file system has locks."""
    try:
        with open(folder / ".lock") as file:
            lock(file, shared=True, wait_s=0)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def ask_slurm(job: str) -> str | None:
    """The job's state, with Slurm's reason where it waits; None where Slurm does not answer or knows no such job."""
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


# Files


def metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the last logged steps, all events)."""
    train: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for record in records(path):
        if record.get("type") == "train":
            train = [*train[1 - RECENT :], record]
        elif record.get("type") == "event":
            events.append(record)
    return train, events


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects; the last may be half-written."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def progress(
    folder: Path, last: dict[str, Any], events: list[dict[str, Any]], end: str
) -> tuple[int | None, int | None]:
    """(steps done, steps in all). The log's "step 12/400" says both; an event or the configuration says the second."""
    said = re.findall(r"^step (\d+)/(\d+)", end, re.M)
    step = last.get("step", int(said[-1][0]) if said else None)
    named = [event["steps"] for event in events if "steps" in event]
    if named or said:
        return step, int(named[-1] if named else said[-1][1])
    with suppress(OSError):
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        in_all = re.search(r"^train:\n(?:  .*\n)*?  steps: (\d+)$", text, re.M)
        return step, int(in_all[1]) or None if in_all else None
    return step, None


def steps_per_s(train: list[dict[str, Any]]) -> float | None:
    """Of the last logged steps, validations and checkpoints included; steps before a restart are left out."""
    rows = [(record["step"], record["time"]) for record in train if "step" in record and "time" in record]
    if len(rows) < 2:
        return None
    (first, began), (step, now) = rows[0], rows[-1]
    return (step - first) / (now - began) if step > first and now > began else None


def find_logs(folder: Path, job: dict[str, Any]) -> list[Path]:
    """Of the newest job, rank 0 first."""
    log = Path(job.get("log", folder / "submitit"))
    if log.is_dir():  # jobs on this machine are named by their process, newest last
        firsts = sorted(log.glob("*_0_log.out"), key=lambda path: path.stat().st_mtime)
        if not firsts:
            return []
        log = firsts[-1]
    prefix = log.name.removesuffix("0_log.out")
    others = sorted(path for path in log.parent.glob(f"{prefix}*_log.*") if path != log)
    return [log, *others] if log.exists() else []


def count_faults(log: Path, job: dict[str, Any]) -> int:
    with suppress(OSError):
        return len((log.parent / f"{job['job']}.faults").read_text().splitlines())
    return 0


def exit_note(logs: list[Path], job: dict[str, Any]) -> int | None:
    """The exit code 2 or 75 with which the ranks of a Slurm job ended, by their own note."""
    with suppress(OSError, ValueError, IndexError, KeyError):
        return int((logs[0].parent / f"{job['job']}.code").read_text())
    return None


def this_start(log: str) -> str:
    """What a log says of the newest start of its job (launch/after.sh ends those before)."""
    return re.split(r"^.*: job \S+ (?:is queued again|starts again, .*)$", log, flags=re.M)[-1]


def last_error(logs: list[Path]) -> str | None:
    """The last line of any rank's log that begins with "error"; else the end of a traceback."""
    for pattern in (r"^(error\b.*)$", r"^Traceback .*(?:\n\s.*)*\n(\S.*)$", r"^(fault \(.*)$"):
        for log in logs:
            found = re.findall(pattern, tail(log), re.M)
            if found:
                return found[-1]
    return None


def tail(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")
    return ""


# What is printed


def describe(each: Status) -> list[str]:
    """A few lines for people."""
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
