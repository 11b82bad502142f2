"""Find and read files of a source: in folders, and in zips, which are read in place."""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipdist.errors import UserError


@dataclass(frozen=True)
class SourceFile:
    """Where the bytes of one file lie: the file `path`, or the member `member` of the zip `path`."""

    path: str
    member: str
    size: int
    crc: int  # of a zip's member; 0 for a file

    @property
    def name(self) -> str:
        return os.path.basename(_with_slashes(self.member) or self.path)

    @property
    def folder(self) -> str:
        inside = os.path.dirname(_with_slashes(self.member))
        return f"{self.path}!/{inside}" if self.member else os.path.dirname(self.path)

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """
        Raises:
            OSError: the disk or the archive does not give the bytes.
        """
        if not self.member:
            return Path(self.path).read_bytes()
        try:
            return _open_zip(self.path, os.stat(self.path).st_mtime_ns).read(self.member)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"{self}: {error}") from None


def _with_slashes(member: str) -> str:
    return member.replace("\\", "/")  # some archives made on Windows


@functools.lru_cache(maxsize=8)
def _open_zip(path: str, mtime_ns: int) -> zipfile.ZipFile:
    """Open an archive once in every process, and anew where it was replaced."""
    return zipfile.ZipFile(path)


def files_below(source: Path) -> list[SourceFile]:
    """Return the files of a folder, at any depth, or the file itself, sorted; of a zip its members.

    Raises:
        UserError: a folder cannot be read, or a zip is damaged as a whole.
    """
    paths = [str(source)]
    if source.is_dir():
        every = (os.path.join(here, name) for here, _, names in walk(source) for name in names)
        paths = sorted(filter(os.path.isfile, every))
    found = []
    for path in paths:
        found += _members(path) if path.lower().endswith(".zip") else [SourceFile(path, "", os.stat(path).st_size, 0)]
    return found


def _members(path: str) -> list[SourceFile]:
    try:
        infos = _open_zip(path, os.stat(path).st_mtime_ns).infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not a zip, or not wholly downloaded ({error}); fetch it again") from None
    files = (info for info in infos if not info.is_dir())
    return sorted((SourceFile(path, i.filename, i.file_size, i.CRC) for i in files), key=lambda file: file.member)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what os.walk yields, top down; linked folders are followed, once.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield here, folders, files
