"""In: a recipe, the number of nodes and of GPUs per node. Out: a training job on Slurm, or run here, or shown.

One task per GPU. What can be checked without the cluster is checked before the job queues.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.config import DEFAULT_RECIPE, Config, load_config, to_yaml
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.plan import check_data, check_launch, check_ranks

if TYPE_CHECKING:
    from submitit import Job, LocalExecutor, SlurmExecutor

EXAMPLES = """examples:
  python launch/submit.py --nodes 2 --gpus 8
  python launch/submit.py --nodes 2 --gpus 8 --config configs/cc3m_vitb16.yaml --dry-run
  python launch/submit.py --cluster local --gpus 2 --config configs/flickr8k_vit_tiny.yaml device=cpu
"""
# Flag -> key of the recipe's launch section; a flag wins over the recipe and over key=value.
FLAGS = ("nodes", "gpus", "cluster", "partition", "account", "qos", "constraint", "time_min")
FOLLOW_S = 0.2  # between two looks at the log of a job on this machine
GRACE_S = 2.0  # from the first rank's failure to the end of the others


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    words = [f"launch.{flag}={json.dumps(getattr(args, flag))}" for flag in FLAGS if getattr(args, flag) is not None]
    config = load_config(args.config, [*args.overrides, *words])
    if args.dry_run:
        check(config)
        show(config, args.config)
        return 0
    check_launch(config, config.launch.nodes * config.launch.gpus)
    check(config)
    command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    match config.launch.cluster:
        case "slurm":
            return submit_to_slurm(config, command)
        case "local":
            return run_here(config, command)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Submits a training run: one task per GPU, on Slurm or on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe (default {DEFAULT_RECIPE})")
    parser.add_argument("--nodes", type=int, help="number of nodes")
    parser.add_argument("--gpus", type=int, help="GPUs per node; with device=cpu, CPU ranks per node")
    parser.add_argument("--cluster", choices=("slurm", "local"), help="local: train on this machine, and wait")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument("--qos", help="Slurm quality of service")
    parser.add_argument("--constraint", help="node features that Slurm shall look for")
    parser.add_argument("--time", type=int, dest="time_min", metavar="MINUTES", help="time limit in minutes")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and sbatch script; needs no Slurm")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def check(config: Config) -> None:
    """Raises UserError for what is wrong with the configuration itself, wherever the data lies."""
    if config.launch.cluster == "local" and config.launch.nodes != 1:
        raise UserError(f"launch.nodes={config.launch.nodes}: --cluster local has one node, this machine")
    check_ranks(config, config.launch.nodes * config.launch.gpus)
    from clipdist.model.spec import resolve_spec  # slow to import: last

    resolve_spec(config.model)


def show(config: Config, recipe: str) -> None:
    print(f"# resolved configuration: {recipe} and the command line\n{to_yaml(config)}")
    match config.launch.cluster:
        case "slurm":
            print(f"# sbatch script, as it would be submitted\n{sbatch_script(config)}")
        case "local":
            print(f"# no sbatch script: {config.launch.gpus} processes on this machine")
    try:
        check_data(config)
    except UserError as error:  # it may lie on the cluster alone
        print(f"note: submitted from here it would be refused: {error}", file=sys.stderr)


# Slurm


def submit_to_slurm(config: Config, command: list[str]) -> int:
    """Queues the job and returns at once.

    Raises:
        UserError: this machine cannot submit to Slurm, or Slurm refuses the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = slurm_executor(config)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's words there
            job = executor.submit(train_rank, config, command)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {refusal(str(error))}") from None
    print(f"job {job.job_id}: {config.launch.nodes} nodes x {config.launch.gpus} tasks, run folder {config.run.dir}")
    print(f"log   {job.paths.stdout}\nwatch squeue -j {job.job_id}\nstop  scancel {job.job_id}")
    return 0


def slurm_executor(config: Config) -> SlurmExecutor:
    """submitit's executor, set up as the launch section says.

    Raises:
        UserError: no Slurm on this machine.
    """
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(submitit_folder(config))
    except RuntimeError:
        raise UserError(
            "launch.cluster=slurm: no srun on PATH, so this is no Slurm login node;"
            " --cluster local trains here, --dry-run shows the script"
        ) from None
    executor.update_parameters(**slurm_parameters(config))
    return executor


