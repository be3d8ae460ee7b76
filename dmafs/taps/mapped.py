"""The mapped device of one volume, ``/dev/mapper/dmafs-<volume>``, and the logs that its writes go to.

The device is a table of one line, ``log-writes <primary> <log>``: the kernel does each write on the primary, and
appends it to the log, a loop device over a sparse file of the store::

    <volume>/log/<first LSN, 20 digits>.log

A *log sequence number* (LSN) counts sectors over all logs of the volume: byte b of a log is at LSN first + b // 512.
The target never wraps a log, and stops logging for good when it is full or can't be written, while the primary goes on
and marks are still taken without an error: ``status`` says so, and ``rotate`` puts a fresh log in its place.

What holds:

1. *The device outlives us.* Nothing here is needed for it to work; ``find`` takes it over as it is, and puts away what
   an ``attach`` or ``rotate`` that was cut off has left. The current log is the one that the device's table names, and
   no log is newer.
2. *All or nothing.* After an error of ``attach`` there is neither device nor log; after one of ``rotate`` the current
   log is the old one.
3. *Only ours.* A device is taken over if its uuid, its primary, and its log by inode are this volume's.
4. *A log that is closed is complete*: all that went to it is in its file, and it ends with the target's own mark.
5. *The loop device needs nobody*: it is held by the table, and detaches itself with it.

Everything is synchronous and may be called in any thread, but only one of ``rotate`` and ``detach`` at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NewType, Self
from uuid import UUID

from dmafs.core.ondisk import LOG_DIRECTORY, LOG_NAME
from dmafs.errors import ExistsError, SourceBusyError, SourceError, StoreError, TapBusyError, TapError
from dmafs.taps import loopdev
from dmafs.taps.devicemapper import DeviceMapper, Mapped, Target, numbered, spelled
from dmafs.taps.logformat import HEADER_BYTES, encode_mark
from dmafs.units import SECTOR

Lsn = NewType("Lsn", int)
"""A log sequence number, in sectors."""

MARK_BYTES_MAX: Final = 479
"""No mark's text is longer."""
DRAIN_S: Final = 0.05
"""How long writes may be held up, until the log has everything, before a rotation is given up."""
HEAD_BYTES: Final = 4096
"""Of a log, that are never punched: its super block is in them, whatever the primary's sector size."""

_TARGET: Final = "log-writes"
_MARK: Final = re.compile(rf"[!-\[\]-~]{{1,{MARK_BYTES_MAX}}}")  # a word; device-mapper takes \ for an escape
_STATUS: Final = re.compile(r"([0-9]+) ([0-9]+)( logging_disabled)?")
_LSN_END: Final = 2**63
_SECTORS_WRITTEN, _SECTORS_DISCARDED = 6, 13  # fields of a stat file: Documentation/block/stat.rst
_PUNCH_KEEP_SIZE: Final = 1 | 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class TapStatus:
    """What the kernel says of a mapped device and of its log."""

    entries: int
    """How many entries it has put into the log."""
    next_sector: int
    """Where in the log the next entry goes."""
    end_sector: int
    """The log's size."""
    disabled: bool
    """Whether logging has stopped for good: writes since then are not in the log."""
    open_count: int
    """How many others have the device open; a mounted file system is one."""


