"""What users change in the tree itself: snapshots and clones are taken, dropped and renamed by their folders."""

from __future__ import annotations

import errno
from typing import Final

import pyfuse3
from pyfuse3 import FUSEError

from dmafs.tree.backend import Backend
from dmafs.tree.guard import guarded, text_of, with_deadline
from dmafs.tree.nodes import CloneFolder, Directory, InodeTable, Node, SnapshotFolder

_NO_REPLACE: Final = 1  # RENAME_NOREPLACE of renameat2(2), which holds always


class Changes(pyfuse3.Operations):
    """The part of the tree's operations that change it."""

    def __init__(self, backend: Backend) -> None:
        """Change *backend*."""
        super().__init__()
        self._backend = backend
        self._table = InodeTable()

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return the attributes of a node."""
        raise NotImplementedError

    @guarded
    @with_deadline
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Take a snapshot: ``mkdir snapshots/<name>``, or make a clone: ``mkdir clones/<name>[@<time>]``."""
        node: Node
        match self._table.node(parent_inode):
            case Directory("snapshots"):
                await self._backend.take_snapshot(text_of(name))
                node = SnapshotFolder(text_of(name))
            case Directory("clones"):
                clone, sign, at = text_of(name).partition("@")
                await self._backend.create_clone(clone, at if sign else None)
                node = CloneFolder(clone)
            case _:
                raise FUSEError(errno.EROFS)
        attributes = self._attributes(node)
        self._table.looked_up(node)
        return attributes

    @guarded
    @with_deadline
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Drop a snapshot or a clone: ``rmdir snapshots/<id>``, ``rmdir clones/<name>``."""
        match self._table.node(parent_inode):
            case Directory("snapshots"):
                await self._backend.drop_snapshot(text_of(name))
                self._table.retire(SnapshotFolder(text_of(name)))
            case Directory("clones"):
                await self._backend.drop_clone(text_of(name))
                self._table.retire(CloneFolder(text_of(name)))
            case _:
                raise FUSEError(errno.EROFS)

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
        """Rename a snapshot: ``mv snapshots/<id> snapshots/<name>``. EEXIST if there is one of that name."""
        parents = {self._table.node(parent_inode_old), self._table.node(parent_inode_new)}
        if parents != {Directory("snapshots")}:
            raise FUSEError(errno.EROFS)
        if flags & ~_NO_REPLACE:
            raise FUSEError(errno.EINVAL)
        old, new = text_of(name_old), text_of(name_new)
        await self._backend.rename_snapshot(old, new)
        self._table.rename(SnapshotFolder(old), SnapshotFolder(new))
