"""Fetch whole objects (http, s3, gs, a mounted file) into local files, and try again where a transfer fails."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec
import urllib3
from fsspec.implementations.local import LocalFileSystem
from urllib3.util import Retry, Timeout, make_headers, parse_url

from clipdist.data.workers import Workers
from clipdist.errors import Fault, UserError

_CHUNK_BYTES = 1 << 20
_OBJECT_BLOCK_BYTES = 8 << 20  # of one ranged request to an object store: large enough to hide its latency
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_CHECK_S = 0.2  # between checks whether the fetch is still wanted
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}  # the drivers' own names
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*)://")


class _NoSuchObject(UserError):
    """There is no object at this address."""


class _Transient(Exception):
    """A failure that another try may mend.

    Attributes:
        wait_s: the server's Retry-After, seconds.
    """

    def __init__(self, cause: str, wait_s: float = 0.0) -> None:
        super().__init__(cause)
        self.wait_s = wait_s


def is_remote(name: str) -> bool:
    """Return whether a name is a URL rather than a plain path.

    Raises:
        UserError: it is a "pipe:" command, which other loaders of shards run in a shell.
    """
    if name.startswith("pipe:"):
        raise UserError(
            "pipe:...: a shard that names a shell command is refused: whoever writes the list of shards could run"
            " anything; mount the storage, or name an address (https://, s3://, gs://)"
        )
    return _SCHEME.match(name) is not None


def safe_name(url: str) -> str:
    """Return the URL as messages may show it: without user, password, query and fragment."""
    if not _SCHEME.match(url):
        return url
    scheme, rest = url.split("://", 1)
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_query(url: str) -> str:
    """Return an address without its query and fragment, which may be a signature that changes; a path as it is."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if _SCHEME.match(url) else url


def beside(url: str, suffix: str) -> str:
    """Return the address with `suffix` behind the object's name; the query stays (it may hold the right to read)."""
    path = without_query(url)
    return path + suffix + url[len(path) :]


@dataclass(frozen=True)
class Fetcher:
    """Fetches objects. Has no state: threads may share it.

    Attributes:
        retry_s: a transfer is tried again for so long after its last progress: a byte that no earlier try had.
        stall_s: a transfer without a byte for so long has failed.
    """

    retry_s: float = 300.0
    stall_s: float = 30.0

    def fetch(self, url: str, to: Path, size: int | None = None, room: Callable[[int], None] | None = None) -> None:
        """Write a whole object to `to`, made or overwritten in place. After an error its content is undefined.

        Args:
            url: a URL or a path.
            size: bytes that the object must have, where that is known.
            room: called with the bytes that the file is to hold, before it grows to them, and every second or so
                besides, between tries too; what it raises ends the fetch.

        Raises:
            UserError: no such object, no access, not of `size`, a missing driver.
            Fault: no progress for retry_s.
            OSError: `to` cannot be written.
        """
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            self._run(_Sink(cast(BinaryIO, file), url, size, room or (lambda size: None)))

    def read_small(self, url: str, limit_bytes: int = 1 << 28) -> bytes | None:
        """Return a whole object, or None where there is none.

        Raises:
            UserError, Fault: as fetch; the object is larger than the limit.
        """

        def room(size: int) -> None:
            if size > limit_bytes:
                raise UserError(f"{safe_name(url)}: more than {limit_bytes} bytes; is this the file that was meant?")

        buffer = io.BytesIO()
        try:
            self._run(_Sink(buffer, url, None, room))
        except _NoSuchObject:
            return None
        return buffer.getvalue()

    def _run(self, sink: _Sink) -> None:
        """Try until the object is whole, the error is final, or there was no progress for retry_s."""
        scheme = _SCHEME.match(sink.url)
        copy = self._copy_http if scheme and scheme[1].lower() in ("http", "https") else self._copy_by_driver
        tries, failures = 0, 0
        while True:
            tries += 1
            reached = sink.furthest
            try:
                sink.check_room()
                copy(sink)
                return sink.finish()
            except _Transient as error:
                failures = 0 if sink.furthest > reached else failures + 1
                longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures, 16))
                pause_s = max(error.wait_s, random.uniform(0.5, 1) * longest)
                left_s = sink.moved_at + self.retry_s - time.monotonic()
                if left_s <= 0 or error.wait_s > left_s:
                    raise Fault(
                        f"{safe_name(sink.url)}: not fetched after {tries} tries, {self.retry_s:g} s without progress; "
                        f"the last cause: {_scrubbed(str(error), sink.url)}"
                    ) from None
            end = time.monotonic() + min(pause_s, left_s)
            while (left_s := end - time.monotonic()) > 0:
                time.sleep(min(left_s, _CHECK_S))
                sink.check_room()

    def _copy_by_driver(self, sink: _Sink) -> None:
        """Copy a file, or an object that fsspec has a driver for; neither has a time limit of its own."""
        sink.restart()
        chunks = _chunks(sink.url)
        thread = Workers(1, "fetch")  # one that hangs (a dead mount) is left behind: it holds no lock of ours
        try:
            coming = thread.submit(next, chunks, None)
            while (chunk := coming.result(self.stall_s)) is not None:
                coming = thread.submit(next, chunks, None)  # is read while this one is written
                if isinstance(chunk, int):
                    sink.expect(chunk)
                else:
                    sink.write(chunk)
        except FutureTimeout:
            raise _Transient(f"no byte for {self.stall_s:g} s") from None
        finally:
            thread.close(0.0)

    def _copy_http(self, sink: _Sink) -> None:
        """Copy over HTTP, from where the last try stopped if it is the same object still."""
        headers = {"Accept-Encoding": "identity"}
        resumed = sink.written > 0 and sink.validator is not None
        if resumed:
            headers |= {"Range": f"bytes={sink.written}-", "If-Range": cast(str, sink.validator)}
        with _http_errors(sink.url), _request(sink.url, headers, self.stall_s) as response:
            _begin(response, sink, resumed)
            # read1 gives what has arrived: were chunks filled first, a stall would lose the begun one
            while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
                sink.write(chunk)


