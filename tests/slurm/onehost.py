"""A Slurm cluster on this machine, and runs on it: how the tests of this folder submit, disturb and wait."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASK_S = 1.0  # between two questions to Slurm: each is two starts of programs, where the CPUs have better things to do
LOOK_S = 0.2  # between two looks at a file
# Generous: a start of four ranks takes 20 s of an idle machine with two cores, and a lost node is noticed after 15 s.
PATIENCE_S = 240.0
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "PREEMPTED", "NODE_FAIL", "REQUEUED")


@dataclass(frozen=True)
class OneHost:
    """slurm/cluster with a folder of its own."""

    folder: Path

    def call(self, *words: str, check: bool = True) -> str:
        """Runs slurm/cluster with these words. Returns what it printed on stdout."""
        command = [sys.executable, "slurm/cluster", "--folder", str(self.folder), *words]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert not check or ended.returncode == 0, f"{' '.join(words)}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def exec(self, *command: str, check: bool = True) -> str:
        """A command as on the login node."""
        return self.call("exec", *command, check=check)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, NodeList ..."""
        words = self.exec("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def node_states(self) -> dict[str, str]:
        lines = self.exec("sinfo", "--noheader", "--Node", "--partition=train", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)


def submit(cluster: OneHost, command: list[str]) -> list[str]:
    """Runs a command that queues jobs. Returns their numbers, those of an array's elements one by one."""
    said = cluster.exec(*command)
    numbers = re.findall(r"^(?:Submitted batch )?job (\d+(?:_\d+)?)", said, re.MULTILINE)
    assert numbers, said
    return numbers


class Run:
    """One training run: a run folder, and the job that works on it at present.

    Args:
        submit: the command that queues it; what it prints names the job.
        number: the job's, where it is queued already.
    """

    def __init__(self, cluster: OneHost, folder: Path, submit: list[str], number: str = "") -> None:
        self.cluster, self.folder, self._submit, self.number = cluster, folder, submit, number

    def submit(self) -> None:
        (self.number,) = submit(self.cluster, self._submit)

    @property
    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    @property
    def state(self) -> str:
        return self.job["JobState"]

    @property
    def starts(self) -> int:
        return int(self.job["Restarts"])

    def records(self, kind: str, **wanted: str) -> list[dict]:
        """Of metrics.jsonl, without a last line that is still being written."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        found = [record for record in map(json.loads, lines) if record["type"] == kind]
        return [record for record in found if wanted.items() <= record.items()]

    def curve(self) -> dict[int, tuple[str, float]]:
        """Step -> (hash of the global batch's sample ids, loss). No step is recorded twice."""
        records = self.records("train")
        curve = {record["step"]: (record["batch_hash"], record["loss"]) for record in records}
        assert len(curve) == len(records)
        return curve

    def resumed_at(self) -> int:
        """The step from which the newest start went on."""
        return self.records("event", event="restart")[-1]["step"]

    def until_it_trains(self) -> int:
        """Waits for a step from now on; submits the run where no job works on it. Returns the step."""
        if not self.number or self.state not in ACTIVE:
            self.submit()
        now, looks = time.time(), itertools.count(1)

        def fresh() -> bool:
            if any(record["time"] > now for record in self.records("train")[-1:]):
                return True
            assert next(looks) % 20 or self.state in ACTIVE, f"the job ended: {self.state}"
            return False

        self.wait_for("a training step", fresh, look_s=LOOK_S)
        return self.records("train")[-1]["step"]

    def until_started_again(self, starts: int) -> None:
        """Waits until Slurm has started the job once more than `starts` times, by whosever request."""

        def again() -> bool:
            assert self.state in ACTIVE, f"the job ended: {self.state}"
            return self.starts > starts and self.state == "RUNNING"

        self.wait_for("the job's next start", again)

    def until_ended(self) -> dict[str, str]:
        """Waits for the job's end. Returns scontrol's words."""
        self.wait_for("the job's end", lambda: self.state not in ACTIVE)
        return self.job

    def wait_for(self, what: str, true: Callable[[], bool], limit_s: float = PATIENCE_S, look_s: float = ASK_S) -> None:
        until = time.monotonic() + limit_s
        try:
            while not true():
                assert time.monotonic() < until, f"{limit_s:.0f} s were too short"
                time.sleep(look_s)
        except AssertionError as error:
            raise AssertionError(f"no {what}: {error}\n{self.job}\n{self.log()[-6000:]}") from None

    def log(self) -> str:
        """What all ranks of all starts wrote, in the order of the files' ages."""
        files = sorted(self.folder.rglob("*log.out"), key=lambda file: file.stat().st_mtime)
        return "".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def kill_rank(self, rank: int, node: str) -> None:
        """kill -9 of one rank's Python, by a step beside the job's own; a task may be a shell that waits for it."""
        task = f"task=$(scontrol listpids {self.number}.0 | awk '$5 == {rank} {{ print $1 }}')"
        kill = "kill -9 $(pgrep -P $task -f clipdist/train.py || echo $task)"
        beside = ["srun", f"--jobid={self.number}", "--overlap", "-n1", "-N1", f"--nodelist={node}"]
        self.cluster.exec(*beside, "sh", "-c", f"{task}; {kill}")
