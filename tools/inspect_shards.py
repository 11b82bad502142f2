"""Show what shards hold, as tables and a contact sheet: sizes, captions, repeats, damage."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipdist.data.bad_sample import BadSample
from clipdist.data.decode import decode_pixels
from clipdist.data.fetch import safe_name
from clipdist.data.first_look import look_at
from clipdist.data.members import Members, tell_sources
from clipdist.data.reader import Reader, open_reader
from clipdist.datasets.describe import choose_samples, describe_members, describe_samples, open_shards
from clipdist.datasets.examine import MOST_NAMED, ShardTask, examine_shard, shard_sources
from clipdist.datasets.interop import compare_readers
from clipdist.datasets.pool import in_order
from clipdist.errors import EXIT_FAULT, UserError, run_main
from clipdist.evals import front
from clipdist.evals.sheet import SheetRow, contact_sheet, first_caption

EXAMPLE = """examples:
  python tools/inspect_shards.py data/flickr8k/train --sheet train.png
  python tools/inspect_shards.py data/cc3m --samples 2000 --verify --json
  python tools/inspect_shards.py data/cc3m --interop"""
SHEET_IMAGES = 32


def parse_arguments() -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="folders, tars, globs, brace patterns, .txt lists, .index.zip files"
    )
    front.add_number(parser, "--samples", 10_000, "read at most so many samples (10000)", "N")
    parser.add_argument(
        "--verify", action="store_true", help="read and decode every sample; damage ends in exit code 1"
    )
    parser.add_argument(
        "--interop", action="store_true", help="only compare with what webdataset reads; differences end in exit code 1"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw some pictures with their captions")
    front.add_members(parser)
    front.add_images_only(parser)
    front.add_processes(parser, "of --verify, --interop; ")
    arguments = parser.parse_args()
    if arguments.interop and (arguments.verify or arguments.sheet):
        parser.error("--interop stands alone: leave --verify and --sheet out")
    if arguments.sheet and arguments.sheet.suffix != ".png":
        parser.error(f"--sheet {arguments.sheet}: the name must end in .png")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.sheet and not os.access(arguments.sheet.absolute().parent, os.W_OK):
        raise UserError(f"--sheet {arguments.sheet}: no such folder, or it cannot be written")
    if arguments.interop:
        return compare_with_webdataset(arguments)
    members = front.members_of_arguments(arguments)
    opened = open_shards(arguments.shards, members)
    if not len(opened.catalog):
        raise UserError(opened.damaged[0] if opened.damaged else f"no samples in {' '.join(arguments.shards)}")
    for damage in opened.damaged:
        print(f"damaged: {damage}", file=sys.stderr)
    result = {**describe_members(opened.catalog), "indexed": opened.indexed, "damaged": opened.damaged}
    try:
        look_at(opened.catalog, "SHARDS", [" ".join(arguments.shards)], not arguments.images_only)
    except UserError as error:  # the table says what is there instead
        front.tell(str(error))
    ids = choose_samples(opened.catalog, arguments.samples)
    reader = open_reader(opened.catalog)
    try:
        result |= describe_samples(reader, ids, not arguments.images_only)
        if arguments.sheet:
            draw_sheet(reader, ids, arguments.sheet)
    finally:
        reader.close()
    if arguments.verify:
        result["verified"] = verify(arguments.shards, arguments.processes, members, not arguments.images_only)
    front.finish(arguments, result, table(result))
    return EXIT_FAULT if opened.damaged or result.get("verified") else 0


def verify(shards: list[str], processes: int, members: Members, captions: bool) -> dict[str, int]:
    """Read and decode everything. Return how many samples have each defect; the first are named on stderr."""
    sources = shard_sources(shards)
    defects: Counter[str] = Counter()
    named = 0
    with tempfile.TemporaryDirectory(prefix="clipdist-") as folder:
        place = Path(folder)
        task = ShardTask(
            verify=True, output="nothing", salvage=True, reread=True, folder=place, members=members, captions=captions
        )
        results = in_order(functools.partial(examine_shard, task=task), sources, processes)
        for found in tqdm(results, total=len(sources), desc="verify", unit="shard", disable=None):
            defects += found.defects
            for key, defect in found.named[: max(0, MOST_NAMED - named)]:
                tqdm.write(f"defective: {safe_name(found.tar)}: {key!r}: {defect}", file=sys.stderr)
                named += 1
    return dict(defects.most_common())


def compare_with_webdataset(arguments: argparse.Namespace) -> int:
    """Compare both readers on every shard. Return the exit code."""
    sources = shard_sources(arguments.shards)
    found = []
    with tempfile.TemporaryDirectory(prefix="clipdist-") as folder:
        compare = functools.partial(compare_readers, folder=Path(folder))
        results = in_order(compare, sources, arguments.processes)
        for result in tqdm(results, total=len(sources), desc="interop", unit="shard", disable=None):
            found.append(result)
            for line in result.told:
                tqdm.write(f"differs: {result.tar}: {line}", file=sys.stderr)
    totals = {
        "shards": len(found),
        "samples": sum(shard.clipdist for shard in found),
        "samples_webdataset": sum(shard.webdataset for shard in found),
        "differences": sum(shard.differences for shard in found),
    }
    line = (
        f"{totals['shards']} shards: {totals['samples']} samples for clipdist, {totals['samples_webdataset']} for "
        f"webdataset, {totals['differences'] or 'no'} differences"
    )
    differing = {shard.tar: list(shard.told) for shard in found if shard.differences}
    front.finish(arguments, {**totals, "differing": differing}, [line])
    return EXIT_FAULT if totals["differences"] else 0


def draw_sheet(reader: Reader, ids: np.ndarray, path: Path) -> None:
    """Draw images spread evenly over the samples that were looked at."""
    images, labels = [], []
    for sample_id in ids[np.linspace(0, len(ids) - 1, min(len(ids), SHEET_IMAGES)).astype(int)].tolist():
        try:
            images.append(decode_pixels(reader.sample(sample_id).image()))
        except BadSample as error:
            print(f"defective: {reader.shard_name(sample_id)}: {reader.key(sample_id)!r}: {error}", file=sys.stderr)
            continue
        labels.append(f"{reader.key(sample_id)}\n{first_caption(reader, sample_id)}")
    if not images:
        raise UserError(f"--sheet {path}: none of the pictures looked at can be decoded")
    contact_sheet([SheetRow(f"{len(images)} of {len(reader.catalog)} samples", images, labels)]).save(path)


def table(result: dict) -> list[str]:
    per_shard, images, captions = result["samples_per_shard"], result["pictures"], result["captions"]
    looked = "all" if result["looked_at"] == result["samples"] else f"a sample of {result['looked_at']}"
    lines = [
        f"{result['samples']} samples in {result['shards']} shards, {result['bytes'] / 1e6:.1f} MB; "
        f"{per_shard['0']:g} / {per_shard['50']:g} / {per_shard['100']:g} a shard (least / median / most)",
        f"{result['indexed']} shards have a fresh index, {result['shards_with_checksums']} have checksums",
        "members, % of samples: " + ", ".join(f"{kind} {share:.4g}" for kind, share in result["kinds"].items()),
        f"token ids: {', '.join(result['token_ids']) or 'none'}",
        f"of {looked}:",
        "  formats: " + (", ".join(f"{count} {kind}" for kind, count in images["formats"].items()) or "none"),
        f"{'percentile':>14}" + "".join(f"{p:>9}" for p in captions["words"] or images["width"]),
    ]
    rows = [(name, images[name]) for name in ("width", "height", "aspect")]
    rows += [(name, captions[name]) for name in ("per_picture", "words", "characters") if captions["count"]]
    lines += [f"{name.replace('_', ' '):>14}" + "".join(f"{v:>9.4g}" for v in values.values()) for name, values in rows]
    if captions["count"]:
        lines += [
            f"  captions are {tell_sources(captions['sources'])}",
            f"  {captions['count']} captions, {captions['vocabulary']} different words: "
            + ", ".join(f"{word} {count}" for word, count in captions["most_frequent"].items()),
        ]
    else:
        lines.append("  no captions")
    lines.append(f"  repeats: {images['repeated']} pictures, {captions['repeated']} captions equal an earlier one")
    lines += front.count_lines("", result["unusable"])[1:]
    if "verified" in result:
        lines += front.count_lines("verified: every sample, of which", result["verified"]) or [
            "verified: every sample is good"
        ]
    return lines


if __name__ == "__main__":
    run_main(main)