class _Sink:
    """The file that an object is copied into, and what is known of the object.

    Attributes:
        written: bytes that the current object has so far.
        total: bytes that it is to have; None: not known.
        furthest: the most that `written` has been over all tries.
        moved_at: monotonic time at which `furthest` last grew.
        validator: ETag or Last-Modified of the object that `written` belongs to.
    """

    def __init__(self, file: BinaryIO, url: str, size: int | None, room: Callable[[int], None]) -> None:
        self.file, self.url, self.size, self.room = file, url, size, room
        self.written, self.furthest, self.moved_at = 0, 0, time.monotonic()
        self.total = size
        self.validator: str | None = None

    def check_room(self) -> None:
        self.room(max(self.total or 0, self.written))

    def restart(self, validator: str | None = None) -> None:
        self.file.seek(0)
        self.written, self.total, self.validator = 0, self.size, validator

    def expect(self, total: int | None) -> None:
        """Note the size that the source reports."""
        if total is None:
            return
        if self.size is not None and total != self.size:
            raise self._wrong_size(total)
        self.total = total
        self.check_room()

    def write(self, chunk: bytes) -> None:
        after = self.written + len(chunk)
        if self.size is not None and after > self.size:
            raise self._wrong_size(after)
        self.room(max(self.total or 0, after))
        view = memoryview(chunk)
        while view:  # an unbuffered write may be partial
            view = view[self.file.write(view) :]
        self.written = after
        if after > self.furthest:
            self.furthest, self.moved_at = after, time.monotonic()

    def finish(self) -> None:
        if self.total is not None and self.written != self.total:
            raise _Transient(f"cut off: {self.written} of {self.total} bytes")
        self.file.truncate(self.written)

    def _wrong_size(self, found: int) -> UserError:
        return UserError(
            f"{safe_name(self.url)}: has {found} bytes or more where {self.size} were expected; the shard has changed "
            "since its index was written: write the index again, or restore the shard"
        )


def _request(url: str, headers: dict[str, str], stall_s: float) -> urllib3.BaseHTTPResponse:
    """Send a GET; return the answer, its body unread. Closed with bytes unread, it closes its connection too."""
    parts = parse_url(url)
    redirects = Retry(connect=0, read=0, other=0, redirect=5, raise_on_redirect=False, respect_retry_after_header=False)
    proxy = None if proxy_bypass(parts.host or "") else getproxies().get(parts.scheme or "")
    return _connections(proxy, os.getpid()).request(
        "GET",
        parts._replace(auth=None, fragment=None).url,
        headers=headers | (make_headers(basic_auth=unquote(parts.auth)) if parts.auth else {}),
        preload_content=False,
        timeout=Timeout(stall_s),
        retries=redirects,
    )


@functools.cache
def _connections(proxy: str | None, process: int) -> urllib3.PoolManager:
    """Return connections of this process alone: a forked child must not speak on its parent's sockets."""
    return urllib3.ProxyManager(proxy, maxsize=8) if proxy else urllib3.PoolManager(maxsize=8)


