"""The descriptors of one segment in memory: packed columns, about 50 bytes an event.

``Columns`` knows nothing of files; ``Segment`` adds the two queues that the descriptors come from and point into.
Events are numbered from 0 here; event number i has the seq ``first + i``.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from dmafs.core.extent import Ints
from dmafs.core.ondisk import EVENT_FLAGS, Flag, Records


@dataclass(frozen=True, slots=True)
class Indicator:
    """A sync indicator: a point of the primary that was flushed, ticked or named (fig. 7, 710)."""

    seq: int
    time_ns: int
    flag: Flag
    name: str = ""


class Columns:
    """Events and sync indicators in the order of their records."""

    def __init__(self, first: int) -> None:
        """Begin empty; *first* is the seq of the first event."""
        self._first = first
        self.starts = array("q")
        self.lengths = array("q")
        self.physicals = array("q")
        self.times = array("q")
        self.checksums = array("Q")
        self.flags = bytearray()  # of each event
        self.verified = bytearray()  # 1 once the checksum of the event's data was right
        self.indicator_seqs = array("q")
        self.indicator_times = array("q")
        self.indicator_flags = bytearray()
        self.indicator_positions = array("q")  # of a log that the events come from, behind the indicator's window
        self.indicator_retained = array("q")  # from where on that log is still of use then
        self.mark_places: dict[int, tuple[int, int, int]] = {}  # indicator index -> physical, length, checksum
        self.records = 0
        self.data_sectors = 0
        self.claimed_durable = 0

    def __len__(self) -> int:
        """Return the number of events."""
        return len(self.starts)

    @property
    def next_seq(self) -> int:
        """Return the seq that the next event will have."""
        return self._first + len(self.starts)

    def absorb(self, records: Records) -> None:
        """Add decoded records to the columns."""
        if not len(records):
            return
        event = np.isin(records["flags"], EVENT_FLAGS)
        events = records[event]
        for column, field in (
            (self.starts, "start"),
            (self.lengths, "length"),
            (self.physicals, "physical"),
            (self.times, "time_ns"),
        ):
            column.frombytes(events[field].astype(np.int64).tobytes())
        self.checksums.frombytes(events["data_checksum"].tobytes())
        self.flags += events["flags"].astype(np.uint8).tobytes()
        self.verified += bytes(len(events))
        indicators = records[~event]
        names = np.flatnonzero(indicators["flags"] == int(Flag.MARK)).tolist()
        for index in names:
            place = indicators[index]
            where = len(self.indicator_seqs) + index
            self.mark_places[where] = int(place["physical"]), int(place["length"]), int(place["data_checksum"])
        self.indicator_seqs.frombytes(indicators["seq"].astype(np.int64).tobytes())
        self.indicator_times.frombytes(indicators["time_ns"].astype(np.int64).tobytes())
        self.indicator_flags += indicators["flags"].astype(np.uint8).tobytes()
        self.indicator_positions.frombytes(indicators["start"].astype(np.int64).tobytes())
        retained = np.where(indicators["flags"] == int(Flag.MARK), 0, indicators["data_checksum"])
        self.indicator_retained.frombytes(retained.astype(np.int64).tobytes())
        with_data = np.isin(records["flags"], (int(Flag.DATA), int(Flag.MARK)))
        ends = np.where(with_data, records["physical"] + records["length"], 0)
        self.data_sectors = max(self.data_sectors, int(ends.max()))
        self.claimed_durable = max(self.claimed_durable, int(records["durable"].max()))
        self.records += len(records)

    def add_event(self, time_ns: int, start: int, length: int, flag: Flag, digest: int) -> None:
        """Add an event whose data, if it has any, follows that of the one before."""
        self.starts.append(start)
        self.lengths.append(length)
        self.physicals.append(self.data_sectors)
        self.times.append(time_ns)
        self.checksums.append(digest)
        self.flags.append(flag)
        self.verified.append(0)
        self.records += 1
        if flag == Flag.DATA:
            self.data_sectors += length

    def add_indicator(
        self, time_ns: int, flag: Flag, length: int, digest: int, *, position: int, retained: int
    ) -> None:
        """Add a sync indicator whose name, if it has one, takes *length* sectors of data."""
        if flag == Flag.MARK:
            self.mark_places[len(self.indicator_seqs)] = self.data_sectors, length, digest
        self.indicator_seqs.append(self.next_seq - 1)
        self.indicator_times.append(time_ns)
        self.indicator_flags.append(flag)
        self.indicator_positions.append(position)
        self.indicator_retained.append(0 if flag == Flag.MARK else retained)
        self.records += 1
        self.data_sectors += length

    def forget(self, seq: int, *, indicators: int | None = None) -> None:
        """Forget event *seq* and all after it, and the indicators after the event before it (or from a number on)."""
        keep = seq - self._first
        assert 0 <= keep <= len(self)
        marks = int(np.searchsorted(np.array(self.indicator_seqs, np.int64), seq, "left"))
        if indicators is not None:
            marks = min(marks, indicators)
        for column in (self.starts, self.lengths, self.physicals, self.times, self.checksums):
            del column[keep:]
        del self.flags[keep:]
        del self.verified[keep:]
        for column in (
            self.indicator_seqs,
            self.indicator_times,
            self.indicator_positions,
            self.indicator_retained,
        ):
            del column[marks:]
        del self.indicator_flags[marks:]
        self.mark_places = {index: place for index, place in self.mark_places.items() if index < marks}
        self.records = keep + marks
        ends = [place[0] + place[1] for place in self.mark_places.values()]
        data = [index for index in range(keep - 1, -1, -1) if self.flags[index] == Flag.DATA][:1]
        self.data_sectors = max([self.physicals[index] + self.lengths[index] for index in data] + ends, default=0)

    def agrees(self, records: Records) -> bool:
        """Say whether records are those that the columns were made from, but for checksums and what is durable."""
        other = Columns(self._first)
        other.absorb(records)
        seqs = records["seq"][np.isin(records["flags"], EVENT_FLAGS)]
        return (
            self._contents() == other._contents()
            and self.mark_places == other.mark_places
            and np.array_equal(seqs, np.arange(self._first, self.next_seq, dtype=np.uint64))
        )

    def _contents(self) -> list[bytes]:
        columns = (
            *(self.starts, self.lengths, self.physicals, self.times, self.checksums, self.flags),
            *(self.indicator_seqs, self.indicator_times, self.indicator_flags),
            *(self.indicator_positions, self.indicator_retained),
        )
        return [bytes(column) for column in columns]

    def is_zero(self, index: int) -> bool:
        """Say whether event number *index* has no data and reads as zeros."""
        return self.flags[index] == Flag.ZERO

    def indicators_of(self, *kinds: Flag) -> list[int]:
        """Return the numbers of the indicators of some kinds."""
        return np.flatnonzero(np.isin(np.frombuffer(bytes(self.indicator_flags), np.uint8), kinds)).tolist()

    def extents(self, begin: int = 0, end: int | None = None) -> tuple[Ints, Ints]:
        """Return copies of starts and stops of the events ``[begin, end)``."""
        starts = np.array(self.starts[begin:end], np.int64)
        return starts, starts + np.array(self.lengths[begin:end], np.int64)

    def select(self, start: int, stop: int, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
        """Return those of the events ``[begin, end)`` that overlap a range of sectors: starts, stops, numbers."""
        starts = np.frombuffer(self.starts, np.int64)[begin:end]
        stops = starts + np.frombuffer(self.lengths, np.int64)[begin:end]
        index = np.flatnonzero((starts < stop) & (stops > start))
        return starts[index], stops[index], index + begin

    def check(self) -> None:
        """Assert the invariants: columns of one length, physical addresses in order."""
        count = len(self.starts)
        columns = self.lengths, self.physicals, self.times, self.checksums, self.flags, self.verified
        assert all(len(column) == count for column in columns)
        assert self.records == count + len(self.indicator_seqs)
        assert len(self.indicator_seqs) == len(self.indicator_times) == len(self.indicator_flags)
        assert len(self.indicator_seqs) == len(self.indicator_positions) == len(self.indicator_retained)
        assert np.all(np.diff(np.array(self.physicals, np.int64)) >= 0), "physical addresses never decrease"
