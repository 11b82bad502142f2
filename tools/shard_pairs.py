"""Write any list of images and captions as tar shards, resumable.

Lists: CSV, TSV, Parquet (with files' names or the pictures themselves), JSONL, COCO's captions, a folder of pairs.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

from clipdist.datasets.pair_lists import PairList, open_list, survey
from clipdist.datasets.pair_shards import PackCaptions, ShardPlan, write_pairs
from clipdist.datasets.shard_writer import MAX_SHARD_SIZE, hold_folder
from clipdist.errors import run_main
from clipdist.evals import front

EXAMPLE = """examples:
  python tools/shard_pairs.py captions.csv --images-root Images --out data/mine
  python tools/shard_pairs.py list.parquet --image-column path --caption-column TEXT --shrink 256 --out data/mine
  python tools/shard_pairs.py 'flickr30k/data/test-*.parquet' --out data/mine      # the pictures are in it
  python tools/shard_pairs.py annotations/captions_train2017.json --images-root train2017 --out data/coco
  python tools/shard_pairs.py folder_of_pairs --out data/mine          # a.jpg beside a.txt or a.json

A run that was cut off is finished by the same command. docs/data.md says more."""


DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    what = ".csv, .tsv, .parquet (a folder or pattern too), .jsonl, COCO's .json, or a folder of pairs"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--image-column", metavar="NAME", help="the pictures' file names, or bytes; default: found")
    what = "of captions (repeatable); default: found"
    parser.add_argument("--caption-column", action="append", default=[], metavar="NAME", help=what)
    parser.add_argument(
        "--images-root", type=Path, metavar="DIR", help="where relative file names start; default: the list's folder"
    )
    front.add_number(parser, "--per-shard", 1000, "pictures of the list per shard (1000)", "N", most=MAX_SHARD_SIZE)
    shrink = "shrink to this shorter side; default: bytes untouched"
    front.add_number(parser, "--shrink", 0, shrink, "PIXELS", 0, 65_500)
    parser.add_argument("--no-verify", action="store_true", help="read the pictures' headers only, do not decode them")
    parser.add_argument("--no-quotes", action="store_true", help="quotation marks of a CSV or TSV are plain characters")
    parser.add_argument("--tokens", metavar="MODEL", help="store token ids for this model (open_clip name or JSON) too")
    front.add_processes(parser)
    arguments = parser.parse_args(argv)
    if arguments.shrink and arguments.no_verify:
        parser.error("--shrink decodes every picture: it does not go with --no-verify")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments, began = parse_arguments(argv), time.perf_counter()
    pairs = open_list(
        arguments.source,
        arguments.image_column,
        arguments.caption_column,
        arguments.images_root,
        quotes=not arguments.no_quotes,
    )
    print(reading(pairs), flush=True)
    pack, kind = tokens_for(arguments.tokens)
    found = survey(pairs)
    plan = ShardPlan(
        list=found.fingerprint,
        columns=pairs.columns,
        images_root=str(pairs.root.absolute()),
        per_shard=arguments.per_shard,
        shrink=arguments.shrink,
        verified=not arguments.no_verify,
        tokens=kind,
    )
    try:
        with hold_folder(arguments.out):
            totals = write_pairs(pairs, found.images, arguments.out, plan, arguments.processes, pack)
    except KeyboardInterrupt:
        print(f"{arguments.out} holds whole shards only; the same command goes on from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - began
    record = {
        "out": str(arguments.out),
        "image_column": pairs.columns[0],
        "caption_column": ", ".join(pairs.columns[1:]),
        "pictures": found.images,
        "repeated": found.repeated,
        "backslashes": found.backslashes,
        **totals,
        "tokens": kind,
        "seconds": round(seconds, 3),
    }
    front.finish(arguments, record, table(record, seconds))
    return 0


def tokens_for(model: str | None) -> tuple[PackCaptions | None, str]:
    """Return what makes the member with token ids, and its kind; here, in one process: it is a small part of the work.

    Raises:
        UserError: no such model, or its tokenizer is not to be had.
    """
    if model is None:
        return None, ""
    from clipdist import config
    from clipdist.data.tokens import make_tokenizer, pack_tokens, token_kind
    from clipdist.models.spec import resolve_spec

    tokenizer = make_tokenizer(resolve_spec(config.Model(name=model)))
    return functools.partial(pack_tokens, tokenizer), token_kind(tokenizer)


def reading(pairs: PairList) -> str:
    """Return in words what was taken for what."""
    if pairs.form == "folder":
        return f"{pairs.source}: a folder of pairs"
    image, *captions = pairs.columns
    where = f"the bytes of column {image!r}" if pairs.holds_images else f"files of column {image!r} in {pairs.root}"
    words = f"pictures: {where}; captions: column {', '.join(map(repr, captions))}"
    own = "\t" if pairs.source.suffix.lower() == ".tsv" else ","
    if pairs.form == "csv" and pairs.delimiter != own:
        words += f"; parted by {DELIMITERS[pairs.delimiter]}"
    return f"{pairs.source}: {f'{len(pairs.files)} files; ' if pairs.files[1:] else ''}{words}"


def table(record: dict, seconds: float) -> list[str]:
    out = Path(record["out"])
    lines = [
        f"{out}: {record['shards_written_now']} shards written now, in {seconds:.1f} s"
        if record["shards_written_now"]
        else f"{out}: all shards are there already: nothing to do",
        f"{'samples':>10}{'captions':>10}{'shards':>8}{'MB':>10}",
        f"{record['samples']:>10}{record['captions']:>10}{record['shards']:>8}{record['bytes'] / 1e6:>10.1f}",
        *front.count_lines(f"left out (named in {out / 'skipped.jsonl'}):", record["skipped"]),
    ]
    noted = {
        "pictures repeated elsewhere in the list (sort it to join their captions)": record["repeated"],
        "names with backslashes, which are read as / where no file has the name": record["backslashes"],
    }
    return lines + front.count_lines("kept, worth knowing:", {reason: n for reason, n in noted.items() if n})


if __name__ == "__main__":
    run_main(main)
