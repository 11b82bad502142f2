"""Measure what train.stages save: the image tower's forward and backward pass, beside that of whole images.

Random pixels; all ways in turn, in one process. Times are of the processor, all threads together: other programs on the
machine change them less than they change what a clock shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from clipdist.config import Config, load_config
from clipdist.config.stages import PlannedStage, plan_stages
from clipdist.errors import UserError, run_main
from tools.bench import harness

EXAMPLES = """  python tools/bench/stages.py model.name=ViT-B-16 train.micro_batch=8 \
    "train.stages=[{share: 1, patch_dropout: 0.5}]"
  python tools/bench/stages.py --rounds 3 "train.stages=[{share: 0.8, image_size: 112}, {share: 0.2}]"

A pass takes train.micro_batch images, or train.global_batch without micro-batches, in fp32 on a CPU."""


def main() -> int:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the recipe")
    parser.add_argument("--config", help="recipe (none: the defaults)")
    parser.number("--rounds", 5, "R", "timed runs of each way")
    args = parser.parse()
    config = load_config(args.config, args.overrides)
    if not config.train.stages:
        raise UserError("train.stages: name the stages that are to be measured")
    seconds = measure(config, args)
    (whole, *stages) = seconds
    found = {stage: harness.ratios(seconds[stage], seconds[whole]) for stage in stages}
    ratio = {name: statistics.median(ratios) for name, ratios in found.items()}
    rows = [[whole, _milliseconds(seconds[whole]), "", "", ""]]
    rows += [[stage, _milliseconds(seconds[stage]), *harness.spread(found[stage], ".3f")] for stage in stages]
    lines = [
        f"# {config.model.name}: the image tower in stages",
        "",
        *harness.markdown_table(["", "forward and backward", "ratio, least", "median", "largest"], rows),
        "",
        f"{images_of(config)} images.",
        "",
        *harness.provenance("cpu", 1, "open_clip_torch"),
    ]
    return harness.finish(args, lines, {"ratio": ratio})


def images_of(config: Config) -> int:
    """Return the images of one pass."""
    return config.train.micro_batch or config.train.global_batch


def _milliseconds(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f} ms"


def measure(config: Config, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the processor seconds by round: of whole images first, then of every stage that differs."""
    import torch

    from clipdist.models.build import build_model
    from clipdist.models.fewer_patches import allow_stages, kept_of, patches_of
    from clipdist.models.spec import check_stages_fit, resolve_spec

    check_stages_fit(config.train.stages, resolve_spec(config.model))
    torch.set_num_threads(1)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, config.objectives.clip).train()
    spec = model.spec
    planned = plan_stages(config.train.stages, 1 << 40, spec.image_size, spec.context_length)
    allow_stages(model, planned)

    def timed(stage: PlannedStage) -> Callable[[], float]:
        side, count = stage.image_size, images_of(config)
        image = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        patches = patches_of(model.visual, side)
        kept = kept_of(patches, stage.patch_dropout)
        chosen = torch.rand(count, patches).argsort(1)[:, :kept] if kept else None

        def run() -> float:
            began = time.process_time()
            model(image=image, patches=chosen)["image"].sum().backward()
            return time.process_time() - began

        return run

    whole = plan_stages([], 1, spec.image_size, spec.context_length)
    shapes = dict.fromkeys([*whole, *(replace(stage, first=0) for stage in planned)])
    return harness.take_turns({str(stage): timed(stage) for stage in shapes}, args.rounds, warmup=1)


if __name__ == "__main__":
    run_main(main)
