"""One rank of an evaluation suite: measured, then taken from what was kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clipdist.distributed.rank import joined_ranks
from clipdist.evals.embed import WorkShare
from clipdist.evals.suite import measure_all, read_suite
from clipdist.models.load import load_model


def main() -> None:
    folder = Path(sys.argv[1])
    sets, loaded = read_suite(folder / "suite.yaml"), load_model(str(folder / "a"))
    with joined_ranks("cpu") as dist_env:
        share = WorkShare(dist_env.rank, dist_env.world_size, batch=8, progress=False)
        found = [measure_all(sets, loaded, dist_env, share) for _ in range(2)]
    (folder / f"{dist_env.rank}.json").write_text(json.dumps(found))


main()
