"""A copy of the repository whose trainer is a stand-in that imports no torch: launchers are tested in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINER = '''
import os, time
from clipdist.config import Config
from clipdist.errors import UserError
from clipdist.fault_tolerance.signals import StopFlag
from clipdist.fault_tolerance.slurm import requeue, restarts

def train(config, resume_command=""):
    """Steps until the run folder holds a file that says how to end; "<rank>:<what>" is for one rank alone."""
    rank, folder, stop = os.environ["RANK"], config.run.dir, StopFlag()
    if rank == "0":
        print("begin", {version!r}, "restarts", restarts(), "lr", config.optim.lr, flush=True)
    (folder / f"pid-{{rank}}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.02)
        if stop.set:
            queued = rank == "0" and requeue(stop.reason)
            print("stopped by", stop.reason, "queued again" if queued else "", flush=True)
            return 75
        end = (folder / "end").read_text() if (folder / "end").exists() else ""
        who, _, what = end.rpartition(":")
        if restarts() and what == "die once":
            return 0
        if who and who != rank:
            continue
        if what in ("die", "die once"):
            os.kill(os.getpid(), 9)
        if what == "refuse":
            raise UserError("no such thing")
        if what == "done":
            return 0
'''
ESTIMATE = """
class Estimate:
    def refuse(self):
        pass

def make_estimate(config, catalog=None):
    return Estimate()

def summary(estimate):
    return "plan"
"""


def make_repository(folder: Path, version: str = "one") -> Path:
    """In `folder`: the package, the launcher and the recipes; the stand-in prints `version`."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("clipdist", "launch", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    write_trainer(folder, version)
    (folder / "clipdist/models/spec.py").write_text("def resolve_run_spec(cfg):\n    return None\n")
    (folder / "clipdist/estimate/__init__.py").write_text(ESTIMATE)
    return folder


def write_trainer(folder: Path, version: str) -> None:
    (folder / "clipdist/train.py").write_text(TRAINER.format(version=version))
