"""The client: what commands ask, of the running daemon if there is one, else of the store itself.

``session(store)`` yields a ``Session``. A store whose lock is free is opened here; otherwise the daemon is asked
through its control socket.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from dmafs import errors
from dmafs.core.moments import Volumes
from dmafs.core.store import SOCKET_NAME, Store
from dmafs.core.sync import sync
from dmafs.core.work import run
from dmafs.errors import ControlError, DmafsError, InputError, StoreBusyError, StoreError
from dmafs.service.configuration import load_configuration
from dmafs.service.report import Report, image_at, points_of, status_of
from dmafs.units import SECTOR, check_name

TIMEOUT_S: Final = 10.0
"""For answers that are ready at once."""
READ_CHUNK: Final = 4 << 20


class Session(Protocol):
    """What a command may ask."""

    def status(self) -> Report:
        """Return the state of all volumes, and of the daemon if there is one."""

    def points(self) -> Report:
        """Return the recoverable points."""

    def take_snapshot(self, name: str) -> Report:
        """Take a snapshot of all volumes."""

    def sync(self) -> Report:
        """Sync all volumes."""

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a volume at a moment."""


@contextlib.contextmanager
def session(path: Path) -> Iterator[Session]:
    """Yield a session with the daemon that serves the store, or with the store itself."""
    try:
        store = Store(path, limits=load_configuration(path).volume_limits())
    except StoreBusyError:
        with _connected(path) as client:
            yield RemoteSession(client, path)
        return
    try:
        yield LocalSession(store.volumes)
    finally:
        store.close()


class LocalSession:
    """A session that works on the store itself."""

    def __init__(self, volumes: Volumes) -> None:
        """Work on the open *volumes*."""
        self._volumes = volumes

    def status(self) -> Report:
        """See ``Session``."""
        return {"daemon": None, "volumes": [status_of(volume) for volume in self._volumes.values()]}

    def points(self) -> Report:
        """See ``Session``."""
        return points_of(self._volumes)

    def take_snapshot(self, name: str) -> Report:
        """See ``Session``. The newest state that journal and primary agree on; without a daemon nobody writes."""
        check_name(name, "snapshot")
        for volume in self._volumes.values():
            volume.require_snapshot(name)
            if volume.journal.durable < volume.journal.head:
                raise StoreError(
                    f"volume {volume.info.name} wasn't closed in order: its source lacks the last writes",
                    hint="start the daemon, which brings them to the source: dmafs serve STORE MOUNTPOINT",
                )
        for volume in self._volumes.values():
            run(volume.take_snapshot(name=name))
        return {"name": name}

    def sync(self) -> Report:
        """See ``Session``."""
        found = []
        for name, volume in self._volumes.items():
            found.append({"name": name, "mirror_seq": run(sync(volume))})
            for segment in volume.take_garbage():
                segment.close()
        return {"volumes": found}

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """See ``Session``."""
        image = image_at(self._volumes, volume, at)
        _check_range(volume, image.size, offset, length)
        for begin in range(offset, offset + length, READ_CHUNK):
            yield bytes(image.read(begin, min(READ_CHUNK, offset + length - begin)))


class RemoteSession:
    """A session with a daemon."""

    def __init__(self, client: httpx.Client, path: Path) -> None:
        """Ask through *client*."""
        self._client = client
        self._path = path

    def _ask(self, method: str, what: str, *, timeout: float | None = TIMEOUT_S, **query: str | int) -> httpx.Response:
        try:
            response = self._client.request(method, what, params=query, timeout=timeout)
        except httpx.HTTPError as error:
            raise ControlError(
                f"the daemon of store {self._path} doesn't answer: {type(error).__name__}: {error}",
                hint="is another command just working on the store? try again",
            ) from error
        if response.is_success:
            return response
        raise _error(response, self._path)

    def status(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/status").json()
        return answer

    def points(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/points").json()
        return answer

    def take_snapshot(self, name: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/snapshots", timeout=None, name=check_name(name, "snapshot")).json()
        return answer

    def sync(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/sync", timeout=None).json()
        return answer

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """See ``Session``."""
        sizes = {report["name"]: report["size_bytes"] for report in self.status()["volumes"]}
        if volume in sizes:
            _check_range(volume, sizes[volume], offset, length)
        for begin in range(offset, offset + max(length, 1), READ_CHUNK):
            count = min(READ_CHUNK, offset + length - begin)
            yield self._ask("GET", "/read", volume=volume, at=at, offset=begin, length=count).content


def _check_range(volume: str, size: int, offset: int, length: int) -> None:
    if not 0 <= offset <= offset + length <= size:
        raise InputError(
            f"range {offset}+{length} is not within the {size} bytes of volume {volume}",
            hint=f"offset and length in bytes; the volume has {size // SECTOR} sectors of {SECTOR}",
        )


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[httpx.Client]:
    """Yield an HTTP client of the store's socket, reached by its directory: unix socket names are short."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        transport = httpx.HTTPTransport(uds=f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        with httpx.Client(transport=transport, base_url="http://dmafs") as client:
            yield client
    finally:
        os.close(directory)


def _error(response: httpx.Response, path: Path) -> DmafsError:
    """Return the error of the tree that a daemon answered."""
    try:
        body: dict[str, Any] = response.json()
        kind = getattr(errors, body["error"])
        if issubclass(kind, DmafsError):
            error: DmafsError = kind(body["message"], hint=body["hint"])
            return error
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return ControlError(
        f"the daemon of store {path} answered with status {response.status_code}", hint="look at the daemon's log"
    )
