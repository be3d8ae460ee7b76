"""Device-mapper, by its ioctls on /dev/mapper/control (linux/dm-ioctl.h, version 4), without dmsetup's processes.

What is sent and what comes back is one buffer, little-endian here as everywhere that dmafs runs::

    offset  size  field
         0    12  version, 3 x u32: ours, and in answers the kernel's
        12     4  size of the buffer
        16     4  where the data begins, 312
        20     4  number of targets
        24     4  how often the device is open
        28     4  flags
        32     4  event number; in requests a udev cookie, of which we use none
        40     8  device number
        48   128  name, zero-terminated
       176   129  uuid, zero-terminated
       312        data: target specifications, a message, or what the kernel answers

What holds:

1. *No other thread waits.* A suspension waits for I/O, which this very process may have to do. ``fcntl.ioctl`` keeps
   the interpreter to itself while it runs with a buffer of more than 1024 bytes, so the C library's is called instead.
2. *An answer is complete.* One that didn't fit (the flag BUFFER_FULL) is asked for again with a larger buffer.
3. *A name is a file name.* Names and uuids are made of letters, digits and ``._-+:=@#``, so none needs the escapes that
   device-mapper's tools write and udev's rules have to undo.
4. *The node is there.* After ``create`` /dev/mapper/NAME leads to the device, made by udev or else by us; after
   ``remove`` it doesn't.

A device is created empty, gets a table by ``load``, and uses it from ``resume`` on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from dmafs.errors import ExistsError, TapBusyError, TapError

NODES: Final = Path("/dev/mapper")
_CONTROL: Final = NODES / "control"
_UDEV: Final = Path("/run/udev/control")

_libc: Final = ctypes.CDLL(None, use_errno=True)

_HEADER: Final = struct.Struct("<3I4I2I4xQ128s129s7x")
_TARGET: Final = struct.Struct("<QQiI16s")
_ENTRY: Final = struct.Struct("<QI")
assert (_HEADER.size, _TARGET.size) == (312, 40)

_VERSION: Final = (4, 41, 0)  # Linux 5.5, the first that can be asked for a target's version
_NAME: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+:=@#-]{1,127}")
_KIND: Final = re.compile(r"[a-z0-9-]{1,15}")
_BUFFER_BYTES: Final = 16 << 10
_BUFFER_BYTES_MAX: Final = 16 << 20
_DATA_LIMIT: Final = 1 << 20  # of a request

_LIST, _CREATE, _REMOVE = 2, 3, 4
_SUSPEND, _STATUS, _LOAD, _CLEAR = 6, 7, 9, 10
_TABLE_STATUS, _MESSAGE, _TARGET_VERSION = 12, 14, 17

_READ_ONLY, _SUSPENDED, _STATUS_TABLE, _ACTIVE, _INACTIVE = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 6
_BUFFER_FULL, _SKIP_LOCKFS, _NO_FLUSH, _QUERY_LOADED = 1 << 8, 1 << 10, 1 << 11, 1 << 12

_BUSY_S: Final = 2.0  # udev and blkid look into a device for a moment after each change
_NODE_S: Final = 5.0
_POLL_S: Final = 0.01


@dataclass(frozen=True)
class Mapped:
    """A mapped device as the kernel describes it."""

    name: str
    uuid: str
    number: int
    """Device number: the kernel encodes it as ``os.makedev`` does."""
    open_count: int
    suspended: bool
    active: bool
    """Whether it has a table."""
    loaded: bool
    """Whether another table waits for ``resume``."""

    @property
    def node(self) -> Path:
        """The device's file."""
        return NODES / self.name

    @property
    def sysfs(self) -> Path:
        """The device's folder in sysfs."""
        return Path(f"/sys/dev/block/{os.major(self.number)}:{os.minor(self.number)}")


class Target(NamedTuple):
    """A line of a table, or of the status: sectors [start, start + length) by a target of some kind."""

    start: int
    length: int
    kind: str
    text: str


