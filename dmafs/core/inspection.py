"""Inspection: all that is wrong with a store that nobody works on, found at once and without changing a byte of it.

What may be found, and what it means, is known by those who open it: the readers of formats, and the tables of
``recovery``. They are asked here one after the other, on a ``DryStorage``, and told to go on where they would refuse.

1. Nothing is written, truncated, renamed or removed; the store's lock is the only trace. It needs no writable medium.
2. What would keep the store from being opened is an *error*. So is what opening would pass over, but moments can't be
   read then. All else that is worth a word is a *note*: opening takes care of it, or it does no harm.
3. Descriptors and structure are read, all of them; data isn't, but for what had not been durable yet. That is scrub's.

Last, the volume is opened on the same storage: so whatever keeps it from being opened is found.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from dmafs.core import clone as writable
from dmafs.core import digests, mirror, pointers, recovery, scrub, snapshot
from dmafs.core.dry import DryStorage
from dmafs.core.limits import IndexLimits
from dmafs.core.mirror import open_mirror
from dmafs.core.names import CONFIGURATION_NAME, SOCKET_NAME
from dmafs.core.ondisk import LOG_DIRECTORY, LOG_NAME, VOLUME_JSON_LIMIT, Pointers, VolumeInfo
from dmafs.core.overlay import DAT, EXT, Overlay
from dmafs.core.part import Part
from dmafs.core.pointers import PointerFile, read_slots
from dmafs.core.privacy import require_private
from dmafs.core.reopening import Recovery
from dmafs.core.snapshots import Snapshots
from dmafs.core.storage import lock_directory
from dmafs.core.store import (
    directories_of_volumes,
    is_in_making,
    no_store,
    require_apart,
    require_described,
)
from dmafs.core.volume import INFO_NAME, Volume
from dmafs.errors import CorruptionError, DmafsError, NoSuchVolumeError, StoreBusyError
from dmafs.units import SECTOR, valid_name

Severity = Literal["error", "note"]

_FILES: Final = {INFO_NAME, pointers.NAME, mirror.NAME, digests.NAME, scrub.NAME}
_TEMPORARY: Final = {f"{name}.new" for name in (INFO_NAME, scrub.NAME)}
_DIRECTORIES: Final = {recovery.DIRECTORY, snapshot.DIRECTORY, writable.DIRECTORY, LOG_DIRECTORY}
_MOVE_AWAY: Final = "move it out of the store"
_NOTHING_TO_DO: Final = "nothing has to be done"


class Finding(NamedTuple):
    """One thing that was found: about which file or directory, what, and what to do."""

    severity: Severity
    file: str
    problem: str
    remedy: str


@dataclass(slots=True)
class Inspected:
    """What was found in a store."""

    volumes: list[str]
    """Names of the volumes that were looked at."""
    findings: list[Finding] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def count(self, severity: Severity) -> int:
        """Return how many findings have that severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def error(self, file: str, problem: str, remedy: str) -> None:
        """Take in an error, unless it is known."""
        if problem not in self._known:
            self._known.add(problem)
            self.findings.append(Finding("error", file, problem, remedy))

    def note(self, file: str, problem: str, remedy: str = _NOTHING_TO_DO) -> None:
        """Take in a note."""
        self.findings.append(Finding("note", file, problem, remedy))

    def sort(self) -> None:
        """Put errors before notes."""
        self.findings.sort(key=lambda finding: finding.severity != "error")

    def taking(self, file: str) -> Taking:
        """Take in what is raised within, by default about *file*, and go on behind it."""
        return Taking(self, file)


class Taking:
    """See ``Inspected.taking``."""

    def __init__(self, found: Inspected, file: str) -> None:
        """Take errors into *found*."""
        self._found = found
        self._file = file

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        """Take an error in; anything else than one of the world's goes on its way."""
        if isinstance(error, DmafsError):
            self._found.error(self._file, error.message, error.hint)
        elif isinstance(error, OSError):
            file = os.fsdecode(error.filename or self._file)
            problem = f"{file} can't be opened: {(error.strerror or str(error)).lower()}"
            self._found.error(file, problem, "restore it, or look at the store's disk")
        return isinstance(error, (DmafsError, OSError))