def sbatch_script(config: Config) -> str:
    """The text that submitit would hand to sbatch; needs no Slurm."""
    from submitit import SlurmExecutor

    class Offline(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # the real one refuses machines without srun

    executor = Offline(submitit_folder(config))
    executor.update_parameters(**slurm_parameters(config))
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def slurm_parameters(config: Config) -> dict[str, Any]:
    """The launch section in submitit's words. A run with device=cpu requests no GPU."""
    launch = config.launch
    asked = {
        "job_name": config.run.name,
        "nodes": launch.nodes,
        "ntasks_per_node": launch.gpus,
        "gpus_per_node": None if config.device == "cpu" else launch.gpus,
        "cpus_per_task": launch.cpus_per_gpu,
        "time": launch.time_min,
        "mem": f"{launch.mem_gb}GB" if launch.mem_gb else None,
        "partition": launch.partition or None,
        "account": launch.account or None,
        "qos": launch.qos or None,
        "constraint": launch.constraint or None,
        "setup": launch.setup or None,
        "additional_parameters": launch.slurm or None,
        "stderr_to_stdout": True,  # one log per rank
        # Ranks that lost one of them would wait for it in a collective. And some versions of srun do not take over
        # sbatch's --cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={launch.cpus_per_gpu}"],
    }
    return {name: value for name, value in asked.items() if value is not None}


def refusal(message: str) -> str:
    """sbatch's own words out of submitit's message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if line.startswith("sbatch: error: ")]
    return ": ".join(said) or lines[-1]


# This machine


def run_here(config: Config, command: list[str]) -> int:
    """Trains with one process per GPU (or CPU rank) on this machine, and shows the first one's log.

    Returns:
        0; 1 where a rank failed; 75 after Ctrl-C and a checkpoint.

    Raises:
        UserError: the ranks ended with one.
    """
    # The ranks look after Ctrl-C themselves: they inherit "ignored" and set a handler when training starts.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = local_executor(config).submit(train_rank, config, command)
    signal.signal(signal.SIGINT, before)
    print(f"{config.launch.gpus} processes on this machine, log {job.paths.stdout}", flush=True)
    try:
        wait_for(job)
    except KeyboardInterrupt:
        leave_with_checkpoint(job)
    failed = {rank: text for rank in range(job.num_tasks) if (text := failure(job, rank, ended=True)) is not None}
    for text in failed.values():
        if text.startswith(f"{UserError.__module__}.UserError: "):
            raise UserError(text.partition(": ")[2])
    if failed and all(text.endswith(f"exit code {EXIT_INTERRUPTED}") for text in failed.values()):
        return EXIT_INTERRUPTED
    for rank, text in failed.items():
        print(f"rank {rank} failed: {text}; see {job.task(rank).paths.stderr}", file=sys.stderr)
    if failed:
        return 1
    print(f"done: {config.run.dir}")
    return 0


def wait_for(job: Job[None], shown: int = 0) -> None:
    """Shows the first rank's log until all ranks ended; ends the others where one failed."""
    while not job.done():
        time.sleep(FOLLOW_S)
        shown = follow(job.paths.stdout, shown)
        if any(failure(job, rank) is not None for rank in range(job.num_tasks)):
            time.sleep(GRACE_S)  # mostly all fail alike, and each may say why
            signal_ranks(job, signal.SIGKILL)  # the others would wait for the lost rank in a collective
    follow(job.paths.stdout, shown)


def leave_with_checkpoint(job: Job[None]) -> None:
    """After Ctrl-C: the ranks finish their step and save; a second Ctrl-C ends them at once."""
    print("\ninterrupted: writing a checkpoint; Ctrl-C again ends at once", flush=True)
    try:
        signal_ranks(job, signal.SIGINT)  # a terminal has sent it to them already, `kill -INT` has not
        wait_for(job, shown=job.paths.stdout.stat().st_size if job.paths.stdout.exists() else 0)
    except KeyboardInterrupt:
        signal_ranks(job, signal.SIGKILL)
        wait_for(job)


def signal_ranks(job: Job[None], number: int) -> None:
    """To the ranks themselves: submitit's controller, whose children they are, then ends on its own."""
    import psutil

    try:
        for rank in psutil.Process(int(job.job_id)).children():
            rank.send_signal(number)
    except psutil.NoSuchProcess:  # it ended in the meantime
        pass


def local_executor(config: Config) -> LocalExecutor:
    from submitit import LocalExecutor

    executor = LocalExecutor(submitit_folder(config))
    executor.update_parameters(
        tasks_per_node=config.launch.gpus,
        gpus_per_node=0 if config.device == "cpu" else config.launch.gpus,
        timeout_min=config.launch.time_min,
    )
    return executor


def follow(log: Path, shown: int) -> int:
    """Prints what was written to the log after its first `shown` bytes. Returns how many there are now."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(new)


def failure(job: Job[None], rank: int, ended: bool = False) -> str | None:
    """The last line of a rank's traceback; None while it runs, and where it finished well."""
    from submitit.core.utils import pickle_load

    result = job.task(rank).paths.result_pickle  # job.exception() would wait for the other ranks
    if not result.exists():
        return "ended without a result" if ended else None
    outcome, value = pickle_load(result)
    return None if outcome == "success" else value.strip().splitlines()[-1]


# In the job


def submitit_folder(config: Config) -> Path:
    """Scripts and logs of the jobs; all nodes must see it."""
    return config.run.dir / "submitit"


def train_rank(config: Config, command: list[str]) -> None:
    """One rank of the job: submitit's environment becomes the one that launchers give, and training runs.

    submitit pickles this function by its text, not by its module's name, because the file runs as __main__.

    Raises:
        RuntimeError: training ended with another exit code than 0, so that the job counts as failed.
    """
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
        MASTER_PORT=str(rendezvous_port(env.job_id)),
        # Where DeepSpeed compiles (offloading), it looks for ninja there.
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    if env.cluster == "slurm":  # elsewhere the trainer divides the machine's cores among the ranks
        os.environ.setdefault("OMP_NUM_THREADS", str(config.launch.cpus_per_gpu))
    sys.argv = command  # what the run folder keeps as its command line
    from clipdist.train import train

    code = train(config, resume_command=shlex.join(["python", *command]))
    if code:
        raise RuntimeError(f"training ended with exit code {code}")


def rendezvous_port(job_id: str) -> int:
    """The same on all nodes of a job, mostly another one for another job, and below the ports that systems hand out."""
    return 10000 + int("".join(filter(str.isdigit, job_id))) % 20000


if __name__ == "__main__":
    run_main(main)
