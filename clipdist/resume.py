"""How the ranks of a run begin together: each one's plan in; one plan for all, its checkpoint verified, out."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from clipdist.checkpoint.format import MANIFEST
from clipdist.checkpoint.retention import set_aside
from clipdist.config import Config
from clipdist.distributed.consensus import Consensus
from clipdist.distributed.rank import DistEnv
from clipdist.errors import Fault, UserError
from clipdist.fault_tolerance.heartbeat import open_listener
from clipdist.fault_tolerance.watchdog import Watchdog
from clipdist.run_plan import Plan, make_plan


def open_watchdog(config: Config, dist_env: DistEnv, consensus: Consensus) -> Watchdog:
    """The watch over all ranks: rank 0's port and a secret are shared first.

    Raises:
        Fault: this rank cannot reach rank 0.
    """
    listener = open_listener() if dist_env.rank == 0 else None
    port = consensus.broadcast(str(listener.getsockname()[1] if listener else ""))
    return Watchdog(
        dist_env.rank,
        dist_env.world_size,
        config.run.dir,
        config.train.hang_s,
        host=os.environ["MASTER_ADDR"],
        port=int(port),
        token=int(consensus.shared_token(), 16),
        listener=listener,
    )


def settle(config: Config, plan: Plan, dist_env: DistEnv, consensus: Consensus) -> Plan:
    """The plan to begin with: rank 0's checkpoint on all ranks, or an older one where its checksums are wrong.

    Each rank verifies some of the files: together they read the checkpoint once.

    Raises:
        UserError: a checkpoint that was asked for by name is damaged, or none is whole.
    """
    plan = _verified(config, plan, dist_env, consensus)
    # A network file system may show RUN/skipped.json late.
    return replace(plan, skipped=json.loads(consensus.broadcast(json.dumps(plan.skipped))))


def _verified(config: Config, plan: Plan, dist_env: DistEnv, consensus: Consensus) -> Plan:
    passed_over: dict[Path, str] = {}
    while True:
        chosen = consensus.broadcast_path(plan.resume.folder if plan.resume else None)
        if chosen is None or not consensus.all(plan.resume is not None and plan.resume.folder == chosen):
            plan = _plan_from(chosen, config, dist_env.world_size, passed_over)
        if plan.resume is None:
            return plan
        try:
            plan.resume.verify(dist_env.rank, dist_env.world_size)
            damage = ""
        except Fault:
            raise
        except UserError as error:
            damage = str(error)
        damage = consensus.first_text(damage)
        if not damage:
            if dist_env.rank == 0 and config.run.dir.resolve() in plan.resume.folder.resolve().parents:
                set_aside(config.run.dir, plan.start_step)  # newer ones are damaged, or they would have been chosen
            return plan
        passed_over[plan.resume.folder] = damage
        plan = make_plan(config, dist_env.world_size, passed_over)


def _plan_from(chosen: Path | None, config: Config, world: int, passed_over: dict[Path, str]) -> Plan:
    """This rank's plan, once it sees the checkpoint that rank 0 sees: network file systems show new folders late."""
    deadline = time.monotonic() + config.data.retry_s
    while True:
        plan = make_plan(config, world, passed_over)
        if (plan.resume.folder if plan.resume else None) == chosen:
            return plan
        if time.monotonic() > deadline:
            seen = plan.resume.folder if plan.resume else "none"
            raise UserError(
                f"{config.run.dir}: rank 0 goes on from checkpoint {chosen}, this node sees {seen}; the run folder must"
                f" be on storage that all nodes share ({MANIFEST} of that checkpoint did not appear here)"
            )
        time.sleep(1)