class DeviceMapper:
    """Device-mapper's control device; a context manager. Every call may block, and is safe in any thread."""

    def __init__(self) -> None:
        """Open the control device; TapError if there is none, or an older one than we need."""
        try:
            self._fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TapError(
                f"no device-mapper: {_CONTROL}: {error.strerror}", hint="as root: modprobe dm-mod"
            ) from error
        try:
            self.version = _Answer(self._ask(0)).version
            if self.version[0] != _VERSION[0] or self.version < _VERSION:
                raise TapError(
                    f"device-mapper has version {_dotted(self.version)}", hint="Linux 5.5 or later is needed"
                )
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Close the control device."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what there is

    def target_version(self, kind: str) -> tuple[int, int, int] | None:
        """Return the version of a kind of target, whose module the kernel loads if it has it; None without it."""
        assert _KIND.fullmatch(kind), kind
        try:
            data = _Answer(self._ask(_TARGET_VERSION, kind)).data
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENXIO):
                return None
            raise _failed("ask for target", kind, error) from error
        _, major, minor, patch = struct.unpack_from("<4I", data)
        return major, minor, patch

    def devices(self) -> list[tuple[str, int]]:
        """Return names and device numbers of all mapped devices."""
        data = _Answer(self._ask(_LIST)).data
        found: list[tuple[str, int]] = []
        at = 0
        while len(data) >= at + _ENTRY.size:  # without any device there is no entry, or one without a number
            number, step = _ENTRY.unpack_from(data, at)
            if number:
                found.append((_text(data[at + _ENTRY.size :]), number))
            if not step:
                break
            at += step
        return found

    def find(self, *, name: str = "", uuid: str = "") -> Mapped | None:
        """Return the device of that name, or else of that uuid; None if there is none."""
        assert bool(name) != bool(uuid)
        _check(name or uuid)
        try:
            return _Answer(self._ask(_STATUS, name, uuid=uuid)).mapped()
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise _failed("look up", name or uuid, error) from error

    def table(self, name: str, *, loaded: bool = False) -> list[Target]:
        """Return the table in use, or the *loaded* one that waits; empty if there is none."""
        return self._targets(name, _STATUS_TABLE | (_QUERY_LOADED if loaded else 0))

    def status(self, name: str) -> list[Target]:
        """Return each target's status, without having anything written out for it."""
        return self._targets(name, _NO_FLUSH)

    def _targets(self, name: str, flags: int) -> list[Target]:
        answer = _Answer(self._call("ask for the table of", _TABLE_STATUS, name, flags=flags))
        found, at = [], 0
        for _ in range(answer.targets):
            start, length, _, after, kind = _TARGET.unpack_from(answer.data, at)
            found.append(Target(start, length, _text(kind), _text(answer.data[at + _TARGET.size : after])))
            at = after  # unlike a request's, counted from the data's beginning
        return found

    # --- changes

    def create(self, name: str, uuid: str) -> Mapped:
        """Create a device without a table, and its node; ExistsError if there is one of that name or uuid."""
        _check(name)
        _check(uuid)
        try:
            made = _Answer(self._ask(_CREATE, name, uuid=uuid)).mapped()
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ExistsError(
                    f"a mapped device {name}, or one with uuid {uuid}, is there already",
                    hint="see dmsetup info; if nothing uses it: dmsetup remove",
                ) from error
            raise _failed("create", name, error) from error
        try:
            _make_node(made)
        except BaseException:
            with contextlib.suppress(TapError):
                self.remove(name)
            raise
        return made

    def load(self, name: str, table: Sequence[Target], *, read_only: bool = False) -> None:
        """Load a table, which is used from the next ``resume`` on. TapBusyError if a device in it is held."""
        data = b"".join(_packed(target) for target in table)
        flags = _READ_ONLY if read_only else 0
        self._call("load a table into", _LOAD, name, flags=flags, targets=len(table), data=data)

    def clear(self, name: str) -> None:
        """Forget the table that was loaded and isn't in use yet."""
        self._call("clear the loaded table of", _CLEAR, name)

    def suspend(self, name: str, *, lockfs: bool = True, flush: bool = True) -> None:
        """Hold up I/O once what is under way is done. *lockfs*: freeze a file system on it before."""
        self._call("suspend", _SUSPEND, name, flags=_SUSPENDED | _suspension(lockfs=lockfs, flush=flush))

    def resume(self, name: str, *, lockfs: bool = True, flush: bool = True) -> None:
        """Go on, with the loaded table if there is one: then the device is suspended for it first, if it isn't yet."""
        self._call("resume", _SUSPEND, name, flags=_suspension(lockfs=lockfs, flush=flush))

    def message(self, name: str, text: str) -> None:
        """Send a message to the target of sector 0; its words are separated by blanks."""
        data = struct.pack("<Q", 0) + text.encode("ascii") + b"\0"
        self._call("send a message to", _MESSAGE, name, data=data)

    def remove(self, name: str, *, seconds: float = _BUSY_S) -> None:
        """Remove a device and its node; TapBusyError if it stays in use for so long."""
        found = self.find(name=name)
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._call("remove", _REMOVE, name)
                break
            except TapBusyError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_POLL_S)
        if found is not None:
            _take_node(found)

    # --- the ioctl

    def _call(
        self, what: str, command: int, name: str, *, flags: int = 0, targets: int = 0, data: bytes = b""
    ) -> bytearray:
        _check(name)
        try:
            return self._ask(command, name, flags=flags, targets=targets, data=data)
        except OSError as error:
            raise _failed(what, name, error) from error

    def _ask(
        self, command: int, name: str = "", *, uuid: str = "", flags: int = 0, targets: int = 0, data: bytes = b""
    ) -> bytearray:
        assert len(data) <= _DATA_LIMIT
        size = max(_BUFFER_BYTES, 2 * (_HEADER.size + len(data)))
        while True:
            head = _HEADER.pack(
                4, 0, 0, size, _HEADER.size, targets, 0, flags, 0, 0, name.encode("ascii"), uuid.encode("ascii")
            )
            buffer = bytearray(size)
            buffer[: _HEADER.size + len(data)] = head + data
            _ioctl(self._fd, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command, buffer)
            if not _Answer(buffer).full:
                return buffer
            size *= 4
            if size > _BUFFER_BYTES_MAX:
                raise TapError(f"device-mapper's answer for {name or 'all devices'} is over {_BUFFER_BYTES_MAX} bytes")


