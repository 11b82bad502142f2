"""Train a model: configuration -> plan -> data -> model -> engine -> loop -> save.

Plan the run before a model is built (run_plan.py, resume.py), join the ranks, then let the Trainer build data, model
and engine, and loop. Signals, locks and limits of the process are in process.py.

deepspeed clipdist/train.py --config configs/flickr8k_rn50.yaml optim.lr=1e-3
torchrun --nproc-per-node 2 clipdist/train.py ...
python clipdist/train.py ...                       one process, no launcher
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a launcher puts clipdist/ first on the path, where its packages would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from clipdist.config import DEFAULT_RECIPE, Config, load_config, refuse_options
from clipdist.errors import EXIT_INTERRUPTED, run_main
from clipdist.fault_tolerance.signals import StopFlag, die_with_launcher
from clipdist.fault_tolerance.slurm import note_start, restarts
from clipdist.process import (
    LOCK_WAIT_S,
    REQUEUED_LOCK_WAIT_S,
    allow_many_files,
    command_line,
    freeze_imported_objects,
    listening_to_signals,
    lock_run_folder,
    without_garbage_collection,
)
from clipdist.resume import agree_on_plan, plan_start, replan, roll_back

if TYPE_CHECKING:
    from clipdist.distributed.rank import DistEnv
    from clipdist.run_plan import RunPlan

EXAMPLE = """examples:
  python clipdist/train.py --config configs/flickr8k_rn10.yaml
  deepspeed --num_accelerators 2 clipdist/train.py --config configs/demo.yaml optim.lr=2e-3 run.name=faster
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train. Return the exit code."""
    die_with_launcher()
    parser = argparse.ArgumentParser(
        description="Trains a dual encoder (CLIP) with the exact global contrastive batch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = parser.parse_known_intermixed_args(argv)
    refuse_options(unknown, argv)
    config = load_config(args.config, args.overrides)
    return train(config, command_line(argv))


def train(config: Config, resume_command: str = "") -> int:
    """Train as configured, from the newest good checkpoint if there is one.

    Args:
        resume_command: printed if a signal interrupts the run.

    Returns:
        the exit code: 0, or 75 if a signal interrupted the run after a checkpoint.

    Raises:
        UserError: bad input; raised before a model is built if possible.
        Fault: the run failed although its input was good.
    """
    first_rank = int(os.environ.get("RANK", "0")) == 0
    if first_rank:
        note_start(config.run.dir)
    with without_garbage_collection():
        from clipdist.distributed.rank import joined_ranks, resolve_device, resolve_precision, world_size

        device = resolve_device(config.device)
        resolve_precision(config.train.precision, device)
        plan = plan_start(config, world_size())
        if plan.start_step >= plan.steps:
            if first_rank:
                more = "for more, raise train.epochs or train.steps"
                print(f"{config.run.dir}: finished at step {plan.start_step}; {more}")
            return 0
        with listening_to_signals() as stop:
            allow_many_files()
            with joined_ranks(device, config.train.hang_s) as dist_env:
                return _train_together(config, plan, dist_env, stop, resume_command)


def _train_together(config: Config, plan: RunPlan, dist_env: DistEnv, stop: StopFlag, resume_command: str) -> int:
    """Join the consensus and the watchdog, then train; after a rollback train again with a new Trainer."""
    from clipdist.distributed.consensus import Consensus
    from clipdist.engine.setup import prepare_deepspeed
    from clipdist.fault_tolerance.consistency import compare, facts
    from clipdist.fault_tolerance.watchdog import open_watchdog
    from clipdist.monitor.metrics import open_metrics, record_fault
    from clipdist.trainer import Trainer

    prepare_deepspeed()
    freeze_imported_objects()
    consensus = Consensus(dist_env, config.train.hang_s)
    with open_watchdog(dist_env, consensus, config.run.dir, config.train.hang_s) as watchdog, ExitStack() as stack:
        # Bounds the time from a signal to the exit even if a rank hangs in a collective.
        stop.on_stop = lambda _: watchdog.stopping(config.launch.signal_s)
        if stop.set:
            watchdog.stopping(config.launch.signal_s)
        if dist_env.rank == 0:
            stack.enter_context(lock_run_folder(config.run.dir, REQUEUED_LOCK_WAIT_S if restarts() else LOCK_WAIT_S))
            open_metrics(config.run.dir)
            plan = replan(config, plan, dist_env.world_size)
        with watchdog.phase("start"):
            plan = agree_on_plan(config, plan, dist_env, consensus)
            watchdog.record = partial(record_fault, config.run.dir, config.train.global_batch)
            compare(facts(config, plan.order_record, plan.val, plan.skipped, plan.resume), dist_env)
        while True:
            with watchdog.phase("start"):
                trainer = Trainer(config, plan, dist_env, consensus, watchdog, stop)
            outcome = trainer.run()
            if outcome.kind != "rollback":
                break
            plan = roll_back(config, trainer, outcome)
            del trainer
            gc.collect()  # the engine's tensors are in reference cycles
    if outcome.kind == "finished":
        trainer.journal.log(f"finished {plan.steps} steps; see {config.run.dir}, tensorboard --logdir runs")
        return 0
    again = "the job is queued again" if outcome.queued else f"go on with: {resume_command}"
    trainer.journal.log(f"interrupted at step {outcome.step}, checkpoint written; {again}")
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    run_main(main)
