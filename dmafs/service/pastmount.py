"""Mounting what is on an image of a moment, and taking that down again.

A file system that is at rest in its image is mounted from that, read-only. One whose journal wants a replay, or may
want one, is mounted from a clone of the moment, which the kernel can write to: so it shows what a restart of the
machine at that moment would have brought back.

No state is kept: what is mounted where, the loop device and its file are asked of the kernel. The loop device detaches
itself with its last user. The clones have names of their own; one that nobody has open is left of a plain ``umount`` or
of something cut off, and goes away with the next ``dmafs mount`` or ``dmafs umount``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmafs.core.mounts import Mount, mounts
from dmafs.errors import MountError
from dmafs.service.extraction import Range, close, open_in
from dmafs.service.holders import SHOWN_MAX, holders
from dmafs.service.mounting import FILESYSTEM_TYPE, tree_of
from dmafs.service.probing import Content, find, needs_recovery, run
from dmafs.service.report import Report
from dmafs.service.session import Session
from dmafs.taps import loopdev
from dmafs.units import parse_canonical

CLONE: Final = re.compile(r"mount-[0-9a-f]{12}")
"""The names of clones that are there for a mount."""
WAIT_S: Final = 10.0
"""How long a loop device and its file may take to be free once nothing uses them."""
_BUSY_S: Final = 2.0
_POLL_S: Final = 0.02
_TRIES: Final = 5
_WITHOUT_JOURNAL: Final = {"cramfs", "erofs", "exfat", "ext2", "iso9660", "ntfs", "squashfs", "udf", "vfat"}
_SEQ: Final = "user.dmafs.seq"


class _CoarsenedError(Exception):
    """A sync took the moment away before there was a clone of it."""


@dataclass(frozen=True)
class Request:
    """What is to be mounted where: *number* is a partition's, *options* are further ones for mount(8)."""

    look_up: Callable[[], Range]
    directory: Path
    number: int | None = None
    writable: bool = False
    options: str = ""


def mount_moment(asked: Session, tree: Path, request: Request) -> Report:
    """Mount what is on the image that a request looks up. On any error nothing is left.

    InputError and MountError say what can't be mounted, and why.
    """
    directory = request.directory
    if not directory.is_dir():
        raise MountError(f"{directory} is not a directory", hint=f"make it: mkdir {directory}")
    if directory.is_relative_to(tree):
        raise MountError(f"{directory} is in the tree {tree}", hint="give a directory outside of it")
    with _alone(tree):
        _clear_clones(tree)
        for _ in range(_TRIES):
            with contextlib.suppress(_CoarsenedError):
                return _mount_once(asked, tree, request)
    raise MountError("syncs coarsen the moment while it is being mounted", hint="take a snapshot of it, or try again")


def _mount_once(asked: Session, tree: Path, request: Request) -> Report:
    directory, writable = request.directory, request.writable
    wanted, _, fd = open_in(tree, request.look_up)
    with contextlib.ExitStack() as undo:
        undo.callback(close, fd)
        image = Path(f"/proc/{os.getpid()}/fd/{fd}")  # a sync may take its name away, but not the image
        content, found = find(image, wanted.length, request.number)
        name = None
        if writable or _wants_replay(image, content):
            name = f"mount-{secrets.token_hex(6)}"
            asked.create_clone(name, wanted.at)
            undo.callback(_drop, tree, name)
            image = tree / "clones" / name / f"{wanted.volume}.img"
            if os.getxattr(image, _SEQ) != os.getxattr(fd, _SEQ):
                raise _CoarsenedError
        chosen = _options(content, request.options, writable=writable, cloned=name is not None)
        area = {} if found is None else {"offset": content.offset, "limit": content.length}
        with loopdev.attach(image, writable=name is not None, **area) as loop:
            undo.callback(_take_down, loop.node, directory)
            _mount(content.type, chosen, loop.node, directory)
        undo.pop_all()
        close(fd)
    return {
        "volume": wanted.volume,
        "at": wanted.at,
        "time": wanted.time,
        "partition": found,
        "type": content.type,
        "options": chosen,
        "device": str(loop.node),
        "clone": name,
        "directory": str(directory),
    }


def _wants_replay(image: Path, content: Content) -> bool:
    """Say whether a file system has, or may have, a journal that isn't empty."""
    if content.type in {"ext3", "ext4"}:
        return needs_recovery(image, content.offset)
    return content.type not in _WITHOUT_JOURNAL


def _options(content: Content, further: str, *, writable: bool, cloned: bool) -> str:
    chosen = ["rw" if writable else "ro"]
    if content.type in {"ext3", "ext4"} and not cloned:
        chosen.append("noload")
    if content.type == "xfs":
        chosen.append("nouuid")  # the original is mounted, as a rule
    if content.type == "btrfs" and Path("/sys/fs/btrfs", content.uuid).exists():
        raise MountError(
            f"Btrfs {content.uuid} is mounted already, and the kernel would take the past one for the same",
            hint="unmount that first, or look at the image in a virtual machine",
        )
    return ",".join([*chosen, *([further] if further else [])])


