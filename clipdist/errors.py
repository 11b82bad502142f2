"""How a program of clipdist ends: exit codes, and errors that are written for people.

Exit codes: 0 done; 1 fault; 2 bad input, one line on stderr and no traceback; 75 interrupted with a good checkpoint.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75
RANK_0_FIRST_S = 3  # longer than a launcher takes to notice that rank 0 has ended


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do about it."""


class Fault(UserError):
    """What ended a run although its input was good, and is understood: one line as well, but exit code 1."""


class Unreadable(UserError):
    """A file that cannot be read now: missing, or its storage is unavailable. A retry may succeed."""


def brief(error: BaseException) -> str:
    """Return another library's error as part of a line; with its type where the text alone says little."""
    text = " ".join(str(error).split())[:200]
    telling = text and not isinstance(error, (AttributeError, KeyError, TypeError))
    return text if telling else f"{type(error).__name__} {text}".strip()


def require_extra(what: str, modules: Iterable[str], extra: str) -> None:
    """Check that the modules of an optional extra can be imported; imports none.

    Args:
        what: what needs them, the beginning of the line: "--format onnx".

    Raises:
        UserError: one is missing; the line names the extra.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what}: needs {' and '.join(missing)}, not installed: pip install -c constraints.txt -e '.[{extra}]'"
        )


@contextmanager
def writing(what: str, hint: str = "", error: type[UserError] = UserError) -> Iterator[None]:
    """Turn an OSError of the block into one line: what cannot be written, why, and what to do about it."""
    try:
        yield
    except OSError as reason:
        raise error(f"{what}: cannot be written ({reason.strerror or reason}){hint}") from None


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and leaves the process with its exit code, as `exit_code` says. The last call of a program."""
    for stream in (sys.stdout, sys.stderr):  # a caption or file name that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    alone = sys._getframe(1).f_back is None and not sys.flags.inspect
    try:
        code = exit_code(main)
    except Exception:
        if not alone:
            raise
        sys.excepthook(*sys.exc_info())  # last: libraries that Python takes apart print pages about themselves
        code = EXIT_FAULT
    if alone:
        _leave(code)
    sys.exit(code)  # a profiler, a debugger or a test runs the program, and has something left to do


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs `main`. Returns the exit code that the process shall have.

    A UserError becomes one line on stderr and exit code 2. Under a launcher rank 0 speaks first and the others wait:
    where all ranks met the same error the launcher ends them before they repeat it.

    Raises:
        Exception: every other exception: that is a fault, its traceback is kept and Python's exit code is 1.
    """
    try:
        code = main() or 0
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(RANK_0_FIRST_S)
        print(f"error{f' (rank {rank})' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = EXIT_FAULT if isinstance(error, Fault) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away (`| head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what was printed cannot be kept (a full disk): that is no fault of the run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process without taking it apart: all modules of torch, one by one, take 2 s.

    Files must have been closed: what only the end of Python would flush is lost, but for what was printed. Where a
    thread is still to be waited for, Python does all of it.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it may be none, full or closed
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries print, such as NCCL its log
    os._exit(code)
