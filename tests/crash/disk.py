"""A simulated disk: a file system in memory that knows what of it is durable, and what a power cut may leave.

``SimulatedDisk`` counts *operations*: all that changes or syncs a file or a name. Before each of them ``watch`` is
asked, which may take a ``moment`` (cheap: contents are immutable bytes, shared), or have the operation fail or land
elsewhere. What a power cut at a moment leaves is in ``cutting``.

``SimulatedStorage`` is the storage interface of the core on a part of such a disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from dmafs.core.storage import Buffer
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

ROOT: Final = 0
FREE: Final = 1 << 40


class Operation(NamedTuple):
    """What is about to be done; *inode* is that of the file, or of the directory whose names change."""

    kind: str
    path: str
    inode: int


class Failure(NamedTuple):
    """The operation raises; *done* is the part of it that is done before.

    Of a write that is up to some sector, else all or nothing.
    """

    number: int
    done: float = 0.0


class Elsewhere(NamedTuple):
    """A write lands at another place: the page cache shows it where it was meant, the disk has it elsewhere."""

    inode: int
    offset: int


Watch = Callable[[Operation], Failure | Elsewhere | None]


class Change(NamedTuple):
    """A change of a file's content: *data* from *offset* on, with None so many zeros, or a new size."""

    offset: int
    data: bytes | None
    length: int
    resizes: bool = False


Naming = tuple[tuple[int, str, int | None], ...]
"""Names that change at once: directory, name, inode."""


class Moment(NamedTuple):
    """All that a cut needs to know; nothing of it changes any more."""

    files: dict[int, bytes]
    changes: dict[int, tuple[Change, ...]]
    names: dict[int, dict[str, int]]
    naming: tuple[Naming, ...]


class SimulatedDisk:
    """See the module. Made empty, or from what was left of another one, which is durable then."""

    def __init__(self, files: dict[int, bytes] | None = None, names: dict[int, dict[str, int]] | None = None) -> None:
        self.files: dict[int, bytes] = files if files is not None else {}
        self.names: dict[int, dict[str, int]] = names if names is not None else {ROOT: {}}
        self._durable = dict(self.files)
        self._durable_names = {inode: dict(entries) for inode, entries in self.names.items()}
        self._changes: dict[int, list[Change]] = {}
        self._naming: list[Naming] = []
        self._next = max([ROOT, *self.files, *self.names]) + 1
        self._astray = False
        self.watch: Watch | None = None
        self.operations = 0
        self.opened = 0
        self.free = FREE

    # -- what is done -------------------------------------------------------------------------------------------

    def begin(self, kind: str, path: str, inode: int) -> Failure | Elsewhere | None:
        """Count an operation and ask what becomes of it; raises if nothing of it is to be done."""
        self.operations += 1
        outcome = self.watch(Operation(kind, path, inode)) if self.watch else None
        if isinstance(outcome, Failure) and not outcome.done:
            raise failed(outcome, path)
        return outcome

    def change(self, inode: int, change: Change, outcome: Failure | Elsewhere | None = None, path: str = "") -> None:
        """Change a file's content, not durably."""
        if isinstance(outcome, Failure) and change.data is not None:
            end = change.offset + int(len(change.data) * outcome.done)
            whole = end if outcome.done == 1 else end // SECTOR * SECTOR
            done = change.data[: max(whole - change.offset, 0)]
            change = change._replace(data=done, length=len(done))
        self.files[inode] = changed(self.files[inode], change)
        if isinstance(outcome, Elsewhere):
            self._astray = True
            inode, change = outcome.inode, change._replace(offset=outcome.offset)
        self._changes.setdefault(inode, []).append(change)
        if isinstance(outcome, Failure):
            raise failed(outcome, path)

    def poke(self, inode: int, content: bytes) -> None:
        """Have other content in a file, durably, as if by somebody else."""
        self.files[inode] = self._durable[inode] = content
        self._changes.pop(inode, None)

    def sync(self, inode: int) -> None:
        """Make a file's content durable."""
        changes = self._changes.pop(inode, [])
        if not self._astray:
            self._durable[inode] = self.files[inode]
        for change in changes if self._astray else ():
            self._durable[inode] = changed(self._durable[inode], change)

    def add_file(self) -> int:
        """Return a new inode of an empty file that has no name yet."""
        self.files[self._next] = self._durable[self._next] = b""
        self._next += 1
        return self._next - 1

    def add_directory(self) -> int:
        """Return a new inode of an empty directory that has no name yet."""
        self.names[self._next] = {}
        self._durable_names[self._next] = {}
        self._next += 1
        return self._next - 1

    def name(self, naming: Naming) -> None:
        """Change names, not durably."""
        self._naming.append(naming)
        rename_all(self.names, naming)

    def sync_names(self, inode: int) -> None:
        """Make the names of a directory durable."""
        self._durable_names[inode] = dict(self.names[inode])
        rest = (tuple(one for one in naming if one[0] != inode) for naming in self._naming)
        self._naming = [naming for naming in rest if naming]

    # -- what is left -------------------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """Return what is durable now, and what isn't yet."""
        changes = {inode: tuple(changes) for inode, changes in self._changes.items()}
        names = {inode: entries.copy() for inode, entries in self._durable_names.items()}
        return Moment(self._durable.copy(), changes, names, tuple(self._naming))

    def paths(self) -> dict[str, int]:
        """Return the inodes of all files and directories that have a name, by path; of a directory with a slash."""
        found: dict[str, int] = {}
        queue = [(ROOT, "")]
        while queue:
            inode, prefix = queue.pop()
            for name, target in self.names[inode].items():
                if target in self.names:
                    found[f"{prefix}{name}/"] = target
                    queue.append((target, f"{prefix}{name}/"))
                else:
                    found[prefix + name] = target
        return found

    def contents(self) -> dict[str, bytes]:
        """Return the content of every file by its path; directories have none."""
        return {path: self.files.get(inode, b"") for path, inode in self.paths().items()}


