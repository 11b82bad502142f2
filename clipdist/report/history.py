"""Read a run folder: records, configuration, environment, results, and what they come to."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdist.checkpoint.format import newest_checkpoint
from clipdist.config import Config, load_config
from clipdist.errors import UserError
from clipdist.evals.results import read_results

Record = dict[str, Any]
RECALLS = tuple(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))
MOST_STEPS = 1 << 53  # what a float holds exactly; a larger step is a damaged one


@dataclass(frozen=True)
class RunHistory:
    """One run.

    Attributes:
        label: its name on the page, unlike those beside it.
        records: of metrics.jsonl, in the order of the file.
        config: None where it cannot be read: `notes` says why.
        environment: of the last attempt; empty where it is missing.
        results: what the tools found out, by tool.
        notes: what is missing or cannot be read, a line each.
    """

    folder: Path
    label: str
    records: list[Record]
    config: Config | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of_type(self, kind: str) -> list[Record]:
        """Return records of type train, val or event; of two train or val records of one step, the later one."""
        return self._sorted.get(kind, [])

    @cached_property
    def _sorted(self) -> dict[str, list[Record]]:
        by_type: dict[str, list[Record]] = {}
        for record in self.records:
            by_type.setdefault(record["type"], []).append(record)
        for kind in by_type.keys() - {"event"}:
            by_step = {record["step"]: record for record in by_type[kind]}
            by_type[kind] = [by_step[step] for step in sorted(by_step)]
        return by_type

    def points(self, kind: str, name: str, x: str = "step") -> list[tuple[float, float | None]]:
        """Return (x, value) of the records that have the name; None for a value that is missing or not finite."""
        return [
            (place, number(record[name]))
            for record in self.of_type(kind)
            if name in record and (place := number(record.get(x))) is not None
        ]

    def events(self, name: str) -> list[Record]:
        return [record for record in self.of_type("event") if record.get("event") == name]

    def attempts(self) -> list[list[Record]]:
        """Return the records of every start of the run; a restart begins the next one."""
        parts: list[list[Record]] = [[]]
        for record in self.records:
            if record.get("event") == "restart" and parts[-1]:
                parts.append([])
            parts[-1].append(record)
        return parts

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def objectives(self) -> list[str]:
        """Names of what the run trains, as configured."""
        return [name for name, section in vars(self.config.objectives).items() if section] if self.config else []

    @property
    def reads_text(self) -> bool:
        """Whether the run reads captions, as far as is known."""
        return self.config is None or self.config.objectives.read_text

    def planned_steps(self) -> int | None:
        """Return the steps of the whole run; None where that cannot be known."""
        if self.config is None:
            return None
        train = self.config.train
        if train.samples:
            return -(-train.samples // train.global_batch)
        if train.steps:
            return train.steps
        per_epoch = self.steps_per_epoch()
        return None if per_epoch is None else train.epochs * per_epoch

    def steps_per_epoch(self) -> int | None:
        for record in reversed(self.of_type("train")):
            if epoch := number(record.get("epoch")):
                return round(record["step"] / epoch)
        return None

    def state(self) -> str:
        """Say whether the run finished, was interrupted, ended with an error, or has no recorded end."""
        planned = self.planned_steps()
        of = "" if planned is None else f" of {planned:,}"
        last = self.attempts()[-1]
        if last and last[-1].get("event") == "fault":
            return f"ended at step {self.step:,}{of}: {last[-1].get('error')}"
        if planned is not None and self.step >= planned:
            return "finished"
        if last and last[-1].get("event") == "interrupted":
            return f"interrupted at step {self.step:,}{of}"
        return f"at step {self.step:,}{of}: still going, or ended without a word"

    def seconds(self) -> float:
        """Return the wall time from the first to the last record of every attempt, added up."""
        total = 0.0
        for attempt in self.attempts():
            times = [time for record in attempt if (time := number(record.get("time"))) is not None]
            total += max(times) - min(times) if times else 0.0
        return total

    def bad_counts(self) -> dict[str, int]:
        """Return {reason: unusable samples}: every attempt counts from 0, its last count holds."""
        total: Counter[str] = Counter()
        for attempt in self.attempts():
            told = [record.get("counts") for record in attempt if record.get("event") == "bad_samples"]
            if told and isinstance(told[-1], dict):
                total.update({str(reason): int(number(count) or 0) for reason, count in told[-1].items()})
        return dict(total.most_common())

    def median(self, name: str) -> float | None:
        """Return the median of a name in the train records."""
        values = [value for _, value in self.points("train", name) if value is not None]
        return statistics.median(values) if values else None

    def last(self, kind: str, name: str) -> float | None:
        """Return the newest finite value."""
        return next((value for _, value in reversed(self.points(kind, name)) if value is not None), None)


def run_figures(run: RunHistory) -> dict[str, Any]:
    """Return the numbers of the summary by plain names, None where a run does not tell; rates in percent."""
    wait_share = run.median("wait_share")
    return {
        "state": run.state(),
        "objectives": run.objectives,
        "step": run.step,
        "samples": max((int(number(record.get("samples")) or 0) for record in run.records), default=0),
        "seconds": round(run.seconds(), 1),
        "loss": run.last("train", "loss"),
        "logit_scale": run.last("train", "logit_scale"),
        "samples_per_s": run.median("samples_per_s"),
        "wait_percent": None if wait_share is None else 100 * wait_share,
        **{name: run.last("val", name) for name in RECALLS},
        "bad_samples": sum(run.bad_counts().values()),
        "bad_counts": run.bad_counts(),
        "restarts": len(run.events("restart")),
        "skipped_steps": len(run.events("skip")),
    }


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else that a record may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_runs(folders: list[Path]) -> list[RunHistory]:
    """Read the runs, labelled by their folders' names, or by the paths as given where two names are equal.

    Raises:
        UserError: a folder that is no run or has logged nothing, a damaged file, or a run that is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f"{folders[place]}: is named twice")
    names = [folder.name for folder in resolved]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    return [_read_run(folder, label) for folder, label in zip(folders, labels)]