def _mount(kind: str, options: str, node: Path, directory: Path) -> None:
    done = run("mount", "-t", kind, "-o", options, "--", str(node), str(directory))
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"mount ended with {done.returncode}"]
        raise MountError(
            f"{kind} can't be mounted at {directory} with options {options}: {said[0].strip()}",
            hint="the kernel's log says more: dmesg",
        )


def _take_down(node: Path, directory: Path) -> None:
    """Unmount what mount(8) has mounted just before somebody interrupted it."""
    if any((mount.source, mount.point) == (str(node), str(directory)) for mount in mounts()):
        run("umount", "--", str(directory))


def unmount(directory: Path) -> Report:
    """Unmount what ``mount_moment`` has mounted, wait for its loop device to be free, and drop its clone.

    Returns the clone, if there was one, and whether it is *left*: while the file system is mounted elsewhere too, or
    nobody serves the store. MountError if something else, or nothing, is mounted there, or if it is in use.
    """
    mount = next((mount for mount in reversed(mounts()) if mount.point == str(directory)), None)
    if mount is None:
        raise MountError(f"nothing is mounted at {directory}", hint="findmnt lists all mounts")
    number, file = _loop_of(mount)
    _unmount(directory)
    left = any(number in other.devices() for other in mounts())
    if not left:
        _wait(lambda: not _is_backing(number, file), f"loop device of {directory} is still in use")
    tree, name = _tree_of_file(file), file.parent.name if CLONE.fullmatch(file.parent.name) else None
    if tree is not None:
        with _alone(tree):
            if name is not None and not left:
                _drop(tree, name)
            _clear_clones(tree)
    return {"directory": str(directory), "clone": name, "left": bool(name) and (left or tree is None)}


def _loop_of(mount: Mount) -> tuple[int, Path]:
    """Return the number of the loop device that a mount of ours is of, and its file; MountError if it isn't ours."""
    for number in mount.devices():
        path = loopdev.backing_path(number)
        if path is None:
            continue
        file = Path(path.removesuffix(" (deleted)"))
        folder, name = (["", "", "", *file.parts])[-3:-1]
        if (folder == "clones" and CLONE.fullmatch(name)) or (folder == "at" and parse_canonical(name) is not None):
            return number, file
    raise MountError(
        f"{mount.kind} from {mount.source} at {mount.point} wasn't mounted by dmafs mount", hint="use umount(8)"
    )


def _is_backing(number: int, file: Path) -> bool:
    path = loopdev.backing_path(number)
    return path is not None and Path(path.removesuffix(" (deleted)")) == file


def _tree_of_file(file: Path) -> Path | None:
    """Return the tree that a loop device's file is in; None if it isn't mounted any more."""
    tree = file.parents[2]
    served = any(mount.point == str(tree) and mount.kind == FILESYSTEM_TYPE for mount in mounts())
    with contextlib.suppress(OSError):
        if served and (tree / "clones").is_dir():
            return tree
    return None


def _unmount(directory: Path) -> None:
    deadline = time.monotonic() + _BUSY_S
    while (done := run("umount", "--", str(directory))).returncode:
        if "busy" not in done.stderr:
            raise MountError(f"{directory} can't be unmounted: {done.stderr.strip()}", hint="look at dmesg")
        found = holders(directory)
        if found or time.monotonic() >= deadline:  # somebody may just have had a look
            more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
            who = ", ".join(found[:SHOWN_MAX]) or "nobody that can be seen from here"
            raise MountError(f"{directory} is busy: {who}{more}", hint="end that, then try again")
        time.sleep(_POLL_S)


def _clear_clones(tree: Path) -> None:
    """Drop the clones of mounts that nobody has open any more."""
    for folder in list((tree / "clones").iterdir()):
        if CLONE.fullmatch(folder.name):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _drop(tree: Path, name: str) -> None:
    """Drop a clone once the last user of its loop device is gone."""

    def dropped() -> bool:
        try:
            (tree / "clones" / name).rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise MountError(
                f"clone {name} can't be dropped: {(error.strerror or '').lower()}", hint="look at the daemon's log"
            ) from error
        return True

    _wait(dropped, f"clone {name} is still in use")


def _wait(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() >= deadline:
            raise MountError(f"{otherwise} after {WAIT_S:g} s", hint="losetup --list shows devices; then try again")
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _alone(tree: Path) -> Iterator[None]:
    """Keep others from clearing a clone that isn't open yet."""
    fd = os.open(tree / "clones", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        close(fd)


def require_tree(store: Path) -> Path:
    """Return the tree of a store; MountError if nobody serves it where this process can see it."""
    tree = tree_of(store)
    if tree is None:
        raise MountError(
            f"the tree of store {store} can't be reached from here", hint="serve it: dmafs serve STORE MOUNTPOINT"
        )
    return tree
