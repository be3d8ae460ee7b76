"""The storage interface: every byte the core reads or writes passes through here.

``Storage`` is a directory tree of a volume, named by relative paths; ``File`` is one open file or block device. The
real ones below are thin: one method, one system call, repeated until all bytes are done. A simulated disk can stand in
for them, which is why nothing else in the core touches the operating system.

Rules:

1. Reads and writes are positional and complete: all bytes or an exception. Reading past the end of a file is an error
   (``CorruptionError``), since the core never asks for what it hasn't written.
2. Nothing is durable before ``datasync`` of the file and, for a new, renamed or removed name, ``sync_directory``.
3. Files are created with mode 0600, directories with 0700. Symbolic links are not followed.
4. No method keeps a buffer it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

from dmafs.core.mapping import mapped
from dmafs.errors import (
    CorruptionError,
    NoStoreError,
    SourceBusyError,
    SourceError,
    StoreBusyError,
    StoreError,
)
from dmafs.units import SECTOR

Buffer = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024  # limits.h; writev refuses more
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_BLKGETSIZE64: Final = 0x80081272
_BLKSSZGET: Final = 0x1268
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_ZEROS: Final = bytes(1 << 20)
_NO_NOWAIT: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class File(Protocol):
    """One open file or block device; offsets and lengths in bytes."""

    name: str

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill *buffer* from *offset*; CorruptionError when the file ends before."""

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill *buffer* from the page cache; BlockingIOError when that would have to wait for the disk."""

    def map(self) -> memoryview:
        """Return all of a file that isn't written any more, read-only; it stays when the file is closed or unlinked.

        OSError where that can't be done.
        """

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all *buffers* one after the other from *offset* on."""

    def uncache(self, offset: int, length: int) -> None:
        """Have a range, as far as it is durable, come from the disk when it is read next."""

    def prefetch(self, offset: int, length: int) -> None:
        """Have the system begin to read a range, without waiting for it; nothing is said of errors."""

    def size(self) -> int:
        """Return the size in bytes."""

    def allocated(self) -> int:
        """Return how many bytes the file occupies."""

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges within ``[start, stop)`` that are not holes, ascending, widened to whole sectors."""

    def truncate(self, size: int) -> None:
        """Set the size; new bytes are a hole."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, freeing its space where that is possible."""

    def datasync(self) -> None:
        """Make all completed writes durable."""

    def close(self) -> None:
        """Close; a second call does nothing."""


class Storage(Protocol):
    """A directory tree, named by relative paths with ``/``."""

    def path(self, name: str) -> str:
        """Return what messages call a file or directory."""

    def create(self, name: str) -> File:
        """Create a file that isn't there yet and open it for reading and writing."""

    def open(self, name: str) -> File:
        """Open an existing file for reading and writing; FileNotFoundError if it isn't there."""

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small file's content; CorruptionError if it is longer than *limit* bytes."""

    def names(self, directory: str) -> list[str]:
        """Return the names in a directory, sorted."""

    def exists(self, name: str) -> bool:
        """Say whether a file or directory of that name is there."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; FileNotFoundError if it isn't there."""

    def make_directory(self, name: str) -> None:
        """Make a directory."""

    def rename(self, old: str, new: str) -> None:
        """Rename a file, replacing *new*, or a directory."""

    def unlink(self, name: str) -> None:
        """Remove a file."""

    def remove_directory(self, name: str) -> None:
        """Remove an empty directory."""

    def sync_directory(self, name: str) -> None:
        """Make names created, renamed and removed in a directory durable."""

    def free_bytes(self) -> int:
        """Return the space left for this user."""

    def free_share(self) -> float:
        """Return the part of the file system's space that is left for this user, from 0 to 1."""


_libc = ctypes.CDLL(None, use_errno=True)


