"""The store: the directory that holds the volumes, locked by the one process that works on it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from dmafs.core.limits import VolumeLimits
from dmafs.core.mirror import NAME as MIRROR_NAME
from dmafs.core.mounts import devices_below, mounts
from dmafs.core.names import CONFIGURATION_NAME, SOCKET_NAME
from dmafs.core.ondisk import VOLUME_JSON_LIMIT, VolumeInfo
from dmafs.core.opening import NOT_OURS
from dmafs.core.pointers import NAME as POINTERS_NAME
from dmafs.core.privacy import require_private, require_private_volume
from dmafs.core.storage import RealStorage, Storage, lock_directory, open_source
from dmafs.core.sync import finish
from dmafs.core.volume import INFO_NAME, Volume
from dmafs.core.work import run
from dmafs.errors import (
    CorruptionError,
    ExistsError,
    InputError,
    NoStoreError,
    PlacementError,
    SourceBusyError,
    SourceError,
    StoreError,
    StoreFullError,
)
from dmafs.units import SECTOR, check_name, valid_name

log = logging.getLogger(__name__)

VOLUMES_MAX: Final = 64
_SYSFS_DEVICES: Final = Path("/sys/dev/block")
_NOT_THERE: Final = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENOTCONN, errno.ESTALE, errno.ECONNABORTED,
}  # fmt: skip
"""Also of a file in a mount whose server is gone, which anybody's loop device may have."""


