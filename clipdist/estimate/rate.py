"""A configuration in; how many samples a second its job will take out, as far as it is given or was measured before."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from clipdist.config import Config, to_dict

LAST = 20  # logged steps of a run that are looked at
# What the rate depends on, beside the machine; a run that differs in one of these says nothing.
SAME = ("device", "model.name", "engine", "train.global_batch", "train.micro_batch", "train.precision")
SAME_LAUNCH = ("launch.nodes", "launch.gpus")


def expected_rate(config: Config) -> tuple[float, str]:
    """Samples a second of the whole job and where the figure is from; (0.0, "not known")."""
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
    return [OmegaConf.select(plain, key) for key in (*SAME, *SAME_LAUNCH)]


def _identity_of_run(folder: Path) -> list[Any] | None:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception:  # a folder of something else, or of a run that ended while it wrote: no source, and no harm
        return None
    return _identity(tree) if isinstance(tree, dict) else None


def _rates(file: Path) -> list[float]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut short
            continue
        if record.get("type") == "train" and record.get("samples_per_s"):
            found.append(float(record["samples_per_s"]))
    return found