class RealFile:
    """A file descriptor. Thread-safe, since it has no position of its own."""

    def __init__(self, fd: int, name: str) -> None:
        """Take ownership of *fd*."""
        self._fd = fd
        self.name = name
        self._nowait = True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``."""
        view = memoryview(buffer)
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise StoreError(
                    f"{self.name} can't be read at byte {offset}: {(error.strerror or '').lower()}",
                    hint="look at the disk it is on",
                ) from error
            if count == 0:
                raise CorruptionError(
                    f"file {self.name} ends at byte {offset}, {len(view)} bytes before the expected end",
                    hint="the file was truncated from outside; restore it, or drop the history that needs it",
                )
            view, offset = view[count:], offset + count

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``. Where the filesystem doesn't know RWF_NOWAIT (tmpfs, old kernels) a plain read."""
        if self._nowait:
            try:
                if os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer):
                    return
            except OSError as error:
                if error.errno not in _NO_NOWAIT:
                    raise
                self._nowait = False
            else:
                raise BlockingIOError
        self.read_into(buffer, offset)

    def map(self) -> memoryview:
        """See ``File``: maps it."""
        return mapped(self._fd, self.size(), self.name)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """See ``File``."""
        count = self._write_some(buffers, offset)
        if len(buffers) == 1 and count == len(buffers[0]):  # most often
            return
        rest = list(buffers)
        while rest:
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = memoryview(rest[0])[count:]
            if rest:
                count = self._write_some(rest, offset)

    def _write_some(self, buffers: Sequence[Buffer], offset: int) -> int:
        try:
            return os.pwritev(self._fd, buffers if len(buffers) <= _IOV_MAX else buffers[:_IOV_MAX], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def uncache(self, offset: int, length: int) -> None:
        """See ``File``."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def prefetch(self, offset: int, length: int) -> None:
        """See ``File``."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def size(self) -> int:
        """See ``File``."""
        info = os.fstat(self._fd)
        if stat.S_ISBLK(info.st_mode):
            answer = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
            return int.from_bytes(answer, "little")
        return info.st_size

    def allocated(self) -> int:
        """See ``File``."""
        info = os.fstat(self._fd)
        return self.size() if stat.S_ISBLK(info.st_mode) else info.st_blocks * 512

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """See ``File``. A block device is all data."""
        if stat.S_ISBLK(os.fstat(self._fd).st_mode):
            yield start, stop
            return
        while start < stop:
            try:
                begin = os.lseek(self._fd, start, os.SEEK_DATA)
                end = os.lseek(self._fd, begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                raise
            begin, start = max(begin // SECTOR * SECTOR, start), min(-(-end // SECTOR) * SECTOR, stop)
            if begin < stop:
                yield begin, start

    def has_hole(self, start: int, stop: int) -> bool:
        """Say whether something in a range was never written, as far as the filesystem can tell."""
        return os.lseek(self._fd, start, os.SEEK_HOLE) < stop

    def truncate(self, size: int) -> None:
        """See ``File``."""
        os.ftruncate(self._fd, size)

    def zero(self, offset: int, length: int) -> None:
        """See ``File``. Writes zeros where holes can't be punched."""
        if length and _libc.fallocate(
            self._fd,
            _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
            ctypes.c_longlong(offset),
            ctypes.c_longlong(length),
        ):
            number = ctypes.get_errno()
            if number != errno.EOPNOTSUPP:
                raise OSError(number, os.strerror(number), self.name)
            for begin in range(offset, offset + length, len(_ZEROS)):
                self.write([memoryview(_ZEROS)[: offset + length - begin]], begin)

    def datasync(self) -> None:
        """See ``File``."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def close(self) -> None:
        """See ``File``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RealStorage:
    """A directory of the operating system's."""

    def __init__(self, root: Path) -> None:
        """Work below *root*, which exists."""
        self._root = root

    def path(self, name: str) -> str:
        """See ``Storage``."""
        return str(self._root / name)

    def _open(self, name: str, flags: int) -> RealFile:
        path = self.path(name)
        return RealFile(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600), path)

    def create(self, name: str) -> RealFile:
        """See ``Storage``."""
        return self._open(name, os.O_CREAT | os.O_EXCL)

    def open(self, name: str) -> RealFile:
        """See ``Storage``."""
        return self._open(name, 0)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """See ``Storage``."""
        with os.fdopen(os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise CorruptionError(f"file {self._root / name} is longer than {limit} bytes", hint="it isn't ours")
        return content

    def names(self, directory: str) -> list[str]:
        """See ``Storage``."""
        return sorted(entry.name for entry in (self._root / directory).iterdir())

    def exists(self, name: str) -> bool:
        """See ``Storage``."""
        return os.path.lexists(self._root / name)

    def size(self, name: str) -> int:
        """See ``Storage``."""
        return (self._root / name).stat(follow_symlinks=False).st_size

    def make_directory(self, name: str) -> None:
        """See ``Storage``."""
        (self._root / name).mkdir(mode=0o700)

    def rename(self, old: str, new: str) -> None:
        """See ``Storage``."""
        (self._root / old).rename(self._root / new)

    def unlink(self, name: str) -> None:
        """See ``Storage``."""
        (self._root / name).unlink()

    def remove_directory(self, name: str) -> None:
        """See ``Storage``."""
        (self._root / name).rmdir()

    def sync_directory(self, name: str) -> None:
        """See ``Storage``."""
        fd = os.open(self._root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        """See ``Storage``."""
        info = os.statvfs(self._root)
        return info.f_bavail * info.f_frsize

    def free_share(self) -> float:
        """See ``Storage``."""
        info = os.statvfs(self._root)
        return info.f_bavail / info.f_blocks if info.f_blocks else 1.0


class DirectFile(RealFile):
    """A block device that is read past the page cache: what a mapped device over it has written isn't in there."""

    def __init__(self, fd: int, name: str) -> None:
        """Take ownership of *fd*, opened with O_DIRECT."""
        super().__init__(fd, name)
        self.grain = int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), "little")
        """Bytes of a logical block."""

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``. Reads whole logical blocks into aligned memory."""
        view = memoryview(buffer)
        begin = offset // self.grain * self.grain
        end = -(-(offset + len(view)) // self.grain) * self.grain
        aligned = memoryview(mmap.mmap(-1, max(end - begin, 1)))  # it goes with its last view
        super().read_into(aligned[: end - begin], begin)
        view[:] = aligned[offset - begin : offset - begin + len(view)]

    def read_into_nowait(self, _buffer: bytearray | memoryview, _offset: int) -> None:
        """See ``File``: it always has to wait."""
        raise BlockingIOError


def open_source(path: Path, *, writable: bool) -> RealFile:
    """Open a primary: a block device or a regular file.

    When *writable* a device is opened exclusively, so that nobody can mount it, and a file is locked.

    Raises SourceError when it is neither, missing or not accessible, SourceBusyError when somebody else has it.
    """
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISBLK(kind) or stat.S_ISREG(kind)):
            raise SourceError(
                f"source {path} is neither a block device nor a regular file", hint="give a disk or a disk image"
            )
        exclusive = os.O_EXCL if writable and stat.S_ISBLK(kind) else 0
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | exclusive
        fd = os.open(path, flags)
        if writable and not exclusive:
            _lock_source(fd, path)
        return RealFile(fd, str(path))
    except OSError as error:
        message = f"source {path} can't be opened: {os.strerror(error.errno or 0).lower()}"
        if error.errno == errno.EBUSY:
            raise SourceBusyError(message, hint="unmount it: it is to be used through the tap only") from error
        raise SourceError(message, hint="check the path and the permissions") from error


def boot_id() -> UUID:
    """Return what tells this run of the kernel from others."""
    return UUID(_BOOT_ID.read_text().strip())


def open_log(path: Path) -> RealFile:
    """Open a log in the store for reading."""
    try:
        return RealFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), str(path))
    except OSError as error:
        raise StoreError(
            f"log {path} can't be opened: {(error.strerror or '').lower()}", hint="look at the store's disk"
        ) from error


def open_direct(path: Path) -> DirectFile:
    """Open a block device for reading past the page cache, also while it is mapped or mounted."""
    try:
        if not stat.S_ISBLK(path.stat().st_mode):
            raise SourceError(f"source {path} is no block device", hint="make one with losetup, or use another tap")
        return DirectFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), str(path))
    except OSError as error:
        raise SourceError(
            f"source {path} can't be opened: {os.strerror(error.errno or 0).lower()}",
            hint="check the path and the permissions",
        ) from error


def _lock_source(fd: int, path: Path) -> None:
    """Lock a regular file as long as it is open; it is closed on an error."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise SourceBusyError(
            f"source {path} is in use by another daemon or volume", hint="let one volume of one store have it"
        ) from error
    except OSError:
        os.close(fd)
        raise


def lock_directory(path: Path) -> int:
    """Lock a store for this process and return the descriptor that holds the lock; closing it unlocks.

    Raises StoreBusyError when another process has it, NoStoreError when the directory isn't there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NoStoreError(
            f"store {path} can't be opened: {os.strerror(error.errno or 0).lower()}",
            hint="make one with: dmafs create STORE --source PATH",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreBusyError(
            f"store {path} is in use by another process",
            hint=f"a daemon serves it, which dmafs status {path} tells of, or a command is just working on it",
        ) from error
    return fd


def close_all(files: Iterable[File]) -> None:
    """Close several files."""
    for file in files:
        file.close()
