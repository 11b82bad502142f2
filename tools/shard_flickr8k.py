"""Write Flickr8k, as downloaded, as tar shards by split, with statistics and a report of everything left out."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

from clipdist.datasets.flickr8k import (
    NOT_COMPARABLE,
    SPLITS,
    Defects,
    Flickr8kSource,
    keep_from_training,
    random_splits,
    read_source,
)
from clipdist.datasets.images import CheckedImage, check_images, write_splits
from clipdist.datasets.shard_writer import MAX_SHARD_SIZE, ShardFacts, is_whole, publish, read_own, staging, write_json
from clipdist.errors import UserError, run_main
from clipdist.evals import front

FORMAT = 1  # of what is written: raise it when the same source would give other bytes
NAMES = {split: f"flickr8k-{split}" for split in SPLITS}
EXAMPLE = """examples:
  python tools/shard_flickr8k.py Flickr8k_Dataset.zip Flickr8k_text.zip --out data/flickr8k
  python tools/shard_flickr8k.py archive.zip --splits random:0 --out data/flickr8k        # Kaggle's download
  python tools/shard_flickr8k.py dataset_flickr8k.json --images Images --out data/flickr8k  # Karpathy's splits

docs/data.md says where the data set comes from."""


def parse_arguments() -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="folder, zip or file; the layout is detected")
    parser.add_argument("--out", required=True, type=Path, help="folder for train/, val/, test/, extra/ and stats.json")
    parser.add_argument("--images", metavar="DIR", help="take the pictures from this folder or zip")
    parser.add_argument("--lists", metavar="DIR", help="take Flickr_8k.{train,dev,test}Images.txt from here")
    parser.add_argument(
        "--splits", metavar="official|random:SEED", help="default: the lists' or the JSON's; required without either"
    )
    front.add_number(parser, "--per-shard", 500, "samples per shard at most (500)", "N", most=MAX_SHARD_SIZE)
    shrink = "shrink to this shorter side; default: bytes untouched"
    front.add_number(parser, "--shrink", 0, shrink, "PIXELS", 0, 65_500)
    front.add_processes(parser)
    for old, new in (("--workers", "--processes"), ("--shard-size", "--per-shard"), ("--resize", "--shrink")):
        front.add_renamed(parser, old, new)
    parser.add_argument("--no-verify", action="store_true", help="read the pictures' headers only, do not decode them")
    parser.add_argument("--overwrite", action="store_true", help="write anew, in place of what an earlier run wrote")
    arguments = parser.parse_args()
    if arguments.splits and not re.fullmatch(r"official|random:\d+", arguments.splits):
        parser.error(f"--splits {arguments.splits}: expected official, or random: and a whole number (random:0)")
    if arguments.lists and (arguments.splits or "").startswith("random:"):
        parser.error("--lists and --splits random: exclude one another")
    if arguments.shrink and arguments.no_verify:
        parser.error("--shrink decodes every picture: it does not go with --no-verify")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    defects = Defects()
    drawn = (arguments.splits or "").startswith("random:")
    source = read_source(arguments.source, defects, arguments.images, arguments.lists, with_splits=not drawn)
    split_source = choose_splits(source, arguments)
    identity = fingerprint(source, split_source, arguments)
    stats = finished(arguments.out, identity)
    if stats is None or arguments.overwrite:
        require_free(arguments)
        stats = build(source, split_source, identity, arguments, defects)
    else:
        print(f"{arguments.out} is there already, from this source and with these options: nothing to do")
    front.finish(arguments, {**stats, "out": str(arguments.out)}, table(stats, arguments.out))
    return 0


def choose_splits(source: Flickr8kSource, arguments: argparse.Namespace) -> str:
    """Return "lists", "json", or "random:SEED".

    Raises:
        UserError: nothing in the source says which image is for training.
    """
    if arguments.splits and arguments.splits.startswith("random:"):
        return arguments.splits
    if source.split is None:
        wanted = "--splits official: " if arguments.splits else ""
        raise UserError(
            f"{wanted}the source has no split lists (Flickr_8k.trainImages.txt ...): name them with --lists DIR, use "
            f"Karpathy's dataset_flickr8k.json, or draw splits with --splits random:0 ({NOT_COMPARABLE})"
        )
    return "json" if source.layout == "karpathy" else "lists"


def fingerprint(source: Flickr8kSource, split_source: str, arguments: argparse.Namespace) -> str:
    """Return hex digits that are equal where a run would write the same bytes again."""
    said = [FORMAT, source.fingerprint, split_source, arguments.per_shard, arguments.shrink, arguments.no_verify]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def finished(out: Path, identity: str) -> dict | None:
    """Return the statistics of an earlier run with the same outcome, if all of its shards are still there."""
    stats, report = (read_own(out / name, dataset="flickr8k") for name in ("stats.json", "report.json"))
    if stats is None or report is None or stats.get("fingerprint") != identity:
        return None
    return stats if all(is_whole(out / split) for split, count in stats["splits"].items() if count["shards"]) else None


def require_free(arguments: argparse.Namespace) -> None:
    there = [name for name in ("stats.json", *SPLITS) if (arguments.out / name).exists()]
    if there and not arguments.overwrite:
        raise UserError(
            f"{arguments.out / there[0]} is there already, from another source or other options, or incomplete: "
            "--overwrite replaces it, or choose another --out"
        )


def build(
    source: Flickr8kSource, split_source: str, identity: str, arguments: argparse.Namespace, defects: Defects
) -> dict[str, object]:
    """Check, split and write; the statistics come last, as the sign that all is there."""
    out, images = arguments.out, list(source.images.values())
    with staging(out, NAMES) as staged:
        good = []
        for image, checked in zip(images, check_images(images, not arguments.no_verify, arguments.processes)):
            if isinstance(checked, CheckedImage):
                good.append(checked)
            else:
                defects.add(checked, image.name)
        splits = keep_from_training(by_split(good, source, split_source), defects)
        if not any(splits.values()):
            raise UserError(f"no usable picture with a caption in {' '.join(arguments.source)}: {summary(defects)}")
        written = write_splits(staged, splits, NAMES, arguments.per_shard, arguments.shrink, arguments.processes)
        stats = statistics(source, split_source, identity, arguments, splits, written, defects)
        (out / "stats.json").unlink(missing_ok=True)
        publish(staged, SPLITS)
        write_json(out / "report.json", {"dataset": "flickr8k", **defects.report()})
        write_json(out / "stats.json", stats)
    return stats


def by_split(good: list[CheckedImage], source: Flickr8kSource, split_source: str) -> dict[str, list[CheckedImage]]:
    _, is_random, seed = split_source.partition("random:")
    split = random_splits((p.source.name for p in good), int(seed)) if is_random else source.split
    assert split is not None
    return {name: [p for p in good if split.get(p.source.name, "extra") == name] for name in SPLITS}


def statistics(
    source: Flickr8kSource,
    split_source: str,
    identity: str,
    arguments: argparse.Namespace,
    splits: dict[str, list[CheckedImage]],
    written: dict[str, list[ShardFacts]],
    defects: Defects,
) -> dict[str, object]:
    counts = {
        split: {
            "pictures": len(images),
            "captions": sum(len(p.source.captions) for p in images),
            "shards": len(written[split]),
            "bytes": sum(shard.size_bytes for shard in written[split]),
        }
        for split, images in splits.items()
    }
    report = defects.report()
    return {
        "dataset": "flickr8k",
        "format": FORMAT,
        "layout": source.layout,
        "split_source": split_source,
        "note": NOT_COMPARABLE if split_source.startswith("random:") else "",
        "shard_size": arguments.per_shard,
        "resize": arguments.shrink,
        "verified": not arguments.no_verify,
        "splits": counts,
        **{group: {reason: entry["count"] for reason, entry in report[group].items()} for group in report},
        "fingerprint": identity,
    }


def summary(defects: Defects) -> str:
    skipped = defects.report()["skipped"]
    return ", ".join(f"{entry['count']} x {reason}" for reason, entry in skipped.items()) or "none was found"


def table(stats: dict, out: Path) -> list[str]:
    note = f" ({stats['note']})" if stats["note"] else ""
    lines = [
        f"{out}: layout {stats['layout']}, splits by {stats['split_source']}{note}",
        f"{'split':<8}{'pictures':>10}{'captions':>10}{'shards':>8}{'MB':>10}",
    ]
    for split, count in stats["splits"].items():
        megabytes = count["bytes"] / 1e6
        lines.append(f"{split:<8}{count['pictures']:>10}{count['captions']:>10}{count['shards']:>8}{megabytes:>10.1f}")
    for group, title in (("skipped", "left out"), ("noted", "kept, worth knowing")):
        lines += front.count_lines(f"{title} (names in {out / 'report.json'}):", stats[group])
    return lines


if __name__ == "__main__":
    run_main(main)
