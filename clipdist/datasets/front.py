"""What the shard tools share: how they end, how they name what was left out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


def count_lines(title: str, counts: Mapping[str, int]) -> list[str]:
    """Return a title and a line for every count; nothing where there are none."""
    return [title, *(f"{count:>10}  {reason}" for reason, count in counts.items())] if counts else []


def finish(arguments: argparse.Namespace, table: list[str], record: Mapping[str, object]) -> None:
    """Print the table and, with --json, the record as the last line."""
    print("\n".join(table))
    if arguments.json:
        print(json.dumps(record))
