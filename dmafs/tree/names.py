"""Which node a name in a directory is, and which names a directory has."""

from __future__ import annotations

import errno

from pyfuse3 import FUSEError

from dmafs.core.clone import Clone
from dmafs.core.moments import LATEST
from dmafs.errors import NotFoundError
from dmafs.tree.backend import Backend
from dmafs.tree.nodes import (
    SUFFIX,
    TOP,
    CloneFile,
    CloneFolder,
    Directory,
    Link,
    LiveFile,
    Moment,
    Node,
    PastImage,
    SnapshotFolder,
    TapFile,
)
from dmafs.units import format_time, parse_canonical


class Names:
    """The names that a backend's moments, snapshots, clones and volumes have in the tree."""

    def __init__(self, backend: Backend) -> None:
        """Name what *backend* has."""
        self._backend = backend

    def child(self, parent: Node, name: str) -> Node:
        """Return the node called *name* in *parent*; NotFoundError or FUSEError ENOENT."""
        found: Node | None
        match parent:
            case Directory(""):
                found = Directory(name) if name in TOP else None
            case Directory(top):
                found = self._child_of_top(top, name)
            case Moment() | SnapshotFolder():
                volume, seqs = self._volume_of(name), self._seqs(parent)
                found = PastImage(volume, seqs[volume]) if volume in seqs else None
            case CloneFolder(folder):
                volume, clones = self._volume_of(name), self._backend.clones(folder)
                found = CloneFile(volume, folder, clones[volume].serial) if volume in clones else None
            case _:
                raise FUSEError(errno.ENOTDIR)
        if found is None:
            raise FUSEError(errno.ENOENT)
        return found

    def _child_of_top(self, top: str, name: str) -> Node | None:
        match top:
            case "live":
                volume = self._volume_of(name)
                self._backend.live(volume)
                return LiveFile(volume)
            case "tap":
                volume = self._volume_of(name)
                return TapFile(volume) if self._backend.has_tap(volume) else None
            case "at":
                return self._moment(name)
            case "clones":
                self._backend.clones(name)
                return CloneFolder(name)
            case _:
                return self._snapshot(name)

    def _snapshot(self, name: str) -> Node:
        if name == LATEST:
            return Link("snapshots", name, self._latest())
        self._backend.snapshot_seqs(name)
        return SnapshotFolder(name)

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

    def listing(self, node: Node) -> list[tuple[str, Node]]:
        """Return names and nodes in a directory."""
        match node:
            case Directory(top):
                return self._list_top(top)
            case Moment() | SnapshotFolder():
                return [(name + SUFFIX, PastImage(name, seq)) for name, seq in self._seqs(node).items()]
            case CloneFolder(folder):
                clones = self._backend.clones(folder)
                return [(name + SUFFIX, CloneFile(name, folder, clone.serial)) for name, clone in clones.items()]
            case _:
                raise FUSEError(errno.ENOTDIR)

    def _list_top(self, top: str) -> list[tuple[str, Node]]:
        match top:
            case "":
                return [(name, Directory(name)) for name in TOP]
            case "at":
                times, names = self._backend.landmarks()
                entries: list[tuple[str, Node]] = [(format_time(time_ns), Moment(time_ns)) for time_ns in times]
                links = ((name, Link("at", name, format_time(time_ns))) for name, time_ns in names.items())
                return entries + list(links)
            case "snapshots":
                identifiers = self._backend.snapshot_ids()
                folders: list[tuple[str, Node]] = [(name, SnapshotFolder(name)) for name in identifiers]
                return folders + [(LATEST, Link("snapshots", LATEST, name)) for name in identifiers[-1:]]
            case "clones":
                return [(name, CloneFolder(name)) for name in self._backend.clone_names()]
            case _:
                return self._list_files(Directory(top))

    def clone(self, node: CloneFile) -> Clone:
        """Return a node's clone; ESTALE when it was dropped, also if there is one of the same name again."""
        clone = self._backend.clones(node.name).get(node.volume)
        if clone is None or clone.serial != node.serial:
            raise FUSEError(errno.ESTALE)
        return clone

    def _list_files(self, parent: Directory) -> list[tuple[str, Node]]:
        entries = []
        for volume in self._backend.volume_names():
            try:
                entries.append((volume + SUFFIX, self.child(parent, volume + SUFFIX)))
            except (NotFoundError, FUSEError):
                continue  # no recoverable point yet, or no tap
        return entries
