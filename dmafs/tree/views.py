"""Views: the partitions of an image as files beside it, ``<volume>.p<number>.img``.

Which there are is found in the image's own bytes, read as any other. Of an image of the past that is done once, of what
changes at each look-up and each listing. A volume's image has precedence over a view of the same name, in all folders.
"""

from __future__ import annotations

import errno
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from pyfuse3 import FUSEError

from dmafs.core.partitions import Partition, scanned
from dmafs.errors import DmafsError, NotFoundError
from dmafs.tree.backend import Backend
from dmafs.tree.names import Names
from dmafs.tree.nodes import SUFFIX, CloneFile, LiveFile, Node, PartitionFile, PastImage

log = logging.getLogger(__name__)

KEPT_MAX: Final = 256
"""Images of the past whose partitions are kept in memory, the least recently used go first. At worst 50 KiB each."""

_VIEW: Final = re.compile(r"(.+)\.p([1-9][0-9]{0,3})" + re.escape(SUFFIX), re.DOTALL)
_Reading = Callable[[int, int], Awaitable[memoryview]]


class Views:
    """The names of directories, with those of views."""

    def __init__(self, backend: Backend, names: Names) -> None:
        """Add views to *names*, which are those of *backend*."""
        self._backend = backend
        self._names = names
        self._kept: OrderedDict[PastImage, list[Partition]] = OrderedDict()

    async def child(self, parent: Node, name: str) -> Node:
        """Return the node called *name* in *parent*; NotFoundError or FUSEError ENOENT."""
        match = _VIEW.fullmatch(name)
        if match is None or name.removesuffix(SUFFIX) in self._backend.volume_names():
            return self._names.child(parent, name)
        image = self._names.child(parent, match[1] + SUFFIX)
        if isinstance(image, (PastImage, LiveFile, CloneFile)):
            for partition in await self._partitions(image):
                if partition.number == int(match[2]):
                    return PartitionFile(image, partition.start, partition.length)
        raise FUSEError(errno.ENOENT)

    async def listing(self, node: Node) -> list[tuple[str, Node]]:
        """Return names and nodes in a directory; the views of an image whose table can't be read are left out."""
        found: list[tuple[str, Node]] = []
        volumes = set(self._backend.volume_names())
        for name, image in self._names.listing(node):
            found.append((name, image))
            if isinstance(image, (PastImage, LiveFile, CloneFile)):
                for partition in await self._readable_partitions(image):
                    view = f"{image.volume}.p{partition.number}"
                    if view not in volumes:
                        found.append((view + SUFFIX, PartitionFile(image, partition.start, partition.length)))
        return found

    async def _readable_partitions(self, node: PastImage | LiveFile | CloneFile) -> list[Partition]:
        try:
            return await self._partitions(node)
        except (NotFoundError, FUSEError):
            return []  # it has coarsened away, or was dropped
        except (DmafsError, OSError) as error:
            log.error("partitions of volume %s are not listed: %s", node.volume, error)
            return []

    async def _partitions(self, node: PastImage | LiveFile | CloneFile) -> list[Partition]:
        """Return the partitions that an image has now. Held or opened meanwhile, so that it isn't dropped."""
        size = self._backend.size(node.volume)
        match node:
            case PastImage():
                return await self._past(node, size)
            case LiveFile(volume):
                return await _scan(partial(self._backend.read, self._backend.live(volume)), size)
            case CloneFile():
                clone = self._names.clone(node)
                clone.opens += 1
                try:
                    return await _scan(partial(self._backend.read_clone, clone), size)
                finally:
                    clone.opens -= 1

    async def _past(self, node: PastImage, size: int) -> list[Partition]:
        if node in self._kept:
            self._kept.move_to_end(node)
            return self._kept[node]
        image = self._backend.image(node.volume, node.seq)
        self._backend.hold(image)
        try:
            found = await _scan(partial(self._backend.read, image), size)
        finally:
            self._backend.release(image)
        self._kept[node] = found
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        return found


async def _scan(read: _Reading, size: int) -> list[Partition]:
    """Return the partitions of what *read* reads, *size* bytes."""
    scan = scanned(size)
    try:
        wanted = next(scan)
        while True:
            wanted = scan.send(bytes(await read(*wanted)))
    except StopIteration as stop:
        found: list[Partition] = stop.value
        return found
