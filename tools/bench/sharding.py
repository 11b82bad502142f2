"""Pictures with captions in; how fast they become shards, beside a plain copy of the very same members into tars."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence

from tqdm import tqdm

from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

EXAMPLE = """examples:
  python tools/bench/sharding.py folder_of_pairs
  python tools/bench/sharding.py Flickr8k_Dataset.zip Flickr8k_text.zip --tool shard_flickr8k --processes 1 --json

The sharding is the whole command without the start of Python: the list read, pictures' headers looked at (--no-verify),
shards, indices and checksums written; the start of its worker processes counts. The copy knows all names, has the texts
in memory, reads every picture from a file of its own and appends it with tarfile, in one process. They take turns."""
TOOLS = {"shard_pairs": "--processes", "shard_flickr8k": "--workers"}

Shards = dict[str, list[tuple[str, bytes | Path]]]  # {tar below the folder: [(member, its bytes or their file)]}


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        shard(args, folder / "first")
        shards = unpack(folder / "first", folder / "members")
        copy(shards, folder / "copied")
        require_equal(shards, folder / "first", folder / "copied")
        sharded_s, copied_s = [], []
        for turn in tqdm(range(args.repeats), desc="turns", disable=None):
            sharded_s.append(timed(shard, args, folder / f"sharded-{turn}"))
            copied_s.append(timed(copy, shards, folder / f"copied-{turn}"))
        size = sum((folder / "first" / name).stat().st_size for name in shards)
    record = result(args, shards, size, sharded_s, copied_s)
    print(table(record))
    if args.json:
        print(json.dumps(record))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", type=Path, metavar="SOURCE", help="as the sharding tool takes it")
    parser.add_argument("--tool", choices=list(TOOLS), default="shard_pairs")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="of the sharding; default: one per core")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be at least 1")
    if args.processes < 0:
        parser.error(f"--processes {args.processes}: must be at least 0")
    if args.scratch and not args.scratch.is_dir():
        parser.error(f"--scratch {args.scratch}: no such folder")
    return args


def shard(args: argparse.Namespace, out: Path) -> None:
    """Runs the tool's main function in this process, its table unseen."""
    words = [*map(str, args.source), "--out", str(out), "--no-verify", TOOLS[args.tool], str(args.processes)]
    before = sys.argv
    try:
        sys.argv = [args.tool, *words]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"tools.{args.tool}").main()
    finally:
        sys.argv = before


def unpack(out: Path, folder: Path) -> Shards:
    """The members of all shards of `out`: the first of every sample, its picture, as a file in `folder`."""
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
    """Raises UserError unless both wrote the same bytes: only then are their times to be compared."""
    for name in shards:
        if (sharded / name).read_bytes() != (copied / name).read_bytes():
            raise UserError(f"{name}: the copy is not the shard to the byte; the tool has changed what it writes")


def timed(function, *arguments) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def result(
    args: argparse.Namespace, shards: Shards, size: int, sharded_s: Sequence[float], copied_s: Sequence[float]
) -> dict[str, object]:
    members = sum(map(len, shards.values()))
    processes = args.processes or len(os.sched_getaffinity(0))
    return {
        "tool": args.tool,
        "processes": processes,
        "samples": sum(isinstance(content, Path) for content in (c for m in shards.values() for _, c in m)),
        "members": members,
        "bytes": size,
        "sharded_s": [round(seconds, 4) for seconds in sharded_s],
        "copied_s": [round(seconds, 4) for seconds in copied_s],
        "speed_percent": round(100 * statistics.median(copied_s) / statistics.median(sharded_s), 1),
        "commit": commit(),
        "hardware": hardware("cpu", processes),
    }


def table(record: dict) -> str:
    lines = [
        f"{record['samples']} samples, {record['members']} members, {record['bytes'] / 1e6:.1f} MB; "
        f"{record['tool']} with {record['processes']} processes",
        f"commit {record['commit']}; {record['hardware']}",
        f"{'':<14}{'median s':>10}{'least s':>10}{'most s':>10}{'MB/s':>8}",
    ]
    for title, name in (("sharding", "sharded_s"), ("plain copy", "copied_s")):
        times = record[name]
        median = statistics.median(times)
        speed = record["bytes"] / 1e6 / median
        lines.append(f"{title:<14}{median:>10.3f}{min(times):>10.3f}{max(times):>10.3f}{speed:>8.1f}")
    lines.append(f"sharding has {record['speed_percent']:.0f} % of the plain copy's speed")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
