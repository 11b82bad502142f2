"""Stacks of all threads of this process, as text and as a file of the run folder."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from pathlib import Path


def stacks() -> str:
    """Return the stacks of all threads, the newest call first."""
    # faulthandler holds the interpreter while it writes. Memory never blocks; a hung file system or a full pipe would.
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("stacks"), "r+", errors="replace")
    else:
        file = tempfile.TemporaryFile("r+", errors="replace")  # noqa: SIM115  closed below
    with file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def stacks_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "stacks" / f"rank-{rank:05d}.txt"


def write_stacks(run_dir: Path, rank: int, text: str) -> None:
    """Write them to stacks_file. Raise OSError if the run folder cannot be written."""
    path = stacks_file(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
