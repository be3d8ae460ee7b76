"""Sessions with a store that no daemon serves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dmafs import answers
from dmafs.core.moments import (
    Volumes,
    clone_group,
    group_to_drop,
    instant_of,
    pin_group,
    rename_group,
    require_mark,
    unpin_group,
)
from dmafs.core.ondisk import Flag
from dmafs.core.resync import mend, needs_resync, resync
from dmafs.core.retention import KeepRules
from dmafs.core.scrub import Rest, last_scrub, scope_sectors, scrub
from dmafs.core.storage import open_source
from dmafs.core.store import Store
from dmafs.core.sync import sync
from dmafs.core.throttle import Throttle
from dmafs.core.verify import Steps, verify
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import SourceError, StoreError, TapError
from dmafs.service.configuration import Configuration
from dmafs.service.loading import load_configuration
from dmafs.service.moment import moment_of
from dmafs.service.report import (
    READ_CHUNK,
    check_range,
    clones_of,
    diff_of,
    differences_of,
    image_at,
    points_of,
    require_copied,
    require_source,
    scrub_told,
    scrubbed_of,
    snapshots_of,
    status_of,
    volume_of,
)
from dmafs.service.session import Show, unseen
from dmafs.service.thinning import Thinning
from dmafs.units import SECTOR, check_name


@contextlib.contextmanager
def open_store(path: Path) -> Iterator[LocalSession]:
    """Yield a session with the store in *path*; StoreBusyError if another process has it."""
    configuration = load_configuration(path)
    store = Store(path, limits=configuration.volume_limits())
    try:
        yield LocalSession(store.volumes, configuration.retention.rules(path), path=path, configuration=configuration)
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

    def status(self) -> answers.Status:
        """See ``Session``."""
        return {
            "daemon": None,
            "alarms": [],
            "volumes": [
                {**status_of(volume), "last_scrub": scrub_told(last_scrub(volume))} for volume in self._volumes.values()
            ],
        }

    def points(self) -> answers.Points:
        """See ``Session``."""
        return points_of(self._volumes)

    def moment(self, at: str, volume: str | None = None) -> answers.Moment:
        """See ``Session``."""
        return moment_of(self._volumes, at, volume)

    def snapshots(self) -> answers.Snapshots:
        """See ``Session``."""
        return snapshots_of(self._volumes)

    def take_snapshot(self, name: str) -> answers.Named:
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

    def drop_snapshot(self, identifier: str) -> answers.Dropped:
        """See ``Session``."""
        for name, snapshot in group_to_drop(self._volumes, identifier).items():
            run(self._volumes[name].drop_snapshot(snapshot))
            _close_garbage(self._volumes[name])
        return {"id": identifier}

    def rename_snapshot(self, identifier: str, name: str) -> answers.Renamed:
        """See ``Session``."""
        run(rename_group(self._volumes, identifier, check_name(name, "snapshot")))
        return {"id": identifier, "name": name}

    def mark(self, name: str) -> answers.Named:
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

    def sync(self) -> answers.Syncs:
        """See ``Session``."""
        found: list[answers.Synced] = []
        for name, volume in self._volumes.items():
            found.append({"name": name, "mirror_seq": run(sync(volume))})
            _close_garbage(volume)
        return {"volumes": found}

    def pin(self, identifier: str) -> answers.Pinned:
        """See ``Session``."""
        run(pin_group(self._volumes, identifier))
        return {"id": identifier, "pinned": True}

    def unpin(self, identifier: str) -> answers.Pinned:
        """See ``Session``."""
        run(unpin_group(self._volumes, identifier))
        return {"id": identifier, "pinned": False}

    def thin(self, *, dry_run: bool = False) -> answers.Thinned:
        """See ``Session``."""
        thinning = Thinning(self._volumes, self._rules)
        if not dry_run:
            for drops in thinning.rounds():
                for name, snapshots in drops.items():
                    for snapshot in snapshots:
                        run(self._volumes[name].drop_snapshot(snapshot))
                        _close_garbage(self._volumes[name])
        return thinning.report(dry_run=dry_run)

    def clones(self) -> answers.Clones:
        """See ``Session``."""
        return clones_of(self._volumes)

    def create_clone(self, name: str, at: str | None = None) -> answers.Named:
        """See ``Session``. Nobody could write to it."""
        check_name(name, "clone")
        raise StoreError(
            f"clone {name}{f' at {at}' if at else ''} can't be made: no daemon serves the store",
            hint="start one: dmafs serve STORE MOUNTPOINT",
        )

    def drop_clone(self, name: str) -> answers.Named:
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

    def diff(self, volume: str, a: str, b: str) -> answers.Difference:
        """See ``Session``."""
        return run(diff_of(self._volumes, volume, a, b))

    def verify(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """See ``Session``. The source is read only; without a daemon nobody writes through the tap."""
        return self._compare(volume, bytes_per_s, show, resyncs=False)

    def resync(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """See ``Session``. Likewise."""
        return self._compare(volume, bytes_per_s, show, resyncs=True)

    def scrub(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Scrubbed:
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

    def tap(self, action: str, volume: str | None = None) -> answers.Taps:
        """See ``Session``."""
        from dmafs.service.devices import local_tap, mapped_volumes  # noqa: PLC0415 - slow to import, for this only

        size = self._configuration.log_size
        names = mapped_volumes(self._volumes, volume)
        return {
            "volumes": [local_tap(self._volumes[name], self._path / name, action, log_bytes=size) for name in names]
        }

    def _compare(self, name: str, bytes_per_s: int | None, show: Show, *, resyncs: bool) -> answers.Differences:
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


def _close_garbage(volume: Volume) -> None:
    for segment in volume.take_garbage():
        segment.close()


def _settled() -> Work[object]:
    """Settle: without a daemon there is nothing on its way."""
    return (yield lambda: None)
