"""Signals become a flag; who ignores them, who dies with whom. In real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from clipdist.fault_tolerance.signals import SAME_KEY_S, StopFlag

SCRIPT = str(Path(__file__).with_name("signalled.py"))
ROOT = Path(__file__).parents[2]


@pytest.fixture
def start():
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str, **more: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            env=env | {"PYTHONPATH": str(ROOT)} | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def ready(process: subprocess.Popen[str]) -> int:
    """The pid of the process that the words are for."""
    word, pid = said(process).split()
    assert word == "ready"
    return int(pid)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_sets_the_flag_and_what_was_there_before_is_silent(start, name):
    process = start("flag")
    ready(process)
    process.send_signal(getattr(signal, name))
    assert sorted([said(process), said(process)]) == [f"set {name} True", f"told {name}"]
    process.communicate("end\n", timeout=30)
    assert process.returncode == 0


def test_repeated_signals_neither_kill_nor_change_the_reason(start):
    process = start("flag")
    ready(process)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    out, _ = process.communicate("end\n", timeout=30)
    assert sorted(out.splitlines()) == ["set SIGUSR2 True", "told SIGUSR2"]
    assert process.returncode == 0


def test_a_second_ctrl_c_ends_at_once_but_not_the_echo_of_the_first(start):
    process = start("flag")
    ready(process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.poll() is None
    time.sleep(SAME_KEY_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_a_main_thread_that_never_returns_from_c(start):
    process = start("blocked")
    ready(process)
    process.send_signal(signal.SIGINT)
    assert said(process) == "told SIGINT"
    time.sleep(SAME_KEY_S + 0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_restored(start):
    process = start("restored")
    ready(process)
    process.send_signal(signal.SIGUSR2)
    assert said(process) == "submitit"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_a_forked_child_does_not_set_the_flag_of_its_parent():
    stop = StopFlag()
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR2)  # ignored there
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # ends it
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stop.set
    finally:
        stop.restore()


def test_a_hang_up_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopFlag()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert not stop.set
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
@pytest.mark.parametrize("how", ["torchrun", "launch.py", "deepspeed"])
def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed(start, how):
    """deepspeed: the one that is killed starts another launcher, and that one the rank."""
    words = {
        "torchrun": ["start", "rank"],
        "launch.py": ["start", "rank", "--local_rank=0"],
        "deepspeed": ["start", "start", "rank", "--local_rank=0", "deepspeed"],
    }[how]
    launcher = start(*words, **({"TORCHELASTIC_RUN_ID": "1"} if how == "torchrun" else {}))
    assert said(launcher) == "depends"
    ready(launcher)
    launcher.kill()
    assert sorted([said(launcher), said(launcher)]) == ["set SIGTERM True", "told SIGTERM"]


def test_without_a_launcher_a_rank_outlives_who_started_it(start):
    shell = start("start", "rank")
    assert said(shell) == "alone"
    pid = ready(shell)
    shell.kill()
    shell.wait()
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)  # it is there still, and says that this is the first signal
    assert said(shell) in ("set SIGTERM True", "told SIGTERM")
