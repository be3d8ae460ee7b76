"""The connection to a daemon: HTTP over its control socket, and the errors that it answers.

By the standard library: to import a greater one takes longer than all else that a command does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from dmafs import errors
from dmafs.core.names import SOCKET_NAME
from dmafs.errors import ControlError, DmafsError

TIMEOUT_S: Final = 10.0
"""For answers that are ready at once."""
LINE_MAX: Final = 1 << 24
"""Of what is answered line by line, in bytes."""


class _Connection(http.client.HTTPConnection):
    """A connection to the socket of a store, reached by its directory: unix socket names are short."""

    def __init__(self, store: Path, timeout_s: float | None) -> None:
        super().__init__("dmafs", timeout=timeout_s)
        self._store = store

    def connect(self) -> None:
        directory = os.open(self._store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        finally:
            os.close(directory)


class Daemon:
    """The daemon that serves a store, to be asked one thing after the other."""

    def __init__(self, store: Path) -> None:
        """Ask that of *store*."""
        self.store = store

    @contextlib.contextmanager
    def ask(
        self, method: str, path: str, query: Mapping[str, str | int], *, timeout_s: float | None = TIMEOUT_S
    ) -> Iterator[Answer]:
        """Yield the answer to a request; the error of the tree that was answered instead, or ControlError.

        No part of the answer is awaited for longer than *timeout_s*.
        """
        with contextlib.closing(_Connection(self.store, timeout_s)) as connection:
            with _translated(self.store):
                with contextlib.suppress(BrokenPipeError):  # who isn't served is told so before anything is read
                    connection.request(method, f"{path}?{urlencode(query)}" if query else path)
                response = connection.getresponse()
            answer = Answer(self.store, response)
            if response.status != http.client.OK:
                raise answer.error()
            yield answer


class Answer:
    """What a daemon answers; ControlError if that breaks off."""

    def __init__(self, store: Path, response: http.client.HTTPResponse) -> None:
        """Read what the daemon of *store* says in *response*."""
        self._store = store
        self._response = response

    def read(self, most: int | None = None) -> bytes:
        """Return all that is still to come, or at most so many bytes of it."""
        with _translated(self._store):
            return self._response.read(most)

    def lines(self) -> Iterator[str]:
        """Yield line after line, without their ends."""
        while True:
            with _translated(self._store):
                line = self._response.readline(LINE_MAX)
            if not line:
                return
            yield line.decode().rstrip("\n")

    def error(self) -> DmafsError:
        """Return the error of the tree that this is."""
        try:
            return error_of(json.loads(self.read()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return ControlError(
                f"the daemon of store {self._store} answered with status {self._response.status}",
                hint="look at the daemon's log",
            )


@contextlib.contextmanager
def _translated(store: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ControlError(
            f"the daemon of store {store} doesn't answer: {type(error).__name__}: {error}",
            hint="look at its log; or another command is just working on the store, then try again",
        ) from error


def error_of(body: Mapping[str, Any]) -> DmafsError:
    """Return the error of the tree that a JSON object says; TypeError and its like if it says none."""
    kind = getattr(errors, body["error"])
    if not issubclass(kind, DmafsError):
        raise TypeError
    error: DmafsError = kind(body["message"], hint=body["hint"])
    return error