def _begin(response: urllib3.BaseHTTPResponse, sink: _Sink, resumed: bool) -> None:
    """Set the sink to the first byte of the answer; an answer that brings no bytes is raised."""
    name, status = safe_name(sink.url), response.status
    if status == 200:
        sink.restart(_validator(response))
        length = response.headers.get("Content-Length", "")
        sink.expect(int(length) if length.isdecimal() else None)
    elif status == 206 and resumed:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        same = _validator(response) in (None, sink.validator)
        if not found or int(found[1]) != sink.written or not same:
            sink.restart()  # the next try asks for the whole
            raise _Transient("the server sent another part than the one asked for")
        sink.expect(int(found[2]) if found[2] != "*" else None)
    elif status == 416 and resumed:
        sink.restart()
        raise _Transient("the object has changed during the transfer")
    elif status in (404, 410):
        raise _NoSuchObject(f"{name}: no such object (HTTP {status}); check the name")
    elif status in (401, 403):
        raise UserError(f"{name}: no access (HTTP {status}); check the credentials, or sign the URL anew")
    elif status in (408, 429) or status >= 500:
        wait_s = None
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            wait_s = Retry().get_retry_after(response)
        raise _Transient(f"HTTP {status}", wait_s or 0.0)
    else:
        raise UserError(f"{name}: HTTP {status} {response.reason or ''}; check the URL")


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """Return what If-Range may carry: a strong ETag, else the date."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


@contextlib.contextmanager
def _http_errors(url: str) -> Generator[None]:
    """Sort urllib3's errors into those that another try may mend and those that it cannot."""
    try:
        yield
    except (urllib3.exceptions.LocationValueError, urllib3.exceptions.URLSchemeUnknown) as error:
        raise UserError(f"{safe_name(url)}: not a URL that can be fetched ({_scrubbed(str(error), url)})") from None
    except urllib3.exceptions.HTTPError as error:
        cause = getattr(error, "reason", None) or error
        if any(isinstance(part, ssl.SSLCertVerificationError) for part in (cause, *getattr(cause, "args", ()))):
            raise UserError(
                f"{safe_name(url)}: the server's certificate is not trusted ({_scrubbed(str(cause), url)}); "
                "name your certificates in SSL_CERT_FILE"
            ) from None
        raise _Transient(f"{type(cause).__name__}: {cause}") from None


def _chunks(url: str) -> Iterator[bytes | int]:
    """Yield the size of an object where the driver knows it, then its bytes."""
    scheme = _SCHEME.match(url)
    local = scheme is None or scheme[1].lower() == "file"
    chunk_bytes = _CHUNK_BYTES if local else _OBJECT_BLOCK_BYTES
    with _driver_errors(url):
        if local:
            system, path = LocalFileSystem(), os.path.abspath(unquote(urlsplit(url).path) if scheme else url)
        else:
            system, path = fsspec.core.url_to_fs(url)
        if (size := system.info(path).get("size")) is not None:
            yield int(size)
        with system.open(path, "rb", block_size=chunk_bytes) as file:
            while chunk := file.read(chunk_bytes):
                yield chunk


@contextlib.contextmanager
def _driver_errors(url: str) -> Generator[None]:
    """Sort the errors of files and of fsspec's drivers likewise; those of unknown classes count as transient."""
    name = safe_name(url)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise _NoSuchObject(f"{name}: no such object; check the name") from None
    except IsADirectoryError:
        raise UserError(f"{name}: is a folder; name the shards in it") from None
    except Exception as error:
        text = _scrubbed(str(error), url)
        if isinstance(error, PermissionError):
            told = f"no access ({text}); check the credentials"
        elif isinstance(error, ImportError):
            package = _DRIVERS.get(url.partition("://")[0].lower())
            told = f"needs a driver that is not installed: {f'`pip install {package}`' if package else text}"
        elif isinstance(error, ValueError | TypeError):
            told = f"cannot be fetched ({text}); check the URL"
        elif type(error).__name__ in _NO_CREDENTIALS:
            told = f"no credentials found ({text}); set them up"
        else:
            raise _Transient(f"{type(error).__name__}: {error}") from None
        raise UserError(f"{name}: {told}") from None


def _scrubbed(text: str, url: str) -> str:
    """Return an error's text on one line, without the secrets of this URL or of one that it was redirected to."""
    parts = url.partition("://")[2]
    secrets = [re.split(r"[/?#]", parts, maxsplit=1)[0].rpartition("@")[0], parts.partition("?")[2]]
    for secret in filter(None, secrets):
        text = text.replace(secret, "...").replace(unquote(secret), "...")
    text = re.sub(r"//[^/@\s]+@", "//", text)
    return " ".join(re.sub(r"\?[^\s'\")]+", "?...", text).split())
