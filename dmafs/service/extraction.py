"""Copying an image, or a range of one, out of a store: to a file with holes, onto a block device, or anywhere.

With a daemon the image is read through the tree, where the kernel reads ahead, or through the control socket if this
process can't reach the tree; without one from the store itself. Either way it is held from the first byte to the last,
so all of it is of one moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.store import is_inside, is_same_file
from dmafs.errors import ControlError, CorruptionError, DmafsError, ExistsError, InputError, PlacementError
from dmafs.service.mounting import tree_of
from dmafs.service.session import Session, Show

CHUNK: Final = 4 << 20
"""What is read at once."""
BLOCK: Final = 4096
"""Zeros become holes in blocks of this size: that of a page, and of most file systems."""
_TRIES: Final = 5
_ZEROS: Final = bytes(CHUNK)


@dataclass(frozen=True)
class Range:
    """A range of one volume at one moment, in bytes; *at* is the moment's canonical name."""

    volume: str
    at: str
    time: str
    offset: int
    length: int


def range_at(asked: Session, volume: str | None, at: str, offset: int, length: int | None) -> Range:
    """Return the range of a volume (None: of the only one) at a time; *length* None goes to its end."""
    if volume is None:
        volume = only_volume(asked)
    report = asked.moment(at, volume)
    [found] = report["volumes"]
    assert "problem" not in found  # asked for one volume, that is an error
    size = found["size_bytes"]
    length = size - offset if length is None else length
    if not 0 <= offset <= offset + length <= size:
        raise InputError(
            f"range {offset}+{length} is not within the {size} bytes of volume {volume}",
            hint="offset and length are bytes",
        )
    return Range(volume, report["at"], found["time"], offset, length)


def only_volume(asked: Session) -> str:
    """Return the name of the store's only volume; InputError if it has several."""
    names = [report["name"] for report in asked.status()["volumes"]]
    if len(names) != 1:
        raise InputError(f"the store has volumes {', '.join(names)}", hint="say which one: VOLUME@TIME")
    name: str = names[0]
    return name


@contextlib.contextmanager
def opened(asked: Session, store: Path, look_up: Callable[[], Range]) -> Iterator[tuple[Range, Iterator[bytes]]]:
    """Yield what is looked up, and its bytes in parts, all of its moment."""
    tree = tree_of(store)
    if tree is None:
        wanted = look_up()
        yield wanted, asked.read(wanted.volume, at=wanted.at, offset=wanted.offset, length=wanted.length)
        return
    wanted, path, fd = open_in(tree, look_up)
    try:
        os.posix_fadvise(fd, wanted.offset, wanted.length, os.POSIX_FADV_SEQUENTIAL)
        yield wanted, _parts(fd, path, wanted)
    finally:
        close(fd)


def open_in(tree: Path, look_up: Callable[[], Range]) -> tuple[Range, Path, int]:
    """Open an image in the tree. A sync may coarsen its moment away right after its look-up: then look again."""
    for left in reversed(range(_TRIES)):
        wanted = look_up()
        path = tree / "at" / wanted.at / f"{wanted.volume}.img"
        try:
            return wanted, path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENOENT or not left:
                raise _unreadable(path, error) from error
    raise AssertionError(tree)


