"""Compare the engine's loss and gradients with those of one process on the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a launcher may put its own folder first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import subprocess
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from clipdist.config import DEFAULT_RECIPE, Config, load_config
from clipdist.config.batches import check_ranks
from clipdist.errors import UserError, run_main
from clipdist.evals import front

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
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if args.peers and config.objectives.clip is None:
        raise UserError("--peers: compares losses of objectives.clip, which is not set")
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
        return report(args, audit, rows, source.note) if dist_env.rank == 0 else 0


# Output


def print_head(audit: Audit, data: str) -> None:
    cfg, dist_env = audit.cfg, audit.dist_env
    micro = f"micro-batches of {audit.micro}" if cfg.train.micro_batch else "no micro-batches"
    print(
        f"{audit.spec.name}: {cfg.train.global_batch} pairs on {dist_env.world_size} x {dist_env.device.type}, {micro},"
        f" ZeRO {cfg.engine.zero_stage}, {audit.precision}, {losses(cfg)}\ndata: {data}",
        flush=True,
    )


def losses(cfg: Config) -> str:
    """Return the losses of the objectives in words."""
    named = {name: name for name, section in vars(cfg.objectives).items() if section is not None}
    if cfg.objectives.clip:
        named["clip"] = cfg.objectives.clip.loss
    if cfg.objectives.distill:
        named["distill"] = f"distilled {cfg.objectives.distill.target}"
    return " and ".join(named.values())


def print_step(rows: list[AuditRow], steps: int) -> None:
    """One step of the engine beside one process on the whole batch."""
    loss = next(row for row in rows if row.part == "loss")
    print(f"\nstep {loss.step} of {steps}, loss {loss.reference_norm:.6g}")
    print(f"{'part':19}{'norm ratio':>12}{'cosine':>11}{'largest diff.':>15}{'error':>10}{'limit':>10}")
    for row in rows:
        numbers = f"{row.norm_ratio:12.6f}{row.cosine:11.6f}{row.max_diff:15.1e}{row.error:10.1e}{row.limit:10.0e}"
        print(f"{row.part:19}{numbers}   {_verdict(row)}")
    sys.stdout.flush()


def print_peers(rows: list[AuditRow]) -> None:
    """All implementations side by side, in the first step."""
    impls = list(dict.fromkeys(row.impl for row in rows))
    width = max(map(len, impls)) + 1
    rows = [row for row in rows if row.part != "evaluation"]  # of one's own step alone
    parts = [row.part for row in rows if row.impl == impls[0]]
    print(f"\nstep 1, norm ratio and error by implementation\n{'':{width}}" + "".join(f"{part:>24}" for part in parts))
    for impl in impls:
        cells = [f"{r.norm_ratio:11.6f} {r.error:7.1e} {_verdict(r)}" for r in rows if r.impl == impl]
        print(f"{impl:{width}}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def _verdict(row: AuditRow) -> str:
    return "PASS" if row.passed else "FAIL"


def report(args: argparse.Namespace, audit: Audit, rows: list[AuditRow], data: str) -> int:
    """Print notes and verdict. Return the exit code."""
    from clipdist.evals.audit import IMPL

    passed = all(row.passed for row in rows if row.impl == IMPL)
    notes = audit.notes()
    print("", *(f"note: {note}" for note in notes), sep="\n")
    print(f"{'PASS' if passed else 'FAIL'}: relative L2 errors against one process on the whole batch")
    cfg = audit.cfg
    record = {
        "pass": passed,
        "rows": [asdict(row) for row in rows],
        "model": audit.spec.name,
        "loss": losses(cfg),
        "world": audit.dist_env.world_size,
        "global_batch": cfg.train.global_batch,
        "micro_batch": audit.micro,
        "zero_stage": cfg.engine.zero_stage,
        "precision": audit.precision,
        "data": data,
        "notes": notes,
    }
    front.finish(args, record)
    return 0 if passed else 1


# Ranks


def check_device(config: Config, ranks: int) -> str:
    """Returns the device. Raises UserError for what cannot run here."""
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
    """All GPUs; on a CPU the recipe's ranks, but 2 at least and no more than there are cores, and a divisor."""
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    most = min(max(2, config.launch.nodes * config.launch.gpus), max(2, len(os.sched_getaffinity(0))))
    return next(ranks for ranks in range(most, 0, -1) if _fits(config, ranks))


def _fits(config: Config, ranks: int) -> bool:
    try:
        check_ranks(config, ranks)
    except UserError:
        return ranks == 1
    return True


def spawn(ranks: int) -> int:
    """Run this command in a process per rank; a failing rank ends the others. Return the exit code."""
    from tools.bench.processes import rank_environments

    processes: list[subprocess.Popen] = []
    for of_rank in rank_environments(ranks):
        out = subprocess.DEVNULL if processes else None
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | of_rank, stdout=out))
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return next((code if code > 0 else 1 for code in failed), 0)  # one that a signal ended is a fault: 1
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Trains a few steps as configured: ranks, ZeRO stage, precision, micro-batches, loss, dropout.\n"
        "Compares loss and gradients with those of one process on the whole batch, in float64 but for the towers.",
        EXAMPLES,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    front.add_number(parser, "--steps", 2, "steps to audit, at the peak learning rate (2)")
    front.add_number(parser, "--ranks", 0, "processes (all GPUs; on a CPU the recipe's, 2 at least)", least=0)
    parser.add_argument("--peers", action="store_true", help="also what open_clip's losses give, in the first step")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_main(main)
