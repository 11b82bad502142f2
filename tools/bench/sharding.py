"""Time sharding beside a plain copy of the very same members into tars."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import importlib
import io
import os
import statistics
import tarfile
from itertools import count

from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware
from tools.bench import harness

EXAMPLES = """  python tools/bench/sharding.py folder_of_pairs
  python tools/bench/sharding.py Flickr8k_Dataset.zip Flickr8k_text.zip --tool shard_flickr8k --processes 1 --json

The sharding is the whole command without the start of Python: the list read, pictures' headers looked at (--no-verify),
shards, indices and checksums written; the start of its worker processes counts. The copy knows all names, has the texts
in memory, reads every picture from a file of its own and appends it with tarfile, in one process. They take turns."""
TOOLS = ("shard_pairs", "shard_flickr8k")

Shards = dict[str, list[tuple[str, bytes | Path]]]  # {tar below the folder: [(member, its bytes or their file)]}


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("source", nargs="+", type=Path, metavar="SOURCE", help="as the sharding tool takes it")
    parser.add_argument("--tool", choices=TOOLS, default="shard_pairs")
    parser.number("--processes", 0, "N", "of the sharding; 0: one per core", least=0)
    parser.number("--repeats", 5, "N", "turns of each")
    return parser.parse()


def main() -> int:
    args = parse_args()
    with harness.workspace() as folder:
        shard(args, folder / "first")
        shards = unpack(folder / "first", folder / "members")
        copy(shards, folder / "copied")
        require_equal(shards, folder / "first", folder / "copied")
        turn = count()
        sides = {
            "sharded_s": harness.seconds_of(lambda: shard(args, folder / f"sharded-{next(turn)}")),
            "copied_s": harness.seconds_of(lambda: copy(shards, folder / f"copied-{next(turn)}")),
        }
        times = harness.take_turns(sides, args.repeats)
        size = sum((folder / "first" / name).stat().st_size for name in shards)
    record = {
        "tool": args.tool,
        "processes": args.processes or len(os.sched_getaffinity(0)),
        "samples": sum(isinstance(content, Path) for members in shards.values() for _, content in members),
        "members": sum(map(len, shards.values())),
        "bytes": size,
        **{name: [round(s, 4) for s in by_turn] for name, by_turn in times.items()},
        "speed_percent": round(100 * statistics.median(times["copied_s"]) / statistics.median(times["sharded_s"]), 1),
        "commit": commit(),
    }
    record["hardware"] = hardware("cpu", record["processes"])
    return harness.finish(args, report(record), record)


def shard(args: argparse.Namespace, out: Path) -> None:
    """Run the tool's main function in this process, its table unseen."""
    words = [*map(str, args.source), "--out", str(out), "--no-verify", "--processes", str(args.processes)]
    before = sys.argv
    try:
        sys.argv = [args.tool, *words]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"tools.{args.tool}").main()
    finally:
        sys.argv = before


def unpack(out: Path, folder: Path) -> Shards:
    """Read the members of all shards of `out`; the first of every sample, its image, goes into a file in `folder`."""
    folder.mkdir()
    shards: Shards = {}
    for tar in sorted(out.rglob("*.tar")):
        members: list[tuple[str, bytes | Path]] = []
        last = ""
        with tarfile.open(tar) as archive:
            for number, info in enumerate(archive):
                file = archive.extractfile(info)
                assert file is not None
                key, _, _ = info.name.partition(".")
                place = folder / f"{len(shards)}-{number}"
                if key != last:
                    place.write_bytes(file.read())
                members.append((info.name, place if key != last else file.read()))
                last = key
        shards[str(tar.relative_to(out))] = members
    return shards


def copy(shards: Shards, out: Path) -> None:
    for name, members in shards.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for member, content in members:
                data = content.read_bytes() if isinstance(content, Path) else content
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def require_equal(shards: Shards, sharded: Path, copied: Path) -> None:
    """Raise a UserError unless both wrote the same bytes: only then are their times to be compared."""
    for name in shards:
        if (sharded / name).read_bytes() != (copied / name).read_bytes():
            raise UserError(f"{name}: the copy is not the shard to the byte; the tool has changed what it writes")


def report(record: dict) -> list[str]:
    rows = []
    for title, name in (("sharding", "sharded_s"), ("plain copy", "copied_s")):
        speed = record["bytes"] / 1e6 / statistics.median(record[name])
        rows.append([title, *harness.spread(record[name], ".3f"), f"{speed:.1f}"])
    return [
        "# Sharding beside a plain copy",
        "",
        f"{record['samples']} samples, {record['members']} members, {record['bytes'] / 1e6:.1f} MB;"
        f" {record['tool']} with {record['processes']} processes",
        "",
        *harness.markdown_table(["", "least s", "median s", "most s", "MB/s"], rows),
        "",
        f"sharding has {record['speed_percent']:.0f} % of the plain copy's speed",
        "",
        *harness.provenance("cpu", record["processes"]),
    ]


if __name__ == "__main__":
    run_main(main)
