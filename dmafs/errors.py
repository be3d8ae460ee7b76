"""The error tree: what can go wrong with the world, as opposed to bugs of our own.

::

    DmafsError                  exit  2  EIO
    ├── InputError              exit  3  EINVAL     a name, number or option that can't be used
    │   ├── SourceError         exit  4  EINVAL     source missing, unreadable, of odd size, or changed
    │   ├── SourceBusyError     exit  5  EBUSY      source is mounted or held by somebody else
    │   ├── PlacementError      exit  6  EINVAL     store, source and mount point in each other
    │   ├── ExistsError         exit  7  EEXIST     volume, snapshot, clone or foreign files are already there
    │   └── CloneBusyError      exit  8  EBUSY      somebody has the clone open
    ├── StoreError              exit 10  EIO
    │   ├── NoStoreError        exit 11  ENOENT     not a store
    │   ├── StoreBusyError      exit 12  EBUSY      another process has the store
    │   ├── VersionError        exit 13  EIO        format version that this program doesn't know
    │   ├── CorruptionError     exit 14  EIO        a checksum, record or file is wrong or missing
    │   ├── StoreFullError      exit 15  ENOSPC     no space left for the journal or a clone
    │   ├── ReadOnlyError       exit 16  EROFS      the volume stopped taking writes after an error
    │   └── UnsafeError         exit 17  EACCES     others can write to the store or its configuration
    ├── NotFoundError           exit 20  ENOENT
    │   ├── NoSuchPointError    exit 21  ENOENT     a time before the beginning, in the future, not understood
    │   ├── NoSuchVolumeError   exit 22  ENOENT
    │   ├── NoSuchSnapshotError exit 23  ENOENT
    │   └── NoSuchCloneError    exit 24  ENOENT
    ├── PinnedError             exit 25  EBUSY      a pinned snapshot isn't dropped
    ├── DifferenceError         exit 26  EIO        a verify has found that source and newest image differ
    ├── CheckBusyError          exit 27  EBUSY      a verify or resync of the volume is under way already
    ├── MountError              exit 30  EIO        the mount point can't be used
    ├── ControlError            exit 31  EIO        the daemon doesn't answer, or not in our words
    │   └── DeniedError         exit 35  EACCES     the daemon doesn't serve this user
    └── TapError                exit 32  EIO        device-mapper, a loop device or a tap's log can't be used
        ├── TapBusyError        exit 33  EBUSY      the mapped device is in use
        └── LogLostError        exit 34  EIO        writes are missing in the tap's log: a gap

Exit codes 0 (success), 1 (success with warnings) and 128+n (ended by signal n) belong to the command line. Anything
outside this tree is a bug of ours and shows its traceback. Messages are lower case, name the object and the value, and
have no full stop; the hint says what to do next.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class DmafsError(Exception):
    """Base of all errors that a user can meet; ``hint`` says what to do about it."""

    exit_code: ClassVar[int] = 2
    errno: ClassVar[int] = errno.EIO

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Take a *message* that names object and value, and a *hint* that names the remedy."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(DmafsError):
    """A name, number or option that can't be used; nothing was changed."""

    exit_code = 3
    errno = errno.EINVAL


class SourceError(InputError):
    """The source (the primary) is missing, not readable, of odd size, or has changed its size."""

    exit_code = 4


class SourceBusyError(InputError):
    """The source is mounted read-write or held exclusively by somebody else."""

    exit_code = 5
    errno = errno.EBUSY


class PlacementError(InputError):
    """Store, source and mount point lie within each other."""

    exit_code = 6


class ExistsError(InputError):
    """Something of that name is already there."""

    exit_code = 7
    errno = errno.EEXIST


class CloneBusyError(InputError):
    """Somebody has an image of the clone open; a loop device over it does."""

    exit_code = 8
    errno = errno.EBUSY


class StoreError(DmafsError):
    """The store can't do what was asked."""

    exit_code = 10


class NoStoreError(StoreError):
    """The directory is not a store."""

    exit_code = 11
    errno = errno.ENOENT


class StoreBusyError(StoreError):
    """Another process works on the store."""

    exit_code = 12
    errno = errno.EBUSY


class VersionError(StoreError):
    """The store has a format version that this program doesn't know."""

    exit_code = 13


class CorruptionError(StoreError):
    """A checksum doesn't match, or a record or file is missing or foreign (promise 5)."""

    exit_code = 14


class StoreFullError(StoreError):
    """The journal, or a clone within its quota, has no space left; the write was refused."""

    exit_code = 15
    errno = errno.ENOSPC


class ReadOnlyError(StoreError):
    """The volume or clone takes no writes any more since one of its writes or fsyncs failed."""

    exit_code = 16
    errno = errno.EROFS


class UnsafeError(StoreError):
    """Somebody else than root and this process's user can write to the store or its configuration."""

    exit_code = 17
    errno = errno.EACCES


class NotFoundError(DmafsError):
    """The named thing isn't there."""

    exit_code = 20
    errno = errno.ENOENT


class NoSuchPointError(NotFoundError):
    """A time before the first recoverable point, in the future, or not understood."""

    exit_code = 21


class NoSuchVolumeError(NotFoundError):
    """The store has no volume of that name."""

    exit_code = 22


class NoSuchSnapshotError(NotFoundError):
    """There is no snapshot of that name."""

    exit_code = 23


class NoSuchCloneError(NotFoundError):
    """There is no clone of that name."""

    exit_code = 24


class PinnedError(DmafsError):
    """The snapshot is pinned, so it isn't dropped; nothing was changed."""

    exit_code = 25
    errno = errno.EBUSY


class DifferenceError(DmafsError):
    """A verify has found that source and newest image differ; nothing was changed."""

    exit_code = 26


class CheckBusyError(DmafsError):
    """A verify or resync of the volume is under way already; there is one at a time."""

    exit_code = 27
    errno = errno.EBUSY


class MountError(DmafsError):
    """The mount point is missing, busy, or can't be mounted on."""

    exit_code = 30


class ControlError(DmafsError):
    """The daemon doesn't answer on its control socket, or not as expected."""

    exit_code = 31


class DeniedError(ControlError):
    """The daemon serves its own user and root only."""

    exit_code = 35
    errno = errno.EACCES


class TapError(DmafsError):
    """Device-mapper, a loop device or a tap's log can't be used."""

    exit_code = 32


class TapBusyError(TapError):
    """The mapped device is in use."""

    exit_code = 33
    errno = errno.EBUSY


class LogLostError(TapError):
    """Writes are missing in the tap's log: what follows belongs to a gap."""

    exit_code = 34
