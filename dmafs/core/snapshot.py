"""One snapshot: what is known of it, and where its files are. All of a volume's are in ``snapshots``."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field
from typing import Final

from dmafs.core.batch import Lost
from dmafs.core.layers import Growing
from dmafs.core.segment import Segment
from dmafs.core.storage import Buffer
from dmafs.errors import CorruptionError, PinnedError
from dmafs.units import SECTOR, format_time

log = logging.getLogger(__name__)

DIRECTORY: Final = "backward"

Key = tuple[int, int]


@dataclass(slots=True)
class Snapshot:
    """One snapshot; *segment* is its part of the backward journal, None until it is needed."""

    seq: int
    twin: int  # 0 for the first snapshot at a seq, then 1, 2 ...
    time_ns: int
    instant_ns: int  # canonical time of the moment across all volumes that it was taken with
    name: str
    temporary: bool
    frozen: bool  # a hook had brought what uses the disk to rest
    serial: int
    gone: bool = False
    slot: int = -1  # in the tree of layers, once the mirror has reached it
    busy: int = 0  # how many pieces of work write or rename its files: one takes it, another merges into it
    version: int = 0  # of its files: how often work began on them
    pinned: bool = False  # by the user
    segment: Segment | None = field(default=None, repr=False)
    growing: Growing | None = field(default=None, repr=False)  # the segment's entries, as long as it is the open one

    @property
    def key(self) -> Key:
        """Return what snapshots are ordered by."""
        return self.seq, self.twin

    @property
    def stem(self) -> str:
        """Return the path of the pair of files without the suffix."""
        return f"{DIRECTORY}/{self.seq:020d}" + (f"-{self.twin}" if self.twin else "")

    @property
    def pin(self) -> str:
        """Return the path of the file that is there while it is pinned."""
        return self.stem + ".pin"

    @property
    def hidden(self) -> bool:
        """Say whether it is kept only for somebody who holds its image."""
        return self.gone or self.temporary


def require_unpinned(snapshot: Snapshot) -> None:
    """Raise PinnedError if a snapshot is pinned."""
    if snapshot.pinned:
        raise PinnedError(
            f"snapshot {snapshot.name or format_time(snapshot.time_ns)} is pinned",
            hint="to drop it, unpin it first: dmafs snapshot unpin STORE ID",
        )


def undo_renaming(segment: Segment, name: str) -> None:
    """Have the header say the old name again, durably; where that fails the volume doesn't go on."""
    try:
        segment.rename(name)
        segment.ext.datasync()
    except OSError as error:
        raise OSError(errno.EIO, error.strerror, segment.ext.name) from error


def entry_of(source: Segment, start: int, stop: int, index: int) -> tuple[int, int, Buffer | None]:
    """Read one piece of a backward entry, verified; what is damaged is lost in the copy, too."""
    if source.is_zero(index):
        return start, stop - start, None
    data = bytearray((stop - start) * SECTOR)
    try:
        source.read_into(index, start - source.starts[index], memoryview(data))
    except CorruptionError as error:
        log.error("%s", error.message)
        return start, stop - start, Lost(len(data))
    return start, stop - start, data