class SteadyClock:
    """The wall clock as all volumes of a store see it: it never goes back and shows no time twice.

    So a time that one volume's event has is later than all that had happened on the others before, and one instant of
    all volumes has one name, also when the wall clock is set back.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        """Show what *clock* does as long as it goes on."""
        self._clock = clock
        self._last = 0

    def __call__(self) -> int:
        """Return UTC nanoseconds."""
        self._last = max(self._clock(), self._last + 1)
        return self._last

    def pass_over(self, time_ns: int) -> None:
        """Show only times after *time_ns* from now on."""
        self._last = max(self._last, time_ns)


class Store:
    """An open, locked store with all its volumes open."""

    def __init__(
        self, path: Path, *, limits: VolumeLimits | None = None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Lock *path*, open every volume in it, and finish what an unclean stop left unfinished.

        UnsafeError if others can write there.
        """
        self.path = path.absolute()
        self._lock = lock_directory(self.path)
        self.volumes: dict[str, Volume] = {}
        steady = SteadyClock(clock)
        try:
            require_private(self.path)
            for name in directories_of_volumes(self.path):
                try:
                    require_described(self.path / name)
                except CorruptionError as error:
                    raise advised(error, self.path) from None
                require_private_volume(self.path / name)
                self.volumes[name] = volume = open_volume(self.path / name, limits=limits, clock=steady)
                steady.pass_over(volume.journal.head_time_ns)
            if not self.volumes:
                raise no_store(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all volumes and unlock."""
        for volume in self.volumes.values():
            volume.close()
        self.volumes = {}
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def no_store(path: Path) -> NoStoreError:
    """Return the error of a directory without volumes."""
    cut_off = sorted(entry.name[1:-4] for entry in path.iterdir() if is_in_making(entry.name))
    if cut_off:
        message = (
            f"directory {path} is no store: it has no volume, but {path / f'.{cut_off[0]}.new'}, which is half made"
        )
        return NoStoreError(message, hint=f"make it anew: dmafs create {path} {cut_off[0]} --source PATH")
    return NoStoreError(
        f"directory {path} is no store: it has no volume", hint=f"dmafs create {path} --source PATH makes one"
    )


def require_described(path: Path) -> None:
    """Raise CorruptionError if a volume's directory has no volume.json."""
    if not os.path.lexists(path / INFO_NAME):
        raise CorruptionError(
            f"file {path / INFO_NAME} is missing",
            hint=f"restore it; without it the volume can't be opened, nor the store until {path} is moved out of it",
        )


def require_apart(store: Path, source: Path) -> None:
    """Raise PlacementError if a store lies on the source of one of its volumes, as far as that source is there."""
    if source.exists() and path_lies_on(store, source):
        raise PlacementError(
            f"store {store} is on its own source {source}",
            hint="each write would make another one; copy the store to another disk and serve it there",
        )


def open_volume(path: Path, *, limits: VolumeLimits | None = None, clock: Callable[[], int] = time.time_ns) -> Volume:
    """Open the volume in a directory; see ``open_volume_in``."""
    return open_volume_in(RealStorage(path), path, limits=limits, clock=clock)


def open_volume_in(
    storage: Storage, path: Path, *, limits: VolumeLimits | None = None, clock: Callable[[], int] = time.time_ns
) -> Volume:
    """Open one volume: recover the journal, finish a committed sync, drop what only a held image had kept.

    *path* is what errors call the place where no file's name is known.
    """
    try:
        volume = Volume(storage, limits=limits, clock=clock)
    except OSError as error:
        raise advised(_unreadable(error, path), path.parent) from error
    except CorruptionError as error:
        raise advised(error, path.parent) from error
    try:
        if volume.pointers.now.sync_target:  # R43
            run(finish(volume))
        run(volume.drop_unheld())  # R31, R32
    except (StoreFullError, CorruptionError) as error:  # the next sync or drop goes on with it; all images are right
        log.error("volume %s is open, but work on it can't be finished: %s", volume.info.name, error.message)
    except OSError as error:
        volume.close()
        raise advised(_unreadable(error, path), path.parent) from error
    except BaseException:
        volume.close()
        raise
    return volume


def advised(error: StoreError, store: Path) -> StoreError:
    """Return an error of a damaged store whose hint says how all of the damage is listed."""
    return type(error)(error.message, hint=f"{error.hint}; all that is wrong is listed by: dmafs check {store}")


def _unreadable(error: OSError, path: Path) -> StoreError:
    kind = CorruptionError if error.errno in NOT_OURS else StoreError
    return kind(
        f"file {error.filename or path} can't be opened: {(error.strerror or '').lower()}",
        hint="restore it, or look at the store's disk",
    )


def volume_names(path: Path) -> list[str]:
    """Return the names of the volumes in a store's directory, sorted."""
    try:
        names = [entry.parent.name for entry in path.glob(f"*/{INFO_NAME}")]
    except OSError as error:
        raise NoStoreError(f"store {path} can't be read: {error.strerror}", hint="check the path") from error
    return sorted(name for name in names if valid_name(name))[:VOLUMES_MAX]  # others are volumes in the making


def directories_of_volumes(path: Path) -> list[str]:
    """Return the names of the volumes in a store's directory, and of what was one but has lost its volume.json."""
    names = set(volume_names(path))
    for part in (POINTERS_NAME, MIRROR_NAME):
        names |= {entry.parent.name for entry in path.glob(f"*/{part}") if valid_name(entry.parent.name)}
    return sorted(names)[:VOLUMES_MAX]


def create_volume(
    store: Path,
    name: str,
    *,
    source: Path,
    tap: str,
    log_path: Path | None = None,
    force: bool = False,
    clock: Callable[[], int] = time.time_ns,
) -> list[str]:
    """Make a volume in *store*, and the store if it isn't there; return warnings. On any error nothing is changed."""
    require_volume_name(name)
    store, source = store.absolute(), source.absolute()
    size = _check_source(source)
    _check_placement(store, source)
    if log_path is not None:
        log_path = log_path.absolute()
        _check_log(store, source, log_path)
    warnings = []
    for place in mounted_writable(source):
        message = f"source {source} is mounted read-write at {place}"
        if not force:
            raise SourceBusyError(
                message, hint="unmount it: writes that don't go through the tap are missed (--force if you know better)"
            )
        warnings.append(message + ": writes that don't go through the tap are missed")
    with new_volume(store, name) as directory:
        _check_unprotected(store, source)
        Volume.create(
            RealStorage(directory),
            name=name,
            size_sectors=size // SECTOR,
            source=source,
            tap=tap,
            created_ns=clock(),
            log_path=str(log_path) if log_path else "",
        )
    return warnings


@contextlib.contextmanager
def new_volume(store: Path, name: str) -> Iterator[Path]:
    """Yield an empty directory for the files of a new volume; then it takes its place in *store*, which is made too.

    After any error nothing is changed. Nobody else works on the store meanwhile.
    """
    require_volume_name(name)
    store = store.absolute()
    _check_store(store, name)
    with _directories(store):
        lock = lock_directory(store)
        try:
            with _in_place(store, name) as temporary:
                yield temporary
        finally:
            os.close(lock)


def require_volume_name(name: str) -> None:
    """Raise InputError if no volume can have the name."""
    check_name(name, "volume")
    if name in {SOCKET_NAME, CONFIGURATION_NAME}:
        raise InputError(f"volume name {name} is taken by a file of the store", hint="choose another name")


@contextlib.contextmanager
def _directories(store: Path) -> Iterator[None]:
    """Make a store's directory and its parents where they are missing; on any error remove what was made."""
    with contextlib.ExitStack() as undo:
        try:
            for path in (*reversed(store.parents), store):
                if not _exists(path):
                    path.mkdir(mode=0o700 if path == store else 0o777)
                    undo.callback(_remove_directory, path)
        except OSError as error:
            raise InputError(
                f"store {store} can't be made: {(error.strerror or '').lower()}", hint="check the path"
            ) from error
        yield
        undo.pop_all()


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody put something there meanwhile; the first error is what counts
        path.rmdir()


def _exists(path: Path) -> bool:
    """Say whether *path* is there; unlike the method, False also for what can't be: too long a name, say."""
    try:
        path.stat()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _in_place(store: Path, name: str) -> Iterator[Path]:
    """Yield a directory with a temporary name first: a volume is there wholly or not at all."""
    temporary = store / f".{name}.new"
    try:
        _remove_tree(temporary)
        temporary.mkdir(mode=0o700)
        yield temporary
        store.chmod(0o700)
        temporary.rename(store / name)
        RealStorage(store).sync_directory("")
    except OSError as error:
        raise InputError(
            f"volume {name} can't be made in {store}: {(error.strerror or '').lower()}",
            hint="check the space and the permissions there",
        ) from error
    finally:
        _remove_tree(temporary)


def remove_new_volume(store: Path, name: str) -> None:
    """Undo ``create_volume``: remove a volume that nothing was captured for yet, and the store if it is empty then."""
    lock = lock_directory(store)
    try:
        temporary = store / f".{name}.new"
        (store / name).rename(temporary)
        RealStorage(store).sync_directory("")
        _remove_tree(temporary)
        _remove_directory(store)
    finally:
        os.close(lock)


def _remove_tree(path: Path) -> None:
    """Remove what an interrupted or undone creation left; only ever called on a temporary name."""
    for entry in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        entry.rmdir() if entry.is_dir() else entry.unlink()
    if path.is_dir():
        path.rmdir()


def _check_source(source: Path) -> int:
    """Return the size of a source in bytes; SourceError if it can't be protected."""
    file = open_source(source, writable=False)
    try:
        size = file.size()
    finally:
        file.close()
    if size == 0 or size % SECTOR:
        raise SourceError(
            f"source {source} has {size} bytes, which is not a positive multiple of {SECTOR}",
            hint="pad it with: truncate --size=%512 SOURCE",
        )
    return size


def _check_log(store: Path, source: Path, log_path: Path) -> None:
    """Refuse a log that can't be followed."""
    open_source(log_path, writable=False).close()
    if not log_path.is_file():
        raise InputError(f"log {log_path} is no regular file", hint="give the file that QEMU logs to")
    if is_same_file(log_path, source):
        raise InputError(f"log {log_path} is the source itself", hint="give the file that QEMU logs to")
    if is_inside(log_path, store):
        raise PlacementError(f"log {log_path} is inside the store {store}", hint="keep it outside")


def _check_store(store: Path, name: str) -> None:
    """Refuse directories that hold something else, and volumes that are there already."""
    if not _exists(store):
        return
    if not store.is_dir():
        raise InputError(f"store {store} is not a directory", hint="give the path of a directory")
    if (store / name).exists():
        raise ExistsError(f"volume {name} already exists in {store}", hint="choose another volume name")
    names = volume_names(store)
    ours = {*names, SOCKET_NAME, CONFIGURATION_NAME, "lost+found"}
    foreign = sorted(entry.name for entry in store.iterdir() if entry.name not in ours and not is_in_making(entry.name))
    if foreign:
        raise ExistsError(
            f"store {store} is not empty: it has {foreign[0]}", hint="give an empty or a new directory, or a store"
        )
    if len(names) >= VOLUMES_MAX:
        raise InputError(f"store {store} has {VOLUMES_MAX} volumes, which is the limit", hint="make another store")


def volume_info(store: Path, name: str) -> VolumeInfo:
    """Return what is written of a volume in a store that needn't be open."""
    path = store / name / INFO_NAME
    try:
        content = RealStorage(path.parent).read_bytes(INFO_NAME, VOLUME_JSON_LIMIT)
    except OSError as error:
        raise _unreadable(error, path) from error
    return VolumeInfo.decode(content, str(path))


def _check_unprotected(store: Path, source: Path) -> None:
    """Refuse a source that a volume of the store has already: two taps would miss each other's writes."""
    for name in volume_names(store):
        if is_same_file(Path(volume_info(store, name).source), source):
            raise ExistsError(
                f"source {source} is already the source of volume {name} in {store}", hint="give another source"
            )


def is_in_making(name: str) -> bool:
    """Say whether a directory of that name holds a volume in the making, or one whose creation was cut off."""
    return name.startswith(".") and name.endswith(".new") and valid_name(name[1:-4])


def is_inside(inner: Path, outer: Path) -> bool:
    """Say whether *inner* is *outer* or below it, symbolic links resolved."""
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def _check_placement(store: Path, source: Path) -> None:
    """Refuse a source inside the store and a store on its own source."""
    if is_inside(source, store):
        raise PlacementError(f"source {source} is inside the store {store}", hint="keep them on different disks")
    parent = next(path for path in [store, *store.parents] if _exists(path))
    if path_lies_on(parent, source):
        raise PlacementError(
            f"store {store} is on its own source {source}", hint="put the store on another disk than the one protected"
        )


def path_lies_on(path: Path, source: Path) -> bool:
    """Say whether the filesystem of an existing *path* lies on *source*, in whatever way ``lies_on`` knows."""
    return any(lies_on(device, source) for device in devices_below(path))


def lies_on(device: int, source: Path, *, through_files: bool = True) -> bool:
    """Say whether block device *device* is *source*, a partition of it, or a mapped or loop device over it.

    With *through_files* also whether a loop device's backing file is on a filesystem that lies on *source*.
    """
    kind = source.stat()
    seen, queue = set(), [device]
    while queue:
        number = queue.pop()
        if stat.S_ISBLK(kind.st_mode) and number == kind.st_rdev:
            return True
        directory = (_SYSFS_DEVICES / f"{os.major(number)}:{os.minor(number)}").resolve()
        if number in seen or not directory.exists():
            continue
        seen.add(number)
        if (directory / "partition").exists():
            queue.append(_device_number(directory.parent))
        queue += [_device_number(slave) for slave in _entries(directory / "slaves")]
        backing = directory / "loop" / "backing_file"
        if backing.exists():
            file = Path(backing.read_text().rstrip("\n"))
            if is_same_file(file, source):
                return True
            if through_files and _exists(file):
                queue += devices_below(file)
    return False


def _device_number(directory: Path) -> int:
    major, _, minor = (directory / "dev").read_text().strip().partition(":")
    return os.makedev(int(major), int(minor))


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def is_same_file(one: Path, other: Path) -> bool:
    """Say whether two paths lead to one file, or to nodes of one block device."""
    try:
        infos = one.stat(), other.stat()
        if all(stat.S_ISBLK(info.st_mode) for info in infos):
            return infos[0].st_rdev == infos[1].st_rdev
        return os.path.samestat(*infos)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise


def mounted_writable(source: Path) -> Iterator[str]:
    """Yield the mount points where *source* or something on top of it is mounted read-write."""
    for mount in mounts():
        if mount.writable and any(lies_on(device, source, through_files=False) for device in mount.devices()):
            yield mount.point
