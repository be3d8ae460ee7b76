"""Who talks to the daemon: what is asked of a connection to the control socket before anything it says is read.

1. Only processes of the daemon's own user and root are served, whatever became of the socket's mode: the kernel says
   who has connected (SO_PEERCRED).
2. At most ``CONNECTIONS_MAX`` connections are open; more are told so and closed.
3. Who says nothing that can be answered for ``HEAD_S``, or speaks something else than HTTP, is cut off.
4. An answer that isn't taken on for ``STALL_S`` is given up, so that nobody holds an image for ever by not reading it.
5. What goes wrong in one connection ends that connection, and at the daemon's end all of them are cut.

The port for metrics, where there is one, takes connections from anybody who reaches it; all else holds there, too.
Those who are refused get an answer as the control interface gives them, without anything being read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from math import inf
from typing import Final

import trio

from dmafs.errors import ControlError, DeniedError, DmafsError

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 64
SCRAPERS_MAX: Final = 8
"""Connections to the port for metrics."""
HEAD_S: Final = 5.0
"""How long a connection may take to say what it wants."""
LINGER_S: Final = 0.05
"""How long a connection that has ended on one side may take to end altogether."""
STALL_S: Final = 600.0
"""Longer than somebody may stop what ``dmafs read`` writes to, such as a tape that is rewound."""

_CREDENTIALS: Final = struct.Struct("iII")
_REASONS: Final = {403: "Forbidden", 503: "Service Unavailable"}


class Connection:
    """An accepted connection, bounded in time; otherwise as a ``trio.SocketStream``."""

    def __init__(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """Wrap *stream*; cancel *scope*, in which it is served, when its time is over."""
        self.socket = stream.socket
        self._stream = stream
        self._sending = trio.Lock()
        self._scope = scope
        self._answers = 0
        self._patience_s = HEAD_S
        self._wait()

    def _wait(self) -> None:
        if not self._answers:
            self._scope.deadline = trio.current_time() + self._patience_s

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Take the time that an answer needs."""
        self._answers += 1
        self._scope.deadline = inf
        try:
            yield
        finally:
            self._answers -= 1
            self._wait()

    def _end(self) -> None:
        """Nothing more is asked: what is left to do is done at once."""
        self._patience_s = LINGER_S
        self._wait()

    async def receive_some(self, most: int) -> bytes | bytearray:
        """Receive."""
        received = await self._stream.receive_some(most)
        if not received:
            self._end()
        return received

    async def aclose(self) -> None:
        """Close."""
        self._end()
        await self._stream.aclose()

    async def send_all(self, data: bytes) -> None:
        """Send *data*, behind what is being sent already; BrokenResourceError if it isn't taken in time."""
        try:
            with trio.fail_after(STALL_S):
                async with self._sending:  # the server may find fault with a request while the last one is answered
                    await self._stream.send_all(data)
        except trio.TooSlowError as error:
            raise trio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Send nothing more, once all is sent."""
        async with self._sending:
            await self._stream.send_eof()

    async def cut_at_end(self) -> None:
        """Wait to be cancelled, and have nobody wait for the other side then."""
        try:
            await trio.sleep_forever()
        finally:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


class Admission:
    """Takes connections: ``serve_listeners`` calls ``handle`` with each."""

    where = "the control socket"
    level = logging.WARNING
    """How what others do wrong is logged."""

    def __init__(self, serve: Callable[[Connection], Awaitable[None]]) -> None:
        """Have *serve* do what an admitted connection asks."""
        self._serve = serve
        self._open = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve a connection, or refuse it."""
        try:
            self._check(stream)
        except DmafsError as error:
            log.log(self.level, "%s", error.message)
            await _refuse(stream, error)
            return
        self._open += 1
        try:
            async with trio.open_nursery() as nursery:
                connection = Connection(stream, nursery.cancel_scope)
                nursery.start_soon(connection.cut_at_end)
                await self._serve(connection)
                nursery.cancel_scope.cancel()
        except Exception:
            log.exception("a connection to %s failed, please report this", self.where)
        finally:
            self._open -= 1
            stream.socket.close()

    def _check(self, stream: trio.SocketStream) -> None:
        peer = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(peer)
        if user not in {0, os.geteuid()}:
            raise DeniedError(
                f"process {pid} of user {user} may not ask the daemon of user {os.geteuid()}",
                hint="run the command as root, or as the user that the daemon runs as",
            )
        self._check_number(CONNECTIONS_MAX)

    def _check_number(self, most: int) -> None:
        if self._open >= most:
            raise ControlError(
                f"{self.where} has {most} connections open, which is the limit",
                hint="try again when some of those that ask the daemon have ended",
            )


class ScraperAdmission(Admission):
    """Takes connections to the port for metrics, from anybody: so nobody can fill the log with warnings."""

    where = "the port for metrics"
    level = logging.INFO

    def _check(self, stream: trio.SocketStream) -> None:
        del stream
        self._check_number(SCRAPERS_MAX)


async def _refuse(stream: trio.SocketStream, error: DmafsError) -> None:
    body = json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}).encode()
    status = 403 if isinstance(error, DeniedError) else 503
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    with contextlib.suppress(OSError):  # less than any socket's buffer: it never waits
        await stream.socket.send(head.encode() + b"connection: close\r\n\r\n" + body)
    stream.socket.close()