def inspect(path: Path, only: str | None = None) -> Inspected:
    """Look at a store that nobody works on, at all of its volumes or *only* one; return all that was found.

    NoStoreError if it is none, NoSuchVolumeError, StoreBusyError if a process works on it.
    """
    path = path.absolute()
    try:
        lock = lock_directory(path)
    except StoreBusyError as error:
        raise StoreBusyError(
            f"{error.message}, so that it can't be checked",
            hint=f"stop the daemon that serves it; to look at a store in use, all data too: dmafs scrub {path}",
        ) from error
    try:
        names = directories_of_volumes(path)
        if not names:
            raise no_store(path)
        if only is not None and only not in names:
            raise NoSuchVolumeError(f"there is no volume {only}", hint=f"there are: {', '.join(names)}")
        found = Inspected(names if only is None else [only])
        _look_at_store(path, names, found)
        for name in found.volumes:
            _Volume(path / name, found).look()
    finally:
        os.close(lock)
    found.sort()
    return found


def _look_at_store(path: Path, names: list[str], found: Inspected) -> None:
    """Look at the store's directory: who can write to it, and what isn't ours."""
    with found.taking(str(path)):
        require_private(path)
    ours = {*names, SOCKET_NAME, "lost+found"}
    for name in sorted({entry.name for entry in path.iterdir()} - ours):
        file = str(path / name)
        if name == CONFIGURATION_NAME:
            with found.taking(file):
                require_private(path / name)
        elif is_in_making(name):
            problem = f"{file} is a volume whose making was cut off"
            found.note(file, problem, f"make it anew: dmafs create {path} {name[1:-4]} --source PATH; or remove it")
        else:
            found.note(file, f"{file} isn't the store's: no volume can be made beside it", _MOVE_AWAY)


