"""What users change in the tree itself: snapshots and clones are taken, dropped and renamed by their folders."""

from __future__ import annotations

import errno
from typing import Final

from pyfuse3 import FUSEError

from dmafs.tree.backend import Backend
from dmafs.tree.guard import text_of
from dmafs.tree.nodes import CloneFolder, Directory, InodeTable, Node, SnapshotFolder

_NO_REPLACE: Final = 1  # RENAME_NOREPLACE of renameat2(2), which holds always


class Changes:
    """The changes to one tree; EROFS for all others. Names are as the kernel has them."""

    def __init__(self, backend: Backend, table: InodeTable) -> None:
        """Change *backend*, and keep the numbers in *table* right."""
        self._backend = backend
        self._table = table

    async def make(self, parent: Node, name: bytes) -> Node:
        """Take a snapshot: ``mkdir snapshots/<name>``, or make a clone: ``mkdir clones/<name>[@<time>]``."""
        match parent:
            case Directory("snapshots"):
                await self._backend.take_snapshot(text_of(name))
                return SnapshotFolder(text_of(name))
            case Directory("clones"):
                clone, sign, at = text_of(name).partition("@")
                await self._backend.create_clone(clone, at if sign else None)
                return CloneFolder(clone)
        raise FUSEError(errno.EROFS)

    async def drop(self, parent: Node, name: bytes) -> None:
        """Drop a snapshot or a clone: ``rmdir snapshots/<id>``, ``rmdir clones/<name>``."""
        match parent:
            case Directory("snapshots"):
                await self._backend.drop_snapshot(text_of(name))
                self._table.retire(SnapshotFolder(text_of(name)))
            case Directory("clones"):
                await self._backend.drop_clone(text_of(name))
                self._table.retire(CloneFolder(text_of(name)))
            case _:
                raise FUSEError(errno.EROFS)

    async def rename(self, parents: set[Node], old: bytes, new: bytes, flags: int) -> None:
        """Rename a snapshot: ``mv snapshots/<id> snapshots/<name>``. EEXIST if there is one of that name."""
        if parents != {Directory("snapshots")}:
            raise FUSEError(errno.EROFS)
        if flags & ~_NO_REPLACE:
            raise FUSEError(errno.EINVAL)
        before, after = text_of(old), text_of(new)
        await self._backend.rename_snapshot(before, after)
        self._table.rename(SnapshotFolder(before), SnapshotFolder(after))
