"""Training on two nodes: one run is left alone, another has everything happen to it, and both are the same run.

The tests of the disturbed run are in the order in which things happen to it; each of them waits until the run trains,
and submits it again where nothing works on it. Those that compare runs need the tests before them. Some other jobs are
queued to train meanwhile, because the disturbed one often waits for Slurm.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.onehost import ROOT, OneHost, Run, submit

pytestmark = pytest.mark.slurm

STEPS = 80
SAVE_EVERY = 10
RANK_GONE_S = 60.0  # so long a job may go on without one of its ranks


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneHost]:
    cluster = OneHost(tmp_path_factory.mktemp("c") / "c")
    cluster.call("--ttl", "1800", "start")
    yield cluster
    cluster.call("stop")


@pytest.fixture(scope="module")
def settings(shards: Path) -> list[str]:
    """What all runs have in common."""
    words = [f"data.train={shards / 'train'}", "data.val=", f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}"]
    return ["--config", "configs/tiny.yaml", "device=cpu", *words]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def submitted(cluster: OneHost, settings: list[str], runs: Path) -> Callable[..., Run]:
    """Makes a run that launch/submit.py queues, on 2 nodes with 2 ranks each."""

    def make(name: str, *more: str) -> Run:
        command = [sys.executable, "launch/submit.py", "--nodes", "2", "--gpus", "2", *settings, *more]
        return Run(cluster, runs / name, [*command, f"run.root={runs}", f"run.name={name}"])

    return make


@pytest.fixture(scope="module")
def from_script(cluster: OneHost, settings: list[str], runs: Path) -> Iterator[Callable[..., Run]]:
    """Makes a run that a script of slurm/ queues, on 2 nodes with one rank each."""
    made = []

    def make(script: str, *options: str) -> Run:
        folder = runs / script
        folder.mkdir()  # Slurm does not make the log's
        options = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", *options)
        command = ["sbatch", *options, f"--output={folder}/%j_0_log.out", f"slurm/{script}.sbatch", *settings]
        made.append(Run(cluster, folder, [*command, f"run.root={runs}", f"run.name={script}"]))
        return made[-1]

    yield make
    for run in made:
        for notes in ROOT.glob(f"clipdist-{run.number}.*"):  # where the scripts keep them
            notes.unlink()


@pytest.fixture(scope="module")
def undisturbed(submitted) -> Run:
    run = submitted("undisturbed")
    run.submit()
    return run


@pytest.fixture(scope="module")
def disturbed(submitted) -> Run:
    return submitted("disturbed", "--partition", "spare")


@pytest.fixture(scope="module")
def launcher(from_script) -> Run:
    run = from_script("deepspeed", "--export=ALL,RANKS_PER_NODE=1")
    run.submit()
    return run


@pytest.fixture(scope="module")
def template(from_script) -> Run:
    return from_script("train", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def sweep(cluster: OneHost, settings: list[str], runs: Path) -> list[Run]:
    """An array of two runs without an end, with one rank each, on the node that is not lost."""
    command = [sys.executable, "launch/submit.py", "--nodes", "1", "--gpus", "1", "--exclude", "node2", *settings]
    words = ["train.steps=1000000", f"run.root={runs}", "run.name=sweep", "--sweep", "data.seed=1,2"]
    numbers = submit(cluster, [*command, *words])
    return [Run(cluster, runs / f"sweep-seed{seed}", [], number) for seed, number in zip((1, 2), numbers)]


@pytest.fixture(scope="module")
def lost(disturbed) -> tuple[Run, int, int]:
    """The disturbed run, one of whose nodes has just lost its power; its last step, and how often it was started."""
    step, starts = disturbed.until_it_trains(), disturbed.starts
    disturbed.cluster.call("kill-node", "2")
    return disturbed, step, starts


def test_cancelled_with_a_signal_it_saves_and_ends_75(undisturbed, disturbed):
    step = disturbed.until_it_trains()
    disturbed.cluster.exec("scancel", "--signal=TERM", disturbed.number)
    ended = disturbed.until_ended()
    assert ended["ExitCode"] == "75:0"
    assert int(ended["Restarts"]) == 0
    assert "launch/submit.py" in disturbed.log().partition("go on with:")[2]  # how to resume it
    disturbed.submit()
    disturbed.until_it_trains()
    assert disturbed.resumed_at() >= step  # nothing is lost


def test_preempted_by_a_job_of_a_higher_partition_it_saves_and_waits(disturbed):
    step, starts = disturbed.until_it_trains(), disturbed.starts
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = disturbed.cluster.exec(*urgent, "--wrap=true").strip()
    disturbed.wait_for("other job's turn", lambda: disturbed.cluster.job(other)["JobState"] == "COMPLETED")
    disturbed.until_started_again(starts)
    disturbed.until_it_trains()
    assert disturbed.resumed_at() >= step


def test_warned_of_its_time_limit_it_saves_and_queues_itself_again(disturbed, launcher):
    step, starts = disturbed.until_it_trains(), disturbed.starts
    disturbed.cluster.exec("scancel", "--signal=USR2", disturbed.number)
    disturbed.until_started_again(starts)
    disturbed.until_it_trains()
    assert disturbed.resumed_at() >= step


def test_requeued_by_hand_it_goes_on(disturbed):
    step, starts = disturbed.until_it_trains(), disturbed.starts
    disturbed.cluster.exec("scontrol", "requeue", disturbed.number)
    disturbed.until_started_again(starts)
    disturbed.until_it_trains()
    assert disturbed.resumed_at() >= step - 2 * SAVE_EVERY  # the last checkpoint may not have been whole


def test_trains_across_both_nodes(undisturbed):
    """Here, and not at the top, because it runs beside the tests above; nothing that follows may reach it."""
    ended = undisturbed.until_ended()
    assert ended["JobState"] == "COMPLETED", undisturbed.log()[-6000:]
    assert ended["NodeList"] == "node[1-2]"
    manifest = json.loads((undisturbed.folder / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["world"] == 4
    assert sorted(undisturbed.curve()) == list(range(1, STEPS + 1))


def test_one_run_of_a_sweep_is_warned_and_then_the_sweep_is_cancelled(lost, sweep):
    """While Slurm finds out about the lost node."""
    warned, other = sweep
    step, starts = warned.until_it_trains(), warned.starts
    warned.cluster.exec("scancel", "--signal=USR2", warned.number)
    warned.until_started_again(starts)
    warned.until_it_trains()
    assert warned.resumed_at() >= step
    other.until_it_trains()
    assert other.starts == 0
    warned.cluster.exec("scancel", warned.number.partition("_")[0])  # the whole array
    for run in sweep:
        assert run.until_ended()["JobState"] == "CANCELLED"
        assert run.records("event", event="interrupted")[-1]["step"] == max(run.curve())  # saved, even so


def test_a_node_is_lost_and_the_run_goes_on_when_it_is_back(lost):
    run, step, starts = lost
    run.wait_for("requeue", lambda: run.state == "PENDING")
    run.cluster.call("start-node", "2")
    run.until_started_again(starts)
    run.until_it_trains()
    assert run.resumed_at() >= step - 2 * SAVE_EVERY


def test_the_sbatch_template_starts_again_after_a_killed_rank(template):
    template.until_it_trains()
    starts = template.starts
    template.kill_rank(1, "node2")
    template.wait_for("end of the other rank", lambda: template.starts > starts, RANK_GONE_S)
    assert re.search(r"node2.*(rank|task) 1\b|(rank|task) 1\b.*node2", template.log())
    assert template.until_ended()["JobState"] == "COMPLETED", template.log()[-6000:]
    assert template.starts == starts + 1


def test_the_disturbed_run_is_the_undisturbed_one(undisturbed, disturbed):
    assert disturbed.until_ended()["JobState"] == "COMPLETED", disturbed.log()[-6000:]
    assert len(disturbed.records("event", event="restart")) >= 5
    assert disturbed.curve() == undisturbed.curve()


def test_the_deepspeed_launcher_s_run_is_the_template_s(launcher, template):
    assert launcher.until_ended()["JobState"] == "COMPLETED", launcher.log()[-6000:]
    assert launcher.curve() == template.curve()


def test_half_the_ranks_have_the_same_batches(template, undisturbed):
    """And the same losses, but for the rounding of sums."""
    mine, reference = template.curve(), undisturbed.curve()
    assert {step: ids for step, (ids, _) in mine.items()} == {step: ids for step, (ids, _) in reference.items()}
    assert mine[STEPS][1] == pytest.approx(reference[STEPS][1], rel=1e-4)