class _Volume:
    """One volume as it is looked at."""

    def __init__(self, path: Path, found: Inspected) -> None:
        self.path = path
        self.found = found
        self.storage = DryStorage(path)

    def look(self) -> None:
        """Look at everything; each part also if another one is damaged."""
        with self.found.taking(str(self.path)):
            self._directory()
        info = self._info()
        if info is None:
            return
        for opening in (open_mirror, self._digests):
            with self.found.taking(str(self.path)):
                opening(self.storage, info).close()
        now = self._pointers(info)
        with self.found.taking(self.storage.path(snapshot.DIRECTORY)):
            self._backward(info, now)
        with self.found.taking(self.storage.path(recovery.DIRECTORY)):
            if now is not None:
                self._forward(info, now)
        with self.found.taking(self.storage.path(writable.DIRECTORY)):
            self._clones(info)
        with self.found.taking(str(self.path)):
            self._opened()
        self._changes()

    # -- names, kinds and modes ---------------------------------------------------------------------------------

    def _directory(self) -> None:
        with self.found.taking(str(self.path)):
            require_private(self.path)
        for entry in sorted(self.path.iterdir()):
            with self.found.taking(str(entry)):
                if not entry.is_symlink():
                    require_private(entry)
                if entry.name in _DIRECTORIES:
                    if self._is(stat.S_ISDIR, entry, "directory"):
                        self._entries(entry)
                elif entry.name in _FILES:
                    self._is(stat.S_ISREG, entry, "regular file")
                elif entry.name in _TEMPORARY:
                    self.found.note(str(entry), f"{entry} is left over from writing it", "remove it")
                else:
                    self.found.note(str(entry), f"{entry} isn't the volume's", _MOVE_AWAY)

    def _is(self, kind: Callable[[int], bool], entry: Path, word: str) -> bool:
        """Say whether something is of a kind, and take in an error if it isn't, or isn't ours to write."""
        if not kind(entry.lstat().st_mode):
            self.found.error(str(entry), f"{entry} is no {word}", "restore it; symbolic links aren't followed")
            return False
        if not os.access(entry, os.R_OK | os.W_OK) and not os.statvfs(entry).f_flag & os.ST_RDONLY:
            self.found.error(str(entry), f"{entry} can't be read and written", "give it back its owner and mode")
        return True

    def _entries(self, directory: Path) -> None:
        for entry in sorted(directory.iterdir()):
            if directory.name == writable.DIRECTORY:
                if valid_name(entry.name) and self._is(stat.S_ISDIR, entry, "directory"):
                    for file in sorted(entry.iterdir()):
                        if self._is(stat.S_ISREG, file, "regular file") and file.name not in {EXT, DAT}:
                            self.found.note(str(file), f"{file} isn't the clone's", _MOVE_AWAY)
            elif directory.name != LOG_DIRECTORY or LOG_NAME.fullmatch(entry.name):
                self._is(stat.S_ISREG, entry, "regular file")
            else:
                self.found.note(str(entry), f"{entry} is no log of a mapped device", _MOVE_AWAY)

    # -- the parts of a volume ----------------------------------------------------------------------------------

    def _info(self) -> VolumeInfo | None:
        file = self.storage.path(INFO_NAME)
        with self.found.taking(file):
            require_described(self.path)
            info = VolumeInfo.decode(self.storage.read_bytes(INFO_NAME, VOLUME_JSON_LIMIT), file)
            if info.name != self.path.name:
                self.found.note(file, f"{file} calls the volume {info.name}", f"call the directory {info.name} again")
            with self.found.taking(info.source):
                require_apart(self.path.parent, Path(info.source))
            return info
        self.found.note(file, f"nothing else in {self.path} could be looked at", f"repair {INFO_NAME}, and check again")
        return None

    @staticmethod
    def _digests(storage: DryStorage, info: VolumeInfo) -> digests.Digests:
        return digests.Digests(storage, info.uuid, info.size_sectors)

    def _pointers(self, info: VolumeInfo) -> Pointers | None:
        file = self.storage.path(pointers.NAME)
        with self.found.taking(file):
            with contextlib.closing(PointerFile(self.storage, info.uuid)) as opened:
                now = opened.now
            with contextlib.closing(self.storage.open(pointers.NAME)) as slots:
                bad = [slot for slot in read_slots(slots) if isinstance(slot, DmafsError)]
            for error in bad:
                self.found.note(file, error.message, "the other slot counts; the next change of the pointers mends it")
            if now.sync_target:
                self.found.note(file, f"{file}: a sync was committed and not finished; opening the store finishes it")
            return now
        return None

    def _backward(self, info: VolumeInfo, now: Pointers | None) -> None:
        snapshots = Snapshots(self.storage, info.uuid, IndexLimits(), refuse=self._refuse)
        for one in snapshots.all():
            with self.found.taking(self.storage.path(one.stem)), contextlib.ExitStack() as opened:
                segment = snapshots.segment(one)
                for loaded in snapshots.unload(keep=None, everything=True):
                    opened.callback(loaded.close)
                if excess := segment.ext.size() - segment.ext_size:
                    problem = f"the last {excess} B of {segment.ext.name} don't count, an unclean stop has left them"
                    self.found.note(segment.ext.name, problem)
        if now is not None:
            with self.found.taking(self.storage.path(snapshot.DIRECTORY)):
                snapshots.require_open(now.open_snapshot, target=bool(now.sync_target))

    def _refuse(self, name: str, error: DmafsError) -> None:
        self.found.error(self.storage.path(name), error.message, error.hint)

    def _forward(self, info: VolumeInfo, now: Pointers) -> None:
        journal = Recovery(
            self.storage,
            info.uuid,
            now.mirror_seq,
            max(now.mirror_time_ns, now.origin_time_ns),
            windowed=info.tap != "fuse",
            refuse=self._refuse,
        )
        try:
            journal.read(max(now.durable, now.mirror_seq))
            for part in journal.parts:
                with self.found.taking(self.storage.path(f"{part.stem}.ext")):
                    self._part(part, info)
        finally:
            journal.close()

    def _part(self, part: Part, info: VolumeInfo) -> None:
        """Look at a segment: its descriptors, if opening the volume doesn't read them, and how much data there is."""
        if part.damage not in recovery.PASSED_OVER:
            part.require_known()
        if part.segment is None and not part.damage:
            with contextlib.closing(part.open(self.storage, info.uuid)) as segment:
                size, right = segment.dat.size(), segment.data_sectors * SECTOR
                if size < right:
                    raise CorruptionError(
                        f"{segment.dat.name} has {size} bytes instead of {right}",
                        hint="the file was truncated from outside; moments that need its end can't be read",
                    )

    def _clones(self, info: VolumeInfo) -> None:
        for name in self.storage.names(writable.DIRECTORY):
            stem = f"{writable.DIRECTORY}/{name}"
            file = self.storage.path(stem)
            if valid_name(name):
                with self.found.taking(file):
                    Overlay.open(self.storage, stem, info.uuid, info.size_sectors).close()
            elif not writable.is_leftover(name):
                self.found.error(file, f"{file} is no file of ours", _MOVE_AWAY)

    def _opened(self) -> None:
        """Open the volume as a daemon would: what keeps it from that is found, if all else has overlooked it."""
        with contextlib.closing(Volume(self.storage)) as volume:
            for clone in volume.clones:
                if clone.failure:
                    file = self.storage.path(f"{writable.DIRECTORY}/{clone.name}")
                    self.found.error(file, clone.failure, f"drop it: dmafs clone drop {self.path.parent} {clone.name}")

    def _changes(self) -> None:
        """Tell what opening would change."""
        for name, before, size in dict.fromkeys(self.storage.changes):
            file = self.storage.path(name)
            if size is not None:
                problem = f"the last {before - size} B of {file} don't count; opening the store cuts them off"
                self.found.note(file, problem)
            elif name.count("/") == 1:  # of a clone the directory
                self.found.note(file, f"{file} is left over or not needed any more; opening the store removes it")
