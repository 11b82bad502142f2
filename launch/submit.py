"""In: a recipe, the number of nodes and of GPUs per node. Out: a training job on Slurm, or run here, or shown.

One task per GPU. What can be checked without the cluster is checked before the job queues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout's own code, from any folder and beside an installed one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import shlex
import time

from clipdist.config import Config, to_yaml
from clipdist.config.checks import check_ranks
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
from clipdist.run_plan import check_data, check_launch
from launch.arguments import Request, read_arguments
from launch.setup_lines import as_written
from launch.snapshot import take_snapshot


def main(argv: list[str] | None = None) -> int:
    request = read_arguments(argv)
    for run in request.runs:
        check(run.config)
    if request.dry_run:
        show(request)
        return 0
    if request.plan:
        show_plan(request)
        return 0
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
    """Raises UserError for what is wrong with the configuration itself, wherever the data lies."""
    launch = config.launch
    if launch.cluster == "local" and launch.nodes != 1:
        raise UserError(f"launch.nodes={launch.nodes}: --cluster local has one node, this machine")
    check_ranks(config, 1 if launch.cluster == "debug" else launch.nodes * launch.gpus)
    from clipdist.models.spec import resolve_spec  # slow to import: last

    resolve_spec(config.model)


def check_all(request: Request) -> None:
    """All runs of a sweep, before the first is queued: data, run folders, and whether they fit the GPUs.

    Prints what is to be expected of each, in short; runs that differ in other things alone are not estimated again.
    """
    estimated: list[tuple[object, ...]] = []
    for run in request.runs:
        config = run.config
        debugging = config.launch.cluster == "debug"
        catalog, _ = check_launch(config, 1 if debugging else config.launch.nodes * config.launch.gpus)
        cost = (config.model, config.loss, config.engine, config.train, config.data.train)
        if debugging or cost in estimated:
            continue
        from clipdist.estimate import make_estimate  # slow to import

        estimated.append(cost)
        plan = make_estimate(config, catalog)
        plan.refuse()
        print(plan.short(), flush=True)


def show_plan(request: Request) -> None:
    """What each run will need and take; without steps in all where the data is not here."""
    from clipdist.estimate import make_estimate

    for run in request.runs:
        try:
            catalog, _ = check_data(run.config)
        except UserError as error:  # it may lie on the cluster alone
            catalog = None
            print(f"note: {error}", file=sys.stderr)
        print(make_estimate(run.config, catalog).table())


def show(request: Request) -> None:
    """The configuration and the batch script, without making a file."""
    first = request.runs[0].config
    print(f"# site defaults: {request.site or 'none'}")
    for run in request.runs if len(request.runs) > 1 else []:
        print(f"# run {run.config.run.dir}: {' '.join(run.point.words)}")
    print(f"# resolved configuration: {request.recipe} and the command line\n{to_yaml(as_written(first))}")
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


def submit_to_slurm(request: Request, words: list[str]) -> int:
    """Queues the job and returns at once."""
    from launch.slurm_job import submit_job

    first = request.runs[0].config
    snapshots = [take_snapshot(run.config) for run in request.runs]
    commands = [rank_command(snapshot, resume_command(words)) for snapshot in snapshots]
    jobs = submit_job(first, job_folder(request), snapshots[0] / "launch/after.sh", commands)
    for run, snapshot, (job, log) in zip(request.runs, snapshots, jobs):
        record(run.config, snapshot, words, job=job, log=str(log.resolve()))
        size = f"{first.launch.nodes} nodes x {first.launch.gpus} tasks"
        print(f"job {job}: {size}, run folder {run.config.run.dir}\nlog   {log}")
    folders = shlex.join(str(run.config.run.dir) for run in request.runs)
    array = jobs[0][0].partition("_")[0]
    print(f"watch python launch/status.py {folders} --follow\nstop  scancel {array}")
    return 0


def run_in_turn(request: Request, words: list[str]) -> int:
    """One run after another on this machine. A run that fails leaves the others their turn, Ctrl-C does not."""
    from launch.local_job import run_here

    code = 0
    for run in request.runs:
        snapshot = take_snapshot(run.config)
        folder = run.config.run.dir / "submitit"
        record(run.config, snapshot, words, log=str(folder.resolve()))
        ended = run_here(run.config, folder, rank_command(snapshot, resume_command(words)))
        if ended == EXIT_INTERRUPTED:
            return ended
        code = code or ended
    return code


def debug(request: Request, words: list[str]) -> int:
    """One process, this one, with the working tree's code."""
    from launch.local_job import debug_here

    if len(request.runs) > 1:
        raise UserError("--sweep: --cluster debug runs a single configuration")
    config = request.runs[0].config
    return debug_here(as_written(config), config.run.dir / "submitit", resume_command(words))


def rank_command(snapshot: Path, resume: str) -> list[str]:
    """What every rank executes: the snapshot's code with the snapshot's configuration."""
    program = [sys.executable, "-u", str(snapshot / "launch/rank.py")]
    return [*program, "--config", str(snapshot / "config.yaml"), "--resume-command", resume]


def resume_command(words: list[str]) -> str:
    return shlex.join(["python", "launch/submit.py", *words])


def job_folder(request: Request) -> Path:
    """Scripts, logs and notes of the jobs; all nodes must see it. A sweep is one job: it has one for all runs."""
    run = request.runs[0].config.run
    return Path(run.root) / run.name.removesuffix(request.runs[0].point.suffix) / "submitit"


def record(config: Config, snapshot: Path, words: list[str], **more: str) -> None:
    """A line in RUN/jobs.jsonl: what was submitted when, which code it runs and where its log is."""
    launch = config.launch
    line = {
        "time": time.time(),
        "cluster": launch.cluster,
        "nodes": launch.nodes,
        "gpus": launch.gpus,
        "snapshot": str(snapshot),
        "command": ["launch/submit.py", *words],
        **more,
    }
    with (config.run.dir / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_main(main)
