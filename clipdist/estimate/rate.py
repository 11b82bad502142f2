"""Find how many samples a second a job will process: as configured, or as an earlier run of the same kind logged."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from clipdist.config import Config, to_dict
from clipdist.config.checks import VIEWED
from clipdist.storage import json_lines

LAST = 20  # logged steps of a run that are used
# The rate depends on these, beside the machine; a run that differs in one of them is no source.
SAME = (
    *("device", "model.name", "engine", "launch.nodes", "launch.gpus"),
    *("train.global_batch", "train.micro_batch", "train.precision", "train.stages"),
    *("objectives.clip.weight", *(f"objectives.{name}" for name in VIEWED)),
)


def expected_rate(config: Config) -> tuple[float, str]:
    """Return samples a second of the whole job and where the figure is from; (0.0, "not known")."""
    if config.launch.samples_per_s:
        return config.launch.samples_per_s, "launch.samples_per_s"
    files = sorted(Path(config.run.root).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    wanted = _identity(to_dict(config))
    for file in files:
        if _identity_of_run(file.parent) == wanted and (rates := _rates(file)):
            return median(rates[-LAST:]), f"measured in {file.parent}"
    return 0.0, "not known"


def _identity(tree: dict[Any, Any]) -> list[Any]:
    plain = OmegaConf.create(tree)
    return [OmegaConf.select(plain, key) or None for key in SAME]  # runs of earlier versions lack some


def _identity_of_run(folder: Path) -> list[Any] | None:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception:  # another kind of folder, or a run that was killed while it wrote
        return None
    return _identity(tree) if isinstance(tree, dict) else None


def _rates(file: Path) -> list[float]:
    train = (record for record in json_lines(file) if record.get("type") == "train")
    return [float(record["samples_per_s"]) for record in train if record.get("samples_per_s")]
