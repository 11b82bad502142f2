"""The watch over ranks, with real processes: who is named when one dies, hangs or errs, and how all of them end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from clipdist.fault_tolerance.heartbeat import open_listener
from clipdist.fault_tolerance.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
TOKEN = 0x5EED


class Ranks:
    """The processes of one run."""

    def __init__(self, folder: Path, acts: list[str], hang_s: float = 60.0, silence_s: float = 30.0) -> None:
        self.folder, self.processes = folder, []
        port = 0
        for rank, act in enumerate(acts):
            do = {"rank": rank, "world": len(acts), "port": port, "token": TOKEN, "dir": str(folder), "act": act}
            do |= {"hang_s": hang_s, "silence_s": silence_s}
            with (folder / f"err-{rank}").open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("watched.py")), json.dumps(do)],
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    text=True,
                )
            self.processes.append(process)
            if rank == 0:
                port = int(process.stdout.readline())
        for process in self.processes:
            assert process.stdout.readline() == "ready\n"

    def tell(self, rank: int, line: str = "") -> None:
        self.processes[rank].stdin.write(line + "\n")
        self.processes[rank].stdin.flush()

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def codes(self, *, without: tuple[int, ...] = ()) -> list[int]:
        return [p.wait(timeout=30) for rank, p in enumerate(self.processes) if rank not in without]

    def said(self, rank: int) -> str:
        return (self.folder / f"err-{rank}").read_text()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture
def start(tmp_path):
    started: list[Ranks] = []

    def begin(*acts: str, **limits: float) -> Ranks:
        started.append(Ranks(tmp_path, list(acts), **limits))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.end()


def test_a_good_end_in_any_order(start):
    ranks = start("train", "train", "train")
    for rank in (1, 0, 2):
        ranks.tell(rank)
        assert ranks.processes[rank].wait(timeout=30) == 0
    assert [ranks.said(rank) for rank in range(3)] == ["", "", ""]


def test_a_killed_rank_is_named_and_ends_all(start):
    ranks = start("train", "train", "train")
    pid = ranks.processes[1].pid
    ranks.signal(1, signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL, 1]
    for rank, prefix in ((0, "error: "), (2, "error (rank 2): ")):
        line = f"{prefix}rank 1 on node0 (pid {pid}) ended without a word (last known "
        assert ranks.said(rank).startswith(line)
        assert "killed from outside" in ranks.said(rank)
    assert ranks.said(0).count("\n") == ranks.said(2).count("\n") == 1
    assert sorted(path.name for path in ranks.folder.glob("lingered-*")) == ["lingered-0", "lingered-2"]


def test_rank_0_killed_is_noticed_by_the_others(start):
    ranks = start("train", "train", "train")
    ranks.signal(0, signal.SIGKILL)
    assert ranks.codes() == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        assert ranks.said(rank).startswith(f"error (rank {rank}): rank 0 on node0 (pid {ranks.processes[0].pid}) ended")
    assert (ranks.folder / "record").read_text() == f"1 120 {ranks.said(1).removeprefix('error (rank 1): ')}"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_counts_as_dead(start, stopped):
    ranks = start("train", "train", silence_s=1.0)
    ranks.signal(stopped, signal.SIGSTOP)
    assert ranks.codes(without=(stopped,)) == [1]
    assert f"rank {stopped} on node0 (pid {ranks.processes[stopped].pid}) has not answered" in ranks.said(1 - stopped)


def test_a_suspended_job_goes_on(start):
    """Slurm may stop all ranks for a while. Time in which nobody ran is no silence."""
    ranks = start("train", "train", hang_s=5.0, silence_s=5.0)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            ranks.signal(rank, number)
        time.sleep(6 if number == signal.SIGSTOP else 0.7)
    for rank in (0, 1):
        ranks.tell(rank)
    assert (ranks.codes(), ranks.said(0), ranks.said(1)) == ([0, 0], "", "")


def test_a_hang_shows_who_is_behind_and_all_stacks(start):
    ranks = start("train", "train", "hang", hang_s=1.5)
    ranks.tell(2)
    assert ranks.codes() == [1, 1, 1]
    first = ranks.said(0).splitlines()[0]
    assert first.startswith("error: no progress for 2 s: rank 2 on node1 has been at step 120 in phase data for 2 s")
    assert "ranks 0-1 at step 120 in phase step" in first
    for rank in range(3):
        text = (ranks.folder / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert text.startswith(f"rank {rank} on node{rank // 2} (pid {ranks.processes[rank].pid}) at step 120 in phase")
        assert "watched.py" in text
        assert "watched.py" in ranks.said(rank)


def test_a_rank_that_not_even_its_watch_can_end(start):
    ranks = start("train", "stuck", hang_s=2.0, silence_s=1.0)
    ranks.tell(1)
    assert ranks.codes() == [1, 1]
    assert "rank 1 on node0" in ranks.said(0)
    assert "has not answered" in ranks.said(0)
    assert "Timeout" in ranks.said(1)  # the back-stop's word
    assert "watched.py" in ranks.said(1)


def test_no_limit_no_hang(start):
    ranks = start("train", "hang", hang_s=0, silence_s=0.5)
    ranks.tell(1)
    time.sleep(1.5)
    assert [process.poll() for process in ranks.processes] == [None, None]


def test_last_words_reach_all_and_bad_input_stays_2(start):
    ranks = start("train", "words", "train")
    ranks.tell(1, "UserError no shards match X")
    assert ranks.codes() == [2, 2, 2]
    line = "rank 1 on node0 ended at step 120 in phase validation: no shards match X\n"
    assert ranks.said(0) == f"error: {line}"
    assert ranks.said(1) == "error (rank 1): no shards match X\n"
    assert ranks.said(2) == f"error (rank 2): {line}"


def test_an_unforeseen_error_keeps_its_traceback(start):
    ranks = start("train", "words")
    ranks.tell(1, "RuntimeError out of memory")
    assert ranks.codes() == [1, 1]
    assert ranks.said(0).endswith("in phase validation: RuntimeError: out of memory\n")
    assert ranks.said(1).startswith("Traceback")
    assert ranks.said(1).endswith("RuntimeError: out of memory\n")
    assert "Traceback" not in ranks.said(0)
    assert (ranks.folder / "record").read_text() == f"0 120 {ranks.said(0).removeprefix('error: ')}"


def test_all_ranks_with_the_same_error_say_it_once_each_and_rank_0_first(start):
    ranks = start("words", "words")
    for rank in (1, 0):
        ranks.tell(rank, "Fault the storage is gone")
    assert ranks.processes[0].wait(timeout=30) == 1
    assert (ranks.said(0), ranks.said(1)) == ("error: the storage is gone\n", "")  # a launcher would end rank 1 now
    assert ranks.codes() == [1, 1]
    assert ranks.said(1) == "error (rank 1): the storage is gone\n"


def test_errors_that_follow_from_a_death_do_not_hide_it(start):
    ranks = start("train", "train", "words")
    ranks.tell(2, "RuntimeError Connection closed by peer")
    ranks.signal(1, signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "rank 1 on node0" in ranks.said(rank)
        assert "Traceback" not in ranks.said(rank)


def test_a_stop_that_takes_too_long_ends_with_stacks(start):
    ranks = start("train", "slow")
    ranks.tell(1)
    assert ranks.codes() == [1, 1]
    assert "rank 1 on node0 was asked to stop and has not ended" in ranks.said(1)
    assert "watched.py" in ranks.said(1)
    assert "asked to stop" in ranks.said(0)


def test_a_second_watch_in_the_same_processes(start):
    ranks = start("again", "again")
    for rank in (0, 1):
        ranks.tell(rank)
    for rank in (0, 1):
        assert ranks.processes[rank].stdout.readline() == "closed\n"
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    ranks.tell(0, str(port))
    assert int(ranks.processes[0].stdout.readline()) == port
    ranks.tell(1, str(port))
    for rank in (0, 1):
        assert ranks.processes[rank].stdout.readline() == "ready\n"
    ranks.signal(1, signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL]
    assert "rank 1 on node0" in ranks.said(0)


def test_strangers_are_turned_away(start):
    listener = open_listener()
    port = listener.getsockname()[1]
    with Watchdog(0, 2, Path("unused"), 0, token=TOKEN, listener=listener) as watchdog:
        hellos = [
            {"kind": "hello", "token": f"{TOKEN + 1:x}", "rank": 1},
            {"kind": "hello", "token": f"{TOKEN:x}", "rank": 2},
            {"kind": "verdict", "verdict": {"line": "end"}},
        ]
        for line in [*map(json.dumps, hellos), "GET / HTTP/1.1", "x" * 5000]:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(line.encode() + b"\n")
                assert not _answer(stranger)
        assert watchdog._ranks.connected == 0
        with socket.create_connection(("127.0.0.1", port), timeout=5) as known:
            hello = {"kind": "hello", "token": f"{TOKEN:x}", "rank": 1, "node": "here", "pid": 1}
            known.sendall(json.dumps(hello).encode() + b"\n")
            assert b'"beat"' in _answer(known)
            known.sendall(b'{"kind": "bye"}\n')


def _answer(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1000)
    except ConnectionResetError:
        return b""


def test_64_ranks(tmp_path):
    """Forked: no interpreter starts. One dies; all others name it."""
    world, listener = 64, open_listener()
    port, pids = listener.getsockname()[1], []
    for rank in reversed(range(world)):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            with (tmp_path / f"err-{rank}").open("w") as err:
                os.dup2(err.fileno(), 2)
            if rank:
                listener.close()
            watchdog = Watchdog(
                rank, world, tmp_path, 60, port=port, token=TOKEN, listener=None if rank else listener, node="here"
            )
            watchdog.progress(7)
            time.sleep(60)
        finally:
            os._exit(3)
    listener.close()
    try:
        deadline = time.monotonic() + 20
        while len(_connected(port)) < world - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(pids[world - 1 - 40], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    codes.reverse()
    assert codes[40] == -signal.SIGKILL
    assert codes[:40] + codes[41:] == [1] * 63
    for rank in (0, 1, 63):
        assert "rank 40 on here" in (tmp_path / f"err-{rank}").read_text()


def _connected(port: int) -> list[str]:
    """Established connections to a port of this machine."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    fields = [line.split() for line in lines]
    return [f[2] for f in fields if f[1].endswith(f":{port:04X}") and f[3] == "01"]
