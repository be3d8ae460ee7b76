"""Loop devices: a regular file as a block device (linux/loop.h, loop(4)).

Each one made here is buffered, so that what is written to it can be read through its file at once, and detaches itself
when its last user closes it (AUTOCLEAR). Until somebody else has it open, it needs the descriptor in ``Loop``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from dmafs.errors import TapError
from dmafs.units import SECTOR

_CONTROL: Final = Path("/dev/loop-control")
_GET_FREE: Final = 0x4C82
_CLEAR: Final = 0x4C01
_GET_STATUS: Final = 0x4C05
_CONFIGURE: Final = 0x4C0A  # Linux 5.8: everything in one step, so nobody sees a loop device without AUTOCLEAR
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
_CONFIG: Final = struct.Struct("<II5QIIII64s64s32s2Q64x")
_INFO: Final = struct.Struct("<5QIIII64s64s32s2Q")
assert (_CONFIG.size, _INFO.size) == (304, 232)
_TRIES: Final = 64  # each means that somebody else took the same free device


@dataclass(frozen=True)
class Backing:
    """The file behind a loop device."""

    path: str
    """Its name when it was attached, as the kernel knows it; ``(deleted)`` follows if it has none any more."""
    device: int
    inode: int

    def is_file(self, path: Path) -> bool:
        """Say whether that is what *path* names."""
        try:
            info = path.stat()
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == (self.device, self.inode)


class Loop:
    """A loop device that was just made, held open; a context manager."""

    def __init__(self, node: Path, fd: int) -> None:
        """Take over a descriptor."""
        self.node = node
        self.number = os.fstat(fd).st_rdev
        self._fd = fd

    def close(self) -> None:
        """Let go of the device, which detaches itself unless somebody else has it open."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(path: Path, *, writable: bool = True, offset: int = 0, limit: int = 0) -> Loop:
    """Make a loop device over the file *path*; TapError if that can't be.

    It shows *limit* bytes from *offset* on; *limit* 0 is no limit.
    """
    try:
        file = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise TapError(f"can't open {path} for a loop device: {error.strerror}") from error
    area, flags = (offset, limit), _AUTOCLEAR | (0 if writable else _READ_ONLY)
    try:
        control = _opened(_CONTROL)
        try:
            for _ in range(_TRIES):
                made = _try(control, file, path, area, flags)
                if made is not None:
                    _set_scheduler(made)
                    return made
        finally:
            os.close(control)
    finally:
        os.close(file)
    raise TapError(f"no free loop device for {path}: others took {_TRIES} of them first")


def _opened(node: Path) -> int:
    try:
        return os.open(node, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TapError(
            f"no loop devices: {node}: {error.strerror}",
            hint="as root: modprobe loop; a container needs the host's /dev",
        ) from error


def _try(control: int, file: int, path: Path, area: tuple[int, int], flags: int) -> Loop | None:
    """Take the free device that the kernel names; None if somebody else was faster."""
    try:
        node = Path(f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}")
    except OSError as error:
        raise TapError(f"no free loop device for {path}: {error.strerror}") from error
    fd = _opened(node)
    name = os.fsencode(path)[:63]
    config = _CONFIG.pack(file, SECTOR, 0, 0, 0, *area, 0, 0, 0, flags, name, b"", b"", 0, 0)
    try:
        fcntl.ioctl(fd, _CONFIGURE, config)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            return None
        raise TapError(
            f"can't make {node} over {path}: {error.strerror}", hint="Linux 5.8 or later is needed"
        ) from error
    return Loop(node, fd)


def _set_scheduler(made: Loop) -> None:
    """Have requests go straight to the file, where that can be said: there is no seek to save."""
    with contextlib.suppress(OSError):
        Path(f"/sys/block/{made.node.name}/queue/scheduler").write_text("none")


def backing(number: int) -> Backing | None:
    """Return the file behind the loop device of that number; None if it is no loop device, or has no file."""
    name = backing_path(number)
    try:
        info = _INFO.unpack(_ioctl(_sysfs(number), _GET_STATUS, bytes(_INFO.size)))
    except OSError:
        return None  # also when it is detached meanwhile
    return None if name is None else Backing(name, info[0], info[1])


def backing_path(number: int) -> str | None:
    """Return that file's path as the kernel tells it, without asking who serves the file: that may be a dead mount."""
    try:
        return os.fsdecode((_sysfs(number) / "loop" / "backing_file").read_bytes()).removesuffix("\n")
    except OSError:
        return None


def detach(number: int) -> None:
    """Detach a loop device, now or when its last user closes it; nothing happens if it is detached already."""
    try:
        _ioctl(_sysfs(number), _CLEAR, b"")
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            raise TapError(f"can't detach loop device {number:#x}: {error.strerror}") from error


def _sysfs(number: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def _ioctl(folder: Path, request: int, data: bytes) -> bytes:
    fd = os.open(f"/dev/{folder.resolve(strict=True).name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, request, data)
    finally:
        os.close(fd)
