"""The FUSE operations: the tree as the kernel sees it.

- Images of the past never change: ``keep_cache``, long attribute timeouts, EROFS for every change.
- ``live`` follows the primary: read past the page cache (``direct_io``), no timeouts.
- ``tap`` is the primary; truncation is ignored as on a disk. It is read and written past the page cache, too: through
  that the kernel asks for an extended attribute before each write, which takes as long as the write. What stands on the
  tap, a loop device most often, has a cache of its own.
- A clone's image is like a tap, also past the page cache: its bytes are had by two files, its own and a partition's.
- A partition's file is a range of an image's, and otherwise like it. An open one stays where it was in the image.
- ``mkdir clones/<name>@<time>`` is answered with the folder ``<name>``, and the kernel is told to forget the name that
  it was made by: looking that up finds nothing.
- Names are looked up each time (no entry timeout): what a time means may coarsen with a sync, and a snapshot's name may
  become another snapshot's.
- Handlers raise only FUSEError; ``guarded`` translates everything else, since any other exception would end the mount.
"""

from __future__ import annotations

import errno
import os
import stat
from time import perf_counter
from typing import Any, Final

import pyfuse3
from pyfuse3 import FUSEError

from dmafs.core.image import Image
from dmafs.errors import NotFoundError
from dmafs.tree.around import ReadAround
from dmafs.tree.backend import Backend
from dmafs.tree.changes import Changes
from dmafs.tree.guard import guarded, text_of, with_deadline
from dmafs.tree.handles import Handle
from dmafs.tree.names import Names
from dmafs.tree.nodes import (
    CloneFile,
    CloneFolder,
    Directory,
    InodeTable,
    Link,
    LiveFile,
    Moment,
    Node,
    PartitionFile,
    PastImage,
    SnapshotFolder,
    TapFile,
    Whole,
    whole,
)
from dmafs.tree.views import Views
from dmafs.units import SECTOR, format_rfc3339

HANDLES_MAX: Final = 8192
"""Files and folders open at once; more is ENFILE."""
TAP_HANDLES: Final = 1024
"""So many more for taps, so that whoever opens all the past there is doesn't keep others from their disks."""
LISTED_MAX: Final = 1 << 17
"""Entries of all open folders together, unless one alone has more; likewise."""
DIGESTS_MAX: Final = 4
"""Digests under way at once; more is EBUSY, since each of them reads a whole image while its caller waits."""
PAST_TIMEOUT_S: Final = 3600
SCRATCH: Final = 1 << 20
"""The longest read that the kernel asks for."""
AHEAD: Final = 4 << 20
"""How far the disk is told of what a sequential read will want."""
IMAGE_MODE: Final = stat.S_IFREG | 0o440
TAP_MODE: Final = stat.S_IFREG | 0o600
_WRITING: Final = os.O_WRONLY | os.O_RDWR
_XATTRS: Final = ("seq", "time", "volume", "consistency")
_XATTR_PREFIX: Final = "user.dmafs."
_WITH_XATTRS: Final = (PastImage, LiveFile, CloneFile)


