"""The FUSE operations: the tree as the kernel sees it.

- Images of the past never change: ``keep_cache``, long attribute timeouts, EROFS for every change.
- ``live`` follows the primary: read past the page cache (``direct_io``), no timeouts.
- ``tap`` is the primary. The kernel writes through its page cache; truncation is ignored as on a disk.
- Names are looked up each time (no entry timeout): what a time means may coarsen with a sync, and a snapshot's name may
  become another snapshot's.
- Handlers raise only FUSEError; ``guarded`` translates everything else, since any other exception would end the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from dmafs.core.image import Image
from dmafs.core.moments import LATEST
from dmafs.errors import DmafsError, InputError, NotFoundError, PinnedError, StoreFullError
from dmafs.tree.backend import Backend
from dmafs.tree.nodes import (
    SUFFIX,
    TOP,
    Directory,
    InodeTable,
    Link,
    LiveFile,
    Moment,
    Node,
    PastImage,
    SnapshotFolder,
    TapFile,
)
from dmafs.units import SECTOR, format_rfc3339, format_time, parse_canonical

log = logging.getLogger(__name__)

DEADLINE_S: Final = 300
"""Longest that a handler which waits for others may take before its caller gets EIO."""
HANDLES_MAX: Final = 65536
PAST_TIMEOUT_S: Final = 3600
IMAGE_MODE: Final = stat.S_IFREG | 0o440
TAP_MODE: Final = stat.S_IFREG | 0o600
_WRITING: Final = os.O_WRONLY | os.O_RDWR
_XATTRS: Final = ("seq", "time", "volume", "consistency")
_XATTR_PREFIX: Final = "user.dmafs."

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def guarded(handler: Handler) -> Handler:
    """Translate whatever a handler raises to FUSEError; log what isn't an ordinary answer."""

    @functools.wraps(handler)
    async def wrapper(self: Tree, *args: Any) -> Any:  # noqa: ANN401 - as the handler
        try:
            return await handler(self, *args)
        except FUSEError:
            raise
        except (NotFoundError, InputError, PinnedError) as error:
            raise FUSEError(error.errno) from None
        except DmafsError as error:
            log.error("%s: %s", handler.__name__, error.message)
            raise FUSEError(error.errno) from None
        except OSError as error:
            log.error("%s: %s", handler.__name__, error)
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed, please report this", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return cast("Handler", wrapper)


def with_deadline(handler: Handler) -> Handler:
    """Give up on a handler that waits for others too long: EIO."""

    @functools.wraps(handler)
    async def wrapper(self: Tree, *args: Any) -> Any:  # noqa: ANN401 - as the handler
        try:
            with trio.fail_after(DEADLINE_S):
                return await handler(self, *args)
        except trio.TooSlowError:
            log.error("%s took longer than %s s", handler.__name__, DEADLINE_S)
            raise FUSEError(errno.EIO) from None

    return cast("Handler", wrapper)


@dataclass(slots=True)
class Handle:
    """An open file: a past image (held), live, or a tap."""

    volume: str
    image: Image | None
    tap: bool


