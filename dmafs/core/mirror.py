"""The mirror in the middle (fig. 8): a raw sparse image of the size and addresses of the primary, at a known seq.

Which seq that is stands in the pointers, not here. The mirror is overwritten only by the initial copy and by a sync
whose commit record is durable.
"""

from __future__ import annotations

import numpy as np

from dmafs.core.extent import Ints
from dmafs.core.storage import Buffer, Storage
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

NAME = "mirror.img"


class Mirror:
    """The mirror of one volume; addresses in sectors."""

    def __init__(self, storage: Storage, size_sectors: int) -> None:
        """Open the image; CorruptionError if it is missing or of another size."""
        try:
            self.file = storage.open(NAME)
        except FileNotFoundError:
            raise CorruptionError(f"{NAME} is missing", hint="restore it; all history needs it") from None
        size = self.file.size()
        if size != size_sectors * SECTOR:
            self.file.close()
            raise CorruptionError(
                f"{self.file.name} has {size} bytes instead of {size_sectors * SECTOR}",
                hint="the file was truncated or extended from outside; restore it",
            )
        self.size_sectors = size_sectors
        self._allocated: tuple[Ints, Ints] | None = None

    @staticmethod
    def create(storage: Storage, size_sectors: int) -> None:
        """Create an image that is one hole."""
        file = storage.create(NAME)
        try:
            file.truncate(size_sectors * SECTOR)
            file.datasync()
        finally:
            file.close()

    def read_into(self, buffer: memoryview | bytearray, start: int, *, nowait: bool = False) -> None:
        """Fill *buffer* from sector *start* on; with *nowait* BlockingIOError if that has to wait for the disk."""
        if nowait:
            self.file.read_into_nowait(buffer, start * SECTOR)
        else:
            self.file.read_into(buffer, start * SECTOR)

    def write(self, data: Buffer, start: int) -> None:
        """Overwrite from sector *start* on."""
        assert start * SECTOR + len(data) <= self.size_sectors * SECTOR
        self.file.write([data], start * SECTOR)
        self._allocated = None  # after it: another thread may have asked meanwhile

    def zero(self, start: int, stop: int) -> None:
        """Make sectors a hole."""
        self.file.zero(start * SECTOR, (stop - start) * SECTOR)
        self._allocated = None

    def forget_from(self, start: int) -> None:
        """Make everything from sector *start* on a hole: what an interrupted initial copy may have left there."""
        self.zero(start, self.size_sectors)  # not by truncating: the size is never wrong, wherever this is cut off

    def datasync(self) -> None:
        """Make all writes durable."""
        self.file.datasync()

    def allocated(self) -> tuple[Ints, Ints]:
        """Return the sectors that aren't holes as a disjoint list; kept until the next write. O(holes)."""
        if self._allocated is None:
            ranges = list(self.file.data_ranges(0, self.size_sectors * SECTOR))
            starts = np.array([start // SECTOR for start, _ in ranges], np.int64)
            stops = np.array([stop // SECTOR for _, stop in ranges], np.int64)
            self._allocated = starts, stops
        return self._allocated

    def close(self) -> None:
        """Close the image."""
        self.file.close()

    def check(self) -> None:
        """Assert that the image still has its size."""
        assert self.file.size() == self.size_sectors * SECTOR
