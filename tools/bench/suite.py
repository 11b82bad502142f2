"""Compare the figures of an evaluation suite with CLIP_benchmark's, on the same files and weights."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
from typing import Any

import open_clip
import torch

from clipdist.data.loader import default_threads
from clipdist.distributed.rank import DistEnv
from clipdist.errors import run_main
from clipdist.evals.embed import WorkShare
from clipdist.evals.suite import measure_all, read_suite
from clipdist.models.export import export_model
from clipdist.models.load import load_model
from tools.bench import harness
from tools.bench.peers.suite import clip_benchmark_figures, require_clip_benchmark

EXAMPLES = """  PYTHONPATH=DIR python tools/bench/suite.py runs/demo --suite suite.yaml

DIR is where CLIP_benchmark was installed aside. Probes are not compared: its own is another one."""


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run, checkpoint or Hugging Face CLIP folder")
    parser.add_argument("--suite", required=True, type=Path, metavar="FILE.yaml", help="as eval_suite.py takes it")
    return parser.parse()


def main() -> int:
    args = parse_args()
    require_clip_benchmark()
    found = compare(args.run, args.suite)
    rows = [
        [each["set"], name, f"{ours:.3f}", f"{theirs:.3f}", f"{abs(ours - theirs):.3f}"]
        for each in found
        for name, (ours, theirs) in each["figures"].items()
    ]
    table = harness.markdown_table(["set", "figure, %", "clipdist", "CLIP_benchmark", "difference"], rows, left=2)
    lines = [*table, "", *harness.provenance("cpu", torch.get_num_threads(), "open_clip_torch")]
    return harness.finish(args, lines, {"sets": found})


def compare(run: str, suite: Path) -> list[dict[str, Any]]:
    """Return {"set", "task", "figures": {name: (ours, theirs)}} of every set that both measure, in percent."""
    sets = [each for each in read_suite(suite) if each.task != "probe"]
    loaded = load_model(run)
    share = WorkShare(threads=default_threads(), progress=False)
    results = measure_all(sets, loaded, DistEnv(0, 1, 0, torch.device("cpu")), share, cache=False)
    with harness.workspace() as folder:
        written = export_model(loaded.model, folder / "model.safetensors")
        pixels = {"image_mean": loaded.model.spec.image_mean, "image_std": loaded.model.spec.image_std}
        model, _, transform = open_clip.create_model_and_transforms(
            written.name, pretrained=str(written.file), **pixels
        )
        model.eval()
        tokenizer: Any = open_clip.get_tokenizer(written.name)
        if written.merges:
            tokenizer = open_clip.SimpleTokenizer(str(written.merges), context_length=loaded.model.spec.context_length)
        compared = []
        for each, ours in zip(sets, results):
            theirs = clip_benchmark_figures(model, transform, tokenizer, each.task, Path(each.source))
            figures = {name: (ours[name], value) for name, value in theirs.items()}
            compared.append({"set": each.name, "task": each.task, "figures": figures})
    return compared


if __name__ == "__main__":
    run_main(main)
