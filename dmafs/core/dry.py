"""A volume's directory as if it could be changed: what opening would remove or cut off is noted, and nothing is done.

Files are opened for reading only, so that it works on read-only media, too. Only what recovery does when a volume is
opened is imitated: names are unlinked, files are truncated. Anything else is a bug of the caller's.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from dmafs.core.storage import Buffer, RealFile, RealStorage
from dmafs.errors import CorruptionError

_CHUNK: Final = 1 << 20


class Change(NamedTuple):
    """What would have been done to a file or directory; *size* is what it would have been cut to, None: removed."""

    name: str
    before: int
    size: int | None


class DryFile(RealFile):
    """A file that isn't changed."""

    def __init__(self, fd: int, name: str, storage: DryStorage, key: str) -> None:
        """Take ownership of *fd*; how long the file would be by now is known to *storage* as *key*."""
        super().__init__(fd, name)
        self._storage = storage
        self._key = key

    def size(self) -> int:
        """See ``File``."""
        return self._storage.sizes.get(self._key, super().size())

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``."""
        if offset + len(buffer) > self.size():
            raise CorruptionError(
                f"file {self.name} ends at byte {self.size()}, {offset + len(buffer) - self.size()} bytes before the "
                "expected end",
                hint="the file was truncated from outside; restore it, or drop the history that needs it",
            )
        super().read_into(buffer, offset)

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``: it may wait."""
        self.read_into(buffer, offset)

    def truncate(self, size: int) -> None:
        """See ``File``: only noted, and not even that if it is zeros that were written ahead."""
        before = self.size()
        assert size <= before, "opening lets no file grow"
        if size < before:
            if not self._is_zero(size, before):
                self._storage.changes.append(Change(self._key, before, size))
            self._storage.sizes[self._key] = size

    def _is_zero(self, begin: int, end: int) -> bool:
        for at in range(begin, end, _CHUNK):
            data = bytearray(min(_CHUNK, end - at))
            self.read_into(data, at)
            if data.count(0) < len(data):
                return False
        return True

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """See ``File``: opening writes only what is there, to make it durable."""
        data = b"".join(buffers)
        there = bytearray(len(data))
        self.read_into(there, offset)
        assert there == data, f"opening writes nothing else, least of all {len(data)} bytes at {offset}"

    def zero(self, offset: int, length: int) -> NoReturn:
        """See ``File``."""
        raise AssertionError(f"opening writes nothing, least of all {length} zeros at {offset}")

    def datasync(self) -> None:
        """See ``File``: there is nothing to make durable."""


class DryStorage(RealStorage):
    """A directory in which nothing is changed; *changes* are those that would have been made, in order."""

    def __init__(self, root: Path) -> None:
        """Work below *root*, which exists."""
        super().__init__(root)
        self.changes: list[Change] = []
        self.sizes: dict[str, int] = {}
        self._removed: set[str] = set()

    def _require(self, name: str) -> None:
        if name in self._removed:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name))

    def create(self, name: str) -> NoReturn:
        """See ``Storage``."""
        raise AssertionError(f"opening makes no file, least of all {name}")

    def open(self, name: str) -> DryFile:
        """See ``Storage``. For reading; OSError if it is no regular file."""
        self._require(name)
        path = self.path(name)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EISDIR, "not a regular file", path)
        return DryFile(fd, path, self, name)

    def names(self, directory: str) -> list[str]:
        """See ``Storage``."""
        return [name for name in super().names(directory) if f"{directory}/{name}" not in self._removed]

    def exists(self, name: str) -> bool:
        """See ``Storage``."""
        return name not in self._removed and super().exists(name)

    def size(self, name: str) -> int:
        """See ``Storage``."""
        self._require(name)
        return self.sizes.get(name, super().size(name))

    def make_directory(self, name: str) -> NoReturn:
        """See ``Storage``."""
        raise AssertionError(f"opening makes no directory, least of all {name}")

    def rename(self, old: str, new: str) -> NoReturn:
        """See ``Storage``."""
        raise AssertionError(f"opening renames nothing, least of all {old} to {new}")

    def unlink(self, name: str) -> None:
        """See ``Storage``: only noted."""
        if (self._root / name).is_dir() and not (self._root / name).is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path(name))
        self.changes.append(Change(name, self.size(name), None))
        self._removed.add(name)

    def remove_directory(self, name: str) -> None:
        """See ``Storage``: only noted."""
        self._require(name)
        if self.names(name):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self.path(name))
        self.changes.append(Change(name, 0, None))
        self._removed.add(name)

    def sync_directory(self, name: str) -> None:
        """See ``Storage``: there is nothing to make durable."""
