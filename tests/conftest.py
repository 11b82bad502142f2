"""What all tests share: a set of shards; tests whose hardware or Slurm is missing are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Processes that tests start find this Python's programs first.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (70 samples in 4 shards) and val/ (20 samples)."""
    from pairs import write_pairs

    folder = tmp_path_factory.mktemp("shards")
    write_pairs(folder / "train", 70)
    write_pairs(folder / "val", 20)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, why_not in (("gpu", why_no_cuda), ("slurm", why_no_slurm)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not(config)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def why_no_cuda(config: pytest.Config) -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


def why_no_slurm(config: pytest.Config) -> str:
    """Minutes of jobs on a cluster of this machine: only for those who ask for them, and where it can be."""
    if "slurm" not in config.option.markexpr:
        return "make slurm-test runs them"
    probe = subprocess.run(
        [sys.executable, "slurm/cluster", "probe"], cwd=config.rootpath, capture_output=True, text=True
    )
    return "" if probe.returncode == 0 else probe.stderr.strip().splitlines()[-1]


def pytest_terminal_summary(terminalreporter) -> None:
    """Says by which rule the golden losses were compared."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "rule" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid}: compared {value}")