def changed(content: bytes, change: Change) -> bytes:
    """Return a file's content with a change made."""
    offset, data, length, resizes = change
    if resizes:
        return content[:offset] if offset <= len(content) else content + bytes(offset - len(content))
    if data is None:
        end = min(offset + length, len(content))
        return content if end <= offset else content[:offset] + bytes(end - offset) + content[end:]
    if not data:
        return content
    return content[:offset].ljust(offset, b"\0") + data + content[offset + length :]


def rename_all(names: dict[int, dict[str, int]], naming: Naming) -> None:
    for directory, name, inode in naming:
        if inode is None:
            names[directory].pop(name, None)
        else:
            names[directory][name] = inode


def failed(failure: Failure, path: str) -> OSError:
    """Return what a failed system call raises."""
    return OSError(failure.number, os.strerror(failure.number), path)


class SimulatedFile:
    """An open file; it goes on when its name is gone."""

    def __init__(self, disk: SimulatedDisk, inode: int, name: str) -> None:
        self._disk = disk
        self._inode = inode
        self._open = True
        self.name = name
        disk.opened += 1

    @property
    def _content(self) -> bytes:
        self._require_open()
        return self._disk.files[self._inode]

    def _require_open(self) -> None:
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``."""
        size, content = len(buffer), self._content
        if offset + size > len(content) and size:
            end = max(offset, len(content))
            raise CorruptionError(
                f"file {self.name} ends at byte {end}, {offset + size - end} bytes before the expected end",
                hint="the file was truncated from outside; restore it, or drop the history that needs it",
            )
        buffer[:] = content[offset : offset + size]

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See ``File``."""
        self.read_into(buffer, offset)

    def map(self) -> memoryview:
        """See ``File``."""
        return memoryview(self._content)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """See ``File``."""
        self._require_open()
        data = b"".join(buffers)
        if data:
            outcome = self._disk.begin("write", self.name, self._inode)
            self._disk.change(self._inode, Change(offset, data, len(data)), outcome, self.name)

    def uncache(self, offset: int, length: int) -> None:
        """See ``File``. There is no cache."""

    def prefetch(self, offset: int, length: int) -> None:
        """See ``File``. There is no cache."""

    def size(self) -> int:
        """See ``File``."""
        return len(self._content)

    def allocated(self) -> int:
        """See ``File``."""
        return sum(stop - start for start, stop in self.data_ranges(0, len(self._content)))

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """See ``File``. Whatever is all zeros is a hole."""
        content = self._content
        begin = -1
        for at in range(start // SECTOR * SECTOR, min(stop, len(content)), SECTOR):
            if any(content[at : at + SECTOR]):
                begin = at if begin < 0 else begin
            elif begin >= 0:
                yield max(begin, start), at
                begin = -1
        if begin >= 0:
            yield max(begin, start), min(-(-min(stop, len(content)) // SECTOR) * SECTOR, stop)

    def truncate(self, size: int) -> None:
        """See ``File``."""
        self._require_open()
        outcome = self._disk.begin("truncate", self.name, self._inode)
        self._disk.change(self._inode, Change(size, None, 0, resizes=True), outcome, self.name)

    def zero(self, offset: int, length: int) -> None:
        """See ``File``."""
        self._require_open()
        if length:
            outcome = self._disk.begin("zero", self.name, self._inode)
            self._disk.change(self._inode, Change(offset, None, length), outcome, self.name)

    def datasync(self) -> None:
        """See ``File``."""
        self._require_open()
        outcome = self._disk.begin("datasync", self.name, self._inode)
        self._disk.sync(self._inode)
        if isinstance(outcome, Failure):
            raise failed(outcome, self.name)

    def close(self) -> None:
        """See ``File``."""
        self._disk.opened -= self._open
        self._open = False


class SimulatedStorage:
    """A directory of a simulated disk."""

    def __init__(self, disk: SimulatedDisk, root: str = "") -> None:
        self._disk = disk
        self._root = root

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._root, name) if part)

    def _directory(self, path: str) -> int:
        inode = ROOT
        for part in path.split("/") if path else ():
            target = self._disk.names[inode].get(part)
            if target is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if target not in self._disk.names:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            inode = target
        return inode

    def _place(self, name: str) -> tuple[str, int, str, int | None]:
        """Return path, directory, name in it, and inode or None."""
        path = self._path(name)
        directory, _, last = path.rpartition("/")
        inode = self._directory(directory)
        return path, inode, last, self._disk.names[inode].get(last)

    def _found(self, name: str, *, directory: bool = False) -> tuple[str, int, str, int]:
        path, parent, last, inode = self._place(name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if directory != (inode in self._disk.names):
            number = errno.ENOTDIR if directory else errno.EISDIR
            raise OSError(number, os.strerror(number), path)
        return path, parent, last, inode

    def _do(self, kind: str, path: str, parent: int, naming: Naming) -> None:
        outcome = self._disk.begin(kind, path, parent)
        self._disk.name(naming)
        if isinstance(outcome, Failure):
            raise failed(outcome, path)

    def create(self, name: str) -> SimulatedFile:
        """See ``Storage``."""
        path, parent, last, inode = self._place(name)
        if inode is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = self._disk.add_file()
        self._do("create", path, parent, ((parent, last, inode),))
        return SimulatedFile(self._disk, inode, path)

    def open(self, name: str) -> SimulatedFile:
        """See ``Storage``."""
        path, _, _, inode = self._found(name)
        return SimulatedFile(self._disk, inode, path)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """See ``Storage``."""
        path, _, _, inode = self._found(name)
        if len(self._disk.files[inode]) > limit:
            raise CorruptionError(f"file {path} is longer than {limit} bytes", hint="it isn't ours")
        return self._disk.files[inode]

    def path(self, name: str) -> str:
        """See ``Storage``."""
        return self._path(name)

    def names(self, directory: str) -> list[str]:
        """See ``Storage``."""
        return sorted(self._disk.names[self._directory(self._path(directory))])

    def exists(self, name: str) -> bool:
        """See ``Storage``."""
        try:
            return self._place(name)[3] is not None
        except OSError:
            return False

    def size(self, name: str) -> int:
        """See ``Storage``."""
        return len(self._disk.files[self._found(name)[3]])

    def make_directory(self, name: str) -> None:
        """See ``Storage``."""
        path, parent, last, inode = self._place(name)
        if inode is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self._do("mkdir", path, parent, ((parent, last, self._disk.add_directory()),))

    def rename(self, old: str, new: str) -> None:
        """See ``Storage``."""
        path, parent, last, inode = self._place(old)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        _, target, name, _ = self._place(new)
        self._do("rename", path, parent, ((parent, last, None), (target, name, inode)))

    def unlink(self, name: str) -> None:
        """See ``Storage``."""
        path, parent, last, _ = self._found(name)
        self._do("unlink", path, parent, ((parent, last, None),))

    def remove_directory(self, name: str) -> None:
        """See ``Storage``."""
        path, parent, last, inode = self._found(name, directory=True)
        if self._disk.names[inode]:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self._do("rmdir", path, parent, ((parent, last, None),))

    def sync_directory(self, name: str) -> None:
        """See ``Storage``."""
        path = self._path(name)
        inode = self._directory(path)
        outcome = self._disk.begin("sync_directory", path, inode)
        self._disk.sync_names(inode)
        if isinstance(outcome, Failure):
            raise failed(outcome, path)

    def free_bytes(self) -> int:
        """See ``Storage``."""
        return self._disk.free

    def free_share(self) -> float:
        """See ``Storage``."""
        return min(1.0, self._disk.free / FREE)
