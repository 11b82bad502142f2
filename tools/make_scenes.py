"""Draw captioned images in Flickr8k's layout, and an image folder of labelled ones."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from clipdist.datasets.scenes import SCENES_VERSION, write_labelled, write_scenes
from clipdist.datasets.shard_writer import read_own, write_json
from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

SCENES, LABELLED, STAMP = "scenes", "labelled", "made.json"
MAKER = "tools/make_scenes.py"
EXAMPLE = """examples:
  python tools/make_scenes.py --out runs/demo-data
  python tools/make_scenes.py --out data/scenes --seed 1 --train 20000

Writes OUT/scenes in Flickr8k's original layout (for tools/shard_flickr8k.py) and OUT/labelled/{train,test}/COLOUR/*.png
(for tools/probe_cifar10.py). The same options give the same bytes."""


def parse_arguments() -> argparse.Namespace:
    parser = front.make_parser(
        "Draws captioned scenes, and pictures with a colour as label: data to try everything on.", EXAMPLE
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes/ and labelled/")
    front.add_number(parser, "--seed", 0, "another seed draws other pictures (0)", "N", 0)
    for name, default, what in (
        ("train", 6000, "captioned pictures to train on"),
        ("dev", 300, "captioned pictures to validate on"),
        ("test", 1000, "captioned pictures to evaluate on"),
        ("labelled-train", 600, "labelled pictures to fit a probe on"),
        ("labelled-test", 400, "labelled pictures to measure it on"),
    ):
        front.add_number(parser, f"--{name}", default, f"{what} ({default})", "N")
    front.add_processes(parser)
    front.add_renamed(parser, "--workers", "--processes")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    wanted = {"maker": MAKER, "version": SCENES_VERSION, "seed": arguments.seed}
    wanted |= {name: getattr(arguments, name) for name in ("train", "dev", "test", "labelled_train", "labelled_test")}
    there = read_stamp(arguments.out) == {**wanted, "complete": True}
    if there:
        print(f"{arguments.out} holds this set already: nothing to do")
    else:
        for name in (SCENES, LABELLED):  # of an earlier or interrupted run: images of two sets must not mix
            if (arguments.out / name).exists():
                shutil.rmtree(arguments.out / name)
        stamp(arguments.out, {**wanted, "complete": False})
        draw(arguments)
        stamp(arguments.out, {**wanted, "complete": True})
        images = arguments.train + arguments.dev + arguments.test
        print(f"{arguments.out / SCENES}: {images} pictures with five captions each, Flickr8k's layout")
        labelled = arguments.labelled_train + arguments.labelled_test
        print(f"{arguments.out / LABELLED}: {labelled} pictures with a label each, a folder per class")
    front.finish(arguments, {**wanted, "out": str(arguments.out), "written": not there})
    return 0


def read_stamp(out: Path) -> dict | None:
    """Return what was written here and whether to the end; None where nothing was.

    Raises:
        UserError: the folders hold something that this tool did not write.
    """
    made = read_own(out / STAMP, maker=MAKER)
    foreign = [name for name in (SCENES, LABELLED) if (out / name).exists()]
    if made is None and foreign:
        raise UserError(f"{out / foreign[0]} was not written by this tool; choose another --out")
    return made


def stamp(out: Path, content: dict) -> None:
    with writing(f"--out {out}", "; choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STAMP, content)


def draw(arguments: argparse.Namespace) -> None:
    counts = {name: getattr(arguments, name) for name in ("train", "dev", "test")}
    total = sum(counts.values()) + arguments.labelled_train + arguments.labelled_test
    with tqdm(total=total, unit="picture", disable=not sys.stderr.isatty()) as bar:
        write_scenes(arguments.out / SCENES, arguments.seed, counts, arguments.processes, bar.update)
        write_labelled(
            arguments.out / LABELLED,
            arguments.seed,
            arguments.labelled_train,
            arguments.labelled_test,
            arguments.processes,
            bar.update,
        )


if __name__ == "__main__":
    run_main(main)