class MappedTap:
    """See the module. Made by ``attach`` or ``find``."""

    def __init__(self, mapped: Mapped, log: Path, source: Path, *, log_bytes: int) -> None:
        """Work on a device that is there, and whose table names that log."""
        self.source = source
        self.node = mapped.node
        self.log = log
        """File of the current log."""
        self.log_bytes = log_bytes
        """Size of logs made from now on."""
        self._name = mapped.name
        self._sysfs = mapped.sysfs
        self._source_sysfs = _queue_folder(source.stat().st_rdev)
        self._fd = -1
        self._lock = threading.Lock()  # over self._fd
        self._written = -1
        self._dm = DeviceMapper()

    # --- how one comes about

    @classmethod
    def attach(
        cls, directory: Path, *, volume_name: str, volume_uuid: UUID, source: Path, log_bytes: int, first: Lsn
    ) -> Self:
        """Make the mapped device of the volume in *directory*, with a log of *log_bytes* that begins at LSN *first*.

        SourceError if the source is no block device that can be written to, SourceBusyError if somebody uses it,
        ExistsError if there is a device of that name, TapError if the kernel lacks what is needed.
        """
        name, uuid = device_name(volume_name), _device_uuid(volume_uuid)
        with DeviceMapper() as dm, contextlib.ExitStack() as undo:
            if dm.target_version(_TARGET) is None:
                raise TapError(
                    f"the kernel has no device-mapper target {_TARGET}",
                    hint="modprobe dm-log-writes; its configuration needs CONFIG_DM_LOG_WRITES",
                )
            _check_free(dm, name, uuid)
            number, sectors = _checked_source(source)
            path = _make_log(directory / LOG_DIRECTORY, first, log_bytes)
            undo.callback(path.unlink)
            with loopdev.attach(path) as loop:
                made = dm.create(name, uuid)
                undo.callback(dm.remove, name)
                try:
                    dm.load(name, [_line(sectors, number, loop.number)])
                except TapBusyError as error:
                    raise SourceBusyError(
                        f"source {source} is in use",
                        hint=f"lsblk {source} and fuser -vm {source} say by what; unmount it",
                    ) from error
                dm.resume(name)
            tap = cls(made, path, source, log_bytes=log_bytes)
            undo.pop_all()
            return tap

    @classmethod
    def find(cls, directory: Path, *, volume_name: str, volume_uuid: UUID, source: Path, log_bytes: int) -> Self | None:
        """Return the volume's mapped device if it is attached, by whichever process; None if it isn't.

        TapError if there is one, but it isn't as this volume's has to be. What an interrupted ``attach`` or ``rotate``
        has left is put away.
        """
        with DeviceMapper() as dm:
            found = dm.find(uuid=_device_uuid(volume_uuid))
            if found is None:
                return None
            logs = directory / LOG_DIRECTORY
            unused = _log_of(dm.table(found.name, loaded=True), logs)
            if not found.active:  # an attach that was cut off
                dm.remove(found.name)
                if unused is not None:
                    unused.unlink()
                return None
            if found.name != device_name(volume_name):
                raise TapError(
                    f"the mapped device of volume {volume_name} is called {found.name}",
                    hint=f"dmsetup rename {found.name} {device_name(volume_name)}",
                )
            log = _checked_log(found, dm.table(found.name), logs, source)
            if found.loaded:
                dm.clear(found.name)
            for path in log_paths(directory):
                if path.name > log.name:  # of a rotation that was cut off: no write has ever gone to it
                    path.unlink()
            return cls(found, log, source, log_bytes=log_bytes)

    # --- what is asked of it

    @property
    def discards(self) -> bool:
        """Whether the primary takes discards; where it doesn't, they are logged though the primary keeps its bytes."""
        return int((self._source_sysfs / "discard_max_bytes").read_text()) > 0

    @property
    def sector_bytes(self) -> int:
        """Size of the primary's logical blocks, in which the log is written too."""
        return int((self._source_sysfs / "logical_block_size").read_text())

    def log_paths(self) -> list[Path]:
        """Return the files of all logs, in ascending order."""
        return log_paths(self.log.parent.parent)

    def status(self) -> TapStatus:
        """Ask the kernel."""
        match = self._logging()
        found = self._dm.find(name=self._name)
        if match is None or found is None:
            raise TapError(f"{self.node} is no {_TARGET} device any more", hint=f"dmsetup table {self._name} says what")
        with self._lock:
            ours = int(self._fd >= 0)
        return TapStatus(
            entries=int(match[1]),
            next_sector=int(match[2]) + 1,
            end_sector=self.log.stat().st_size // SECTOR,
            disabled=match[3] is not None,
            open_count=found.open_count - ours,
        )

    def has_stopped_logging(self) -> bool:
        """Say whether the log has lost something. Not so where the device was removed by force: then it has its end."""
        match = self._logging()
        return match is not None and match[3] is not None

    def _logging(self) -> re.Match[str] | None:
        """Return what the kernel says of logging, None if the device has another table."""
        lines = self._dm.status(self._name)
        return _STATUS.fullmatch(lines[0].text) if len(lines) == 1 and lines[0].kind == _TARGET else None

    def has_written(self) -> bool:
        """Say whether anything was written or discarded since the last call; also on the first one."""
        fields = (self._sysfs / "stat").read_text().split()
        written = int(fields[_SECTORS_WRITTEN]) + int(fields[_SECTORS_DISCARDED])
        before, self._written = self._written, written
        return written != before

    # --- what it does

    def fsync(self) -> None:
        """Have all that is written to the device until now done on the primary, and in the log; TapError on failure.

        Only for reading is it opened, since udev looks into a device whenever a writer closes it.
        """
        with self._lock:
            if self._fd < 0:
                self._fd = self._opened()
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise TapError(f"{self.node} can't be flushed: {error.strerror}", hint="see dmesg") from error

    def _opened(self) -> int:
        try:
            return os.open(self.node, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TapError(f"can't open {self.node}: {error.strerror}") from error

    def mark(self, text: str) -> None:
        """Put a mark into the log: one word of MARK_BYTES_MAX printable ASCII characters at most, without backslashes.

        It says nothing about writes that were not flushed, and is taken without an error by a log that is disabled.
        """
        assert _MARK.fullmatch(text), text
        self._dm.message(self._name, f"mark {text}")

    def rotate(self, first: Lsn) -> Path:
        """Have writes go to a fresh log, which begins at LSN *first*, and return its file.

        The primary's writes are held up for as long as those under way take, and until all that is to be logged is in
        the old log: what was never flushed is put before that, not behind it, when the old table goes. A file system on
        it isn't frozen. TapError if that takes too long; then all is as before.
        """
        assert first >= first_of(self.log) + self.log.stat().st_size // SECTOR, (first, self.log)
        path = _make_log(self.log.parent, first, self.log_bytes)
        try:
            with loopdev.attach(path) as loop:
                (line,) = self._dm.table(self._name)
                primary, _ = line.text.split()
                self._dm.load(self._name, [line._replace(text=f"{primary} {spelled(loop.number)}")])
                try:
                    self._dm.suspend(self._name, lockfs=False)
                    self._drain(f"dmafs:next-{first}")
                except BaseException:
                    self._dm.clear(self._name)
                    self._dm.resume(self._name)
                    raise
                self._dm.resume(self._name)
        except BaseException:
            path.unlink()
            raise
        self.log = path
        return path

    def _drain(self, text: str) -> None:
        """Wait until all that was to be logged is in the log; nothing more comes. Nothing to do if it is disabled.

        A mark is put behind it, and is the last entry once it is there.
        """
        if self.status().disabled:
            return
        self.mark(text)
        expected = encode_mark(text)[: HEADER_BYTES + len(text)]
        deadline = time.monotonic() + DRAIN_S
        with self.log.open("rb", buffering=0) as file:
            while True:
                status = self.status()
                if (
                    status.disabled
                    or os.pread(file.fileno(), len(expected), status.next_sector * SECTOR - self.sector_bytes)
                    == expected
                ):
                    return
                if time.monotonic() > deadline:
                    raise TapError(f"the log of {self.node} isn't written in time", hint="it is tried again")
                time.sleep(DRAIN_S / 100)

    def detach(self) -> None:
        """Take the device away, after which its log is closed; TapBusyError if somebody else has it open.

        In that case it goes on as before. Afterwards only ``close`` may be called.
        """
        with contextlib.suppress(TapError):  # somebody is writing: then the device stays anyway
            self.fsync()
            self._drain("dmafs:detach")
        self._let_go()
        self._dm.remove(self._name)
        self.close()

    def close(self) -> None:
        """Let go of the device, which stays."""
        self._let_go()
        self._dm.close()

    def _let_go(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


# --- names


def device_name(volume_name: str) -> str:
    """Return the name of a volume's mapped device."""
    return f"dmafs-{volume_name}"


def _device_uuid(volume_uuid: UUID) -> str:
    return f"DMAFS-{volume_uuid}"


def log_paths(directory: Path) -> list[Path]:
    """Return the files of all logs of the volume in *directory*, in ascending order."""
    return sorted(path for path in (directory / LOG_DIRECTORY).glob("*.log") if LOG_NAME.fullmatch(path.name))


def first_of(log: Path) -> Lsn:
    """Return the LSN at which a log begins, which is its name."""
    return Lsn(int(log.stem))


# --- logs


def _make_log(directory: Path, first: Lsn, size: int) -> Path:
    """Make a sparse file for a log. One of that name that nobody has ever written to is replaced."""
    assert 0 <= first < _LSN_END, first
    assert size >= HEAD_BYTES, size
    assert size % HEAD_BYTES == 0, size
    path = directory / f"{first:020d}.log"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if path.stat(follow_symlinks=False).st_blocks == 0:
                path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except FileExistsError as error:
        raise ExistsError(f"log {path} is there already", hint="it belongs to an earlier time; remove it") from error
    except OSError as error:
        raise StoreError(f"can't make log {path}: {error.strerror}") from error
    return path


def punch(path: Path, size: int) -> None:
    """Free the space of the first *size* bytes of a log, down to HEAD_BYTES, but for the first of these."""
    stop = min(size, path.stat().st_size) // HEAD_BYTES * HEAD_BYTES
    if stop <= HEAD_BYTES:
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _libc.fallocate(fd, _PUNCH_KEEP_SIZE, ctypes.c_longlong(HEAD_BYTES), ctypes.c_longlong(stop - HEAD_BYTES)):
            number = ctypes.get_errno()
            raise StoreError(
                f"can't free the space of log {path}: {os.strerror(number)}",
                hint="the store's file system has to know holes, as ext4, XFS and Btrfs do",
            )
    finally:
        os.close(fd)


# --- devices


def _line(sectors: int, primary: int, log: int) -> Target:
    return Target(0, sectors, _TARGET, f"{spelled(primary)} {spelled(log)}")


def _folder(number: int) -> Path:
    return Path(f"/sys/dev/block/{spelled(number)}")


def _queue_folder(number: int) -> Path:
    """Return the folder of a device's limits; a partition has those of its disk."""
    folder = _folder(number).resolve()
    return folder / "queue" if (folder / "queue").is_dir() else folder.parent / "queue"


def _checked_source(source: Path) -> tuple[int, int]:
    """Return the source's device number and its size in sectors."""
    try:
        info = source.stat()
    except OSError as error:
        raise SourceError(f"source {source}: {error.strerror}") from error
    if not stat.S_ISBLK(info.st_mode):
        raise SourceError(
            f"source {source} is no block device", hint="the dm tap needs one; losetup makes one of a file"
        )
    folder = _folder(info.st_rdev)
    try:
        sectors, read_only = int((folder / "size").read_text()), (folder / "ro").read_text() != "0\n"
        holders = sorted(entry.name for entry in (folder / "holders").iterdir())
    except OSError as error:
        raise SourceError(f"source {source} can't be looked into: {error.strerror}", hint="/sys is needed") from error
    if not sectors or read_only:
        raise SourceError(f"source {source} is {'read-only' if sectors else 'empty'}")
    if holders:
        # Device-mapper lets two of its devices share one below, but the other's writes would not be captured.
        raise SourceBusyError(
            f"source {source} is part of {', '.join(holders)}", hint="protect that device, or remove it"
        )
    return info.st_rdev, sectors


def _check_free(dm: DeviceMapper, name: str, uuid: str) -> None:
    for found in (dm.find(name=name), dm.find(uuid=uuid)):
        if found is not None:
            whose = "of this volume" if found.uuid == uuid else "not of this volume"
            raise ExistsError(
                f"there is a mapped device {found.name} already, {whose}: uuid {found.uuid or 'none'}",
                hint=f"detach it, or give one of the volumes another name; dmsetup info {found.name} says more",
            )


def _checked_log(found: Mapped, table: Sequence[Target], logs: Path, source: Path) -> Path:
    """Return the log that a device's table names; TapError if the table isn't one of this volume."""
    hint = f"dmsetup table {found.name} says what it is; if it isn't used: dmsetup remove {found.name}"
    numbers = _numbers(table)
    if numbers is None:
        raise TapError(f"{found.node} is no {_TARGET} device", hint=hint)
    try:
        info = source.stat()
    except OSError as error:
        raise SourceError(f"source {source}: {error.strerror}") from error
    if not stat.S_ISBLK(info.st_mode) or info.st_rdev != numbers[0]:
        raise TapError(f"{found.node} is over device {spelled(numbers[0])}, not the source {source}", hint=hint)
    log = _log_of(table, logs)
    if log is None:
        backing = loopdev.backing(numbers[1])
        where = backing.path if backing else f"device {spelled(numbers[1])}"
        raise TapError(f"the log of {found.node} is {where}, which isn't in {logs}", hint=hint)
    return log


def _numbers(table: Sequence[Target]) -> tuple[int, int] | None:
    """Return the device numbers of primary and log; None if the table is another one."""
    if len(table) != 1 or table[0].kind != _TARGET:
        return None
    numbers = [number for word in table[0].text.split() if (number := numbered(word)) is not None]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None  # noqa: PLR2004 - these two


def _log_of(table: Sequence[Target], logs: Path) -> Path | None:
    """Return the file in *logs* that is behind the log device of a table, if there is one."""
    numbers = _numbers(table)
    backing = loopdev.backing(numbers[1]) if numbers else None
    ours = (path for path in logs.glob("*.log") if LOG_NAME.fullmatch(path.name))
    return next((path for path in ours if backing and backing.is_file(path)), None)
