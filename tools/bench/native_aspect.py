"""Measure images at their own aspect ratio: the image tower's forward and backward pass, beside padded images.

Drawn images of stated aspect ratios, all ways in turn, in one process. Times are of the processor, all threads
together: other programs on the machine change them less than they change what a clock shows.

- packed: at most a budget of patches for each image, and nothing else computed.
- padded to the budget, masked: the same patches, as timm's collation lays them out.
- padded to a square, as large: squares in which the images have on average as many patches as in "packed".
- padded to a square of the budget: what the budget costs as squares; the images are smaller in them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main
from tools.bench import harness

DEFAULT_MODEL = "configs/models/naflex_vit_tiny.json"
ASPECTS = "1:1,4:3,3:4,3:2,2:3,16:9,9:16"
SIDE = 320  # of the longer side of a drawn image, pixels
PACKED, MASKED = "packed", "padded to the budget, masked"
LARGE, SAME_COST = "padded to a square, as large", "padded to a square of the budget"
EXAMPLES = f"""  python tools/bench/native_aspect.py model.patch_budget=256
  python tools/bench/native_aspect.py model.patch_budget=196 --aspects 1:1,2:1 --images 16 --rounds 3

Without model.name {DEFAULT_MODEL} is measured, in fp32 on a CPU."""


@dataclass(frozen=True)
class Way:
    """One way to give the same images to a tower: its pass, and patches by image, computed and of the image itself."""

    run: Callable[[], object]
    computed: float
    shown: float


def main() -> int:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the model")
    parser.add_argument("--aspects", default=ASPECTS, metavar="W:H,...", help=f"equally frequent ({ASPECTS})")
    parser.number("--images", 28, "N", "images of a pass")
    parser.number("--rounds", 5, "R", "timed passes of each way")
    args = parser.parse()
    aspects = read_aspects(args.aspects)
    config = load_config(None, [f"model.name={DEFAULT_MODEL}", *args.overrides])
    ways = make_ways(config, aspects, args.images)
    seconds = harness.take_turns({name: timed(way) for name, way in ways.items()}, args.rounds, warmup=1)
    ratios = {name: harness.ratios(seconds[name], seconds[PACKED]) for name in ways}
    record = {name: statistics.median(found) for name, found in ratios.items() if name != PACKED}
    return harness.finish(args, report(config, args, ways, seconds, ratios), {"ratio": record})


def read_aspects(text: str) -> list[tuple[int, int]]:
    """Return (width, height) of aspect ratios W:H,W:H ..."""
    try:
        found = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(len(pair) != 2 or min(pair) < 1 for pair in found):
        raise UserError(f"--aspects {text}: must be aspect ratios such as 4:3,1:1")
    return [(pair[0], pair[1]) for pair in found]


def make_ways(config: Config, aspects: list[tuple[int, int]], images: int) -> dict[str, Way]:
    """Draw the images, and lay them out in every way."""
    import numpy as np
    import torch

    from clipdist.data.decode import eval_pixels
    from clipdist.data.patches import grids
    from clipdist.data.transform import EvalTransform, NativeAspect
    from clipdist.datasets import scenes
    from clipdist.models.build import build_model

    torch.set_num_threads(1)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).train()
    native = model.spec.transform
    if not isinstance(native, NativeAspect):
        raise UserError(f"model.name={config.model.name}: its images are squares; set model.patch_budget")
    pixels = []
    for number in range(images):
        rng = np.random.default_rng(number)
        width, height = (round(SIDE * side / max(pair)) for pair in [aspects[number % len(aspects)]] for side in pair)
        scene = scenes.render_scene(scenes.sample_scene(rng), rng, SIDE)
        pixels.append(np.array(scene)[:height, :width])
    shapes = [(image.shape[0], image.shape[1]) for image in pixels]
    buffer = torch.stack([eval_pixels(image, native) for image in pixels])
    shown = statistics.mean(rows * columns for rows, columns in grids(buffer))

    def square(side: int) -> Way:
        transform = EvalTransform(side * native.patch, "longest")
        batch = torch.stack([eval_pixels(image, transform) for image in pixels])
        return Way(lambda: model.encode_image(batch), side**2, _shown_in(side, shapes))

    large = next(side for side in count(1) if _shown_in(side, shapes) >= shown)
    return {
        PACKED: Way(lambda: model.encode_image(buffer), shown, shown),
        MASKED: Way(lambda: model.visual(masked(model, buffer)), native.budget, shown),
        LARGE: square(large),
        SAME_COST: square(math.isqrt(native.budget)),
    }


def _shown_in(side: int, shapes: list[tuple[int, int]]) -> float:
    """Return the mean number of patches that images take up in a square of side * side patches, in parts of patches."""
    return statistics.mean(side**2 * min(shape) / max(shape) for shape in shapes)


def masked(model: Any, buffer: Any) -> dict[str, Any]:
    """Return a buffer's images in timm's layout: patches with coordinates, those behind an image's own marked."""
    import torch

    from clipdist.data.patches import grids

    sizes = grids(buffer)
    pixels = (buffer[:, 1:].reshape(-1, 3).float() / 255 - model.image_mean.view(3)) / model.image_std.view(3)
    patches = pixels.view(len(buffer), buffer.shape[1] - 1, -1)
    place = torch.arange(patches.shape[1])
    columns = torch.tensor([width for _, width in sizes])[:, None]
    valid = place < torch.tensor([height * width for height, width in sizes])[:, None]
    coord = torch.stack([place // columns, place % columns], dim=-1) * valid[..., None]
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def timed(way: Way) -> Callable[[], float]:
    """Return a function that runs a forward and a backward pass, and returns its processor seconds."""

    def run() -> float:
        began = time.process_time()
        features: Any = way.run()
        features.sum().backward()
        return time.process_time() - began

    return run


def report(
    config: Config,
    args: argparse.Namespace,
    ways: dict[str, Way],
    seconds: dict[str, list[float]],
    ratios: dict[str, list[float]],
) -> list[str]:
    """Return Markdown: a table, then what it was measured with."""
    from clipdist.models.spec import resolve_spec

    rows = []
    for name, way in ways.items():
        rate = args.images / statistics.median(seconds[name])
        found = ["", "", ""] if name == PACKED else harness.spread(ratios[name], ".2f")
        rows.append([name, f"{way.computed:.0f}", f"{way.shown:.0f}", f"{rate:.1f}", *found])
    header = ["", "patches computed", "of the image", "images/s", "packed is faster: least", "median", "largest"]
    return [
        f"# {config.model.name}: images at their own aspect ratio",
        "",
        *harness.markdown_table(header, rows),
        "",
        f"{args.images} drawn images of {args.aspects}, equally frequent; {resolve_spec(config.model).transform}."
        " Patches are means over the images; images a second of the processor's time, forward and backward.",
        "",
        *harness.provenance("cpu", 1, "timm"),
    ]


if __name__ == "__main__":
    run_main(main)
