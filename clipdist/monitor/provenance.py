"""Name the commit, the hardware and the data, for run folders, benchmark tables and other people."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clipdist import __version__
from clipdist.config import REPOSITORY, SNAPSHOT


def commit() -> str | None:
    """Return the commit of the running code, with "-dirty" where files differ from it; None where it is not known.

    In a copy of the folder without its repository, CLIPDIST_COMMIT in the environment says which commit it is of.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((REPOSITORY / SNAPSHOT).read_text())["commit"]
    words = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        found = ""
    return found or os.environ.get("CLIPDIST_COMMIT") or None


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of clipdist, which may run from its folder without being installed, and of packages."""
    found = {"clipdist": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def without_secrets(name: str) -> str:
    """Return the address of data without user, password and signature; any other name as it is."""
    return re.sub(r"//[^/@\s]*@", "//", re.split(r"[?#]", name, maxsplit=1)[0]) if "://" in name else name


def hardware(device: str, threads: int) -> str:
    """Return one line: the GPU if device is "cuda", the processor, cores that this process may use, threads, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    line = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {threads} threads, {memory} GiB"
    if device == "cuda":
        import torch

        line = f"{torch.cuda.get_device_name()}; {line}"
    return line


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system names no model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