def _read_run(folder: Path, label: str) -> RunHistory:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: {_what_is_wrong(folder)}")
    notes: list[str] = []
    records = _read_records(path, notes)
    return RunHistory(
        folder,
        label,
        records,
        _read_config(folder, notes),
        _read_environment(folder, notes),
        read_results(folder),
        notes,
    )


def _what_is_wrong(folder: Path) -> str:
    if not folder.is_dir():
        there = sorted(path.parent.name for path in folder.parent.glob("*/metrics.jsonl"))
        return f"no such run folder{f'; {folder.parent} holds {_listed(there)}' if there else ''}"
    if (folder / "config.yaml").is_file():
        return "has no metrics.jsonl: the run has logged nothing; start it, or wait for its first lines"
    inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
    if inside:
        return f"is no run folder, but holds some: name {_listed(inside)} in it"
    if newest_checkpoint(folder):  # of tools/interpolate.py, or an export of adapters
        of = f"; its figures are in {folder / 'results'}" if (folder / "results").is_dir() else ""
        return (
            "holds weights alone, and no training to report: name the runs that it was made of, or compare it with them"
            f" by tools/eval_suite.py{of}"
        )
    over = next((parent for parent in folder.resolve().parents if (parent / "metrics.jsonl").is_file()), None)
    return f"is no run folder (no metrics.jsonl){f'; the run is {over}' if over else ''}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _read_records(path: Path, notes: list[str]) -> list[Record]:
    """Read metrics.jsonl. Leave out a torn last line, with a note; any other line must be a record."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif place == len(lines):
            notes.append(f"the last line of {path.name} is not whole, and left out")
        else:
            raise UserError(f"{path}, line {place}: is no record ({_excerpt(line)}); mend the line or take it out")
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("type"), str):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < MOST_STEPS else None


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _read_config(folder: Path, notes: list[str]) -> Config | None:
    path = (folder / "config.yaml").resolve()
    if not path.is_file():
        notes.append("no config.yaml: the configuration is not known")
        return None
    try:
        return load_config(path)
    except (UserError, OSError, UnicodeDecodeError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read by this version: {error}")
        return None


def _read_environment(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "environment.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("no environment.json: versions, commit and command line are not known")
        return {}
    except (OSError, ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    notes.append("environment.json cannot be read")
    return {}
