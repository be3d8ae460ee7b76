"""Names and inodes of the tree.

====================================  ==============================================================================
path                                  node
====================================  ==============================================================================
``/``                                 ``Directory("")``
``/live /at /clones`` ...             ``Directory("live")`` ...
``/live/<volume>.img``                ``LiveFile``
``/tap/<volume>.img``                 ``TapFile``
``/at/<canonical time>``              ``Moment``
``/at/<any other spelling>``          ``Link`` to the canonical time
``/snapshots/<id>``                   ``SnapshotFolder``
``/snapshots/latest``                 ``Link`` to the newest id
``/clones/<name>``                    ``CloneFolder``
``/clones/<name>/<volume>.img``       ``CloneFile(volume, name, serial)``: the serial tells it from an earlier clone of
                                      that name
``/at/<time>/<volume>.img``,          ``PastImage(volume, seq)``: one inode for one seq, so all spellings and all ways
to ``/snapshots/<id>/<volume>.img``      it share the page cache
``<volume>.p<number>.img`` beside an     ``PartitionFile(image, start, length)``: one inode for one range of one image;
image, but for a tap's                   when a table changes, the name means another node
====================================  ==============================================================================

An inode number means one node for as long as the tree is mounted: numbers are never given a second time. Nodes are in
memory only while the kernel knows them or has them open.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

import pyfuse3

SUFFIX: Final = ".img"
TOP: Final = ("at", "clones", "live", "snapshots", "tap")


@dataclass(frozen=True, slots=True)
class Directory:
    """The root (name "") or one of the directories in it."""

    name: str


@dataclass(frozen=True, slots=True)
class Moment:
    """A canonical folder below ``at``."""

    time_ns: int


@dataclass(frozen=True, slots=True)
class SnapshotFolder:
    """A folder below ``snapshots``."""

    identifier: str


@dataclass(frozen=True, slots=True)
class CloneFolder:
    """A folder below ``clones``."""

    name: str


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in directory *parent*."""

    parent: str
    name: str
    target: str


@dataclass(frozen=True, slots=True)
class LiveFile:
    """The newest state of a volume."""

    volume: str


@dataclass(frozen=True, slots=True)
class TapFile:
    """The primary itself, captured."""

    volume: str


@dataclass(frozen=True, slots=True)
class PastImage:
    """A volume at a seq."""

    volume: str
    seq: int


@dataclass(frozen=True, slots=True)
class CloneFile:
    """A volume in a clone."""

    volume: str
    name: str
    serial: int


@dataclass(frozen=True, slots=True)
class PartitionFile:
    """A partition of an image: *length* bytes of it from *start* on."""

    image: PastImage | LiveFile | CloneFile
    start: int
    length: int


Whole = Directory | Moment | SnapshotFolder | CloneFolder | Link | CloneFile | LiveFile | TapFile | PastImage
Node = Whole | PartitionFile


def whole(node: Node) -> Whole:
    """Return the image that a partition's file is of; any other node itself."""
    return node.image if isinstance(node, PartitionFile) else node


class InodeTable:
    """Which inode number is which node. The kernel's look-ups are counted; a node nobody knows is forgotten."""

    def __init__(self) -> None:
        """Begin with the root and the directories in it, which are never forgotten."""
        self._nodes: dict[int, Node] = {}
        self._inodes: dict[Node, int] = {}
        self._lookups: dict[int, int] = {}
        self._next = int(pyfuse3.ROOT_INODE)
        for name in ("", *TOP):
            self._lookups[self.inode(Directory(name))] = 1

    def __len__(self) -> int:
        """Return the number of nodes in memory."""
        return len(self._nodes)

    def inode(self, node: Node) -> pyfuse3.InodeT:
        """Return the number of a node, a new one if it has none."""
        number = self._inodes.get(node)
        if number is None:
            number = self._next
            self._next += 1
            self._nodes[number] = node
            self._inodes[node] = number
        return pyfuse3.InodeT(number)

    def node(self, inode: pyfuse3.InodeT) -> Node:
        """Return the node of a number; FUSEError ESTALE if it was forgotten."""
        try:
            return self._nodes[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def looked_up(self, node: Node) -> pyfuse3.InodeT:
        """Count a look-up by the kernel; return the node's number."""
        number = self.inode(node)
        self._lookups[number] = self._lookups.get(number, 0) + 1
        return number

    def forget(self, inode: pyfuse3.InodeT, count: int) -> None:
        """Take back look-ups."""
        left = self._lookups.get(inode, 0) - count
        if left > 0 or inode <= len(TOP) + 1:
            self._lookups[inode] = max(left, 1)
            return
        self._lookups.pop(inode, None)
        node = self._nodes.pop(inode, None)
        if node is not None and self._inodes.get(node) == inode:
            del self._inodes[node]

    def retire(self, node: Node) -> None:
        """Take the number from a node that was removed: one of the same name gets a new one.

        The kernel finds nothing more in a directory it has removed, as long as anybody uses anything in it.
        """
        number = self._inodes.pop(node, None)
        if number is not None and number not in self._lookups:
            del self._nodes[number]

    def rename(self, old: Node, new: Node) -> None:
        """Have the number of a node be that of another one: who is in the folder stays there."""
        self.retire(new)
        number = self._inodes.pop(old, None)
        if number is not None:
            self._nodes[number] = new
            self._inodes[new] = number

    def drop_unknown(self, node: Node) -> None:
        """Forget a node whose number was only listed, never looked up."""
        number = self._inodes.get(node)
        if number is not None and number not in self._lookups:
            del self._inodes[node]
            del self._nodes[number]
