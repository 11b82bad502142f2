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
from clipdist.distributed.consensus import Control
from clipdist.distributed.rank import Place
from clipdist.errors import Fault, UserError
from clipdist.fault_tolerance.heartbeat import open_listener
from clipdist.fault_tolerance.watchdog import Watch
from clipdist.run_plan import Plan, make_plan


def open_watch(config: Config, place: Place, control: Control) -> Watch:
    """The watch over all ranks: rank 0's port and a secret are shared first.

    Raises:
        Fault: this rank cannot reach rank 0.
    """
    listener = open_listener() if place.rank == 0 else None
    port = control.tell(str(listener.getsockname()[1] if listener else ""))
    return Watch(
        place.rank,
        place.world,
        config.run.dir,
        config.train.hang_s,
        host=os.environ["MASTER_ADDR"],
        port=int(port),
        token=int(control.token(), 16),
        listener=listener,
    )


def settle(config: Config, plan: Plan, place: Place, control: Control) -> Plan:
    """The plan to begin with: rank 0's checkpoint on all ranks, or an older one where its checksums are wrong.

    Each rank verifies some of the files: together they read the checkpoint once.

    Raises:
        UserError: a checkpoint that was asked for by name is damaged, or none is whole.
    """
    plan = _verified(config, plan, place, control)
    # A network file system may show RUN/skipped.json late.
    return replace(plan, skipped=json.loads(control.tell(json.dumps(plan.skipped))))


def _verified(config: Config, plan: Plan, place: Place, control: Control) -> Plan:
    passed_over: dict[Path, str] = {}
    while True:
        chosen = control.tell_path(plan.resume.folder if plan.resume else None)
        if chosen is None or not control.all(plan.resume is not None and plan.resume.folder == chosen):
            plan = _plan_from(chosen, config, place.world, passed_over)
        if plan.resume is None:
            return plan
        try:
            plan.resume.verify(place.rank, place.world)
            damage = ""
        except Fault:
            raise
        except UserError as error:
            damage = str(error)
        damage = control.first(damage)
        if not damage:
            if place.rank == 0 and config.run.dir.resolve() in plan.resume.folder.resolve().parents:
                set_aside(config.run.dir, plan.start_step)  # newer ones are damaged, or they would have been chosen
            return plan
        passed_over[plan.resume.folder] = damage
        plan = make_plan(config, place.world, passed_over)


def _plan_from(chosen: Path | None, config: Config, world: int, passed_over: dict[Path, str]) -> Plan:
    """This rank's plan, once it sees the checkpoint that rank 0 sees: network file systems show new folders late."""
    deadline = time.monotonic() + config.data.patience_s
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
