"""Build the compiled parts of DeepSpeed that a run needs, once per type of node.

Only the optimiser of an offloaded run is compiled (-march=native, so a build serves one type of processor). By default
every rank would use one folder of the home directory, and a build that was killed would leave a lock there on which all
later runs wait for ever.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from clipdist.config import Config
from clipdist.monitor.provenance import cpu_name
from clipdist.storage import lock


def prepare_extensions(config: Config) -> None:
    """Build what the run will load, or wait until another rank has. Do nothing where nothing is offloaded."""
    zero = config.engine.deepspeed.get("zero_optimization") or {}
    if (zero.get("offload_optimizer") or {}).get("device") != "cpu":
        return
    from clipdist.distributed.rank import resolve_device

    device = resolve_device(config.device)
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / node_type(device))))
    os.environ["DS_ACCELERATOR"] = device  # before the first import of deepspeed
    with one_at_a_time(folder):
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load(verbose=False)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process in at a time; the kernel releases the lock of a process that is killed, on whatever node.

    torch's own lock is a file that stays when its process is killed: whoever is let in here removes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".building", "w") as file:
        with suppress(OSError):  # a file system without locks: torch's own must do, and its leftovers stay
            lock(file)
            for stale in folder.rglob("lock"):
                stale.unlink(missing_ok=True)
        yield


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdist" / "extensions"


def node_type(device: str) -> str:
    """Return a folder name that differs where a build of one node would not run on another."""
    parts = [cpu_name(), platform.machine(), platform.python_version(), version("torch"), version("deepspeed")]
    parts += [gpu_name()] if device == "cuda" else []
    label = re.sub(r"[^A-Za-z0-9]+", "-", parts[-1] if device == "cuda" else parts[0]).strip("-")
    return f"{label}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:8]}"


def gpu_name() -> str:
    """Ask nvidia-smi: torch would open a context on the first GPU in every rank."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "gpu"
    return "gpu"
