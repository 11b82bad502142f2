"""What all tests share: a set of shards; tests whose hardware is missing are skipped."""

from __future__ import annotations

import os
import shutil
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, there, reason in (
        ("gpu", cuda_there, "no CUDA device"),
        ("slurm", slurm_there, "no Slurm: srun and sbatch are not on PATH"),
    ):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def cuda_there() -> bool:
    import torch

    return torch.cuda.is_available()


def slurm_there() -> bool:
    return shutil.which("srun") is not None and shutil.which("sbatch") is not None


def pytest_terminal_summary(terminalreporter) -> None:
    """Says by which rule the golden losses were compared."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "rule" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid}: compared {value}")
