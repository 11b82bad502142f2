"""Write images as tar shards: folders by class and CIFAR with captions that name the classes, any folder without."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from clipdist.datasets.image_sets import ImageSet, open_image_sets
from clipdist.datasets.pair_lists import survey
from clipdist.datasets.pair_shards import ShardPlan, write_pairs
from clipdist.datasets.shard_writer import MAX_SHARD_SIZE, hold_folder
from clipdist.errors import UserError, run_main
from clipdist.evals import front
from clipdist.evals.prompts import find_classes, find_templates, write_prompts

EXAMPLE = """examples:
  python tools/shard_images.py pets --out data/pets       # of pets/CLASS/*.jpg, or pets/{train,test}/CLASS/*.jpg
  python tools/shard_images.py pets --out data/pets --templates 'a photo of a {}, a type of pet.'
  python tools/shard_images.py cifar-10-batches-py --out data/cifar10
  python tools/shard_images.py holidays --out data/holidays --unlabelled

A sample has a caption for each template, its class in the .json, and the number of the class as .cls; without classes
it is an image alone, for objectives that need no text. docs/data.md says how to train on them."""
TEMPLATE = "a photo of a {}."


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    what = "FOLDER/CLASS/*, FOLDER/train and FOLDER/test, CIFAR's folder or archive, or pictures without folders"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=what)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    what = "folders are no classes: all pictures at any depth, without labels and captions"
    parser.add_argument("--unlabelled", action="store_true", help=what)
    what = f"cifar10, imagenet, simple, a file, or one with {{}} ({TEMPLATE})"
    parser.add_argument("--templates", default="", metavar="WHAT", help=what)
    what = "a file with a name per line, in the order of the sorted folders; default: the folders' names"
    parser.add_argument("--classes", default="", metavar="FILE", help=what)
    front.add_number(parser, "--per-shard", 1000, "pictures per shard (1000)", "N", most=MAX_SHARD_SIZE)
    shrink = "shrink to this shorter side; default: bytes untouched"
    front.add_number(parser, "--shrink", 0, shrink, "PIXELS", 0, 65_500)
    front.add_processes(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    splits = open_image_sets(arguments.folder, arguments.unlabelled)
    first = next(iter(splits.values()))  # what is trained on, where there are two
    captions = captions_of(arguments, first)
    templates = len(next(iter(captions.values()), ()))
    record = {"out": str(arguments.out), "classes": len(first.classes), "templates": templates}
    for name, images in splits.items():
        out = arguments.out / name
        totals = write_split(arguments, replace(images, captions=captions), out)
        classes = "" if images.labels is None else f" of {len(set(images.labels))} classes"
        print(f"{out}: {totals['samples']} pictures{classes}, {totals['shards']} shards")
        for line in front.count_lines(f"left out (named in {out / 'skipped.jsonl'}):", totals["skipped"]):
            print(line)
        record[name or "images"] = totals
    if templates > 1:
        print("several templates: train with data.caption=all, or pictures of a class are negatives where these differ")
    if not captions:
        print("no captions: for objectives that need no text")
    front.finish(arguments, record)
    return 0


def captions_of(arguments: argparse.Namespace, images: ImageSet) -> dict[str, list[str]]:
    """Return the captions of every class; none where there are no classes.

    Raises:
        UserError: options that need classes where there are none; a class with a single image.
    """
    if images.labels is None:
        given = [f"--{name}" for name in ("templates", "classes") if getattr(arguments, name)]
        if given:
            raise UserError(f"{given[0]}: {images.source} has no classes; leave it out, or move the pictures to CLASS/")
        return {}
    counts = Counter(images.labels)
    for label, name in enumerate(images.classes):
        if counts[label] == 1:
            raise UserError(f"{images.source / name}: a class with one picture; add some, or remove the folder")
    names = find_classes(arguments.classes, [name.replace("_", " ") for name in images.classes])
    templates = find_templates(arguments.templates or TEMPLATE)
    return {own: write_prompts([name], templates) for own, name in zip(images.classes, names)}


def write_split(arguments: argparse.Namespace, images: ImageSet, out: Path) -> dict:
    """Write the images of a split. Return the counts."""
    found = survey(images)
    root = str(images.source.absolute())
    plan = ShardPlan(found.fingerprint, images.columns, root, arguments.per_shard, arguments.shrink, True, "")
    with hold_folder(out):
        return write_pairs(images, found.images, out, plan, arguments.processes, None)


if __name__ == "__main__":
    run_main(main)