def _parts(fd: int, path: Path, wanted: Range) -> Iterator[bytes]:
    done = 0
    while done < wanted.length:
        try:
            part = os.pread(fd, min(CHUNK, wanted.length - done), wanted.offset + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not part:
            raise CorruptionError(f"{path} ends at {wanted.offset + done}", hint="look at the daemon's log")
        yield part
        done += len(part)


def close(fd: int) -> None:
    """Close a descriptor of the tree. It is closed also if the daemon is gone, which would be an error."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _unreadable(path: Path, error: OSError) -> DmafsError:
    if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
        return ControlError(f"the daemon is gone while {path} is read", hint="start it, then try again")
    return CorruptionError(
        f"{path} can't be read: {(error.strerror or '').lower()}",
        hint="the daemon's log says why; dmafs scrub STORE lists all that is damaged",
    )


# -- targets ---------------------------------------------------------------------------------------------------------


def check_target(path: Path, length: int, sources: list[Path], store: Path, *, force: bool) -> None:
    """Refuse a place that can't or mustn't be written, before anything is read."""
    try:
        info = path.stat()
        is_source = any(is_same_file(path, source) for source in sources)
    except FileNotFoundError:
        info, is_source = None, False
    except OSError as error:
        raise _unwritable(path, error) from error
    if is_source:
        raise PlacementError(f"{path} is a source of this store", hint="write to it through its tap, to be captured")
    if is_inside(path, store):
        raise PlacementError(f"{path} is inside the store {store}", hint="give a place outside of it")
    if info and stat.S_ISREG(info.st_mode) and not force:
        raise _there(path)
    if info and not stat.S_ISREG(info.st_mode):
        _check_device(path, info, length, force=force)


def _check_device(path: Path, info: os.stat_result, length: int, *, force: bool) -> None:
    if not stat.S_ISBLK(info.st_mode):
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "neither a file nor a block device"
        raise InputError(f"{path} is {kind}", hint="give a file, a block device, or - for standard output")
    try:
        with contextlib.closing(_opened(path, os.O_RDONLY)) as device:
            size = device.size()
    except OSError as error:
        raise _unwritable(path, error) from error
    if size < length:
        raise InputError(f"device {path} has {size} bytes, less than {length}", hint="give a larger one")
    if not force:
        raise ExistsError(f"{path} is a block device", hint="--force overwrites what is on it")


def to_file(path: Path, wanted: Range, parts: Iterator[bytes], show: Show, *, force: bool) -> int:
    """Write a file of mode 0600 with holes in place of zeros, whole or not at all; return the bytes of data in it.

    Until it is complete and durable it has another name, in the same directory.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with contextlib.closing(_opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)) as file:
            file.truncate(wanted.length)
            data = _write_sparse(file, parts, wanted.length, show)
            file.datasync()
        if path.exists() and not force:
            raise _there(path)  # it came meanwhile
        temporary.replace(path)
        RealStorage(path.parent).sync_directory(".")
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return data


def to_device(path: Path, wanted: Range, parts: Iterator[bytes], show: Show) -> int:
    """Write onto a block device that nobody else has, zeros too; return how much that was."""
    done = 0
    try:
        with contextlib.closing(_opened(path, os.O_WRONLY | os.O_EXCL)) as file:
            for part in parts:
                file.write([part], done)
                done += len(part)
                show(done, wanted.length)
            file.datasync()
    except OSError as error:
        raise _unwritable(path, error) from error
    return done


def _opened(path: Path, flags: int) -> RealFile:
    return RealFile(os.open(path, flags | os.O_CLOEXEC, 0o600), str(path))


def _write_sparse(file: RealFile, parts: Iterator[bytes], length: int, show: Show) -> int:
    """Write what isn't zero into a file of zeros; return how much that was."""
    done = data = 0
    for part in parts:
        if part != _ZEROS[: len(part)]:
            for begin, end in _runs(part):
                file.write([memoryview(part)[begin:end]], done + begin)
                data += end - begin
        done += len(part)
        show(done, length)
    return data


def _runs(part: bytes) -> list[tuple[int, int]]:
    """Return the runs of blocks that aren't all zeros."""
    whole = len(part) // BLOCK
    blocks = np.frombuffer(part, np.uint64, whole * BLOCK // 8).reshape(whole, BLOCK // 8).any(axis=1)
    tail = any(part[whole * BLOCK :])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], blocks, [tail], [False]])))
    return [(int(begin) * BLOCK, min(int(end) * BLOCK, len(part))) for begin, end in edges.reshape(-1, 2)]


def _there(path: Path) -> ExistsError:
    return ExistsError(f"file {path} is there already", hint="--force replaces it")


def _unwritable(path: Path, error: OSError) -> DmafsError:
    hints = {errno.ENOSPC: "make space there, or give another place", errno.EBUSY: "is it mounted, or in use?"}
    return DmafsError(
        f"{path} can't be written: {(error.strerror or '').lower()}",
        hint=hints.get(error.errno or 0, "look at the path"),
    )
