"""Find the checkpoint that a run starts from, the same on all ranks. Imports torch only to read a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from clipdist.checkpoint.format import EMA, MANIFEST, list_checkpoints, newest_checkpoint, step_of
from clipdist.checkpoint.retention import set_aside
from clipdist.config import Config, flat, saved_config
from clipdist.config.batches import total_steps
from clipdist.config.checks import TAUGHT
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
    """Return this rank's plan, with the checkpoint to start from.

    Args:
        passed_over: damaged checkpoints, and the reasons.

    Raises:
        UserError: see check_launch, find_start and make_plan.
    """
    catalogs = check_launch(config, world)
    notes: list[str] = []
    plan = make_plan(config, world, catalogs, find_start(config, passed_over, notes))
    notes += changes(config, plan)
    return replace(plan, notes=tuple(notes))


def changes(config: Config, plan: RunPlan) -> list[str]:
    """Return lines on what differs from the configuration of the checkpoint that the run starts from."""
    if plan.resume is None:
        return []
    saved = saved_config(plan.resume.manifest.config)
    if saved is None:
        return [f"{plan.resume.folder.name} is of another version: its settings cannot be compared with those here"]
    theirs, ours = ({name: value for name, value in flat(each).items() if value != {}} for each in (saved, config))
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    told = [name for name in names if not name.startswith(("run.", "launch.")) and name != "train.resume"]
    if not told:
        return []
    words = ", ".join(f"{name} {theirs.get(name)} -> {ours.get(name)}" for name in told)
    lines = [f"other settings than those of {plan.resume.folder.name}: {words}", *_schedule_change(config, saved, plan)]
    teachers = [f"objectives.{name}'s teacher" for name in TAUGHT if getattr(config.objectives, name) is not None]
    averages = ["train.ema"] if config.train.ema else teachers
    if averages and not any(name.startswith(EMA) for name in plan.resume.manifest.tensors):
        lines.append(f"{averages[0]}: {plan.resume.folder.name} holds no average; it begins with the weights")
    return lines


def _schedule_change(config: Config, saved: Config, plan: RunPlan) -> list[str]:
    """Return a line on the learning rate where the checkpoint's schedule is not that of the run."""
    from clipdist.engine.optim import learning_rate

    done = plan.start_step - 1
    before = learning_rate(saved.optim, done, total_steps(saved.train, plan.steps_per_epoch))
    if done < 0 or learning_rate(config.optim, done, plan.steps) == before:
        return []
    after = learning_rate(config.optim, plan.start_step, plan.steps)
    word = "raises" if after > before else "lowers"
    times = f", {after / before:.1f} times" if before and after > before else ""
    return [
        f"the other schedule {word} the learning rate{times}: {before:.3g} in the checkpoint's last step,"
        f" {after:.3g} in the next; optim.lr scales it"
    ]


def replan(config: Config, plan: RunPlan, world: int) -> RunPlan:
    """Return the plan after the run folder was locked: its previous owner may have saved in the meantime."""
    newest = newest_checkpoint(config.run.dir)
    if newest is None or (plan.resume is not None and plan.resume.folder == newest):
        return plan
    return plan_start(config, world)


def find_start(config: Config, passed_over: Mapping[Path, str], notes: list[str]) -> CheckpointReader | None:
    """Return the checkpoint to start from; None: new weights. The rule of train.resume:

    auto: the newest checkpoint of the run folder whose files have the right sizes, else none.
    FOLDER: that checkpoint; once the run folder has checkpoints of its own, as with auto, so that the same command
        resumes. A checkpoint of the run folder itself must be its newest: later ones would be lost or hidden.
    never: none; a run folder that has checkpoints is refused instead of overwritten.
    A requeued job resumes as with auto.

    Args:
        passed_over: see plan_start.
        notes: appends a line for every damaged checkpoint.

    Raises:
        UserError: the named checkpoint cannot be used, or the setting would overwrite others.
        Fault: the storage cannot be read.
    """
    wanted, run_dir = config.train.resume, config.run.dir
    retry_s = config.data.retry_s
    folders = list_checkpoints(run_dir, retry_s)
    if restarts() and folders:
        wanted = "auto"  # the setting was applied at the job's first start
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
        except Fault:  # unavailable storage, not a damaged checkpoint
            raise
        except UserError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
    if folders:
        raise UserError(f"{run_dir}/checkpoints: none of {len(folders)} checkpoints is whole; choose another run.name")
    return None


