"""Records the golden losses anew: python tests/golden/record.py. Commit the result with the reason for the change."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
GOLDEN = HERE / "losses.json"
STEPS = 20
WORLDS = (1, 2)


def fingerprint() -> dict[str, str]:
    """What the last bits of a float32 sum on a CPU depend on."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": "1",
        "open_clip": version("open_clip_torch"),
        "deepspeed": version("deepspeed"),
    }


def processor() -> str:
    """The CPU's name: MKL chooses its kernels by vendor and family, too."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "cpu family", "model\t"))
    ]
    return " ".join(names[:3]) or platform.machine()


def golden_losses(world: int, folder: Path) -> list[float]:
    """The losses of the first steps of a tiny run on generated data, with `world` ranks of one thread each."""
    from dist.launch import run_ranks
    from pairs import write_pairs

    shards = write_pairs(folder / "train", 70)
    settings = [f"run.root={folder}", f"data.train={shards}", f"train.steps={STEPS}", "engine.zero_stage=2"]
    run_ranks("training.py", world, "none", "0", "--config", "configs/tiny.yaml", "data.val=", *settings)
    records = map(json.loads, (folder / "tiny" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["type"] == "train"]


def main() -> None:
    losses = {}
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            losses[str(world)] = golden_losses(world, Path(folder))
    GOLDEN.write_text(json.dumps({"fingerprint": fingerprint(), "losses": losses}, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
