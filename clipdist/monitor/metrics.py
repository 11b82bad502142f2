"""What a run tells about itself: numbers in; metrics.jsonl, TensorBoard events and a progress line out."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from clipdist.errors import Fault
from clipdist.monitor.board import Board
from clipdist.monitor.line_file import LineFile
from clipdist.storage import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Records past the resumed step come again with the steps that are run again, except how attempts began and ended.
KEPT_ON_RESUME = ("restart", "interrupted", "rollback", "save_failed", "fault")


class Metrics:
    """Writes the records of one run. Only rank 0 holds an open one; elsewhere all calls do nothing.

    A disk that is full or away ends no run: see LineFile and Board.

    Args:
        start_step: the step that training goes on from; later records of an earlier, interrupted attempt are dropped.

    Attributes:
        validated_at: the step of the last validation that is kept; 0: none.

    Raises:
        Fault: the run folder cannot be written at the start.
    """

    def __init__(self, run_dir: Path, rank: int, start_step: int = 0) -> None:
        self._lines: LineFile | None = None
        self.validated_at = 0
        if rank != 0:
            return
        path = run_dir / "metrics.jsonl"
        try:
            if path.exists():
                kept = _drop_after(path, start_step)
                self.validated_at = max([0, *(record["step"] for record in kept if record["type"] == "val")])
            self._lines = LineFile(path)
        except OSError as error:
            raise Fault(f"{path}: cannot be written ({error.strerror or error}); mend it and start again") from None
        self._board = Board(run_dir, start_step + 1)

    def write(self, kind: str, step: int, samples: int, **values: Any) -> None:
        """One record: kind is train, val or event. Numbers go to TensorBoard as kind/name, too."""
        if self._lines is None:
            return
        # JSON has no nan and no infinity (fp16 overflows in its first steps).
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"type": kind, "step": step, "samples": samples, "time": time.time(), **values}
        self._lines.write(json.dumps(record) + "\n")
        if kind == "event":
            self._board.show(lambda board: board.add_text("events", json.dumps(values), step))
            return
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.show(partial(_add_scalar, f"{kind}/{name}", value, step))

    def picture(self, name: str, picture: Any, step: int) -> None:
        """A Pillow picture on TensorBoard's image page."""
        if self._lines is not None:
            import numpy as np

            pixels = np.asarray(picture.convert("RGB"))
            self._board.show(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def settings(self, settings: dict[str, Any], text: str) -> None:
        """The configuration, to read."""
        if self._lines is not None:
            self._board.show(lambda board: board.add_text("config", "    " + text.replace("\n", "\n    ")))
            self._settings = {k: v if isinstance(v, (int, float, bool, str)) else str(v) for k, v in settings.items()}

    def outcome(self, results: dict[str, float]) -> None:
        """Hyper-parameters beside final results, on TensorBoard's HParams page."""
        if self._lines is not None and results:
            named = {f"final/{name}": value for name, value in results.items()}
            self._board.show(lambda board: board.add_hparams(self._settings, named, run_name="."))

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._board.close()
            self._lines = None


class Progress:
    """A bar with ETA on a terminal, plain lines elsewhere; silent on other ranks than 0.

    A terminal that is gone, or a log on a full disk, ends no run.
    """

    def __init__(self, total: int, start: int, rank: int) -> None:
        self._rank, self._total, self._start = rank, total, start
        self._began = time.monotonic()
        self._bar = None
        if rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def step(self, done: int) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(done - self._bar.n)

    def show(self, done: int, values: dict[str, float]) -> None:
        """The numbers of a logged step."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_postfix_str(text)
        else:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(1, done - self._start) * (self._total - done)
            self.say(f"step {done}/{self._total}  {text}  eta {_clock(left)}")

    def say(self, text: str) -> None:
        if self._rank == 0:
            with suppress(OSError), tqdm.external_write_mode():
                print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


def _add_scalar(name: str, value: float, step: int, board: SummaryWriter) -> None:
    board.add_scalar(name, value, step)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far, GB: the device's on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites the file. Returns the records that stay."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for line in lines if (record := _parse(line))]
    kept = [record for record in records if record["step"] <= step or record.get("event") in KEPT_ON_RESUME]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if {"step", "type"} <= record.keys() else None
    except (ValueError, AttributeError):
        return None  # the line that a kill cut short


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
