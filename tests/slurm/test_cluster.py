"""The cluster itself: nodes of their own, a power cut, two of them side by side, and nothing that stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.onehost import ROOT, OneHost

pytestmark = pytest.mark.slurm


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name, unlike tmp_path: sockets lie in it."""
    return tmp_path_factory.mktemp("c")


@pytest.fixture
def cluster(folder: Path) -> Iterator[OneHost]:
    cluster = OneHost(folder / "a")
    cluster.call("start")
    yield cluster
    cluster.call("stop")


def wait_for(true, limit_s: float = 60.0) -> None:
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def processes_of(cluster: OneHost) -> list[str]:
    """All programs that have the cluster's configuration in their environment, on the whole machine."""
    mark = f"SLURM_CONF={cluster.folder}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "comm").read_text().strip())
        except OSError:  # it has ended
            pass
    return found


def test_every_node_is_a_machine_of_its_own(cluster):
    look = "hostname; hostname -i; ls /dev/shm; touch /dev/shm/mine; echo $$"
    said = cluster.exec("srun", "-N2", "-l", "sh", "-c", look).splitlines()
    for node in (0, 1):
        lines = [line.partition(": ")[2] for line in said if line.startswith(f"{node}: ")]
        assert lines[0] == f"node{node + 1}"
        assert len(lines) == 3, lines  # an empty /dev/shm
        assert int(lines[2]) < 1000  # processes are counted from 1
    gpus = cluster.exec("srun", "-N2", "--gpus-per-node=8", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert gpus.splitlines() == ["0,1,2,3,4,5,6,7"] * 2


def test_a_task_that_is_bound_to_cpus_has_all_of_them(cluster):
    """On a machine with two cores both tasks are bound to the same two."""
    look = "from clipdist.distributed.node import cores_of_rank; print(cores_of_rank())"
    bound = ["srun", "-N1", "--ntasks=2", "--cpus-per-task=2", "--cpu-bind=mask_cpu:0x3,0x3"]
    shell = f"cd {ROOT}; LOCAL_WORLD_SIZE=2 {sys.executable} -c '{look}'"
    assert cluster.exec(*bound, "sh", "-c", shell).split() == ["2", "2"]


def test_a_node_loses_its_power_and_boots(cluster):
    """What Slurm makes of it, with a job on the node, is in test_jobs.py."""
    cluster.exec("sbatch", "--nodes=2", "--wrap=srun sleep 300", "--output=/dev/null")
    wait_for(lambda: processes_of(cluster).count("sleep") == 2)
    cluster.call("kill-node", "2")
    assert processes_of(cluster).count("sleep") == 1
    cluster.exec("scancel", "--user=root")
    cluster.call("start-node", "2")
    assert cluster.exec("srun", "--immediate=30", "--nodelist=node2", "hostname").strip() == "node2"


def test_two_clusters_do_not_see_one_another(cluster, folder):
    other = OneHost(folder / "b")
    other.call("start")
    try:
        number = other.exec("sbatch", "--parsable", "--wrap=sleep 300", "--output=/dev/null").strip()
        assert number in other.exec("squeue")
        assert number not in cluster.exec("squeue")
        cluster.call("stop")
        assert other.node_states().keys() == {"node1", "node2"}
    finally:
        other.call("stop")
    assert cluster.call("exec", "true", check=False) == ""


def test_all_ends_with_the_first_process(cluster):
    cluster.exec("sbatch", "--nodes=2", "--wrap=srun sleep 300", "--output=/dev/null")
    wait_for(lambda: processes_of(cluster).count("sleep") == 2)
    assert {"slurmctld", "slurmd"} <= set(processes_of(cluster))
    os.kill(int((cluster.folder / "first").read_text().split()[0]), signal.SIGKILL)
    wait_for(lambda: not processes_of(cluster))


def test_it_leaves_when_its_time_is_over(folder):
    cluster = OneHost(folder / "a")
    cluster.call("--ttl", "3", "start")
    assert processes_of(cluster)
    wait_for(lambda: not processes_of(cluster))


def test_bad_folders_are_refused(folder):
    (folder / "thesis.tex").touch()
    command = [sys.executable, str(ROOT / "slurm/cluster"), "--folder"]
    for name, reason in ((str(folder), "holds something else"), (str(folder / ("x" * 70)), "68 characters")):
        ended = subprocess.run([*command, name, "start"], capture_output=True, text=True)
        assert ended.returncode == 1
        assert reason in ended.stderr
    assert (folder / "thesis.tex").exists()
