"""An HTTP server for tests: serves bytes from memory, and misbehaves on request."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FOREVER = 10**9


@dataclass
class Thing:
    """One object, and what goes wrong with it.

    Attributes:
        statuses: answered one after the other before anything else.
        cut_at: bytes after which a transfer ends too early, `cuts` times.
        stall_at: bytes after which a transfer hangs, `stalls` times.
        next_data: what the object becomes after the first transfer.
        pause_s: before each KiB.
    """

    data: bytes
    etag: str | None = '"1"'
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int = 0
    cuts: int = 0
    stall_at: int = 0
    stalls: int = 0
    next_data: bytes | None = None
    ranges: bool = True
    length: bool = True
    pause_s: float = 0.0


class Storage:
    """A server in a thread. `things` maps a path ("/a.tar") to what lies there; `requests` lists (path, headers)."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    def close(self) -> None:
        self.released.set()  # ends the stalls
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(storage: Storage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            storage.requests.append((self.path, dict(self.headers)))
            thing = storage.things.get(self.path)
            if thing is None:
                self._answer_empty(404, {})
            elif thing.statuses:
                self._answer_empty(thing.statuses.pop(0), thing.headers)
            else:
                self._send(thing)
                if thing.next_data is not None:
                    thing.data, thing.etag, thing.next_data = thing.next_data, '"2"', None

        def _answer_empty(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def _send(self, thing: Thing) -> None:
            data, first = thing.data, self._first_byte(thing)
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            if thing.etag:
                self.send_header("ETag", thing.etag)
            if thing.length:
                self.send_header("Content-Length", str(len(data) - first))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            end = len(data)
            if thing.stalls or thing.cuts:
                end = min(end, first + (thing.stall_at if thing.stalls else thing.cut_at))
            for at in range(first, end, 1024):
                time.sleep(thing.pause_s)
                self.wfile.write(data[at : min(end, at + 1024)])
            if thing.stalls:
                thing.stalls -= 1
                self.wfile.flush()
                storage.released.wait(20)
                self.close_connection = True
            elif thing.cuts:
                thing.cuts -= 1
                self.close_connection = True
            elif not thing.length:
                self.close_connection = True

        def _first_byte(self, thing: Thing) -> int:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") == thing.etag
            return int(asked[1]) if asked and same and thing.ranges else 0

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client went away, as tests make it
                super().handle()

    return Handler
