"""Make the batch script of a run, or of an array of runs, and hand it to Slurm through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from clipdist.config import Config
from clipdist.errors import UserError

LOADER_THREADS = 7  # decoding threads per rank where data.threads leaves them open


def submit_job(config: Config, folder: Path, after: Path, commands: list[list[str]]) -> list[tuple[str, Path]]:
    """Queue one job, or an array where there are several commands, and return at once.

    Args:
        folder: scripts, logs and notes of the jobs; all nodes must see it.
        after: the shell file that ends the batch script.
        commands: what every rank executes, one command per run.

    Returns:
        (job id, log of rank 0) per command.

    Raises:
        UserError: this machine cannot submit to Slurm, or Slurm refuses the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = SlurmExecutor(folder)
    except RuntimeError:
        raise UserError(
            "launch.cluster=slurm: no srun on PATH, so this is no Slurm login node;"
            " --cluster local trains here, --dry-run shows the script"
        ) from None
    executor.update_parameters(**slurm_parameters(config, folder, after))
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit repeats sbatch's words there
            # A function of the standard library: nothing of ours is pickled, and the rank takes the process over.
            jobs = [executor.submit(os.execv, command[0], command) for command in commands]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {refusal(str(error))}") from None
    return [(job.job_id, job.paths.stdout) for job in jobs]


def batch_script(config: Config, folder: Path, after: Path, count: int = 1) -> str:
    """Return the text that submitit would hand to sbatch for `count` runs; needs no Slurm."""

    class Offline(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # the real one refuses machines without srun

    executor = Offline(folder)
    executor.update_parameters(**slurm_parameters(config, folder, after))
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def slurm_parameters(config: Config, folder: Path, after: Path) -> dict[str, Any]:
    """Return the launch section as submitit's parameters. A run with device=cpu requests no GPU."""
    launch = config.launch
    cpus = cpus_per_task(config)
    options = {key: value for key, value in launch.slurm.items() if value is not False and value != ""}
    # pyxis adds options to srun: only the ranks run in the container, not the batch script, which needs scontrol.
    container = {key: options.pop(key) for key in list(options) if key.startswith("container-")}
    asked = {
        "job_name": folder.parent.name,
        "nodes": launch.nodes,
        "ntasks_per_node": launch.gpus,
        "gpus_per_node": None if config.device == "cpu" else launch.gpus,
        "cpus_per_task": cpus,
        "time": launch.time_min,
        "mem": f"{launch.mem_gb}GB" if launch.mem_gb else None,
        "partition": launch.partition or None,
        "account": launch.account or None,
        "signal_delay_s": launch.signal_s,
        "setup": [*_first_lines(folder), *launch.setup],
        "teardown": [shlex.join(["bash", str(after)]) + f' "$?" "$CLIPDIST_JOB_FILES" {launch.max_restarts}'],
        "additional_parameters": {
            "requeue": True,  # also where a node is lost
            "open-mode": "append",  # the log goes on in the next start
            **options,
        },
        "stderr_to_stdout": True,  # one log per rank
        "srun_args": [
            "--kill-on-bad-exit=1",  # ranks that lost one of them would wait for it in a collective
            f"--cpus-per-task={cpus}",  # some versions of srun do not take over sbatch's
            "--open-mode=append",
            *(f"--{key}={value}" for key, value in container.items()),
        ],
    }
    return {name: value for name, value in asked.items() if value is not None} | {"wckey": None}  # submitit has its own


def cpus_per_task(config: Config) -> int:
    """Return the cores of a rank: the loader's threads and one for the training loop."""
    return config.launch.cpus_per_gpu or (config.data.threads or LOADER_THREADS) + 1


def _first_lines(folder: Path) -> list[str]:
    """Return shell lines that remove an earlier start's notes and results: submitit's would stop the next start."""
    number = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"
    return [
        f"export CLIPDIST_JOB_FILES={shlex.quote(str(folder.resolve()))}/{number}",
        'rm -f "$CLIPDIST_JOB_FILES".code "$CLIPDIST_JOB_FILES".again "$CLIPDIST_JOB_FILES"_*_result.pkl',
    ]


def refusal(message: str) -> str:
    """Return sbatch's own words from submitit's message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if line.startswith("sbatch: error: ")]
    return ": ".join(said) or lines[-1]
