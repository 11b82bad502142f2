"""Compare the engine's loss and gradients with those of one process on the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a launcher may put its own folder first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clipdist.config import DEFAULT_RECIPE, Config, load_config
from clipdist.config.batches import check_ranks
from clipdist.errors import UserError, run_main

if TYPE_CHECKING:
    from clipdist.evals.audit import Audit, AuditRow

EXAMPLES = """examples:
  python tools/audit_gradients.py --config configs/demo.yaml --ranks 2
  python tools/audit_gradients.py --config configs/tiny.yaml --ranks 4 --peers train.micro_batch=2 engine.zero_stage=3
  torchrun --nproc-per-node 8 tools/audit_gradients.py --config configs/web_vitl14.yaml train.global_batch=512

The reference runs on rank 0 and takes W times a rank's time: audit a large recipe with a smaller train.global_batch.
Exit codes: 0 all parts pass, 1 one does not (open_clip's rows never count), 2 bad input."""
POLL_S = 0.1


def main() -> int:
    """Parse the command line and run the audit. Return the exit code."""
    args = parse_args()
    config = load_config(args.config, args.overrides)
    given = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else args.ranks
    if given:
        check_ranks(config, given)  # before torch is imported
    ranks = given or default_ranks(config, check_device(config, given))
    check_ranks(config, ranks)
    check_device(config, args.ranks)
    return run_rank(config, args) if ranks == 1 or "RANK" in os.environ else spawn(ranks)


def run_rank(config: Config, args: argparse.Namespace) -> int:
    """Run one rank of the audit. Rank 0 prints the result. Return the exit code: 1 if a part fails."""
    from clipdist.distributed.rank import joined_ranks, resolve_device
    from clipdist.evals.audit import Audit, open_batches
    from tools.bench.peers.audit import audit_peers

    with joined_ranks(resolve_device(config.device)) as dist_env:
        audit = Audit(config, dist_env)
        source = open_batches(config, audit.spec, dist_env)
        rows: list[AuditRow] = []
        if dist_env.rank == 0:
            print_head(audit, source.note)
        for step in range(args.steps):
            batch = source.batch(step)
            peers = audit_peers(audit, batch, step) if args.peers and step == 0 else []
            ours = audit.step(batch, step)
            rows += [*ours, *peers]
            if dist_env.rank == 0:
                print_step(ours, args.steps)
            if peers:
                print_peers([*ours, *peers])
        source.close()
        audit.close()
        return report(audit, rows, source.note, args.json) if dist_env.rank == 0 else 0


# Output


def print_head(audit: Audit, data: str) -> None:
    """Print what is audited."""
    cfg, dist_env = audit.cfg, audit.dist_env
    micro = f"micro-batches of {audit.micro}" if cfg.train.micro_batch else "no micro-batches"
    print(
        f"{audit.spec.name}: {cfg.train.global_batch} pairs on {dist_env.world_size} x {dist_env.device.type}, {micro},"
        f" ZeRO {cfg.engine.zero_stage}, {audit.precision}, {cfg.clip.loss}\ndata: {data}",
        flush=True,
    )


def print_step(rows: list[AuditRow], steps: int) -> None:
    """Print the table of one step."""
    loss = next(row for row in rows if row.part == "loss")
    print(f"\nstep {loss.step} of {steps}, loss {loss.reference_norm:.6g}")
    print(f"{'part':13}{'norm ratio':>12}{'cosine':>11}{'largest diff.':>15}{'error':>10}{'limit':>10}")
    for row in rows:
        numbers = f"{row.norm_ratio:12.6f}{row.cosine:11.6f}{row.max_diff:15.1e}{row.error:10.1e}{row.limit:10.0e}"
        print(f"{row.part:13}{numbers}   {_verdict(row)}")
    sys.stdout.flush()


def print_peers(rows: list[AuditRow]) -> None:
    """Print the table of all implementations in the first step."""
    impls = list(dict.fromkeys(row.impl for row in rows))
    width = max(map(len, impls)) + 1
    rows = [row for row in rows if row.part != "evaluation"]  # the peers have no such row
    parts = [row.part for row in rows if row.impl == impls[0]]
    print(f"\nstep 1, norm ratio and error by implementation\n{'':{width}}" + "".join(f"{part:>24}" for part in parts))
    for impl in impls:
        cells = [f"{r.norm_ratio:11.6f} {r.error:7.1e} {_verdict(r)}" for r in rows if r.impl == impl]
        print(f"{impl:{width}}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def _verdict(row: AuditRow) -> str:
    return "PASS" if row.passed else "FAIL"


def report(audit: Audit, rows: list[AuditRow], data: str, as_json: bool) -> int:
    """Print notes and verdict. Return the exit code."""
    from clipdist.evals.audit import IMPL

    passed = all(row.passed for row in rows if row.impl == IMPL)
    notes = audit.notes()
    print()
    for note in notes:
        print(f"note: {note}")
    print(f"{'PASS' if passed else 'FAIL'}: relative L2 errors against one process on the whole batch")
    if as_json:
        print(json.dumps(_summary(audit, rows, data, notes, passed)))
    return 0 if passed else 1


def _summary(audit: Audit, rows: list[AuditRow], data: str, notes: list[str], passed: bool) -> dict[str, Any]:
    cfg = audit.cfg
    return {
        "pass": passed,
        "rows": [asdict(row) for row in rows],
        "model": audit.spec.name,
        "loss": cfg.clip.loss,
        "world": audit.dist_env.world_size,
        "global_batch": cfg.train.global_batch,
        "micro_batch": audit.micro,
        "zero_stage": cfg.engine.zero_stage,
        "precision": audit.precision,
        "data": data,
        "notes": notes,
    }


# Ranks


def check_device(config: Config, ranks: int) -> str:
    """Return the device.

    Raises:
        UserError: the device, the precision or so many ranks are not available.
    """
    from clipdist.distributed.rank import resolve_device, resolve_precision

    device = resolve_device(config.device)
    resolve_precision(config.train.precision, device)
    if device == "cuda":
        import torch

        if ranks > torch.cuda.device_count():
            raise UserError(
                f"--ranks {ranks}: there are {torch.cuda.device_count()} GPUs, and every rank needs its own"
            )
    return device


def default_ranks(config: Config, device: str) -> int:
    """Return the number of GPUs; on a CPU the recipe's ranks, at least 2, at most the cores, and dividing the batch."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    most = min(max(2, config.launch.nodes * config.launch.gpus), max(2, len(os.sched_getaffinity(0))))
    return next(ranks for ranks in range(most, 0, -1) if _fits(config, ranks))


def _fits(config: Config, ranks: int) -> bool:
    """Return whether the ranks divide the batch; True for 1."""
    try:
        check_ranks(config, ranks)
    except UserError:
        return ranks == 1
    return True


def spawn(ranks: int) -> int:
    """Run this command in a process per rank; a failing rank ends the others. Return the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        env = os.environ | {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        out = None if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=env, stdout=out))
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return _exit_code(failed)
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _exit_code(failed: list[int]) -> int:
    """Return the first failure's exit code, 1 for a process that a signal ended; 0 without failures."""
    return next((code if code > 0 else 1 for code in failed), 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a few steps as configured: ranks, ZeRO stage, precision, micro-batches, loss, dropout.\n"
        "Compares loss and gradients with those of one process on the whole batch, in float64 but for the towers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    parser.add_argument("--steps", type=int, default=2, help="steps to audit, at the peak learning rate (2)")
    parser.add_argument("--ranks", type=int, default=0, help="processes (all GPUs; on a CPU the recipe's, 2 at least)")
    parser.add_argument("--peers", action="store_true", help="also what open_clip's losses give, in the first step")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    args = parser.parse_intermixed_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    if args.ranks < 0:
        parser.error(f"--ranks {args.ranks}: must be at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
