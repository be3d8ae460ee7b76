"""The client: what commands ask, of the running daemon if there is one, else of the store itself.

``session(store)`` yields a ``Session``. A store whose lock is free is opened here; otherwise the daemon is asked
through its control socket.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from dmafs.core.moments import Volumes, clone_group, instant_of, pin_group, require_mark, unpin_group
from dmafs.core.ondisk import Flag
from dmafs.core.resync import mend, needs_resync, resync
from dmafs.core.retention import KeepRules
from dmafs.core.scrub import Rest, last_scrub, scope_sectors, scrub
from dmafs.core.storage import lock_directory, open_source
from dmafs.core.store import Store
from dmafs.core.sync import sync
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Steps, verify
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import ControlError, SourceError, StoreBusyError, StoreError, TapError
from dmafs.service.checking import require_copied, require_source
from dmafs.service.configuration import Configuration
from dmafs.service.connection import connected, error_in, error_of, no_answer
from dmafs.service.devices import local_tap, mapped_volumes
from dmafs.service.loading import load_configuration
from dmafs.service.moment import moment_of
from dmafs.service.report import (
    READ_CHUNK,
    Report,
    check_range,
    clones_of,
    diff_of,
    differences_of,
    image_at,
    points_of,
    scrub_told,
    scrubbed_of,
    status_of,
    volume_of,
)
from dmafs.service.thinning import Thinning
from dmafs.units import SECTOR, check_name

TIMEOUT_S: Final = 10.0
"""For answers that are ready at once."""


Show = Callable[[int, int], None]
"""Is told the bytes done and the total."""


class Session(Protocol):
    """What a command may ask."""

    def status(self) -> Report:
        """Return the state of all volumes, and of the daemon if there is one."""

    def points(self) -> Report:
        """Return the recoverable points."""

    def moment(self, at: str, volume: str | None) -> Report:
        """Return what a time means in all volumes or one, and why."""

    def take_snapshot(self, name: str) -> Report:
        """Take a snapshot of all volumes."""

    def mark(self, name: str) -> Report:
        """Set a mark on all volumes."""

    def sync(self) -> Report:
        """Sync all volumes."""

    def pin(self, identifier: str) -> Report:
        """Have a snapshot not be dropped."""

    def unpin(self, identifier: str) -> Report:
        """Let a snapshot be dropped again."""

    def thin(self, *, dry_run: bool) -> Report:
        """Drop the snapshots that no rule keeps, or only say which."""

    def clones(self) -> Report:
        """Return all clones."""

    def create_clone(self, name: str, at: str | None) -> Report:
        """Make a clone of all volumes at a moment, or now."""

    def drop_clone(self, name: str) -> Report:
        """Drop a clone of all volumes."""

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a volume at a moment."""

    def diff(self, volume: str, a: str, b: str) -> Report:
        """Return which extents of a volume were written between two moments."""

    def tap(self, action: str, volume: str | None) -> Report:
        """Attach or detach mapped devices, or only report them."""

    def verify(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """Return where a volume's source and newest image differ; *show* is told how far it is."""

    def resync(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """Journal that, too; return what it was."""

    def scrub(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """Compare all that has a checksum with it, and repair what can be; return what was damaged."""


@contextlib.contextmanager
def session(path: Path) -> Iterator[Session]:
    """Yield a session with the daemon that serves the store, or with the store itself."""
    try:
        os.close(lock_directory(path))  # a daemon reads its own configuration, so ask it without
        configuration = load_configuration(path)
        store = Store(path, limits=configuration.volume_limits())
    except StoreBusyError:
        with connected(path) as client:
            yield RemoteSession(client, path)
        return
    try:
        rules = configuration.retention.rules(path)
        yield LocalSession(store.volumes, rules, path=path, configuration=configuration)
    finally:
        store.close()


class LocalSession:
    """A session that works on the store itself."""

    def __init__(self, volumes: Volumes, rules: KeepRules, *, path: Path, configuration: Configuration) -> None:
        """Work on the open *volumes* of the store in *path*; keep snapshots by *rules*."""
        self._volumes = volumes
        self._rules = rules
        self._path = path
        self._configuration = configuration
        self._rate = configuration.resync.rate

    def status(self) -> Report:
        """See ``Session``."""
        return {
            "daemon": None,
            "alarms": [],
            "volumes": [
                {**status_of(volume), "last_scrub": scrub_told(last_scrub(volume))} for volume in self._volumes.values()
            ],
        }

    def points(self) -> Report:
        """See ``Session``."""
        return points_of(self._volumes)

    def moment(self, at: str, volume: str | None) -> Report:
        """See ``Session``."""
        return moment_of(self._volumes, at, volume)

    def take_snapshot(self, name: str) -> Report:
        """See ``Session``. The newest state that journal and primary agree on; without a daemon nobody writes."""
        check_name(name, "snapshot")
        for volume in self._volumes.values():
            volume.require_snapshot(name)
        self._require_closed_in_order(*self._volumes.values())
        seqs = {each: run(volume.flush()).seq for each, volume in self._volumes.items()}
        instant_ns = instant_of(self._volumes, seqs)
        for each, seq in seqs.items():
            run(self._volumes[each].snapshot_at(seq, name, instant_ns=instant_ns))
        return {"name": name}

    def mark(self, name: str) -> Report:
        """See ``Session``. Likewise."""
        check_name(name, "mark")
        for volume in self._volumes.values():
            require_mark(volume, name)
        self._require_closed_in_order(*self._volumes.values())
        for volume in self._volumes.values():
            run(volume.flush(flag=Flag.MARK, name=name))
        return {"name": name}

    def _require_closed_in_order(self, *volumes: Volume) -> None:
        for volume in volumes:
            if volume.info.tap in {"dm", "log"} and not volume.pointers.now.clean:
                raise TapError(
                    f"what was written to volume {volume.info.name} may be in its log only",
                    hint="start the daemon, which follows the log: dmafs serve STORE MOUNTPOINT",
                )
            if volume.journal.durable < volume.journal.head:
                raise StoreError(
                    f"volume {volume.info.name} wasn't closed in order: its source lacks the last writes",
                    hint="start the daemon, which brings them to the source: dmafs serve STORE MOUNTPOINT",
                )

    def sync(self) -> Report:
        """See ``Session``."""
        found = []
        for name, volume in self._volumes.items():
            found.append({"name": name, "mirror_seq": run(sync(volume))})
            _close_garbage(volume)
        return {"volumes": found}

    def pin(self, identifier: str) -> Report:
        """See ``Session``."""
        run(pin_group(self._volumes, identifier))
        return {"id": identifier, "pinned": True}

    def unpin(self, identifier: str) -> Report:
        """See ``Session``."""
        run(unpin_group(self._volumes, identifier))
        return {"id": identifier, "pinned": False}

    def thin(self, *, dry_run: bool) -> Report:
        """See ``Session``."""
        thinning = Thinning(self._volumes, self._rules)
        if not dry_run:
            for drops in thinning.rounds():
                for name, snapshots in drops.items():
                    for snapshot in snapshots:
                        run(self._volumes[name].drop_snapshot(snapshot))
                        _close_garbage(self._volumes[name])
        return thinning.report(dry_run=dry_run)

    def clones(self) -> Report:
        """See ``Session``."""
        return clones_of(self._volumes)

    def create_clone(self, name: str, at: str | None) -> Report:
        """See ``Session``. Nobody could write to it."""
        check_name(name, "clone")
        raise StoreError(
            f"clone {name}{f' at {at}' if at else ''} can't be made: no daemon serves the store",
            hint="start one: dmafs serve STORE MOUNTPOINT",
        )

    def drop_clone(self, name: str) -> Report:
        """See ``Session``."""
        for volume, clone in clone_group(self._volumes, check_name(name, "clone")).items():
            run(self._volumes[volume].clones.drop(clone))
            run(self._volumes[volume].drop_unheld())
        return {"name": name}

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """See ``Session``."""
        image = image_at(self._volumes, volume, at)
        check_range(image, offset, length)
        for begin in range(offset, offset + length, READ_CHUNK):
            yield bytes(image.read(begin, min(READ_CHUNK, offset + length - begin)))

    def diff(self, volume: str, a: str, b: str) -> Report:
        """See ``Session``."""
        return run(diff_of(self._volumes, volume, a, b))

    def verify(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. The source is read only; without a daemon nobody writes through the tap."""
        return self._compare(volume, bytes_per_s, show, resyncs=False)

    def resync(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. Likewise."""
        return self._compare(volume, bytes_per_s, show, resyncs=True)

    def scrub(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. Nothing is repaired from a source that can't be opened."""
        found = volume_of(self._volumes, volume)
        require_copied(found)
        size = scope_sectors(found) * SECTOR
        rest = Rest(throttle=Throttle(self._rate if bytes_per_s is None else bytes_per_s))
        with contextlib.ExitStack() as opened:
            primary = None
            if found.info.tap != "none":
                with contextlib.suppress(SourceError):
                    primary = opened.enter_context(
                        contextlib.closing(open_source(Path(found.info.source), writable=False))
                    )
            work = scrub(found, primary, rest, lambda sectors: show(sectors * SECTOR, size))
            return scrubbed_of(volume, run(work))

    def tap(self, action: str, volume: str | None) -> Report:
        """See ``Session``."""
        size = self._configuration.log_size
        names = mapped_volumes(self._volumes, volume)
        return {
            "volumes": [local_tap(self._volumes[name], self._path / name, action, log_bytes=size) for name in names]
        }

    def _compare(self, name: str, bytes_per_s: int | None, show: Show, *, resyncs: bool) -> Report:
        volume = volume_of(self._volumes, name)
        require_source(volume)
        self._require_closed_in_order(volume)
        steps = Steps(_settled, throttle=Throttle(self._rate if bytes_per_s is None else bytes_per_s))
        size = volume.info.size_sectors * SECTOR

        def progress(sectors: int) -> None:
            show(sectors * SECTOR, size)

        with contextlib.closing(open_source(Path(volume.info.source), writable=False)) as primary:

            def flush(flag: Flag) -> Work[object]:
                return (yield from volume.flush(primary, flag=flag))

            if resyncs and needs_resync(volume):
                found = run(resync(volume, primary, flush, steps, progress))
                volume.mark_clean()
            else:
                found = run(verify(volume, primary, steps, progress))
                if resyncs and found.sectors:
                    found = run(mend(volume, primary, flush, steps, lambda _done: None, found=found))
                    volume.mark_clean()
        return differences_of(name, found)


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
            raise no_answer(self._path, error) from error
        if response.is_success:
            return response
        raise error_in(response, self._path)

    def status(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/status").json()
        return answer

    def points(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/points").json()
        return answer

    def moment(self, at: str, volume: str | None) -> Report:
        """See ``Session``."""
        which = {} if volume is None else {"volume": volume}
        answer: Report = self._ask("GET", "/moment", timeout=TIMEOUT_S, at=at, **which).json()
        return answer

    def metrics(self) -> str:
        """Return the daemon's metrics."""
        return self._ask("GET", "/metrics").text

    def take_snapshot(self, name: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/snapshots", timeout=None, name=check_name(name, "snapshot")).json()
        return answer

    def mark(self, name: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/marks", timeout=None, name=check_name(name, "mark")).json()
        return answer

    def sync(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/sync", timeout=None).json()
        return answer

    def pin(self, identifier: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/pin", timeout=None, id=identifier).json()
        return answer

    def unpin(self, identifier: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/unpin", timeout=None, id=identifier).json()
        return answer

    def thin(self, *, dry_run: bool) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("POST", "/thin", timeout=None, dry_run=int(dry_run)).json()
        return answer

    def clones(self) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/clones").json()
        return answer

    def tap(self, action: str, volume: str | None) -> Report:
        """See ``Session``."""
        query = {"action": action} | ({} if volume is None else {"volume": volume})
        answer: Report = self._ask("POST", "/tap", timeout=None, **query).json()
        return answer

    def create_clone(self, name: str, at: str | None) -> Report:
        """See ``Session``."""
        query = {"name": check_name(name, "clone")} | ({} if at is None else {"at": at})
        answer: Report = self._ask("POST", "/clones", timeout=None, **query).json()
        return answer

    def drop_clone(self, name: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("DELETE", "/clones", timeout=None, name=check_name(name, "clone")).json()
        return answer

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """See ``Session``."""
        query: dict[str, str | int] = {"volume": volume, "at": at, "offset": offset, "length": length}
        try:
            with self._client.stream("GET", "/read", params=query, timeout=None) as response:
                if not response.is_success:
                    response.read()
                    raise error_in(response, self._path)
                yield from response.iter_raw()
        except httpx.HTTPError as error:
            raise no_answer(self._path, error) from error

    def diff(self, volume: str, a: str, b: str) -> Report:
        """See ``Session``."""
        answer: Report = self._ask("GET", "/diff", timeout=None, volume=volume, a=a, b=b).json()
        return answer

    def verify(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. Who stops waiting ends it."""
        return self._follow("/verify", volume, bytes_per_s, show)

    def resync(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. Likewise, unless it has found something: then the daemon goes on."""
        return self._follow("/resync", volume, bytes_per_s, show)

    def scrub(self, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """See ``Session``. Who stops waiting ends it; the next one goes on there."""
        return self._follow("/scrub", volume, bytes_per_s, show)

    def _follow(self, what: str, volume: str, bytes_per_s: int | None, show: Show) -> Report:
        """Ask for something that tells how far it is, and return its result."""
        query: dict[str, str | int] = {"volume": volume} | ({} if bytes_per_s is None else {"rate": bytes_per_s})
        try:
            with self._client.stream("POST", what, params=query, timeout=None) as response:
                if not response.is_success:
                    response.read()
                    raise error_in(response, self._path)
                for line in response.iter_lines():
                    told: dict[str, Any] = json.loads(line)
                    if "result" in told:
                        result: Report = told["result"]
                        return result
                    if "error" in told:
                        raise error_of(told)
                    show(told["done_bytes"], told["total_bytes"])
        except httpx.HTTPError as error:
            raise no_answer(self._path, error) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ControlError(
                f"the daemon of store {self._path} answered {what} not as expected", hint="look at the daemon's log"
            ) from error
        raise ControlError(f"the daemon of store {self._path} ended before {what} was done", hint="look at its log")


def _close_garbage(volume: Volume) -> None:
    for segment in volume.take_garbage():
        segment.close()


def _settled() -> Work[object]:
    """Settle: without a daemon there is nothing on its way."""
    return (yield lambda: None)
