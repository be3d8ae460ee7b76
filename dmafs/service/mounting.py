"""Mounting: checks of the mount point, clearing a mount of an earlier life, and the kernel's settings of a mount."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Final

from dmafs.core.mounts import Mount, mounts
from dmafs.core.store import is_inside
from dmafs.errors import MountError, PlacementError

FILESYSTEM_TYPE: Final = "fuse.dmafs"
READ_AHEAD_KB: Final = 1024
"""Measured before the project began: raising the default of 128 doubles sequential speed."""
MAX_BACKGROUND: Final = 64

_BDI: Final = Path("/sys/class/bdi")
_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")


def mount_source(store: Path) -> str:
    """Return what mountinfo shows as the source: the store, so that a mount tells whose it is."""
    return str(store).replace(",", "_")


def is_tree_of(mount: Mount, store: Path) -> bool:
    """Say whether a mount is the tree of a store, which the daemon may know by another path."""
    if mount.kind != FILESYSTEM_TYPE:
        return False
    with contextlib.suppress(OSError):
        if Path(mount.source).samefile(store):
            return True
    return mount.source in {mount_source(store.absolute()), mount_source(store.resolve())}


def tree_of(store: Path) -> Path | None:
    """Return where the tree of a store is mounted and can be reached by this process; None if it can't."""
    for mount in reversed(mounts()):
        if is_tree_of(mount, store):
            point = Path(mount.point)
            with contextlib.suppress(OSError):  # of an earlier daemon, another's without allow_other, or covered
                if point.stat().st_dev == mount.device and (point / "at").is_dir():
                    return point
    return None


def prepare_mount_point(store: Path, point: Path) -> None:
    """Check a mount point, its links resolved; clear a mount that an earlier daemon of this store left there.

    The caller has the store's lock, so no daemon is behind such a mount any more.
    """
    for mount in reversed(mounts()):
        if mount.point == str(point) and mount.kind == FILESYSTEM_TYPE and mount.source == mount_source(store):
            clear_mount(point)
        elif mount.point == str(point) and mount.kind == FILESYSTEM_TYPE:
            raise MountError(f"mount point {point} is taken by store {mount.source}", hint="choose another mount point")
    try:
        if not point.is_dir():
            raise MountError(f"mount point {point} is not a directory", hint=f"make it: mkdir {point}")
        names = sorted(entry.name for entry in point.iterdir())
    except OSError as error:
        raise MountError(
            f"mount point {point} can't be read: {(error.strerror or '').lower()}", hint="check the path"
        ) from error
    if names:
        raise MountError(f"mount point {point} is not empty: it has {names[0]}", hint="give an empty directory")
    if is_inside(point, store) or is_inside(store, point):
        raise PlacementError(
            f"store {store} and mount point {point} lie in each other", hint="give a mount point outside of the store"
        )


def clear_mount(point: Path) -> None:
    """Unmount a mount point now, whoever still uses it."""
    result = subprocess.run(
        ["fusermount3", "-u", "-z", "-q", str(point)], capture_output=True, text=True, check=False, timeout=30
    )
    if any(mount.point == str(point) for mount in mounts()):
        raise MountError(
            f"mount point {point} of an earlier daemon can't be cleared: {result.stderr.strip()}",
            hint=f"umount -l {point}",
        )


def tune(point: Path) -> None:
    """Raise the readahead and the number of background requests of our mount, where we may. Doesn't touch the mount."""
    for mount in mounts():
        if mount.point == str(point) and mount.kind == FILESYSTEM_TYPE:
            minor = os.minor(mount.device)
            with contextlib.suppress(OSError):
                (_BDI / f"{os.major(mount.device)}:{minor}" / "read_ahead_kb").write_text(str(READ_AHEAD_KB))
            with contextlib.suppress(OSError):
                (_CONNECTIONS / str(minor) / "max_background").write_text(str(MAX_BACKGROUND))


def abort(point: Path) -> None:
    """End all requests of our mount with an error, where we may: nobody answers them any more."""
    for mount in mounts():
        if mount.point == str(point) and mount.kind == FILESYSTEM_TYPE:
            with contextlib.suppress(OSError):
                (_CONNECTIONS / str(os.minor(mount.device)) / "abort").write_text("1")
