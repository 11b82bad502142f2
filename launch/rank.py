"""Run one rank of a job that submit.py launched: train as a snapshot's configuration says, with the code beside it.

In a Slurm job submitit's process becomes this one (exec), so exit codes and signals are the rank's own: 0, 1, 2 or 75.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":  # ahead of an installed clipdist
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from clipdist.config import REPOSITORY, Config, load_config
from clipdist.errors import Fault, UserError, run_main
from clipdist.fault_tolerance.signals import die_with_launcher
from clipdist.fault_tolerance.slurm import note_exit, restarts

PORT_STRIDE = 7919  # far from the ports of the next jobs, and prime: 20000 starts until one comes again


def main(argv: list[str] | None = None) -> int:
    die_with_launcher()
    parser = argparse.ArgumentParser(description="Runs one rank of a job; launch/submit.py calls it.")
    parser.add_argument("--config", required=True, help="resolved configuration")
    parser.add_argument("--resume-command", required=True, help="what the user types to go on")
    args = parser.parse_args(argv)
    if "SUBMITIT_EXECUTOR" in os.environ:  # else launch/local_job.py has set the variables
        set_environment()
    try:
        code = train_rank(load_config(args.config), args.resume_command)
    except Fault:
        raise
    except UserError:
        note_exit(2)
        raise
    note_exit(code)
    return code


def train_rank(config: Config, resume_command: str) -> int:
    """Train, with the submission's command line as that of this process. Return the exit code."""
    from launch.extensions import prepare_extensions

    sys.argv = shlex.split(resume_command)[1:]  # what the run folder keeps as its command line
    prepare_extensions(config)
    from clipdist.train import train

    return train(config, resume_command=resume_command)


def set_environment() -> None:
    """Set the variables that launchers give, from what Slurm and submitit say of this rank."""
    from submitit import JobEnvironment

    env = JobEnvironment()
    local_world = env.num_tasks // env.num_nodes
    node = env.hostnames[0]
    numbers = (env.global_rank, env.num_tasks, env.local_rank, local_world)
    os.environ.update(launcher_variables(*numbers, node, env.job_id, restarts()))
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))


def launcher_variables(
    rank: int, world: int, local_rank: int, local_world: int, address: str, job: str, restarts: int
) -> dict[str, str]:
    """Return the environment variables by which torch and DeepSpeed know a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "LOCAL_SIZE": str(local_world),  # DeepSpeed's name for it
        "MASTER_ADDR": address,
        "MASTER_PORT": str(rendezvous_port(job, restarts)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        # Where DeepSpeed compiles (offloading), it looks for ninja there. PYTHONPATH is for what a rank starts.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def rendezvous_port(job_id: str, restarts: int) -> int:
    """Return the port at which ranks meet: the same on all nodes, below the ports that systems hand out.

    It differs between jobs, mostly, and between the starts of a job, so that a restart avoids a port that another
    program holds. slurm/*.sbatch compute the same.
    """
    return 10000 + (int("".join(filter(str.isdigit, job_id))) + PORT_STRIDE * restarts) % 20000


if __name__ == "__main__":
    run_main(main)
