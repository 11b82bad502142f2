"""Submit a training run to Slurm, or run it here, one task per GPU.

What can be checked without the cluster is checked before the job queues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout's own code, from any folder and beside an installed one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import shlex
import time
from contextlib import suppress

from clipdist.config import Config, to_yaml
from clipdist.config.batches import check_ranks, launched_ranks
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.models.spec import resolve_run_spec
from clipdist.process import LOCK_WAIT_S
from clipdist.run_plan import check_data, check_launch
from clipdist.storage import lock
from launch.arguments import LaunchRequest, read_arguments
from launch.snapshot import take_snapshot


def main(argv: list[str] | None = None) -> int:
    request = read_arguments(argv)
    for run in request.runs:
        check(run.config)
    if request.dry_run:
        return show(request)
    if request.plan:
        return show_plan(request)
    words = sys.argv[1:] if argv is None else argv
    check_all(request)
    match request.runs[0].config.launch.cluster:
        case "slurm":
            return submit_to_slurm(request, words)
        case "local":
            return run_in_turn(request, words)
        case "debug":
            return debug(request, words)


def check(config: Config) -> None:
    """Raise UserError for what is wrong with the configuration itself, wherever the data lies."""
    launch = config.launch
    if launch.cluster == "local" and launch.nodes != 1:
        raise UserError(f"launch.nodes={launch.nodes}: --cluster local has one node, this machine")
    check_ranks(config, launched_ranks(config.launch))
    resolve_run_spec(config)


def check_all(request: LaunchRequest) -> None:
    """Check all runs of a sweep before the first is queued: data, run folders, and whether they fit the GPUs.

    Print what each will need, in short; runs that differ in other things alone are not estimated again.
    """
    estimated: list[tuple[object, ...]] = []
    for run in request.runs:
        config = run.config
        catalog, _ = check_launch(config, launched_ranks(config.launch))
        cost = (config.model, config.objectives, config.engine, config.train, config.data.train)
        if config.launch.cluster == "debug" or cost in estimated:
            continue
        from clipdist.estimate import make_estimate, summary  # slow to import

        estimated.append(cost)
        plan = make_estimate(config, catalog)
        plan.refuse()
        print(summary(plan), flush=True)


def show_plan(request: LaunchRequest) -> int:
    """Print what each run will need; without the number of steps where the data is not here."""
    from clipdist.estimate import full_table, make_estimate

    for run in request.runs:
        catalog = None
        try:
            catalog, _ = check_data(run.config)
        except UserError as error:  # it may lie on the cluster alone
            print(f"note: {error}", file=sys.stderr)
        print(full_table(make_estimate(run.config, catalog)))
    return 0


def show(request: LaunchRequest) -> int:
    """Print the configuration and the batch script, without making a file."""
    first = request.runs[0].config
    print(f"# site defaults: {request.site or 'none'}")
    for run in request.runs if len(request.runs) > 1 else []:
        print(f"# run {run.config.run.dir}: {' '.join(run.point.words)}")
    print(f"# resolved configuration: {request.recipe} and the command line\n{to_yaml(first)}")
    if first.launch.cluster == "slurm":
        from launch.slurm_job import batch_script

        after = first.run.dir.resolve() / "code/HASH/launch/after.sh"  # the snapshot is named when it is taken
        script = batch_script(first, job_folder(request), after, len(request.runs))
        print(f"# sbatch script, as it would be submitted\n{script}")
    else:
        print(f"# no sbatch script: {first.launch.cluster} runs on this machine")
    try:
        for run in request.runs:
            check_data(run.config)
    except UserError as error:  # it may lie on the cluster alone
        print(f"note: submitted from here it would be refused: {error}", file=sys.stderr)
    return 0


def submit_to_slurm(request: LaunchRequest, words: list[str]) -> int:
    """Queue the job and return at once."""
    from launch.slurm_job import submit_job

    first = request.runs[0].config
    snapshots = [take_snapshot(run.config) for run in request.runs]
    commands = [rank_command(snapshot, words) for snapshot in snapshots]
    jobs = submit_job(first, job_folder(request), snapshots[0] / "launch/after.sh", commands)
    for run, snapshot, (job, log) in zip(request.runs, snapshots, jobs):
        record(run.config, snapshot, words, job=job, log=str(log.resolve()))
        size = f"{first.launch.nodes} nodes x {first.launch.gpus} tasks"
        print(f"job {job}: {size}, run folder {run.config.run.dir}\nlog   {log}")
    folders = shlex.join(str(run.config.run.dir) for run in request.runs)
    array = jobs[0][0].partition("_")[0]
    print(f"watch python launch/status.py {folders} --follow\nstop  scancel {array}")
    return 0


def run_in_turn(request: LaunchRequest, words: list[str]) -> int:
    """Run one after another on this machine. After a run that fails the others follow, after Ctrl-C they do not."""
    from launch.local_job import run_here

    code = 0
    for run in request.runs:
        snapshot = take_snapshot(run.config)
        folder = run.config.run.dir / "submitit"
        record(run.config, snapshot, words, log=str(folder.resolve()))
        with (run.config.run.dir / "jobs.jsonl").open() as jobs:
            with suppress(OSError):  # for launch/status.py: between two starts no rank holds the run folder
                lock(jobs, wait_s=LOCK_WAIT_S)
            ended = run_here(run.config, folder, rank_command(snapshot, words))
        if ended == EXIT_INTERRUPTED:
            return ended
        code = code or ended
    return code


def debug(request: LaunchRequest, words: list[str]) -> int:
    """Train in this process, with the working tree's code."""
    from launch.local_job import debug_here

    if len(request.runs) > 1:
        raise UserError("--sweep: --cluster debug runs a single configuration")
    return debug_here(request.runs[0].config, resume_command(words))


def rank_command(snapshot: Path, words: list[str]) -> list[str]:
    """Return what every rank executes: the snapshot's code with the snapshot's configuration."""
    program = [sys.executable, "-u", str(snapshot / "launch/rank.py")]
    return [*program, "--config", str(snapshot / "config.yaml"), "--resume-command", resume_command(words)]


def resume_command(words: list[str]) -> str:
    return shlex.join(["python", "launch/submit.py", *words])


def job_folder(request: LaunchRequest) -> Path:
    """Return the folder of the jobs' scripts, logs and notes; all nodes must see it. A sweep, one job, has one."""
    run = request.runs[0].config.run
    return Path(run.root) / run.name.removesuffix(request.runs[0].point.suffix) / "submitit"


def record(config: Config, snapshot: Path, words: list[str], **more: str) -> None:
    """Append to RUN/jobs.jsonl what was submitted when, which code it runs and where its log is."""
    launch = config.launch
    size = {"cluster": launch.cluster, "nodes": launch.nodes, "gpus": launch.gpus}
    line = {"time": time.time(), **size, "snapshot": str(snapshot), "command": ["launch/submit.py", *words], **more}
    with (config.run.dir / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_main(main)
