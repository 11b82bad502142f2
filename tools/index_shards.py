"""Index the samples of shards: one file beside each shard, or one for all, checked and filtered if wanted."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from clipdist.data import consolidated
from clipdist.data.consolidated import Part, write_parts
from clipdist.data.fetch import is_remote, safe_name
from clipdist.data.filters import DERIVED, Condition, parse_condition, rule_of
from clipdist.data.members import DEFAULT_MEMBERS
from clipdist.datasets.examine import DEFECT, MOST_NAMED, Examined, ShardSource, ShardTask, examine_shard, shard_sources
from clipdist.datasets.pool import in_order
from clipdist.errors import EXIT_FAULT, Fault, UserError, run_main
from clipdist.evals import front

EXAMPLE = f"""examples:
  python tools/index_shards.py data/cc3m                                  # NNNNN.tar.idx.npz beside every shard
  python tools/index_shards.py data/cc3m --verify                         # read and decode everything once
  python tools/index_shards.py 'https://host/cc3m/{{00000..00331}}.tar' --out cc3m{consolidated.SUFFIX}
  python tools/index_shards.py data/cc3m --where 'short >= 200' --where 'aspect <= 3' --out big{consolidated.SUFFIX}

A run that was cut off is finished by the same command. docs/data.md says more."""
COLUMN_SHARDS = 16  # none of which has a column: then it is a typing error


@dataclass
class Tally:
    """The sums over all shards, as they come in."""

    conditions: tuple[Condition, ...]
    shards: int = 0
    made: int = 0
    samples: int = 0
    kept: int = 0
    tar_bytes: int = 0
    kinds: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    with_columns: int = 0  # shards whose columns have been seen
    passed: Counter[int] = field(default_factory=Counter)  # by the number of the condition
    damaged: list[tuple[str, str]] = field(default_factory=list)
    empty: int = 0  # damaged shards of which nothing can be used
    defects: Counter[str] = field(default_factory=Counter)
    named: int = 0
    unsaid: list[str] = field(default_factory=list)  # lines for stderr, until a sample shows that the input is no error

    def add(self, found: Examined) -> None:
        self.shards += 1
        self.made += found.made
        self.samples += found.samples
        self.kept += found.kept
        self.tar_bytes += found.tar_bytes
        self.kinds |= set(found.kinds)
        self.columns |= set(found.columns)
        self.with_columns += bool(found.samples and found.passed)
        self.passed.update({number: count or 0 for number, count in enumerate(found.passed)})
        self.defects += found.defects
        if found.damage:
            self.damaged.append((safe_name(found.tar), found.damage))
            self.empty += not found.samples
        self._say(found)
        if self.with_columns == COLUMN_SHARDS:
            self.require_columns()

    @property
    def good(self) -> int:
        """Samples without defects."""
        return self.samples - sum(self.defects.values())

    def require_columns(self) -> None:
        """
        Raises:
            UserError: a condition is on a column that no shard has.
        """
        for condition in self.conditions:
            if self.with_columns and not self.columns.issuperset(condition.columns):
                there = sorted(self.columns | set(DERIVED))
                raise UserError(f"--where '{condition}': no such column; there are: {', '.join(there)}")

    def _say(self, found: Examined) -> None:
        """Name damaged shards, and the first defective samples."""
        if found.damage:
            self.unsaid.append(f"damaged: {found.damage}")
        for key, defect in found.named[: max(0, MOST_NAMED - self.named)]:
            self.unsaid.append(f"defective: {safe_name(found.tar)}: {key!r}: {defect}")
            self.named += 1
        while self.samples and self.unsaid:
            tqdm.write(self.unsaid.pop(0), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = front.make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="folders, tars, globs, brace patterns, addresses, .txt lists"
    )
    parser.add_argument(
        "--out", type=Path, metavar=f"NAME{consolidated.SUFFIX}", help="one file for all; remote shards need it"
    )
    parser.add_argument("--verify", action="store_true", help="read and decode every member; defects go into the index")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="EXPR",
        help="keep samples with e.g. 'short >= 200'; needs --out",
    )
    parser.add_argument("--salvage", action="store_true", help="keep the whole samples of damaged shards")
    parser.add_argument("--force", action="store_true", help="make indices anew that are fresh")
    front.add_members(parser)
    front.add_images_only(parser)
    front.add_processes(parser)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where a remote shard lies while it is read (TMPDIR)")
    arguments = parser.parse_args()
    if arguments.where and not arguments.out:
        parser.error("--where needs --out: shards are not rewritten, the one file names the samples that are kept")
    if arguments.out and not arguments.out.name.endswith(consolidated.SUFFIX):
        parser.error(f"--out {arguments.out}: the name must end in {consolidated.SUFFIX}")
    return arguments


def main() -> int:
    arguments, began = parse_arguments(), time.perf_counter()
    conditions = tuple(map(parse_condition, arguments.where))
    sources = find_sources(arguments)
    for folder in filter(None, (arguments.out and arguments.out.absolute().parent, arguments.cache)):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder}: no such folder, or it cannot be written")
    tally, members = Tally(conditions), front.members_of_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="clipdist-", dir=arguments.cache) as folder:
        task = ShardTask(
            verify=arguments.verify,
            conditions=conditions,
            output="part" if arguments.out else "beside",
            salvage=arguments.salvage,
            force=arguments.force,
            folder=Path(folder),
            members=members,
            captions=not arguments.images_only,
            reread=members != DEFAULT_MEMBERS,  # an earlier run may have looked for others
        )
        parts = examine(sources, task, tally, arguments.processes)
        if arguments.out:
            write_parts(arguments.out, parts, rule_of(conditions))
        else:
            for _ in parts:
                pass
    seconds = time.perf_counter() - began
    front.finish(arguments, report(tally, arguments, seconds), table(tally, arguments, seconds))
    return EXIT_FAULT if tally.empty or (tally.damaged and not arguments.salvage) else 0


def find_sources(arguments: argparse.Namespace) -> list[ShardSource]:
    """
    Raises:
        UserError: no shards match, or what needs --out is named without it.
    """
    sources = shard_sources(arguments.shards)
    for source in sources:
        if source.book and is_remote(source.book):
            raise UserError(f"{source.book}: copy this file to a disk first")
        if not arguments.out and (source.book or is_remote(source.tar)):
            raise UserError(f"{source.book or source.tar}: needs --out NAME{consolidated.SUFFIX}")
    return sources


def examine(sources: list[ShardSource], task: ShardTask, tally: Tally, processes: int) -> Iterator[Part]:
    """Yield the parts of the consolidated index, if one is wanted, as the shards get done.

    Raises:
        UserError: in all of the shards there is nothing to train on.
    """
    found_in_order = in_order(functools.partial(examine_shard, task=task), sources, processes)
    for found in tqdm(found_in_order, total=len(sources), desc="index", unit="shard", disable=None):
        tally.add(found)
        if found.part is not None:
            yield found.part
    require_samples(tally, task.members.images)


def require_samples(tally: Tally, images: Sequence[str]) -> None:
    tally.require_columns()
    if not tally.samples:
        raise UserError(tally.damaged[0][1] if tally.damaged else f"no samples in {tally.shards} shards")
    there = ", ".join(sorted(tally.kinds))
    if tally.kinds and not tally.kinds & set(images):
        raise UserError(f"no pictures in {tally.shards} shards: their members are {there}; see --image-members")
    if not tally.kept and tally.good:
        raise UserError(f"--where: none of {tally.good} samples meets {rule_of(tally.conditions)}")
    if not tally.kept:
        hint = "; --salvage keeps the whole samples of damaged shards" if tally.damaged else ""
        if "missing caption" in tally.defects:
            hint += f"; their members are {there}; see --caption-members, or --images-only"
        raise Fault(f"none of {tally.samples} samples can be used: {', '.join(tally.defects)}{hint}")


def dropped(tally: Tally) -> dict[str, int]:
    """Return samples that are not kept, by reason."""
    unmet = {"conditions not met": tally.good - tally.kept} if tally.good > tally.kept else {}
    return {**dict(tally.defects.most_common()), **unmet}


def report(tally: Tally, arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    return {
        "out": str(arguments.out) if arguments.out else None,
        "shards": tally.shards,
        "shards_indexed_now": tally.made,
        "damaged": dict(tally.damaged),
        "samples": tally.samples,
        "kept": tally.kept,
        "dropped": dropped(tally),
        "conditions": {
            str(c): {"passed": n, "dropped": tally.good - n} for c, n in zip(tally.conditions, tally.passed.values())
        },
        "columns": sorted(tally.columns - {DEFECT}),
        "bytes": tally.tar_bytes,
        "seconds": round(seconds, 3),
        "samples_per_s": round(tally.samples / seconds, 1),
    }


def table(tally: Tally, arguments: argparse.Namespace, seconds: float) -> list[str]:
    lines = [
        f"{tally.made} of {tally.shards} shards indexed now, in {seconds:.1f} s"
        if tally.made
        else "all indices are there already, and fresh",
        f"{'shards':>10}{'samples':>12}{'kept':>12}{'MB':>12}{'samples/s':>12}",
        f"{tally.shards:>10}{tally.samples:>12}{tally.kept:>12}{tally.tar_bytes / 1e6:>12.1f}"
        f"{tally.samples / seconds:>12.0f}",
    ]
    marked = "not to be used (what is defective is marked in the index, and left out by --out):"
    lines += front.count_lines("left out:" if arguments.out else marked, dropped(tally))
    if tally.conditions:
        lines.append(f"of {tally.good} good samples")
        lines += [
            f"{n:>10}  meet {c}, {tally.good - n} do not" for c, n in zip(tally.conditions, tally.passed.values())
        ]
    if tally.damaged:
        state = "only their whole samples are kept" if arguments.salvage else "left out; --salvage keeps whole samples"
        lines.append(f"{len(tally.damaged):>10}  shards are damaged (named above): {state}")
    if arguments.out:
        lines.append(f"wrote {arguments.out}")
    return lines


if __name__ == "__main__":
    run_main(main)
