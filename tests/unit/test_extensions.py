"""launch/extensions.py: one build at a time, leftovers of killed ones, and when nothing is built at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from clipdist.config import load_config
from launch import extensions

ROOT = Path(__file__).resolve().parents[2]
BUILDER = """
import sys, time
from pathlib import Path
from launch.extensions import one_at_a_time
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with one_at_a_time(folder):
    assert not (folder / "cpu_adam/lock").exists()
    (folder / "cpu_adam").mkdir(exist_ok=True)
    (folder / "cpu_adam/lock").touch()
    print(name, flush=True)
    time.sleep(seconds)
    (folder / "cpu_adam/lock").unlink()
"""


def build(folder: Path, name: str, seconds: float) -> subprocess.Popen:
    words = [sys.executable, "-c", BUILDER, str(folder), name, str(seconds)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_build_that_was_killed_does_not_stop_the_next(tmp_path):
    first = build(tmp_path, "first", 600)
    assert first.stdout is not None
    assert first.stdout.readline() == "first\n"
    others = [build(tmp_path, name, 0.1) for name in ("second", "third")]
    time.sleep(0.5)
    assert all(other.poll() is None for other in others)  # they wait
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert [other.communicate(timeout=60)[0] for other in others] == ["second\n", "third\n"]
    assert [other.returncode for other in others] == [0, 0]  # one after the other: each found no lock


def test_without_offloading_nothing_is_built(monkeypatch):
    monkeypatch.setattr(extensions, "one_at_a_time", None)  # would be called
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    extensions.prepare_extensions(load_config())
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_nodes_with_another_processor_build_for_themselves(monkeypatch):
    monkeypatch.setattr(extensions, "cpu_name", lambda: "AMD EPYC 7742")
    first = extensions.node_type("cpu")
    assert first.startswith("AMD-EPYC-7742-")
    assert extensions.node_type("cpu") == first
    monkeypatch.setattr(extensions, "cpu_name", lambda: "AMD EPYC 9654")
    assert extensions.node_type("cpu") != first
