"""Trains a dual encoder: a configuration in, a run folder out. Reading order is the data flow.

deepspeed clipdist/train.py --config configs/flickr8k_rn50.yaml optim.lr=1e-3
torchrun --nproc-per-node 2 clipdist/train.py ...
python clipdist/train.py ...                       one process, no launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # a launcher puts clipdist/ itself first on the path, where data/ and loss/ would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import os
import resource
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from clipdist.config import DEFAULT_RECIPE, Config, load_config
from clipdist.errors import EXIT_INTERRUPTED, Fault, UserError, run_main
from clipdist.fault_tolerance.signals import StopFlag, die_with_launcher
from clipdist.fault_tolerance.slurm import note_start, restarts
from clipdist.resume import plan_start, settle
from clipdist.storage import lock

if TYPE_CHECKING:
    from clipdist.distributed.rank import DistEnv
    from clipdist.run_plan import RunPlan
    from clipdist.trainer import Outcome, Trainer

LOCK_S = 150.0  # that a job which was queued again waits for the run folder
BRIEFLY_S = 1.0  # launch/status.py looks at the lock
EXAMPLE = """examples:
  python clipdist/train.py --config configs/flickr8k_vit_tiny.yaml
  deepspeed --num_accelerators 2 clipdist/train.py --config configs/demo.yaml optim.lr=2e-3 run.name=faster
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains. Returns the exit code."""
    die_with_launcher()
    parser = argparse.ArgumentParser(
        description="Trains a dual encoder (CLIP) with the exact global contrastive batch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    return train(config, command_line(sys.argv[1:] if argv is None else argv))


def command_line(words: list[str]) -> str:
    """The command that goes on with this run, with the launcher that started it."""
    by_deepspeed = any(word.startswith("--local_rank") for word in words)
    words = [word for word in words if not word.startswith("--local_rank")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    elif by_deepspeed:
        launcher = ["deepspeed", "--num_accelerators", os.environ["WORLD_SIZE"]]
    else:
        launcher = ["python"]
    return shlex.join([*launcher, "clipdist/train.py", *words])


def train(config: Config, resume_command: str = "") -> int:
    """Trains as configured, from the newest good checkpoint where there is one.

    Returns:
        0, or 75 where a signal ended the run after a checkpoint.

    Raises:
        UserError: bad input; before any model is built where that can be known then.
        Fault: what ended the run although its input was good.
    """
    with without_collection():
        return _train(config, resume_command)


@contextmanager
def without_collection() -> Iterator[None]:
    """Nothing of what imports make is garbage, and looking for it is a tenth of their time: until training begins."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _train(config: Config, resume_command: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        note_start(config.run.dir)
    from clipdist.distributed.rank import joined_ranks, resolve_device, resolve_precision, world_size

    device = resolve_device(config.device)
    resolve_precision(config.train.precision, device)
    plan = plan_start(config, world_size())
    if plan.start_step >= plan.steps:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{config.run.dir}: finished at step {plan.start_step}; for more, raise train.epochs or train.steps")
        return 0
    stop = StopFlag()
    stop.on_stop = leave_before_training
    try:
        allow_many_files()
        with joined_ranks(device, config.train.hang_s) as dist_env:
            return _train_together(config, plan, dist_env, stop, resume_command)
    finally:
        stop.restore()


def leave_before_training(reason: str) -> None:
    """Ends this process as the signal alone would: the ranks may wait for one another for long, and nothing is lost."""
    print(f"{reason} before training began", file=sys.stderr, flush=True)
    os._exit(128 + signal.Signals[reason])


def allow_many_files() -> None:
    """Raises the soft limit of open files: connections between ranks, and shards."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _train_together(config: Config, plan: RunPlan, dist_env: DistEnv, stop: StopFlag, resume_command: str) -> int:
    """From the first collective to the last: one Trainer after another, where numbers that do not recover send the run
    back to a checkpoint."""
    from clipdist.checkpoint.format import newest_checkpoint
    from clipdist.distributed.consensus import Consensus
    from clipdist.engine.setup import prepare_deepspeed
    from clipdist.fault_tolerance.consistency import compare, facts
    from clipdist.fault_tolerance.watchdog import open_watchdog
    from clipdist.trainer import Trainer

    prepare_deepspeed()  # its imports belong to those that are not looked through
    gc.freeze()  # nor is it looked through later: in training, one rank's pause is a pause of all
    gc.enable()
    consensus = Consensus(dist_env, config.train.hang_s)
    with open_watchdog(dist_env, consensus, config.run.dir, config.train.hang_s) as watchdog, ExitStack() as held:
        # Even a rank that waits in a collective for ever ends within this time of a signal.
        stop.on_stop = lambda _: watchdog.stopping(config.launch.signal_s)
        if stop.set:
            watchdog.stopping(config.launch.signal_s)
        if dist_env.rank == 0:
            held.enter_context(lock_run_folder(config.run.dir, LOCK_S if restarts() else 0))
            newest = newest_checkpoint(config.run.dir)
            if newest is not None and (plan.resume is None or plan.resume.folder != newest):
                plan = plan_start(
                    config, dist_env.world_size
                )  # whoever held the folder until now may have saved meanwhile
        with watchdog.phase("start"):
            plan = settle(config, plan, dist_env, consensus)
            own = facts(config, plan.order_record, plan.val, plan.skipped, plan.resume)
            compare(own, dist_env)
        while True:
            with watchdog.phase("start"):
                trainer = Trainer(config, plan, dist_env, consensus, watchdog)
            outcome = trainer.run(stop)
            if outcome.kind != "rollback":
                break
            plan = go_back(config, trainer, outcome)
            del trainer
            gc.collect()  # the engine's tensors hang in cycles
    if outcome.kind == "finished":
        trainer.journal.say(f"finished {plan.steps} steps; see {config.run.dir}, tensorboard --logdir runs")
        return 0
    again = "the job is queued again" if outcome.queued else f"go on with: {resume_command}"
    trainer.journal.say(f"interrupted at step {outcome.step}, checkpoint written; {again}")
    return EXIT_INTERRUPTED


def go_back(config: Config, trainer: Trainer, outcome: Outcome) -> RunPlan:
    """Closes the trainer and plans the run anew from a checkpoint before the trouble, without the data of the trouble.

    Raises:
        Fault: the run went back guard.rollbacks times already.
    """
    from clipdist.fault_tolerance.rollback import record_rollback, rollbacks

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


def lock_run_folder(folder: Path, retry_s: float = 0.0) -> IO[str]:
    """Keeps other runs out of the folder while the file that is returned stays open.

    Args:
        retry_s: a network file system holds the lock of a node that was lost for a minute or two.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115  held for the run
    try:
        lock(file, wait_s=max(retry_s, BRIEFLY_S))
    except BlockingIOError:
        raise UserError(f"run folder {folder}: another run is writing to it; choose another run.name") from None
    except OSError:
        pass  # a file system without locks
    return file


if __name__ == "__main__":
    run_main(main)