class Tree(pyfuse3.Operations):
    """The tree over a backend."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, backend: Backend, started_ns: int) -> None:
        """Show *backend*; *started_ns* is the time that fixed directories have."""
        super().__init__()
        self._backend = backend
        self._table = InodeTable()
        self._changes = Changes(backend, self._table)
        self._names = Names(backend)
        self._views = Views(backend, self._names)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[str, Node]]] = {}
        self._listed = 0
        self._digests = 0
        self._next_handle = 1
        self._uid, self._gid = os.getuid(), os.getgid()
        self._started_ns = started_ns
        self._scratch = memoryview(bytearray(SCRATCH))
        self.around = ReadAround(backend.read)

    # -- names --------------------------------------------------------------------------------------------------

    @guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        node = await self._views.child(self._table.node(parent_inode), text_of(name))
        await self._measure(node)
        attributes = self._attributes(node)
        self._table.looked_up(node)
        return attributes

    async def forget(self, inode_list: list[tuple[pyfuse3.InodeT, int]]) -> None:  # type: ignore[override]
        """Take back look-ups."""
        for inode, count in inode_list:
            self._table.forget(inode, count)

    @guarded
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the target of a link."""
        node = self._table.node(inode)
        if not isinstance(node, Link):
            raise FUSEError(errno.EINVAL)
        return node.target.encode()

    # -- attributes ---------------------------------------------------------------------------------------------

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return the attributes of a node. A partition holds at most as much data as the image does."""
        entry = self._attributes_of_whole(whole(node))
        if isinstance(node, PartitionFile):
            entry.st_size = node.length
            entry.st_blocks = min(entry.st_blocks, node.length // SECTOR)
        entry.st_ino = self._table.inode(node)
        return entry

    def _attributes_of_whole(self, node: Whole) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_blksize = 4096
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 0
        time_ns = self._started_ns
        match node:
            case PastImage(volume, seq):
                image = self._backend.image(volume, seq)
                self._file(entry, IMAGE_MODE, volume, self._backend.allocated(image))
                entry.attr_timeout = PAST_TIMEOUT_S
                time_ns = image.time_ns
            case LiveFile(volume):
                image = self._backend.live(volume)
                self._file(entry, IMAGE_MODE, volume, self._backend.allocated(image))
                time_ns = image.time_ns
            case TapFile(volume):
                self._file(entry, TAP_MODE, volume, self._backend.tap_allocated(volume))
                entry.attr_timeout = PAST_TIMEOUT_S
                time_ns = self._backend.tap_time(volume)
            case CloneFile(volume):
                clone = self._names.clone(node)
                self._file(entry, TAP_MODE, volume, clone.allocated_sectors() * SECTOR)
                time_ns = clone.written_ns
            case Link(_, _, target):
                entry.st_mode, entry.st_nlink, entry.st_size = stat.S_IFLNK | 0o777, 1, len(target)
            case _:
                writable = node in (Directory("snapshots"), Directory("clones"))
                entry.st_mode, entry.st_nlink, entry.st_size = stat.S_IFDIR | (0o750 if writable else 0o550), 2, 0
                if isinstance(node, Moment):
                    time_ns = node.time_ns
                elif isinstance(node, SnapshotFolder):
                    time_ns = self._backend.snapshot_time(node.identifier)
                elif isinstance(node, CloneFolder):
                    time_ns = max(clone.time_ns for clone in self._backend.clones(node.name).values())
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time_ns
        return entry

    async def _measure(self, node: Node) -> None:
        """Have ready what the attributes of an image or clone need: counting its blocks may take a while."""
        base: Image | None = None
        node = whole(node)
        if isinstance(node, PastImage):
            base = self._image(node)
        elif isinstance(node, CloneFile):
            base = self._names.clone(node).base
        if base is not None:
            await self._backend.measure(base)

    def _file(self, entry: pyfuse3.EntryAttributes, mode: int, volume: str, allocated: int) -> None:
        entry.st_mode, entry.st_nlink = pyfuse3.ModeT(mode), 1
        entry.st_size = self._backend.size(volume)
        entry.st_blocks = allocated // SECTOR

    @guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return attributes."""
        node = self._table.node(inode)
        await self._measure(node)
        return self._attributes(node)

    @guarded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse changes; of what can be written times are the kernel's business, and truncating changes nothing."""
        node = self._table.node(inode)
        if not isinstance(whole(node), (TapFile, CloneFile)):
            raise FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        attributes = self._attributes(node)
        if fields.update_size and attr.st_size not in (0, attributes.st_size):
            raise FUSEError(errno.EINVAL)
        return attributes

    @guarded
    async def getxattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return ``user.dmafs.seq``, ``.time``, ``.volume``, ``.consistency`` or ``.digest``; of a clone its base's.

        A partition has its image's, but for the digest, and ``.offset``: where it begins in the image, in bytes.
        """
        found = self._table.node(inode)
        key = text_of(name)
        node = whole(found)
        if not isinstance(node, _WITH_XATTRS) or not key.startswith(_XATTR_PREFIX):
            raise FUSEError(pyfuse3.ENOATTR)
        image = self._image(node)
        match key.removeprefix(_XATTR_PREFIX):
            case "seq":
                return str(image.seq).encode()
            case "time":
                return format_rfc3339(image.time_ns).encode()
            case "volume":
                return node.volume.encode()
            case "consistency":
                return b"clone" if isinstance(node, CloneFile) else self._backend.consistency(image).encode()
            case "offset" if isinstance(found, PartitionFile):
                return str(found.start).encode()
            case "digest" if isinstance(found, PastImage):
                return await self._digest(image)
        raise FUSEError(pyfuse3.ENOATTR)

    async def _digest(self, image: Image) -> bytes:
        if self._digests >= DIGESTS_MAX:
            raise FUSEError(errno.EBUSY)
        self._backend.hold(image)
        self._digests += 1
        try:
            return (await self._backend.digest(image)).encode()
        finally:
            self._digests -= 1
            self._backend.release(image)

    def _image(self, node: PastImage | LiveFile | CloneFile) -> Image:
        """Return the image that a file shows, or that a clone is based on."""
        match node:
            case PastImage(volume, seq):
                return self._backend.image(volume, seq)
            case LiveFile(volume):
                return self._backend.live(volume)
            case CloneFile():
                return self._names.clone(node).parts()[1]

    @guarded
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """List the cheap attributes; the digest, which reads the whole image, only on demand."""
        node = self._table.node(inode)
        if not isinstance(whole(node), _WITH_XATTRS):
            return []
        names = (*_XATTRS, "offset") if isinstance(node, PartitionFile) else _XATTRS
        return [(_XATTR_PREFIX + name).encode() for name in names]

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the space of the store."""
        space = self._backend.space()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks, data.f_bfree, data.f_bavail = (number // 4096 for number in space)
        data.f_namemax = 255
        return data

    @guarded
    async def access(self, inode: pyfuse3.InodeT, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Leave permissions to the kernel (default_permissions)."""
        return True

    # -- directories --------------------------------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open a directory: its listing stays as it is now."""
        listing = await self._views.listing(self._table.node(inode))
        if self._listed and self._listed + len(listing) > LISTED_MAX:
            raise FUSEError(errno.ENFILE)
        handle = self._new_handle()
        self._listings[handle] = listing
        self._listed += len(listing)
        return handle

    def _new_handle(self, *, more: int = 0) -> pyfuse3.FileHandleT:
        if len(self._handles) + len(self._listings) >= HANDLES_MAX + more:
            raise FUSEError(errno.ENFILE)
        self._next_handle += 1
        return pyfuse3.FileHandleT(self._next_handle)

    @guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List from an entry on; what has coarsened away since opening is left out."""
        for number, (name, node) in enumerate(self._listings[fh][start_id:], start_id + 1):
            try:
                await self._measure(node)
                attributes = self._attributes(node)
            except (NotFoundError, FUSEError):
                continue
            if not pyfuse3.readdir_reply(token, name.encode(), attributes, number):
                self._table.drop_unknown(node)
                return
            self._table.looked_up(node)

    @guarded
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Close a directory."""
        self._listed -= len(self._listings.pop(fh))

    # -- changes -----------------------------------------------------------------------------------------------

    @guarded
    @with_deadline
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """See ``Changes.make``."""
        node = await self._changes.make(self._table.node(parent_inode), name)
        attributes = self._attributes(node)
        self._table.looked_up(node)
        return attributes

    @guarded
    @with_deadline
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """See ``Changes.drop``."""
        await self._changes.drop(self._table.node(parent_inode), name)

    @guarded
    @with_deadline
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: bytes,
        parent_inode_new: pyfuse3.InodeT,
        name_new: bytes,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """See ``Changes.rename``."""
        parents = {self._table.node(parent_inode_old), self._table.node(parent_inode_new)}
        await self._changes.rename(parents, name_old, name_new, flags)

    # -- files --------------------------------------------------------------------------------------------------

    @guarded
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image, which holds it, a clone, which can't be dropped then, or a tap."""
        found = self._table.node(inode)
        node = whole(found)
        if not isinstance(node, (PastImage, LiveFile, TapFile, CloneFile)):
            raise FUSEError(errno.EISDIR)
        volume = node.volume
        handle = Handle(volume, inode, 0, self._backend.size(volume), self._backend.statistics(volume))
        if isinstance(found, PartitionFile):
            handle.start, handle.size = found.start, found.length
        match node:
            case PastImage(volume, seq):
                handle.image = self._backend.image(volume, seq)
            case LiveFile(volume):
                self._backend.live(volume)
            case TapFile():
                handle.tap = True
            case CloneFile():
                handle.clone = self._names.clone(node)
        cached = isinstance(node, PastImage)
        if flags & _WRITING and isinstance(node, (PastImage, LiveFile)):
            raise FUSEError(errno.EROFS)
        number = self._new_handle(more=TAP_HANDLES if handle.tap else 0)
        if handle.image is not None:
            self._backend.hold(handle.image)
        if handle.clone is not None:
            handle.clone.parts()  # a damaged one can't be opened
            handle.clone.opens += 1
        self._handles[number] = handle
        return pyfuse3.FileInfo(fh=number, keep_cache=cached, direct_io=not cached)

    async def read(  # type: ignore[override]  # any buffer will do
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> memoryview | bytearray:
        """Read. Of the past most is there at once; it is in a buffer that pyfuse3 copies before anything else runs."""
        try:
            data = self._read_nowait(fh, off, size)
        except Exception:  # noqa: BLE001 - it is guarded below
            data = None
        return await self._read(fh, off, size) if data is None else data

    def _read_nowait(self, fh: int, offset: int, length: int) -> memoryview | None:
        """Return bytes of a past image that are in memory, until the next call; None for all others."""
        handle = self._handles[fh]
        image = handle.image
        if image is None:
            return None
        handle.sequential, handle.next = offset == handle.next, offset + length
        begun = perf_counter()
        self.around.missed(handle.inode, image, offset, length, start=handle.start, size=handle.size)
        length = min(length, handle.size - offset)
        data = image.read_nowait(handle.start + offset, length, self._scratch) if length > 0 else None
        if data is not None:
            handle.statistics.at_once.add(length)
            handle.statistics.read_durations.add(perf_counter() - begun)
        return data

    @guarded
    async def _read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> memoryview | bytearray:
        """Read whatever it takes."""
        handle = self._handles[fh]
        size = min(size, handle.size - off)
        if size <= 0:
            return bytearray()
        begun = perf_counter()
        data = await self._read_from(handle, handle.start + off, size)
        handle.statistics.read_durations.add(perf_counter() - begun)
        return data

    async def _read_from(self, handle: Handle, off: int, size: int) -> memoryview | bytearray:
        if handle.tap:
            return await self._backend.read_tap(handle.volume, off, size)
        if handle.clone is not None:
            return await self._backend.read_clone(handle.clone, off, size)
        image = handle.image or self._backend.live(handle.volume)
        return await self._backend.read(image, off, size, ahead=AHEAD if handle.sequential else 0)

    @guarded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write to a tap or a clone; past its end ENOSPC and before that what fits, as a disk."""
        handle = self._handles[fh]
        if not handle.tap and handle.clone is None:
            raise FUSEError(errno.EROFS)
        room = handle.size - off
        if len(buf) > room:
            if room <= 0:
                raise FUSEError(errno.ENOSPC)
            buf = buf[:room]
        if handle.clone is not None:
            await self._backend.write_clone(handle.clone, handle.start + off, buf)
        else:
            await self._backend.write_tap(handle.volume, off, buf)
        return len(buf)

    @guarded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - the kernel's interface
        """Make the writes to a tap or a clone durable."""
        handle = self._handles[fh]
        if handle.clone is not None:
            await self._backend.flush_clone(handle.clone)
        if handle.tap:
            await self._backend.flush_tap(handle.volume)

    @guarded
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: closing a disk doesn't flush it."""

    @guarded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Close."""
        handle = self._handles.pop(fh)
        if handle.image is not None:
            self._backend.release(handle.image)
        if handle.clone is not None:
            handle.clone.opens -= 1

    # -- everything else is refused --------------------------------------------------------------------------------

    async def _refuse(self, *_args: object) -> Any:  # noqa: ANN401 - never returns
        raise FUSEError(errno.EROFS)

    create = mknod = symlink = link = unlink = setxattr = removexattr = _refuse  # type: ignore[assignment]

    @guarded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - the kernel's interface
        """Do nothing: snapshots and clones are durable when mkdir returns."""
