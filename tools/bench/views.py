"""Measure what the views of an image cost on the CPU, by recipe, beside torchvision's transforms.

Each side takes the same encoded images, in turn, in one process and one thread, and gives uint8 views. torchvision gets
images that Pillow decodes, and decodes each once for all views. Times are of the processor.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from clipdist.config import Augment, Data
from clipdist.data.augment import (
    VIEW_UNIFORMS,
    View,
    apply_colour,
    blur_radius,
    colour_parameters,
    fill_views,
)
from clipdist.data.bad_sample import MAX_PIXELS, BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import decode_pixels
from clipdist.data.reader import Reader
from clipdist.data.views import image_view, view_of
from clipdist.errors import UserError, run_main
from tools.bench import harness
from tools.bench.images import PhotographLike

STRONG, BYOL = [0.8, 0.8, 0.8, 0.2], [0.4, 0.4, 0.2, 0.1]
SIMCLR = Augment(jitter=STRONG, grayscale=0.2, blur=0.5)
BYOL_PAIR = [
    Augment(jitter=BYOL, grayscale=0.2, blur=1.0),
    Augment(jitter=BYOL, grayscale=0.2, blur=0.1, solarise=0.2),
]
DINO_GLOBAL = [
    Augment(crop_scale=[0.4, 1.0], jitter=BYOL, grayscale=0.2, blur=1.0),
    Augment(crop_scale=[0.4, 1.0], jitter=BYOL, grayscale=0.2, blur=0.1, solarise=0.2),
]
DINO_LOCAL = Augment(crop_scale=[0.05, 0.4], jitter=BYOL, grayscale=0.2, blur=0.5, size=96)
RECIPES = {  # by the papers; "clip" is CLIP's own view
    "clip": [],
    "simclr": [SIMCLR, SIMCLR],
    "byol": BYOL_PAIR,
    "dino": [*DINO_GLOBAL, *[DINO_LOCAL] * 8],
}
PARTS = ("decode", "crop and resize", "colours", "blur and solarise")
EXAMPLES = """  python tools/bench/views.py
  python tools/bench/views.py data/flickr8k/train --size 224 --images 128 --out views.md --json"""


def main() -> int:
    args = parse_args()
    images = read_images(args)
    torch.set_num_threads(1)
    seconds: dict[str, dict[str, list[float]]] = {}
    for recipe in args.recipes:
        harness.say(recipe)
        seconds[recipe] = measure(recipe, images, args)
    medians = {
        recipe: {name: 1e3 * statistics.median(times) for name, times in of_recipe.items()}
        for recipe, of_recipe in seconds.items()
    }
    return harness.finish(args, report(args, seconds, images), {"ms": medians})


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    what = "folders, tars or patterns; without, drawn JPEGs of 640x480, as large as photographs"
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help=what)
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES], help="which to measure (all)")
    parser.number("--size", 224, "PIXELS", "side of the views, but DINO's local ones", least=16, most=4096)
    parser.number("--images", 64, "N", "images of a round", most=100_000)
    parser.number("--rounds", 5, "R", "timed rounds of each side", most=1000)
    return parser.parse()


def read_images(args: argparse.Namespace) -> list[bytes]:
    """Return encoded images: the first of the shards, or drawn ones.

    Raises:
        UserError: the shards cannot be read, or one of the images cannot be decoded.
    """
    if not args.shards:
        draw, found = PhotographLike().draw, []
        for number in range(args.images):
            file = io.BytesIO()
            draw(np.random.default_rng(number))[0].save(file, "JPEG", quality=95)
            found.append(file.getvalue())
        return found
    reader = Reader(Catalog.open(args.shards, "SHARDS"))
    found = []
    for sample_id in range(min(args.images, len(reader.catalog))):
        try:
            found.append(reader.sample(sample_id).image())
            decode_pixels(found[-1])
        except BadSample as error:
            raise UserError(f"SHARDS: {reader.key(sample_id)}: {error.reason}; measure with good samples") from None
    reader.close()
    return found


def measure(recipe: str, images: list[bytes], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return processor seconds per sample by round: of clipdist's parts, each with those before, and of torchvision."""
    own = [view_of(f"{recipe}/{number}", augment, args.size) for number, augment in enumerate(RECIPES[recipe])]
    views = own or [image_view(Data(), args.size)]

    unfiltered = [replace(view, augmentation=replace(view.augmentation, blur=0.0, solarise=0.0)) for view in views]
    cut = [
        replace(view, augmentation=replace(view.augmentation, jitter_probability=0.0, grayscale=0.0))
        for view in unfiltered
    ]
    sides: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(images),
        "crop and resize": Pipeline(images, cut),
        "colours": Pipeline(images, unfiltered),
        "blur and solarise": Pipeline(images, views),
        "torchvision": TorchvisionPipeline(images, views),
    }

    def timed(run: Callable[[], object]) -> float:
        began = time.process_time()
        run()
        return (time.process_time() - began) / len(images)

    return harness.take_turns({name: partial(timed, run) for name, run in sides.items()}, args.rounds, warmup=1)