def _ioctl(fd: int, request: int, buffer: bytearray) -> None:
    content = bytes(buffer)
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    while _libc.ioctl(fd, ctypes.c_ulong(request), place):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
        ctypes.memmove(place, content, len(content))  # a signal to this thread ended a wait; nothing was done yet


class _Answer:
    """What the kernel has put into a buffer."""

    def __init__(self, buffer: bytearray) -> None:
        a, b, c, size, begin, self.targets, opened, self._flags, _, number, name, uuid = _HEADER.unpack_from(buffer)
        self.version = (a, b, c)
        self.data = bytes(memoryview(buffer)[begin:size])
        self.full = bool(self._flags & _BUFFER_FULL)
        self._opened, self._device, self._name, self._uuid = opened, number, name, uuid

    def mapped(self) -> Mapped:
        flags = self._flags
        return Mapped(
            name=_text(self._name),
            uuid=_text(self._uuid),
            number=self._device,
            open_count=self._opened,
            suspended=bool(flags & _SUSPENDED),
            active=bool(flags & _ACTIVE),
            loaded=bool(flags & _INACTIVE),
        )


def _packed(target: Target) -> bytes:
    assert _KIND.fullmatch(target.kind), target
    assert target.text.isascii(), target
    assert target.text.isprintable(), target
    text = target.text.encode("ascii") + b"\0"
    text += bytes(-len(text) % 8)
    return _TARGET.pack(target.start, target.length, 0, _TARGET.size + len(text), target.kind.encode("ascii")) + text


def _suspension(*, lockfs: bool, flush: bool) -> int:
    return (0 if lockfs else _SKIP_LOCKFS) | (0 if flush else _NO_FLUSH)


def _check(name: str) -> None:
    assert _NAME.fullmatch(name), name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(str(part) for part in version)


def _failed(what: str, name: str, error: OSError) -> TapError:
    message = f"can't {what} {name}: {error.strerror}"
    if error.errno == errno.EBUSY:
        return TapBusyError(message, hint=f"lsof {NODES / name}, fuser -vm {NODES / name} and lsblk say what uses it")
    if error.errno in {errno.EPERM, errno.EACCES}:
        return TapError(message, hint="device-mapper is for root")
    return TapError(message, hint="dmesg says why")


# --- nodes


def _udev_runs() -> bool:
    return _UDEV.exists() and not os.environ.get("DM_DISABLE_UDEV")


def _leads_to(node: Path, number: int) -> bool:
    try:
        info = node.stat()
    except OSError:
        return False
    return stat.S_ISBLK(info.st_mode) and info.st_rdev == number


def _wait(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _NODE_S
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _make_node(made: Mapped) -> None:
    """Have udev make the node, and make it if there is no udev, or none that does."""
    if _udev_runs() and _wait(lambda: _leads_to(made.node, made.number)):
        return
    new = made.node.with_name(f".{made.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        os.mknod(new, 0o600 | stat.S_IFBLK, made.number)
        new.rename(made.node)  # what is there of that name is of a device that is gone
    except OSError as error:
        raise TapError(f"can't make {made.node}: {error.strerror}", hint="/dev has to be writable") from error


def _take_node(gone: Mapped) -> None:
    if _udev_runs() and _wait(lambda: not os.path.lexists(gone.node)):
        return
    with contextlib.suppress(OSError):
        gone.node.unlink()


def numbered(text: str) -> int | None:
    """Return the device number that ``major:minor`` in a table names; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,7}):([0-9]{1,7})", text)
    return os.makedev(int(match[1]), int(match[2])) if match else None


def spelled(number: int) -> str:
    """Return a device number as tables have it."""
    return f"{os.major(number)}:{os.minor(number)}"
