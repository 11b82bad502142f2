"""Keep what a tool found out about a run in RUN/results/TOOL.json, where the report reads it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from clipdist.errors import UserError
from clipdist.storage import write_text

FOLDER = "results"  # of a run folder


def keep_result(run_dir: Path | None, tool: str, record: dict[str, Any]) -> None:
    """Write the object that a tool ends in with --json as RUN/results/TOOL.json, in place of an older one.

    Images that belong to it go to RUN/results/TOOL*.png. A folder that cannot be written, such as another person's
    run, costs a line on stderr and not the result, which the tool shows as well.

    Args:
        run_dir: None for a model without a run folder: nothing is kept.
        tool: a plain name, such as zero_shot, or zero_shot-cifar100 beside it.
        record: plain JSON values; numbers that are not finite become null.
    """
    if run_dir is None:
        return
    if Path(tool).name != tool or tool.startswith("."):
        raise ValueError(f"{tool!r} is no plain name")
    path = run_dir / FOLDER / f"{tool}.json"
    text = json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        print(f"{path}: not kept for the report ({error.strerror})", file=sys.stderr)


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the objects that tools left in RUN/results, by tool in alphabetical order; none without such a folder.

    Raises:
        UserError: a file that is not one JSON object.
    """
    results = {}
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: is no result of a tool (one JSON object); run {path.stem} again, or delete it")
        results[path.stem] = _finite(record)
    return results


def _finite(value: Any) -> Any:
    """Replace nan and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
