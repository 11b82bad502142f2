"""One rank of a job that submit.py launched: the configuration of a snapshot in, training with the code beside it.

The submitter's process becomes this one (exec), so exit codes and signals are the rank's own: 0, 1, 2 or 75.
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
from clipdist.fault_tolerance.slurm import note_exit, restarts
from launch.setup_lines import as_written

PORT_STRIDE = 7919  # far from the ports of the next jobs, and prime: 20000 starts until one comes again


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs one rank of a job; launch/submit.py calls it.")
    parser.add_argument("--config", required=True, help="resolved configuration")
    parser.add_argument("--resume-command", required=True, help="what the user types to go on")
    args = parser.parse_args(argv)
    set_environment()
    try:
        config = load_config(args.config)
        code = train_rank(as_written(config), args.resume_command)
    except Fault:
        raise
    except UserError:
        note_exit(2)
        raise
    note_exit(code)
    return code


def train_rank(config: Config, resume_command: str) -> int:
    """Trains, with the submission's command line as that of this process."""
    from launch.extensions import prepare_extensions

    sys.argv = shlex.split(resume_command)[1:]  # what the run folder keeps as its command line
    prepare_extensions(config)
    from clipdist.train import train

    return train(config, resume_command=resume_command)


def set_environment() -> None:
    """From what the submitter's environment says of this rank, the variables that launchers give."""
    from submitit import JobEnvironment

    env = JobEnvironment()
    local_world = env.num_tasks // env.num_nodes
    os.environ.update(
        RANK=str(env.global_rank),
        WORLD_SIZE=str(env.num_tasks),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(local_world),
        LOCAL_SIZE=str(local_world),  # DeepSpeed's name for it
        MASTER_ADDR=env.hostnames[0],
        MASTER_PORT=str(rendezvous_port(env.job_id, restarts())),
        PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        # Where DeepSpeed compiles (offloading), it looks for ninja there. PYTHONPATH is for what a rank starts.
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    if env.cluster == "slurm":  # elsewhere the trainer divides the machine's cores among the ranks
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))


def rendezvous_port(job_id: str, restarts: int) -> int:
    """The same on all nodes of a job, mostly another one for another job, and below the ports that systems hand out.

    Another one at each start, too: where a program holds the port, a restart helps. slurm/*.sbatch compute the same.
    """
    return 10000 + (int("".join(filter(str.isdigit, job_id))) + PORT_STRIDE * restarts) % 20000


if __name__ == "__main__":
    run_main(main)
