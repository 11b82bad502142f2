"""What all benchmarks share: the command line, turns of the compared sides, tables, provenance, output."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from clipdist.errors import UserError
from clipdist.monitor.provenance import commit, hardware, versions

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


class BenchmarkParser(argparse.ArgumentParser):
    """A command line with --out and --json, whose numbers have limits. Raise a UserError for bad input."""

    def __init__(self, description: str, examples: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=f"examples:\n{examples}", formatter_class=form)
        self._limits: dict[str, tuple[str, float, float]] = {}

    def number(
        self, flag: str, default: float, metavar: str, text: str, least: float = 1, most: float = math.inf
    ) -> None:
        """Add an option that takes a number of the default's type in least .. most."""
        text = f"{text} ({default:.9g})".lstrip()
        action = self.add_argument(flag, type=type(default), default=default, metavar=metavar, help=text)
        self._limits[action.dest] = flag, least, most

    def parse(self, out: str = "FILE", out_text: str = "write the report as markdown, too") -> argparse.Namespace:
        self.add_argument("--out", type=Path, metavar=out, help=out_text)
        self.add_argument("--json", action="store_true", help="end with one JSON object")
        args = self.parse_intermixed_args()
        for name, (flag, least, most) in self._limits.items():
            value = getattr(args, name)
            if not least <= value <= most:
                allowed = f"be at least {least:.9g}" if most == math.inf else f"lie in {least:.9g} .. {most:.9g}"
                self.error(f"{flag} {value}: must {allowed}")
        return args

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says more)")


def finish(args: argparse.Namespace, lines: Sequence[str], record: Mapping[str, Any], name: str = "") -> int:
    """Print the report, write it to --out (`name` in it, a folder), and end with the record as JSON for --json."""
    print("\n".join(lines))
    if args.out:
        write_lines(args.out / name, lines)
    if args.json:
        print(json.dumps(record))
    return 0


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def workspace() -> Iterator[Path]:
    """Make a new folder in the temporary folder ($TMPDIR), and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# Measuring


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Call `function`. Return the seconds that it took, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def seconds_of(function: Callable[[], object]) -> Callable[[], float]:
    return lambda: timed(function)[0]


def take_turns(
    sides: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 0,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, list[T]]:
    """Call all sides once in each round, so that what else the machine does slows all alike.

    Args:
        sides: {name: function}; each round begins with another one.
        warmup: rounds before, whose results do not count.
        after_round: called after each round that counts.

    Returns:
        {name: results by round}.
    """
    names = list(sides)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in tqdm(range(-warmup, rounds), "rounds", disable=None):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = sides[name]()
            if number >= 0:
                results[name].append(result)
        if number >= 0:
            after_round()
    return results


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(times, others, strict=True)]


# Tables


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table whose first `left` columns are aligned to the left, and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    marks = ["-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    return [line(header), f"|{'|'.join(marks)}|", *map(line, rows)]


def by_round(values: Sequence[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def spread(values: Sequence[float], form: str) -> list[str]:
    """Return the cells of the least, the median and the largest value."""
    return [format(value, form) for value in (min(values), statistics.median(values), max(values))]


def optional(value: float | None, form: str) -> str:
    """Return the cell of a value that may not have been measured."""
    return "-" if value is None else format(value, form)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def provenance(device: str, threads: int, *packages: str) -> list[str]:
    """Return what a table was measured with: command, commit, hardware, versions, date."""
    command = shlex.join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return [
        f"- command: `{command}`",
        f"- commit: {commit()}",
        f"- hardware: {hardware(device, threads)}",
        f"- versions: {versions_line(*packages)}",
        f"- date: {date.today().isoformat()}",
    ]


def versions_line(*packages: str) -> str:
    installed = ", ".join(f"{name} {version}" for name, version in versions("torch", *packages).items())
    return f"{installed}; Python {platform.python_version()}"
