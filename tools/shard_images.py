"""Write a folder of labelled images as tar shards whose captions name the classes."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

from clipdist.datasets.labelled import class_folders
from clipdist.datasets.pair_lists import open_list, survey
from clipdist.datasets.pair_shards import ShardPlan, write_pairs
from clipdist.datasets.shard_writer import MAX_SHARD_SIZE, hold_folder
from clipdist.errors import UserError, run_main
from clipdist.evals import front
from clipdist.evals.prompts import find_classes, find_templates, write_prompts

EXAMPLE = """examples:
  python tools/shard_images.py pets --out data/pets       # of pets/CLASS/*.jpg, or pets/{train,test}/CLASS/*.jpg
  python tools/shard_images.py pets --out data/pets --templates 'a photo of a {}, a type of pet.'

A sample has a caption for each template, and its class in the .json. docs/data.md says how to train on them."""
TEMPLATE = "a photo of a {}."


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="FOLDER/CLASS/*, or FOLDER/train and FOLDER/test")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    what = f"cifar10, imagenet, simple, a file, or one with {{}} ({TEMPLATE})"
    parser.add_argument("--templates", default=TEMPLATE, metavar="WHAT", help=what)
    what = "a file with a name per line, in the order of the sorted folders; default: the folders' names"
    parser.add_argument("--classes", default="", metavar="FILE", help=what)
    front.add_number(parser, "--per-shard", 1000, "pictures per shard (1000)", "N", most=MAX_SHARD_SIZE)
    shrink = "shrink to this shorter side; default: bytes untouched"
    front.add_number(parser, "--shrink", 0, shrink, "PIXELS", 0, 65_500)
    front.add_processes(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    splits = class_folders(arguments.folder)
    first = next(iter(splits))  # what is trained on, where there are two
    for name, images in splits[first].items():
        if len(images) == 1:
            raise UserError(f"{first / name}: a class with one picture; add some, or remove the folder")
    names = list(splits[first])
    classes = dict(zip(names, find_classes(arguments.classes, names)))
    templates = find_templates(arguments.templates)
    record = {"out": str(arguments.out), "classes": len(classes), "templates": len(templates)}
    for folder, files in splits.items():
        out = arguments.out / folder.name if len(splits) > 1 else arguments.out
        captions = {name: write_prompts([classes[name]], templates) for name in files}
        totals = write_split(arguments, folder, files, captions, out)
        print(f"{out}: {totals['samples']} pictures of {len(files)} classes, {totals['shards']} shards")
        for line in front.count_lines(f"left out (named in {out / 'skipped.jsonl'}):", totals["skipped"]):
            print(line)
        record[folder.name if len(splits) > 1 else "images"] = totals
    if len(templates) > 1:
        print("several templates: train with data.caption=all, or pictures of a class are negatives where these differ")
    front.finish(arguments, record)
    return 0


def write_split(
    arguments: argparse.Namespace,
    folder: Path,
    images: dict[str, list[Path]],
    captions: dict[str, list[str]],
    out: Path,
) -> dict:
    """Write the images of some classes in an order that mixes these, the same every time. Return the counts."""
    rows = [
        {"file": str(path.relative_to(folder)), "captions": captions[name], "class": name}
        for name, paths in images.items()
        for path in paths
    ]
    rows.sort(key=lambda row: hashlib.sha256(str(row["file"]).encode(errors="surrogateescape")).digest())
    with tempfile.TemporaryDirectory() as temporary:
        listed = Path(temporary) / "list.jsonl"
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = open_list(listed, "file", ["captions"], folder)
        found = survey(pairs)
        root = str(folder.absolute())
        plan = ShardPlan(found.fingerprint, pairs.columns, root, arguments.per_shard, arguments.shrink, True, "")
        with hold_folder(out):
            return write_pairs(pairs, found.images, out, plan, arguments.processes, None)


if __name__ == "__main__":
    run_main(main)
