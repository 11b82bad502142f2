"""What the command lines of the shard tools share: their options, how they end, how they name what was left out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


def shard_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Return a parser with --json, whose help ends in the examples as they are."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def require_ranges(parser: argparse.ArgumentParser, arguments: argparse.Namespace, **ranges: tuple[int, int]) -> None:
    """End with a usage error where an option is not in its range (low, high), both included."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(arguments, name) <= high:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must lie in {low} .. {high}")


def count_lines(title: str, counts: Mapping[str, int]) -> list[str]:
    """Return a title and a line for every count; nothing where there are none."""
    return [title, *(f"{count:>10}  {reason}" for reason, count in counts.items())] if counts else []


def finish(arguments: argparse.Namespace, table: list[str], record: Mapping[str, object]) -> None:
    """Print the table and, with --json, the record as the last line."""
    print("\n".join(table))
    if arguments.json:
        print(json.dumps(record))
