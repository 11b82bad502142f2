"""Find what a run starts from, and have all ranks start from the same. Imports torch only when a checkpoint is read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from clipdist.checkpoint.format import MANIFEST, list_checkpoints, newest_checkpoint, step_of
from clipdist.checkpoint.retention import set_aside
from clipdist.config import Config
from clipdist.errors import Fault, UserError
from clipdist.fault_tolerance.rollback import record_rollback, rollbacks
from clipdist.fault_tolerance.slurm import restarts
from clipdist.run_plan import RunPlan, check_launch, make_plan

if TYPE_CHECKING:
    from clipdist.checkpoint.reader import CheckpointReader
    from clipdist.distributed.consensus import Consensus
    from clipdist.distributed.rank import DistEnv
    from clipdist.trainer import Outcome, Trainer


def plan_start(config: Config, world: int, passed_over: Mapping[Path, str] = MappingProxyType({})) -> RunPlan:
    """Return this rank's plan, with the checkpoint that it starts from.

    Args:
        passed_over: checkpoints that were found to be damaged, and how.

    Raises:
        UserError: see check_launch, find_start and make_plan.
    """
    catalogs = check_launch(config, world)
    notes: list[str] = []
    plan = make_plan(config, world, catalogs, find_start(config, passed_over, notes))
    return replace(plan, notes=tuple(notes))


def plan_again(config: Config, plan: RunPlan, world: int) -> RunPlan:
    """Return the plan once the run folder is this run's: whoever held it until now may have saved meanwhile."""
    newest = newest_checkpoint(config.run.dir)
    if newest is None or (plan.resume is not None and plan.resume.folder == newest):
        return plan
    return plan_start(config, world)


def find_start(config: Config, passed_over: Mapping[Path, str], notes: list[str]) -> CheckpointReader | None:
    """Return the checkpoint to start from; None: new weights. The rule, whatever ended the last run:

    auto: the newest checkpoint of the run folder whose files have their sizes, else none.
    FOLDER: that checkpoint to begin with; once the run folder has checkpoints of its own they count as with auto, so
        that the same command continues. A checkpoint of the run folder itself must be its newest: going back would lose
        or hide what came after.
    never: none, and a run folder that holds checkpoints is refused rather than overwritten.
    A job that was requeued continues as with auto.

    Args:
        passed_over: see plan_start.
        notes: gets a line for every damaged checkpoint that is passed over.

    Raises:
        UserError: the named checkpoint is unfit, or the setting would overwrite others.
        Fault: the storage refuses.
    """
    wanted, run_dir = config.train.resume, config.run.dir
    retry_s = config.data.retry_s
    folders = list_checkpoints(run_dir, retry_s)
    if restarts() and folders:
        wanted = "auto"  # what was asked for was done at the job's first start
    if wanted not in ("auto", "never"):
        own = Path(wanted).resolve().parent == (run_dir / "checkpoints").resolve()
        if own and folders and (step_of(Path(wanted)) or 0) < (step_of(folders[-1]) or 0):
            raise UserError(
                f"train.resume={wanted}: {run_dir} holds newer checkpoints, up to {folders[-1].name}; move those"
                " elsewhere first, or choose another run.name"
            )
        if own or not folders:
            if Path(wanted) in passed_over:
                raise UserError(passed_over[Path(wanted)])
            return _open(Path(wanted), retry_s)
    if wanted == "never":
        if folders:
            raise UserError(
                f"train.resume=never: {run_dir} holds checkpoints already; choose another run.name or remove them"
            )
        return None
    for folder in reversed(folders):
        try:
            if folder in passed_over:
                raise UserError(passed_over[folder])
            return _open(folder, retry_s)
        except Fault:  # storage that refuses is no damage
            raise
        except UserError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
    if folders:
        raise UserError(f"{run_dir}/checkpoints: none of {len(folders)} checkpoints is whole; choose another run.name")
    return None


def _open(folder: Path, retry_s: float) -> CheckpointReader:
    from clipdist.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder, retry_s)
    reader.check_sizes()
    return reader


def settle(config: Config, plan: RunPlan, dist_env: DistEnv, consensus: Consensus) -> RunPlan:
    """Return the plan to start with, the same on all ranks: from rank 0's checkpoint, or an older one if it is damaged.

    Each rank verifies some of the files: together they read the checkpoint once. Collective.

    Raises:
        UserError: a checkpoint that was asked for by name is damaged, or none is whole.
    """
    plan = _verified(config, plan, dist_env, consensus)
    # A network file system may show RUN/skipped.json late.
    return replace(plan, skipped=json.loads(consensus.broadcast(json.dumps(plan.skipped))))


def _verified(config: Config, plan: RunPlan, dist_env: DistEnv, consensus: Consensus) -> RunPlan:
    passed_over: dict[Path, str] = {}
    while True:
        told = consensus.broadcast(str(plan.resume.folder) if plan.resume else "")
        chosen = Path(told) if told else None
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
        plan = plan_start(config, dist_env.world_size, passed_over)


def _plan_from(chosen: Path | None, config: Config, world: int, passed_over: dict[Path, str]) -> RunPlan:
    """Return this rank's plan as soon as it sees rank 0's checkpoint: network file systems show new folders late."""
    deadline = time.monotonic() + config.data.retry_s
    while True:
        plan = plan_start(config, world, passed_over)
        if (plan.resume.folder if plan.resume else None) == chosen:
            return plan
        if time.monotonic() > deadline:
            seen = plan.resume.folder if plan.resume else "none"
            raise UserError(
                f"{config.run.dir}: rank 0 goes on from checkpoint {chosen}, this node sees {seen}; the run folder must"
                f" be on storage that all nodes share ({MANIFEST} of that checkpoint did not appear here)"
            )
        time.sleep(1)


def go_back(config: Config, trainer: Trainer, outcome: Outcome) -> RunPlan:
    """Close the trainer and plan the run anew from a checkpoint before the trouble, without the data of the trouble.

    Raises:
        Fault: the run went back guard.rollbacks times already.
    """
    dist_env, consensus = trainer.dist_env, trainer.consensus
    times = int(consensus.broadcast(str(rollbacks(config.run.dir))))
    trouble = f"data steps {outcome.since} to {outcome.step - 1}: {trainer.last_skip}"
    if times >= config.guard.rollbacks:
        trainer.journal.event(outcome.step, "fault", error=trouble)
        trainer.close()
        raise Fault(
            f"{trouble}. The run went back to a checkpoint already (guard.rollbacks={times}): lower optim.lr, or"
            " look at the data of these steps"
        )
    trainer.journal.event(outcome.step, "rollback", first=outcome.since, end=outcome.step, reason=trouble)
    trainer.journal.say(f"note: {trouble}; going back to the checkpoint before, and leaving this data out")
    trainer.close()
    if dist_env.rank == 0:
        record_rollback(config.run.dir, outcome.since, outcome.step)
    consensus.barrier()
    if config.engine.zero_stage == 3:  # DeepSpeed never gives an engine's memory back
        raise Fault(f"{trouble}. With ZeRO 3 going back takes a new process: the same command goes back")
    trainer.engine.close()
    again = replace(config, train=replace(config.train, resume="auto"))
    return settle(again, plan_start(again, dist_env.world_size), dist_env, consensus)
