"""The watchdog's connections: one TCP connection from every rank to rank 0.

A message is a JSON object on a line of its own. The kernel's keep-alive detects a machine that vanished within about
30 s, even while the interpreter at either end is busy; a process that ends is seen at once.
"""

from __future__ import annotations

import hmac
import json
import os
import selectors
import socket
import time
import weakref
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

KEEPALIVE_S = (10, 5, 4)  # idle time, interval, probes without an answer
UNACKNOWLEDGED_S = 30  # data that the other side does not confirm for so long ends the connection
CONNECT_S = 60
STRANGER_S = 10  # within which a new connection must identify itself
STRANGER_BYTES = 1024
LINE_BYTES = 1 << 16
SPARE_CONNECTIONS = 64

_open: weakref.WeakSet[RankConnections] = weakref.WeakSet()


def open_listener() -> socket.socket:
    """Return a listening socket on a free port of all interfaces, for rank 0; the port is `getsockname()[1]`."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be switched off all the same
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def connect(host: str, port: int) -> socket.socket:
    """Connect to rank 0's listener.

    Raises:
        OSError: nothing answers there within CONNECT_S.
    """
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=CONNECT_S)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # a thousand ranks at once may be refused


class RankConnection:
    """One connection. `rank` is None until the other side has identified itself."""

    def __init__(self, connection: socket.socket, rank: int | None) -> None:
        self.socket, self.rank, self.opened = connection, rank, time.monotonic()
        self._received, self._to_send = b"", b""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")  # Linux has all of them
        for name, value in zip(names, (*KEEPALIVE_S, 1000 * UNACKNOWLEDGED_S)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        self._to_send += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send as much as the kernel takes. An error shows at the next `receive`."""
        with suppress(OSError):
            while self._to_send:
                self._to_send = self._to_send[self.socket.send(self._to_send) :]

    @property
    def behind(self) -> bool:
        """Return whether the other side has not yet taken what was sent before."""
        return bool(self._to_send)

    def receive(self) -> list[Message]:
        """Return what has arrived; the last one is {"kind": "lost", "unreachable": bool} if the connection is gone."""
        lost: Message | None = None
        try:
            while data := self.socket.recv(LINE_BYTES):
                self._received += data
                if len(self._received) > (STRANGER_BYTES if self.rank is None else 16 * LINE_BYTES):
                    break
            lost = {"kind": "lost", "unreachable": False}  # closed, or more than a rank of this run sends
        except BlockingIOError:
            pass
        except OSError as error:
            lost = {"kind": "lost", "unreachable": not isinstance(error, (ConnectionResetError, BrokenPipeError))}
        *lines, self._received = self._received.split(b"\n")
        messages: list[Message] = []
        for line in lines:
            try:
                messages.append({"kind": "", **json.loads(line)})
            except (ValueError, TypeError):  # not from a rank of this run
                lost = {"kind": "lost", "unreachable": False}
                break
        return messages if lost is None else [*messages, lost]


class RankConnections:
    """All connections of one rank: on rank 0 those to all others, elsewhere the one to rank 0."""

    def __init__(self, world: int, token: int, listener: socket.socket | None) -> None:
        self._world, self._token, self._listener = world, token, listener
        self._links: dict[int, RankConnection] = {}
        self._behind: set[RankConnection] = set()
        self._strangers: list[RankConnection] = []
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ, self._alarm)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)
        _open.add(self)

    def join(self, host: str, port: int, hello: Message) -> list[Message]:
        """Connect to rank 0 and send `hello`, {"rank": ..., ...}. Return rank 0's answer.

        Raises:
            OSError: it cannot be reached, or turns this rank away.
        """
        link = RankConnection(connect(host, port), 0)
        self._links[0] = link
        self._selector.register(link.socket, selectors.EVENT_READ, link)
        link.send({"kind": "hello", "token": f"{self._token:x}", **hello})
        self._selector.select(CONNECT_S)
        answer = link.receive()
        if not answer or answer[-1]["kind"] == "lost":
            raise ConnectionError("no answer, or this rank is not one of the run")
        return answer

    def wake(self) -> None:
        """End a `poll` early, from another thread."""
        with suppress(OSError):
            self._bell.send(b".")

    def poll(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Wait for messages. Return (rank that sent it, message); a lost rank's last one has the kind "lost"."""
        events: list[tuple[int, Message]] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is self._alarm:
                self._alarm.recv(64)
            elif key.data is self._listener:
                self._accept()
            else:
                events += self._read(key.data)
        for link in list(self._behind):
            link.flush()
            if not link.behind:
                self._behind.remove(link)
        for link in [link for link in self._strangers if time.monotonic() > link.opened + STRANGER_S]:
            self._drop(link)
        return events

    def tell(self, message: Message, *, unless_behind: bool = False) -> None:
        """Send to all connected ranks."""
        for link in self._links.values():
            if not (unless_behind and link.behind):
                self._send(link, message)

    def answer(self, rank: int, message: Message) -> None:
        """Send to one rank."""
        if rank in self._links:
            self._send(self._links[rank], message)

    def hang_up(self, rank: int) -> None:
        if rank in self._links:
            self._drop(self._links[rank])

    @property
    def connected(self) -> int:
        return len(self._links)

    def close(self) -> None:
        for link in [*self._links.values(), *self._strangers]:
            self._drop(link)
        self._selector.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for link in [*self._links.values(), *self._strangers]:
            link.socket.close()
        for part in (self._alarm, self._bell, self._listener):
            if part is not None:
                part.close()
        _open.discard(self)

    def _send(self, link: RankConnection, message: Message) -> None:
        link.send(message)
        if link.behind:
            self._behind.add(link)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                if len(self._links) + len(self._strangers) >= self._world + SPARE_CONNECTIONS:
                    connection.close()
                    continue
                link = RankConnection(connection, None)
                self._strangers.append(link)
                self._selector.register(connection, selectors.EVENT_READ, link)

    def _read(self, link: RankConnection) -> list[tuple[int, Message]]:
        messages = link.receive()
        if link.rank is None and messages:
            self._greet(link, messages[0])
        if link.rank is None:
            if messages:
                self._drop(link)
            return []
        if messages and messages[-1]["kind"] == "lost":
            self._drop(link)
        return [(link.rank, message) for message in messages]

    def _greet(self, link: RankConnection, hello: Message) -> None:
        """Accept a connection whose first message has the run's token and a rank that is not connected yet."""
        token, rank = str(hello.get("token", "")), hello.get("rank")
        known = hmac.compare_digest(token.encode(), f"{self._token:x}".encode())
        if known and isinstance(rank, int) and 0 < rank < self._world and rank not in self._links:
            self._strangers.remove(link)
            self._links[rank], link.rank = link, rank

    def _drop(self, link: RankConnection) -> None:
        self._selector.unregister(link.socket)
        self._behind.discard(link)
        link.socket.close()
        if link.rank is None:
            self._strangers.remove(link)
        else:
            del self._links[link.rank]


def _after_fork_in_child() -> None:
    """Close the connections: a child that outlives its parent would keep them open and hide the parent's death."""
    for wire in list(_open):
        wire._close_sockets()


os.register_at_fork(after_in_child=_after_fork_in_child)
