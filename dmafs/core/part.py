"""One segment of the forward journal as the journal knows it: by its seal, by its descriptors in memory, or by both."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from dmafs.core.columns import Indicator
from dmafs.core.files import discard_index
from dmafs.core.ondisk import Flag, Kind
from dmafs.core.seal import Seal, Summary
from dmafs.core.segment import Segment
from dmafs.core.storage import Storage
from dmafs.errors import CorruptionError

_ANY_TIME: Final = 2**62
"""After all times that a clock may show."""


class Part:
    """See the module. *segment* is there as long as the part isn't sealed, and whenever its descriptors are needed."""

    def __init__(
        self, stem: str, first: int, *, segment: Segment | None = None, seal: Seal | None = None, damage: str = ""
    ) -> None:
        """Take what is known of the segment that begins with seq *first*; with *damage* nothing of it can be read."""
        assert segment is not None or seal is not None
        self.stem = stem
        self.first = first
        self.segment = segment
        self.seal = seal
        self.damage = damage

    @classmethod
    def damaged(cls, stem: str, first: int, next_seq: int, *, time_ns: int, message: str) -> Part:
        """Return a part of which nothing is known but its seqs and the time before it.

        It may hold any time after that, and whoever needs to know gets the error.
        """
        unknown = Summary(0, next_seq, 0, time_ns + 1, _ANY_TIME, 0, 0, 0, 0, 0, 0)
        return cls(stem, first, seal=Seal(unknown, (), 0), damage=message)

    def _known(self) -> Summary:
        assert self.seal is not None
        return self.seal.summary

    @property
    def next_seq(self) -> int:
        """Return the seq behind its last event."""
        return self.segment.next_seq if self.segment is not None else self._known().next_seq

    @property
    def records(self) -> int:
        """Return the number of its records."""
        return self.segment.records if self.segment is not None else self._known().records

    def __len__(self) -> int:
        """Return the number of its events."""
        return self.next_seq - self.first

    @property
    def data_sectors(self) -> int:
        """Return how much data it has."""
        return self.segment.data_sectors if self.segment is not None else self._known().data_sectors

    @property
    def first_time_ns(self) -> int:
        """Return the time of its first event; it has one."""
        return self.segment.times[0] if self.segment is not None else self._known().first_time_ns

    @property
    def last_time_ns(self) -> int:
        """Return a time that none of its events is later than, nor one of its indicators."""
        if self.segment is None:
            return self._known().last_time_ns
        return max([*self.segment.times[-1:], *self.segment.indicator_times[-1:]], default=0)

    @property
    def first_indicator(self) -> int:
        """Return the seq of its first sync indicator; it has one."""
        return self.segment.indicator_seqs[0] if self.segment is not None else self._known().first_indicator

    @property
    def last_indicator(self) -> Indicator | None:
        """Return its last sync indicator."""
        self.require_known()
        if self.segment is None:
            return self.seal.last_indicator if self.seal is not None else None
        count = len(self.segment.indicator_seqs)
        return self.segment.indicator(count - 1) if count else None

    @property
    def has_indicator(self) -> bool:
        """Say whether it is known to have a sync indicator."""
        return bool(self.segment.indicator_seqs if self.segment is not None else self._known().indicators)

    def landmarks(self, *flags: Flag) -> list[Indicator]:
        """Return its indicators of some of the kinds that a seal keeps."""
        if self.seal is not None:
            return [one for one in self.seal.landmarks if one.flag in flags]
        assert self.segment is not None
        return [self.segment.indicator(number) for number in self.segment.indicators_of(*flags)]

    def place_in_log(self) -> tuple[int, int]:
        """Return what its indicators say last of the tap's log: position, and retained or 0. It has one."""
        if self.segment is None:
            return self._known().position, self._known().retained
        retained = next((value for value in reversed(self.segment.indicator_retained) if value), 0)
        return self.segment.indicator_positions[-1], retained

    def require_known(self) -> None:
        """Raise CorruptionError if it is damaged."""
        if self.damage:
            raise CorruptionError(
                self.damage, hint="the storage below the store is damaged; moments that need this segment can't be read"
            )

    def open(self, storage: Storage, uuid: UUID) -> Segment:
        """Open a sealed part's files and read its descriptors. May run in a thread."""
        self.require_known()
        return Segment.open(storage, self.stem, Kind.FORWARD, uuid, seal=self.seal)

    def remove(self, storage: Storage) -> None:
        """Unlink its files, the descriptors first."""
        if self.segment is not None:
            self.segment.remove()
        else:
            storage.unlink(self.stem + ".ext")
            storage.unlink(self.stem + ".dat")
        discard_index(storage, self.stem)
