"""The oracle: the full image of a small volume after every event, so that the past is a look-up.

It is as simple as it can be made, since everything else is measured against it.
"""

from __future__ import annotations

from dataclasses import dataclass

SECTOR = 512


class Oracle:
    """What a volume of a few sectors has to show at every seq."""

    def __init__(self, content: bytes) -> None:
        self._images = [content]
        self.times = [0]
        self._extents = [range(0)]  # the sectors that each event wrote

    @property
    def size_sectors(self) -> int:
        return len(self._images[0]) // SECTOR

    @property
    def head(self) -> int:
        return len(self._images) - 1

    def write(self, start: int, data: bytes, time_ns: int) -> None:
        image = self._images[-1]
        begin, end = start * SECTOR, start * SECTOR + len(data)
        assert end <= len(image)
        self._images.append(image[:begin] + data + image[end:])
        self.times.append(time_ns)
        self._extents.append(range(start, start + len(data) // SECTOR))

    def image_at(self, seq: int) -> bytes:
        return self._images[seq]

    def cut(self, head: int) -> None:
        """Forget the events after *head*."""
        assert head <= self.head
        del self._images[head + 1 :]
        del self.times[head + 1 :]
        del self._extents[head + 1 :]

    def written(self, a: int, b: int) -> set[int]:
        """Return the sectors that events between two seqs wrote, whatever with."""
        return {sector for extent in self._extents[min(a, b) + 1 : max(a, b) + 1] for sector in extent}

    def differing(self, a: int, b: int) -> set[int]:
        """Return the sectors whose bytes at two seqs differ."""
        one, other = self._images[a], self._images[b]
        places = ((sector, slice(sector * SECTOR, (sector + 1) * SECTOR)) for sector in range(self.size_sectors))
        return {sector for sector, place in places if one[place] != other[place]}


@dataclass
class Expected:
    """What a clone has to show, and what of it a power cut may leave."""

    seq: int
    base: bytes
    shown: bytearray
    durable: bytearray

    def write(self, offset: int, data: bytes) -> None:
        self.shown[offset : offset + len(data)] = data

    def flushed(self) -> None:
        self.durable[:] = self.shown

    def settle(self, found: bytes) -> None:
        """Assert that after a cut each sector is as at the last flush or as last written; adopt which."""
        for at in range(0, len(self.shown), SECTOR):
            sector = found[at : at + SECTOR]
            assert sector in (self.shown[at : at + SECTOR], self.durable[at : at + SECTOR]), at
        self.shown[:] = self.durable[:] = found  # what is found when a clone is opened is made durable then


def expected_clone(seq: int, base: bytes) -> Expected:
    return Expected(seq, base, bytearray(base), bytearray(base))


def nonzero_sectors(image: bytes) -> int:
    return sum(any(image[at : at + SECTOR]) for at in range(0, len(image), SECTOR))
