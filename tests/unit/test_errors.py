"""How programs end: exit codes, and what stands on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipdist.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, RANK_0_FIRST_S

ROOT = Path(__file__).resolve().parents[2]


def run(body: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = f"""
from clipdist.errors import EXIT_INTERRUPTED, UserError, run_main
def main():
    {body}
run_main(main)
"""
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean | env)


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("return 0", 0), ("return 3", 3), ("return EXIT_INTERRUPTED", EXIT_INTERRUPTED)],
)
def test_the_exit_code_is_what_main_returns(body, code):
    ended = run(body)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_bad_input_is_one_line_and_no_traceback():
    ended = run("raise UserError('data.train: no shards\\n   match X')")
    assert ended.returncode == EXIT_BAD_INPUT
    assert ended.stderr == "error: data.train: no shards match X\n"
    assert ended.stdout == ""


def test_under_a_launcher_rank_0_speaks_first():
    assert run("raise UserError('wrong')", RANK="0").stderr == "error: wrong\n"
    began = time.monotonic()
    other = run("raise UserError('wrong')", RANK="1")
    assert (other.returncode, other.stderr) == (EXIT_BAD_INPUT, "error (rank 1): wrong\n")
    assert time.monotonic() - began > RANK_0_FIRST_S  # a launcher has ended it by then


def test_what_the_terminals_encoding_lacks_is_escaped():
    ended = run("print('na\\xefve \\u2603 \\udcff'); raise UserError('\\u2603.tar')", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (EXIT_BAD_INPUT, "na\\xefve \\u2603 \\udcff\n")
    assert ended.stderr == "error: \\u2603.tar\n"


def test_every_program_ends_by_run_main():
    programs = [p for p in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("launch/*.py")] if "__main__" in p.read_text()]
    assert len(programs) > 20
    assert [p.name for p in programs if "    run_main(main)\n" not in p.read_text()] == []


def test_ctrl_c_has_no_traceback():
    ended = run("raise KeyboardInterrupt")
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_a_fault_keeps_its_traceback():
    ended = run("raise KeyError('lost')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert ended.stderr.endswith("KeyError: 'lost'\n")


def test_a_traceback_stays_the_last_thing_in_a_log():
    """What native modules print when Python takes itself apart, triton's for one, would follow it."""
    late = "import _ctypes, sys; sys.modules['late'] = type('L', (), {'__del__': lambda s: print('leaked')})()"
    ended = run(f"{late}; raise KeyError('lost')")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert run(f"{late}; sys.exit(1)").stdout == "leaked\n"  # so it would be


def test_a_reader_that_goes_away_is_no_fault(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from clipdist.errors import run_main\n"
        "def main():\n"
        "    for number in range(200000):\n"
        "        print(number)\n"
        "run_main(main)\n"
    )
    line = f"'{sys.executable}' '{program}' | head -n 1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


LEAVING = """
import atexit, ctypes, sys, threading, time
from clipdist.errors import run_main
atexit.register(print, "at exit")
def late():
    time.sleep(0.2)
    print("thread")
def main():
    print("main")
    if "thread" in sys.argv:
        threading.Thread(target=late).start()
    if "library" in sys.argv:
        ctypes.CDLL(None).puts(b"library")
    return 75
run_main(main)
"""


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ([], ["main", "at exit"]),
        (["thread"], ["main", "thread", "at exit"]),
        (["library"], ["main", "at exit", "library"]),
    ],
)
def test_what_was_left_for_the_end_is_done(words, out):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONUNBUFFERED")}
    ended = subprocess.run([sys.executable, "-c", LEAVING, *words], capture_output=True, text=True, env=env)
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (75, out, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_without_a_place_to_print_to_the_exit_code_is_the_same(tmp_path, closed):
    (tmp_path / "program.py").write_text(LEAVING)
    assert subprocess.run(f"'{sys.executable}' program.py {closed}", shell=True, cwd=tmp_path).returncode == 75


def test_a_profiler_still_writes_its_profile(tmp_path):
    (tmp_path / "program.py").write_text(LEAVING)
    subprocess.run([sys.executable, "-m", "cProfile", "-o", "profile", "program.py"], cwd=tmp_path, check=False)
    assert (tmp_path / "profile").exists()
