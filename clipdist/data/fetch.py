"""Fetch whole objects (http, s3, gs, a mounted file) into local files, and try again where a transfer fails."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import queue
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec
import urllib3
from urllib3.util import Retry, Timeout, make_headers, parse_url

from clipdist.errors import Fault, UserError

_CHUNK_BYTES = 1 << 20
_OBJECT_BLOCK_BYTES = 8 << 20  # of one ranged request to an object store: large enough to hide its latency
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_LOOK_UP_S = 0.2  # between looks whether the fetch is still wanted
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}  # the drivers' own names
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*)://")


class _Missing(UserError):
    """There is no such object."""


class _Transient(Exception):
    """A failure that another try may mend.

    Attributes:
        wait_s: the server's Retry-After, seconds.
    """

    def __init__(self, cause: str, wait_s: float = 0.0) -> None:
        super().__init__(cause)
        self.wait_s = wait_s


def is_remote(name: str) -> bool:
    """Whether a name is a URL rather than a plain path.

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
    """The URL as messages may show it: without user, password, query and fragment."""
    if not _SCHEME.match(url):
        return url
    scheme, rest = url.split("://", 1)
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_query(url: str) -> str:
    """An address without its query and fragment, which may be a signature that changes; a path as it is."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if _SCHEME.match(url) else url


def beside(url: str, suffix: str) -> str:
    """The address of the object whose name has `suffix` at its end, the query kept (it may hold the right to read)."""
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
        """Writes a whole object to `to`, made or overwritten in place. After an error its content is undefined.

        Args:
            url: a URL or a path.
            size: bytes that the object must have, where that is known.
            room: called with the bytes that the file is to hold, before it grows to them, and every second or so
                besides, between tries too; what it raises ends the fetch.

        Raises:
            UserError: no such object, no access, not of `size`, a missing driver.
            Fault: the patience is used up.
            OSError: `to` cannot be written.
        """
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            self._run(url, _Sink(cast(BinaryIO, file), url, size, room or _any_size))

    def read_small(self, url: str, limit_bytes: int = 1 << 28) -> bytes | None:
        """A whole object; None where there is none.

        Raises:
            UserError, Fault: as fetch; the object is larger than the limit.
        """

        def room(size: int) -> None:
            if size > limit_bytes:
                raise UserError(f"{safe_name(url)}: more than {limit_bytes} bytes; is this the file that was meant?")

        buffer = io.BytesIO()
        try:
            self._run(url, _Sink(buffer, url, None, room))
        except _Missing:
            return None
        return buffer.getvalue()

    def _run(self, url: str, sink: _Sink) -> None:
        """Tries until the object is whole, the error is final, or the patience is used up."""
        copy = self._way(url)
        tries, failures = 0, 0
        while True:
            tries += 1
            reached = sink.furthest
            try:
                sink.check_room()
                copy(url, sink)
                return sink.finish()
            except _Transient as error:
                failures = 0 if sink.furthest > reached else failures + 1
                longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures, 16))
                pause_s = max(error.wait_s, random.uniform(0.5, 1) * longest)
                left_s = sink.moved_at + self.retry_s - time.monotonic()
                if left_s <= 0 or error.wait_s > left_s:
                    raise Fault(
                        f"{safe_name(url)}: not fetched after {tries} tries, {self.retry_s:g} s without progress; "
                        f"the last cause: {_scrubbed(str(error), url)}"
                    ) from None
            _sleep(min(pause_s, left_s), sink.check_room)

    def _way(self, url: str) -> Callable[[str, _Sink], None]:
        """What copies an object of this kind of URL into a sink."""
        scheme = _SCHEME.match(url)
        match scheme and scheme[1].lower():
            case "http" | "https":
                return _Http(self.stall_s).copy
            case None | "file":
                return functools.partial(self._copy_pumped, _local_chunks)
            case _:
                return functools.partial(self._copy_pumped, _fsspec_chunks)

    def _copy_pumped(self, chunks: Callable[[str], Iterator[bytes | int]], url: str, sink: _Sink) -> None:
        """Copies from a source that has no time limit of its own."""
        sink.restart()
        with contextlib.closing(_with_time_limit(chunks(url), self.stall_s)) as source:
            for item in source:
                if isinstance(item, int):
                    sink.expect(item)
                else:
                    sink.write(item)


class _Sink:
    """Where the bytes go, and what is known of the object.

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
        """Notes what the source says of its size."""
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