def _open(folder: Path, retry_s: float) -> CheckpointReader:
    """Open a checkpoint and check the sizes of its files."""
    from clipdist.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder, retry_s)
    reader.check_sizes()
    return reader


def agree_on_plan(config: Config, plan: RunPlan, dist_env: DistEnv, consensus: Consensus) -> RunPlan:
    """Return the common plan of all ranks: from rank 0's checkpoint, or an older one if that is damaged. Collective.

    Every rank verifies a share of the files, so that the checkpoint is read once.

    Raises:
        UserError: a checkpoint that was given by name is damaged, or all are.
    """
    plan = _verified_plan(config, plan, dist_env, consensus)
    # On a network file system, other ranks may not see rank 0's changes to RUN/skipped.json yet.
    return replace(plan, skipped=json.loads(consensus.broadcast(json.dumps(plan.skipped))))


def _verified_plan(config: Config, plan: RunPlan, dist_env: DistEnv, consensus: Consensus) -> RunPlan:
    """Return the plan from the newest checkpoint without damage, chosen by rank 0. Collective."""
    passed_over: dict[Path, str] = {}
    while True:
        name = consensus.broadcast(str(plan.resume.folder) if plan.resume else "")
        chosen = Path(name) if name else None
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
                set_aside(config.run.dir, plan.start_step)  # newer ones are damaged
            return plan
        passed_over[plan.resume.folder] = damage
        plan = plan_start(config, dist_env.world_size, passed_over)


def _plan_from(chosen: Path | None, config: Config, world: int, passed_over: dict[Path, str]) -> RunPlan:
    """Return this rank's plan from rank 0's checkpoint, once the file system shows it.

    Raises:
        UserError: it does not appear within data.retry_s.
    """
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


def roll_back(config: Config, trainer: Trainer, outcome: Outcome) -> RunPlan:
    """Close the trainer, and return a plan from a checkpoint before the skipped steps, without their data. Collective.

    Raises:
        Fault: the run was rolled back guard.rollbacks times already, or ZeRO 3 needs a new process.
    """
    dist_env, consensus = trainer.dist_env, trainer.consensus
    times = int(consensus.broadcast(str(rollbacks(config.run.dir))))
    reason = f"data steps {outcome.first_skipped} to {outcome.step - 1}: {trainer.last_skip}"
    if times >= config.guard.rollbacks:
        trainer.close()
        raise Fault(
            f"{reason}. The run went back to a checkpoint already (guard.rollbacks={times}): lower optim.lr, or"
            " look at the data of these steps"
        )
    trainer.journal.event(outcome.step, "rollback", first=outcome.first_skipped, end=outcome.step, reason=reason)
    trainer.journal.log(f"note: {reason}; going back to the checkpoint before, and leaving this data out")
    trainer.close()
    if dist_env.rank == 0:
        record_rollback(config.run.dir, outcome.first_skipped, outcome.step)
    consensus.barrier()
    if config.engine.zero_stage == 3:  # DeepSpeed never releases the memory of such an engine
        raise Fault(f"{reason}. With ZeRO 3 going back takes a new process: the same command goes back")
    trainer.engine.close()
    again = replace(config, train=replace(config.train, resume="auto"))
    return agree_on_plan(again, plan_start(again, dist_env.world_size), dist_env, consensus)
