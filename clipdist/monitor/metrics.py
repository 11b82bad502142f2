"""Write metrics.jsonl, TensorBoard's event files and further loggers, and show progress."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from clipdist.errors import Fault
from clipdist.storage import write_text

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    from clipdist.monitor.loggers import Loggers

# Steps past the resumed one are trained again and logged again; how attempts began and ended is not.
KEPT_ON_RESUME = ("restart", "interrupted", "rollback", "save_failed", "fault")
TENSORBOARD_RETRY_S = 60.0  # after a failed write
WATCHED = {  # charts on TensorBoard's page of custom scalars: title, and a regular expression of names
    "loss": "^train/loss(/|$)",  # and its terms
    "R@1, %": "^val/(t2i|i2t)_r1$",
    "effective rank of the image features": "^val/effective_rank$",
    "log scale of the logits": "^train/logit_scale$",
    "learning rate": "^train/lr$",
    "samples per second": "^train/samples_per_s$",
}


class Metrics:
    """Write the records of one run to metrics.jsonl, TensorBoard and loggers. Do nothing on ranks other than 0.

    A write that fails (disk full, storage unavailable) is reported once on stderr and loses what it wrote; training
    goes on, and later writes are tried as usual.

    Args:
        run_dir: the run folder, which exists.
        start_step: the step that training continues from; later records of an earlier attempt are removed from
            metrics.jsonl and hidden in TensorBoard, and so is a line that a kill cut short.
        loggers: those of run.logger, on rank 0.

    Attributes:
        validated_at: step of the last validation that is kept; 0 if there is none.

    Raises:
        Fault: the run folder cannot be written at the start.
    """

    def __init__(self, run_dir: Path, rank: int, start_step: int = 0, loggers: Loggers | None = None) -> None:
        self.validated_at = 0
        self._open = rank == 0
        if not self._open:
            return
        self._path = run_dir / "metrics.jsonl"
        self._warned: set[str] = set()
        try:
            if self._path.exists():
                kept = _drop_after(self._path, start_step)
                self.validated_at = max([0, *(record["step"] for record in kept if record["type"] == "val")])
            self._path.touch()
        except OSError as error:
            reason = error.strerror or error
            raise Fault(f"{self._path}: cannot be written ({reason}); mend it and start again") from None
        self._board: SummaryWriter | None = None
        self._board_not_before = 0.0  # monotonic time
        self._results = {"train/loss"}  # names of what the HParams page shows
        self._hide_from: int | None = start_step + 1
        self._show(lambda board: None)
        self._loggers = loggers

    def write(self, kind: str, step: int, samples: int, **values: Any) -> None:
        """Append one record; its numbers also go to TensorBoard as kind/name.

        Args:
            kind: train, val or event.
            values: what JSON can hold; floats that are not finite become null.
        """
        if not self._open:
            return
        # JSON has no nan and no infinity (fp16 overflows in its first steps).
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"type": kind, "step": step, "samples": samples, "time": time.time(), **values}
        try:
            _append(self._path, json.dumps(record).encode() + b"\n")
        except OSError as error:
            self._warn(str(self._path), error, "training goes on, and loses its lines")
        if kind == "event":
            self._show(lambda board: board.add_text("events", json.dumps(values), step))
            return
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self._show(partial(_add_scalar, name, value, step))
        self._results |= numbers.keys() if kind == "val" else set()
        if self._loggers:
            self._loggers.numbers(numbers, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Show an image on TensorBoard's image page, and in the loggers."""
        if self._open:
            import numpy as np

            pixels = np.asarray(image.convert("RGB"))
            self._show(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))
            if self._loggers:
                self._loggers.image(name, image, step)

    def settings(self, settings: dict[str, Any], text: str) -> None:
        """Show the configuration, as text, and the charts of WATCHED on TensorBoard; keep it for `outcome`."""
        if self._open:
            charts = {title: ["Multiline", [names]] for title, names in WATCHED.items()}
            self._show(lambda board: board.add_custom_scalars({"run": charts}))
            self._show(lambda board: board.add_text("config", "    " + text.replace("\n", "\n    ")))
            self._settings = {k: v if isinstance(v, (int, float, bool, str)) else str(v) for k, v in settings.items()}

    def outcome(self) -> None:
        """Show the settings beside the last loss and the last validation on TensorBoard's HParams page."""
        if self._open:
            self._show(self._add_hparams)
            if self._loggers:
                self._loggers.ended_well()

    def _add_hparams(self, board: SummaryWriter) -> None:
        """Name the curves whose last values the page shows; `add_hparams` would add a card of one point for each."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(self._settings, dict.fromkeys(sorted(self._results))):
            board._get_file_writer().add_summary(summary)

    def close(self) -> None:
        if self._open and self._board is not None:
            self._show(lambda board: board.close())
        if self._open and self._loggers:
            self._loggers.close()
        self._open = False

    def _show(self, put: Callable[[SummaryWriter], object]) -> None:
        """Let `put` add to TensorBoard's writer.

        After an error a writer is of no use: its thread has ended, and its file may end in half a record. A new one,
        with a file of its own, takes its place. The writer opens its file anew for each record, and would create it
        in an empty mount point: nothing is added while metrics.jsonl is away, and nothing stays queued.
        """
        away = not self._path.exists()
        if away or (self._board is None and time.monotonic() < self._board_not_before):
            return
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._path.parent), purge_step=self._hide_from)
                self._hide_from = None
            put(self._board)
            self._board.flush()
        except OSError as error:  # also of the writer's thread: it is raised by a later call
            self._warn(f"{self._path.parent}: TensorBoard's events", error, "training goes on, and loses them")
            self._board_not_before = time.monotonic() + TENSORBOARD_RETRY_S
            board, self._board = self._board, None
            if board is not None:
                with suppress(OSError):
                    board.close()  # ends its thread, where that still runs

    def _warn(self, what: str, error: OSError, lost: str) -> None:
        """Print one line on stderr, once for each `what`."""
        if what not in self._warned:
            self._warned.add(what)
            with suppress(OSError):
                reason = error.strerror or error
                line = f"note: {what} cannot be written ({reason}): make room, or repair it; {lost} until then"
                print(line, file=sys.stderr, flush=True)


def open_metrics(run_dir: Path) -> None:
    """Make metrics.jsonl, which `record_fault` appends to. Metrics tells what is wrong where it cannot be made."""
    with suppress(OSError):
        (run_dir / "metrics.jsonl").touch()


def record_fault(run_dir: Path, global_batch: int, step: int, error: str) -> None:
    """Append to metrics.jsonl why the run ended, whatever state this process is in."""
    record = {"type": "event", "step": step, "samples": step * global_batch, "time": time.time()}
    with suppress(OSError):
        _append(run_dir / "metrics.jsonl", json.dumps({**record, "event": "fault", "error": error}).encode() + b"\n")


def _append(path: Path, line: bytes) -> None:
    """Append a line; where that fails, leave nothing of it.

    The file is never created: where a mount is gone, it would be created on another disk.
    """
    with path.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


class Progress:
    """Show a bar with ETA on a terminal, plain lines elsewhere; nothing on ranks other than 0.

    An output that cannot be written (terminal closed, disk full) does not end the run.
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
        """Show the numbers of a logged step."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_postfix_str(text)
        else:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(1, done - self._start) * (self._total - done)
            self.log(f"step {done}/{self._total}  {text}  eta {_clock(left)}")

    def log(self, text: str) -> None:
        """Print a line on rank 0."""
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
    """Return the peak memory so far, GB: the device's on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove records past `step` and lines that are not whole. Return the records that stay."""
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