class _Http:
    """One object over HTTP; goes on where the last try stopped if it is the same object still."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s

    def copy(self, url: str, sink: _Sink) -> None:
        headers = {"Accept-Encoding": "identity"}
        resumed = sink.written > 0 and sink.validator is not None
        if resumed:
            headers |= {"Range": f"bytes={sink.written}-", "If-Range": cast(str, sink.validator)}
        with _http_errors(url), self._get(url, headers) as response:
            self._begin(response, url, sink, resumed)
            # read1 gives what has arrived: were chunks filled first, a stall would lose the begun one
            while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
                sink.write(chunk)

    @contextlib.contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> Generator[urllib3.BaseHTTPResponse]:
        parts = parse_url(url)
        proxy = None if proxy_bypass(parts.host or "") else getproxies().get(parts.scheme or "")
        response = _pool(proxy, os.getpid()).request(
            "GET",
            parts._replace(auth=None, fragment=None).url,
            headers=headers | (make_headers(basic_auth=unquote(parts.auth)) if parts.auth else {}),
            preload_content=False,
            timeout=Timeout(self.stall_s),
            retries=Retry(
                connect=0, read=0, other=0, redirect=5, raise_on_redirect=False, respect_retry_after_header=False
            ),
        )
        try:
            yield response
        except BaseException:
            response.close()  # what is left of the body must not reach the connection's next user
            raise
        response.release_conn()

    def _begin(self, response: urllib3.BaseHTTPResponse, url: str, sink: _Sink, resumed: bool) -> None:
        """Sets the sink to the first byte of the answer; an answer that brings no bytes is raised."""
        match response.status:
            case 200:
                sink.restart(_validator(response))
                length = response.headers.get("Content-Length", "")
                sink.expect(int(length) if length.isdecimal() else None)
            case 206 if resumed:
                found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
                same = _validator(response) in (None, sink.validator)
                if not found or int(found[1]) != sink.written or not same:
                    sink.restart()  # the next try asks for the whole
                    raise _Transient("the server sent another part than the one asked for")
                sink.expect(int(found[2]) if found[2] != "*" else None)
            case 416 if resumed:
                sink.restart()
                raise _Transient("the object has changed during the transfer")
            case 404 | 410:
                raise _Missing(f"{safe_name(url)}: no such object (HTTP {response.status}); check the name")
            case 401 | 403:
                raise UserError(
                    f"{safe_name(url)}: no access (HTTP {response.status}); check the credentials, or sign the URL anew"
                )
            case 408 | 429 as status:
                raise _Transient(f"HTTP {status}", _retry_after_s(response))
            case status if status >= 500:
                raise _Transient(f"HTTP {status}", _retry_after_s(response))
            case status:
                raise UserError(f"{safe_name(url)}: HTTP {status} {response.reason or ''}; check the URL")


@functools.cache
def _pool(proxy: str | None, process: int) -> urllib3.PoolManager:
    """Connections, of this process alone: a forked child must not speak on its parent's sockets."""
    return urllib3.ProxyManager(proxy, maxsize=8) if proxy else urllib3.PoolManager(maxsize=8)


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _retry_after_s(response: urllib3.BaseHTTPResponse) -> float:
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


@contextlib.contextmanager
def _http_errors(url: str) -> Generator[None]:
    """Sorts urllib3's errors into those that another try may mend and those that it cannot."""
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


def _local_chunks(url: str) -> Iterator[bytes | int]:
    """The file's size, then its bytes."""
    path = unquote(urlsplit(url).path) if _SCHEME.match(url) else url
    with _source_errors(url), open(path, "rb", buffering=0) as file:
        yield os.fstat(file.fileno()).st_size
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _fsspec_chunks(url: str) -> Iterator[bytes | int]:
    """The object's size where the driver knows it, then its bytes."""
    with _source_errors(url):
        system, path = fsspec.core.url_to_fs(url)
        if (size := system.info(path).get("size")) is not None:
            yield int(size)
        with system.open(path, "rb", block_size=_OBJECT_BLOCK_BYTES) as file:
            while chunk := file.read(_OBJECT_BLOCK_BYTES):
                yield chunk


@contextlib.contextmanager
def _source_errors(url: str) -> Generator[None]:
    """The same for files and fsspec's drivers; their classes of errors are many: the unknown count as transient."""
    name = safe_name(url)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise _Missing(f"{name}: no such object; check the name") from None
    except PermissionError as error:
        raise UserError(f"{name}: no access ({_scrubbed(str(error), url)}); check the credentials") from None
    except IsADirectoryError:
        raise UserError(f"{name}: is a folder; name the shards in it") from None
    except ImportError as error:
        package = _DRIVERS.get(url.partition("://")[0].lower())
        what = f"`pip install {package}`" if package else _scrubbed(str(error), url)
        raise UserError(f"{name}: needs a driver that is not installed: {what}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: cannot be fetched ({_scrubbed(str(error), url)}); check the URL") from None
    except Exception as error:
        if type(error).__name__ in _NO_CREDENTIALS:
            raise UserError(f"{name}: no credentials found ({_scrubbed(str(error), url)}); set them up") from None
        raise _Transient(f"{type(error).__name__}: {error}") from None


def _with_time_limit(source: Iterator[bytes | int], stall_s: float) -> Generator[bytes | int]:
    """The items of a source that may hang (a dead mount, a driver without timeouts): read in a thread of its own.

    A thread that hangs is left behind; it is a daemon and holds no lock of ours.

    Raises:
        _Transient: no chunk for `stall_s` seconds.
    """
    passed: queue.Queue[bytes | int | Exception | None] = queue.Queue(2)
    stopped = threading.Event()

    def pump() -> None:
        item: bytes | int | Exception | None
        try:
            for item in source:
                passed.put(item)
                if stopped.is_set():
                    return
            passed.put(None)
        except Exception as error:
            passed.put(error)

    threading.Thread(target=pump, daemon=True, name="fetch").start()
    try:
        while (item := passed.get(timeout=stall_s)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    except queue.Empty:
        raise _Transient(f"no byte for {stall_s:g} s") from None
    finally:
        stopped.set()
        with contextlib.suppress(queue.Empty):  # lets a pump that waits for a free place go on, and see the event
            while True:
                passed.get_nowait()


def _scrubbed(text: str, url: str) -> str:
    """An error's text on one line, without the secrets of this URL or of one that it was redirected to."""
    parts = url.partition("://")[2]
    secrets = [re.split(r"[/?#]", parts, maxsplit=1)[0].rpartition("@")[0], parts.partition("?")[2]]
    for secret in filter(None, secrets):
        text = text.replace(secret, "...").replace(unquote(secret), "...")
    text = re.sub(r"//[^/@\s]+@", "//", text)
    return " ".join(re.sub(r"\?[^\s'\")]+", "?...", text).split())


def _any_size(size: int) -> None:
    """Room without a bound."""


def _sleep(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_UP_S))
        check()
