"""Memory of processes: resident, proportional set size, or what torch allocates on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import psutil

from clipdist.errors import Fault, UserError

# Environment in which glibc returns what is freed at once, so that a peak counts what is in use at one time.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
CLEAR_REFS = Path("/proc/self/clear_refs")
WATCH_S = 0.05


def proc_bytes(name: str, file: str = "/proc/self/status") -> int:
    """Read a figure that /proc gives in KiB: VmRSS is what is resident now, VmHWM the most since the last reset.

    Raises:
        Fault: it is not there.
    """
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise Fault(f"{file} has no {name}")


def require_resettable(what: str) -> None:
    """Raise a UserError where the high-water mark of resident memory cannot be reset (not Linux)."""
    if not os.access(CLEAR_REFS, os.W_OK):
        raise UserError(f"{what}: peak memory needs {CLEAR_REFS} (Linux), which cannot be written here")


def trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class MemoryGrowth:
    """How far memory in use grows from here on: resident memory on a CPU (Linux), the allocator's on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start: int | None = None
        if device == "cuda":
            import torch

            synchronize(device)
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):  # a kernel without clear_refs: not measured
            CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
            self.start = proc_bytes("VmRSS")

    def peak(self) -> int | None:
        """Return the growth at its highest, bytes; None where it cannot be measured."""
        if self.start is None:
            return None
        if self.device == "cuda":
            import torch

            synchronize(self.device)
            return torch.cuda.max_memory_allocated() - self.start
        return max(0, proc_bytes("VmHWM") - self.start)


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
            self.peak_bytes = max(self.peak_bytes, sum(map(_tree_bytes, self.pids)))


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; none where it has ended."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def _tree_bytes(pid: int) -> int:
    total = 0
    for process in process_tree(pid):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += process.memory_full_info().pss
    return total
