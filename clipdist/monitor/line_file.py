"""Lines in, a text file out that they are appended to: what a full or absent disk refuses waits in memory.

Whatever happens, the file holds whole lines, in order: one that was cut short is removed before the next is written.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

MOST_WAITING = 10_000  # lines; when there are more the oldest are lost
_BLOCK_BYTES = 1 << 16


class LineFile:
    """Appends lines to a file, which is made where it is missing. One process writes it.

    Raises:
        OSError: it cannot be opened at the start. Later no method raises one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._lost = 0
        self._refused = ""  # why lines are waiting
        self._descriptor: int | None = _open(path, os.O_CREAT)

    def write(self, line: str) -> None:
        """`line` ends in a line break, and holds no other."""
        if len(self._waiting) == MOST_WAITING:
            self._lost += 1
        self._waiting.append(line.encode())
        self._write_waiting()

    def close(self) -> None:
        """Tries a last time, and tells how many lines were lost."""
        self._write_waiting()
        self._give_up_descriptor()
        lost = self._lost + len(self._waiting)
        if lost:
            tell(f"note: {self.path}: {lost} records are lost ({self._refused or 'too many had to wait'})")

    def _write_waiting(self) -> None:
        try:
            if self._descriptor is None:
                # Not made anew: where a mount is gone, the file would be made on another disk.
                self._descriptor = _open(self.path, 0)
            while self._waiting:
                _write_all(self._descriptor, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._give_up_descriptor()  # opening it again removes what was written of a line
            if not self._refused:
                tell(f"note: {self.path}: cannot be written ({error.strerror}); up to {MOST_WAITING} records wait")
            self._refused = error.strerror or str(error)
            return
        if self._refused:
            tell(f"note: {self.path}: can be written again")
            self._refused = ""

    def _give_up_descriptor(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def tell(text: str) -> None:
    """A line on stderr; where even that cannot be written, nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        whole = _end_of_last_line(descriptor, size)
        if whole < size:
            os.ftruncate(descriptor, whole)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _end_of_last_line(descriptor: int, size: int) -> int:
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
