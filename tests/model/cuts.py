"""Cuts: which bytes of a file are durable, and an end in the middle of a call.

``Disk`` watches the real storage. For every file it knows the size at its last fdatasync: files of the journals are
only appended, so what lies behind that size is what a power cut may take back. With a fuse set, the n-th change of a
file raises ``Cut`` instead of being done, as if the process had been killed right before it. Of overlays, which are
overwritten in place, it keeps the whole content at the last fdatasync.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dmafs.core.ondisk import HEADER_SIZE
from dmafs.core.overlay import DAT
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.work import Work
from dmafs.units import SECTOR

_NAMING = ("rename", "unlink", "make_directory", "remove_directory")


class Cut(BaseException):
    """The process ends here."""


class Disk:
    """Watches all real files while it is entered."""

    def __init__(self) -> None:
        self.synced: dict[int, int] = {}  # by inode, which a rename doesn't change
        self.contents: dict[int, bytes] = {}  # likewise, of overlays
        self.fuse = -1
        self._stack = contextlib.ExitStack()

    def enter(self) -> None:
        for kind, names in ((RealFile, ("write", "zero", "truncate", "datasync")), (RealStorage, _NAMING)):
            for name in names:
                patch = mock.patch.object(kind, name, self._watched(getattr(kind, name), name))
                self._stack.enter_context(patch)
        self._stack.enter_context(mock.patch.object(RealStorage, "create", self._watched(RealStorage.create, "create")))

    def leave(self) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def fused(self, changes: int) -> Iterator[None]:
        """Let *changes* changes through and end at the next one.

        The garbage collector rests meanwhile: work that an earlier history has left is none of this process's, and
        must not be the one that ends.
        """
        self.fuse = changes
        collected = gc.isenabled()
        gc.disable()
        try:
            with contextlib.suppress(Cut):
                yield
        finally:
            self.fuse = -1
            if collected:
                gc.enable()

    def die(self, work: Work[Any]) -> None:
        """Close *work* as the end of its process does, which cleans nothing up."""
        with self.fused(0):
            work.close()

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(target: Any, *arguments: Any) -> Any:
            if self.fuse == 0:
                raise Cut
            self.fuse -= self.fuse > 0
            result = call(target, *arguments)
            if name in {"datasync", "truncate", "create"}:
                info = os.fstat((result if name == "create" else target).fileno())
                known = self.synced.get(info.st_ino, 0)
                sizes = {"datasync": info.st_size, "truncate": min(known, info.st_size), "create": 0}
                self.synced[info.st_ino] = sizes[name]
                file = result if name == "create" else target
                if file.name.endswith(DAT):
                    self.contents[info.st_ino] = Path(f"/proc/self/fd/{file.fileno()}").read_bytes()
            return result

        return watched

    def tear(self, path: Path, rng: random.Random) -> bool:
        """Take back some of what isn't durable in an append-only file; return whether there was any such thing."""
        durable, content = self.synced.get(path.stat().st_ino, 0), bytearray(path.read_bytes())
        if durable >= len(content):
            return False
        header = HEADER_SIZE if path.suffix == ".ext" else 0
        if rng.random() < 0.5 or len(content) <= max(durable, header):
            del content[rng.randrange(durable, len(content)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(max(durable, header), len(content))] ^= rng.randrange(1, 256)
            if durable < header and rng.random() < 0.3:
                content[:header] = bytes(header)
        path.write_bytes(content)
        return True

    def tear_overlay(self, path: Path, rng: random.Random) -> None:
        """Take back some sectors of what isn't durable in an overlay's data, wherever it stands."""
        durable, content = self.contents[path.stat().st_ino], bytearray(path.read_bytes())
        torn = [at for at in range(0, len(content), SECTOR) if rng.random() < 0.5]
        for at in torn:
            content[at : at + SECTOR] = durable[at : at + SECTOR]
        path.write_bytes(content)
        self.contents[path.stat().st_ino] = bytes(content)
