"""A program: a FUSE file system with one file, ``disk``, whose writes fail or are slow while another file is there.

``python faulty_disk.py MOUNTPOINT BACKING FAULT``: what is written to the disk goes to the file BACKING. While the file
FAULT exists and is empty nothing is written, and the answer is EIO; if it has a number each write takes so many
seconds. Reads go on. A loop device over it is a disk that does the same. (One over a file on a full file system would
not do: the kernel's driver takes a write that was done in part for a success.)
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio

DISK = pyfuse3.InodeT(2)


class FaultyDisk(pyfuse3.Operations):
    """See the module."""

    def __init__(self, backing: Path, fault: Path) -> None:
        super().__init__()
        self._fd = os.open(backing, os.O_RDWR | os.O_CLOEXEC)
        self._fault = fault

    async def _check(self) -> None:
        try:
            text = self._fault.read_text()
        except FileNotFoundError:
            return
        if not text:
            raise pyfuse3.FUSEError(errno.EIO)
        await trio.sleep(float(text))

    async def getattr(self, inode: pyfuse3.InodeT, ctx: Any = None) -> pyfuse3.EntryAttributes:
        del ctx
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink = inode, 1
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600 if inode == DISK else stat.S_IFDIR | 0o700)
        entry.st_size = os.fstat(self._fd).st_size if inode == DISK else 0
        return entry

    async def lookup(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        del parent_inode
        if name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(DISK, ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: Any) -> pyfuse3.FileInfo:
        del inode, flags, ctx
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        del fh
        return os.pread(self._fd, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        del fh
        await self._check()
        return os.pwrite(self._fd, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - the kernel's interface
        del fh, datasync
        await self._check()
        os.fdatasync(self._fd)


if __name__ == "__main__":
    point, backing, fault = (Path(word) for word in sys.argv[1:])
    pyfuse3.init(FaultyDisk(backing, fault), str(point), {"fsname=faulty-disk"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()