def decode(images: list[bytes]) -> None:
    for data in images:
        decode_pixels(data)


class Pipeline:
    """What a decoding thread of clipdist does for some samples: the batch's rows are views that are filled."""

    def __init__(self, images: list[bytes], views: list[View]) -> None:
        self.images, self.views = images, views
        self.uniforms = np.random.default_rng(0).random((len(images), len(views), VIEW_UNIFORMS))
        shapes = [(len(images), view.size, view.size, 3) for view in views]
        self.outs = [torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for shape in shapes]

    def __call__(self) -> None:
        fill_views(self.images, self.views, self.uniforms, self.outs, MAX_PIXELS)
        for number, (view, out) in enumerate(zip(self.views, self.outs)):
            parameters = colour_parameters(self.uniforms[:, number], view.augmentation)
            if parameters is not None:
                out.copy_(apply_colour(out, parameters))


class TorchvisionPipeline:
    """The same transforms as a user of torchvision writes them, on uint8 tensors."""

    def __init__(self, images: list[bytes], views: list[View]) -> None:
        self.images, self.transforms = images, [torchvision_transforms(view) for view in views]

    def __call__(self) -> None:
        for data in self.images:
            pixels = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
            for transform in self.transforms:
                transform(pixels)


def torchvision_transforms(view: View) -> v2.Transform:
    given, kernel = view.augmentation, 2 * blur_radius(view.size) + 1
    scale = (given.crop_scale_min, given.crop_scale_max)
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(view.size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(given.flip),
    ]
    if any(given.jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*given.jitter)], given.jitter_probability))
    steps.append(v2.RandomGrayscale(given.grayscale))
    if given.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], given.blur))
    steps.append(v2.RandomSolarize(128, given.solarise))
    return v2.Compose(steps)


def report(args: argparse.Namespace, seconds: dict[str, dict[str, list[float]]], images: list[bytes]) -> list[str]:
    """Return Markdown: a table, then what it was measured with."""
    rows = []
    for recipe, times in seconds.items():
        medians = [1e3 * statistics.median(times[part]) for part in PARTS]
        steps = [medians[0], *(after - before for before, after in itertools.pairwise(medians))]
        ratios = harness.ratios(times["torchvision"], times[PARTS[-1]])
        theirs = 1e3 * statistics.median(times["torchvision"])
        views = max(1, len(RECIPES[recipe]))
        rows.append([recipe, str(views), *(f"{step:.2f}" for step in steps), f"{medians[-1]:.2f}", f"{theirs:.2f}"])
        rows[-1] += harness.spread(ratios, ".2f")
    header = ["", "views", *PARTS, "all", "torchvision", "ratio, least", "median", "largest"]
    size = sum(map(len, images)) / len(images) / 1e3
    return [
        "# What the views of an image cost",
        "",
        "Milliseconds of one core per sample, medians; the ratios are torchvision's time over clipdist's, by round.",
        "",
        *harness.markdown_table(header, rows),
        "",
        f"{len(images)} images of {size:.0f} KB, views of {args.size} pixels (DINO's eight local ones of 96).",
        "",
        *harness.provenance("cpu", 1, "torchvision", "pillow", "simplejpeg"),
    ]


if __name__ == "__main__":
    run_main(main)
