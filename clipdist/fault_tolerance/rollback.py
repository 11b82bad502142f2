"""Roll a run back: record the data steps to leave out, and set aside the checkpoints after them.

The order is a pure function, so the same batches would come again. RUN/skipped.json keeps the ranges from the moment at
which they are decided; checkpoints written later hold them, too.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from clipdist.checkpoint.retention import set_aside
from clipdist.errors import Fault, UserError
from clipdist.storage import write_text


def skipped_ranges(run_dir: Path) -> list[list[int]]:
    """Return the ranges [first, end) of data steps that rollbacks of this run left out."""
    return [[record["first"], record["end"]] for record in _records(run_dir)]


def rollbacks(run_dir: Path) -> int:
    return len(_records(run_dir))


def record_rollback(run_dir: Path, first: int, end: int) -> None:
    """Leave out data steps first .. end-1 from now on, and set aside the checkpoints written after `first`. Rank 0.

    Raises:
        Fault: the record cannot be written.
    """
    path = _path(run_dir)
    records = [*_records(run_dir), {"first": first, "end": end, "time": time.time()}]
    try:
        # First: a start after a kill in between meets the same trouble again. The other way round it would go on from
        # weights that the trouble has changed.
        set_aside(run_dir, first)
        write_text(path, json.dumps(records, indent=1) + "\n")
    except OSError as error:
        raise Fault(f"{path}: cannot be written ({error.strerror or error})") from None


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = _path(run_dir)
    try:
        records = json.loads(path.read_text())
        return [{**record, "first": int(record["first"]), "end": int(record["end"])} for record in records]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to train on all data again") from None


def _path(run_dir: Path) -> Path:
    return run_dir / "skipped.json"