class Tree(pyfuse3.Operations):
    """The tree over a backend."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, backend: Backend, started_ns: int) -> None:
        """Show *backend*; *started_ns* is the time that fixed directories have."""
        super().__init__()
        self._backend = backend
        self._table = InodeTable()
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[str, Node]]] = {}
        self._next_handle = 1
        self._uid, self._gid = os.getuid(), os.getgid()
        self._started_ns = started_ns

    # -- names --------------------------------------------------------------------------------------------------

    def _child(self, parent: Node, name: str) -> Node:  # noqa: C901, PLR0911 - one case for each kind of directory
        """Return the node called *name* in *parent*; NotFoundError or FUSEError ENOENT."""
        match parent:
            case Directory(""):
                if name in TOP:
                    return Directory(name)
            case Directory("live"):
                volume = self._volume_of(name)
                self._backend.live(volume)
                return LiveFile(volume)
            case Directory("tap"):
                volume = self._volume_of(name)
                if self._backend.has_tap(volume):
                    return TapFile(volume)
            case Directory("at"):
                return self._moment(name)
            case Directory("snapshots"):
                if name == LATEST:
                    return Link("snapshots", name, self._latest())
                self._backend.snapshot_seqs(name)
                return SnapshotFolder(name)
            case Moment() | SnapshotFolder():
                volume = self._volume_of(name)
                seqs = self._seqs(parent)
                if volume in seqs:
                    return PastImage(volume, seqs[volume])
            case _:
                raise FUSEError(errno.ENOTDIR)
        raise FUSEError(errno.ENOENT)

    def _volume_of(self, name: str) -> str:
        volume = name.removesuffix(SUFFIX)
        if volume == name or volume not in self._backend.volume_names():
            raise FUSEError(errno.ENOENT)
        return volume

    def _moment(self, name: str) -> Node:
        time_ns = self._backend.resolve(name)
        return Moment(time_ns) if parse_canonical(name) == time_ns else Link("at", name, format_time(time_ns))

    def _seqs(self, parent: Moment | SnapshotFolder) -> dict[str, int]:
        """Return the images in a folder; ENOENT when it has coarsened away."""
        if isinstance(parent, SnapshotFolder):
            return self._backend.snapshot_seqs(parent.identifier)
        if self._backend.resolve(format_time(parent.time_ns)) != parent.time_ns:
            raise FUSEError(errno.ENOENT)
        return self._backend.seqs_at(parent.time_ns)

    def _latest(self) -> str:
        identifiers = self._backend.snapshot_ids()
        if not identifiers:
            raise FUSEError(errno.ENOENT)
        return identifiers[-1]

    def _list(self, node: Node) -> list[tuple[str, Node]]:
        """Return names and nodes in a directory."""
        match node:
            case Directory(""):
                return [(name, Directory(name)) for name in TOP]
            case Directory("at"):
                times, names = self._backend.landmarks()
                entries: list[tuple[str, Node]] = [(format_time(time_ns), Moment(time_ns)) for time_ns in times]
                links = ((name, Link("at", name, format_time(time_ns))) for name, time_ns in names.items())
                return entries + list(links)
            case Directory("snapshots"):
                identifiers = self._backend.snapshot_ids()
                folders: list[tuple[str, Node]] = [(name, SnapshotFolder(name)) for name in identifiers]
                return folders + [(LATEST, Link("snapshots", LATEST, name)) for name in identifiers[-1:]]
            case Directory():
                return self._list_files(node)
            case Moment() | SnapshotFolder():
                return [(name + SUFFIX, PastImage(name, seq)) for name, seq in self._seqs(node).items()]
            case _:
                raise FUSEError(errno.ENOTDIR)

    def _list_files(self, parent: Directory) -> list[tuple[str, Node]]:
        entries = []
        for volume in self._backend.volume_names():
            try:
                entries.append((volume + SUFFIX, self._child(parent, volume + SUFFIX)))
            except (NotFoundError, FUSEError):
                continue  # no recoverable point yet, or no tap
        return entries

    @guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        node = self._child(self._table.node(parent_inode), _text(name))
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
        """Return the attributes of a node."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._table.inode(node)
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
            case Link(_, _, target):
                entry.st_mode, entry.st_nlink, entry.st_size = stat.S_IFLNK | 0o777, 1, len(target)
            case _:
                writable = node == Directory("snapshots")
                entry.st_mode, entry.st_nlink, entry.st_size = stat.S_IFDIR | (0o750 if writable else 0o550), 2, 0
                if isinstance(node, Moment):
                    time_ns = node.time_ns
                elif isinstance(node, SnapshotFolder):
                    time_ns = self._backend.snapshot_time(node.identifier)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time_ns
        return entry

    async def _measure(self, node: Node) -> None:
        """Have ready what the attributes of a past image need: counting its blocks may take a while."""
        if isinstance(node, PastImage):
            await self._backend.measure(self._backend.image(node.volume, node.seq))

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
        """Refuse changes; a tap's times are the kernel's business, and truncating it changes nothing, as on a disk."""
        node = self._table.node(inode)
        if not isinstance(node, TapFile):
            raise FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size not in (0, self._backend.size(node.volume)):
            raise FUSEError(errno.EINVAL)
        return self._attributes(node)

    @guarded
    async def getxattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return ``user.dmafs.seq``, ``.time``, ``.volume``, ``.consistency`` or ``.digest`` of an image."""
        node = self._table.node(inode)
        key = _text(name)
        if not isinstance(node, (PastImage, LiveFile)) or not key.startswith(_XATTR_PREFIX):
            raise FUSEError(pyfuse3.ENOATTR)
        live = isinstance(node, LiveFile)
        image = (
            self._backend.live(node.volume) if live else self._backend.image(node.volume, cast("PastImage", node).seq)
        )
        match key.removeprefix(_XATTR_PREFIX):
            case "seq":
                return str(image.seq).encode()
            case "time":
                return format_rfc3339(image.time_ns).encode()
            case "volume":
                return node.volume.encode()
            case "consistency":
                return self._backend.consistency(image).encode()
            case "digest" if not live:
                self._backend.hold(image)
                try:
                    return (await self._backend.digest(image)).encode()
                finally:
                    self._backend.release(image)
        raise FUSEError(pyfuse3.ENOATTR)

    @guarded
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """List the cheap attributes; the digest, which reads the whole image, only on demand."""
        if isinstance(self._table.node(inode), (PastImage, LiveFile)):
            return [(_XATTR_PREFIX + name).encode() for name in _XATTRS]
        return []

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
        handle = self._new_handle()
        self._listings[handle] = self._list(self._table.node(inode))
        return handle

    def _new_handle(self) -> pyfuse3.FileHandleT:
        if len(self._handles) + len(self._listings) >= HANDLES_MAX:
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
        del self._listings[fh]

    @guarded
    @with_deadline
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Take a snapshot: ``mkdir snapshots/<name>``."""
        if self._table.node(parent_inode) != Directory("snapshots"):
            raise FUSEError(errno.EROFS)
        await self._backend.take_snapshot(_text(name))
        node = SnapshotFolder(_text(name))
        attributes = self._attributes(node)
        self._table.looked_up(node)
        return attributes

    @guarded
    @with_deadline
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Drop a snapshot: ``rmdir snapshots/<id>``."""
        if self._table.node(parent_inode) != Directory("snapshots"):
            raise FUSEError(errno.EROFS)
        await self._backend.drop_snapshot(_text(name))
        self._table.retire(SnapshotFolder(_text(name)))

    # -- files --------------------------------------------------------------------------------------------------

    @guarded
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image, which holds it, or a tap."""
        node = self._table.node(inode)
        match node:
            case PastImage(volume, seq):
                handle = Handle(volume, self._backend.image(volume, seq), tap=False)
                cached, direct = True, False
            case LiveFile(volume):
                self._backend.live(volume)
                handle, cached, direct = Handle(volume, None, tap=False), False, True
            case TapFile(volume):
                handle, cached, direct = Handle(volume, None, tap=True), False, False
            case _:
                raise FUSEError(errno.EISDIR)
        if flags & _WRITING and not handle.tap:
            raise FUSEError(errno.EROFS)
        number = self._new_handle()
        if handle.image is not None:
            self._backend.hold(handle.image)
        self._handles[number] = handle
        return pyfuse3.FileInfo(fh=number, keep_cache=cached, direct_io=direct)

    @guarded
    async def read(  # type: ignore[override]  # any buffer will do
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> memoryview | bytearray:
        """Read."""
        handle = self._handles[fh]
        if handle.tap:
            return await self._backend.read_tap(handle.volume, off, size)
        return await self._backend.read(handle.image or self._backend.live(handle.volume), off, size)

    @guarded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write to a tap; ENOSPC past its end, as a disk. In a full store, wait for what can be dropped."""
        handle = self._handles[fh]
        if not handle.tap:
            raise FUSEError(errno.EROFS)
        if off + len(buf) > self._backend.size(handle.volume):
            raise FUSEError(errno.ENOSPC)
        try:
            self._backend.write_tap(handle.volume, off, buf)
        except StoreFullError:
            await self._backend.make_room(len(buf))
            self._backend.write_tap(handle.volume, off, buf)
        return len(buf)

    @guarded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - the kernel's interface
        """Make a tap's writes durable."""
        handle = self._handles[fh]
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

    # -- everything else is refused --------------------------------------------------------------------------------

    async def _refuse(self, *_args: object) -> Any:  # noqa: ANN401 - never returns
        raise FUSEError(errno.EROFS)

    create = mknod = symlink = link = unlink = rename = setxattr = removexattr = _refuse  # type: ignore[assignment]

    @guarded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - the kernel's interface
        """Do nothing: snapshots are durable when mkdir returns."""


def _text(name: bytes) -> str:
    """Decode a name; ENOENT for what isn't UTF-8."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(errno.ENOENT) from None
