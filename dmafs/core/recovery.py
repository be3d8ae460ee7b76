"""Recovery of the forward journal: which segments there are, and what of them counts.

No file is changed before it is known that nothing durable is missing: damage is reported each time. What is cut off is
truncated durably before anything is appended.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from dmafs.core.ondisk import HEADER_SIZE, Kind
from dmafs.core.segment import Segment
from dmafs.core.storage import Storage
from dmafs.errors import CorruptionError

DIRECTORY: Final = "forward"
_STEM_DIGITS: Final = 20  # of 2**64 - 1, so that names sort as seqs do


def stem(first: int) -> str:
    """Return the name, without suffix, of the segment that begins with seq *first*."""
    return f"{DIRECTORY}/{first:0{_STEM_DIGITS}d}"


def last_indicated(segments: Sequence[Segment]) -> int:
    """Return the number of the last segment that has an indicator, or -1."""
    numbers = range(len(segments) - 1, -1, -1)
    return next((number for number in numbers if len(segments[number].indicator_seqs)), -1)


class Recovery:
    """The segments of a journal as they are found, in order."""

    def __init__(self, storage: Storage, uuid: UUID, tail: int, tail_time_ns: int, *, windowed: bool = False) -> None:
        """Begin at the *tail*: events up to it are in the mirror.

        Of a *windowed* journal the segment of event *tail* is needed, too: where nothing behind counts, it has the last
        indicator.
        """
        self._storage = storage
        self._uuid = uuid
        self._tail, self._tail_time_ns = tail, tail_time_ns
        self._first = tail if windowed else tail + 1  # the first event that is needed
        self.segments: list[Segment] = []
        self.head, self.head_time_ns = tail, tail_time_ns
        self._leftovers: list[str] = []  # stems of files that don't count, unlinked once the rest is known to be whole

    def read(self, durable: int) -> int:
        """Read everything behind the tail and cut off a torn end; return up to which seq it had been made durable."""
        stems = self._stems()
        firsts = [int(stem) for stem in stems]
        live = max(bisect_right(firsts, self._first) - 1, 0)
        self._leftovers += stems[:live]  # wholly behind the tail: a release that was cut off
        claimed = durable
        for stem in stems[live:]:
            claimed = max(claimed, self._recover_segment(stem, claimed))
        if self.head < claimed:
            raise CorruptionError(
                f"forward journal ends at seq {self.head}, but everything up to seq {claimed} had been made durable",
                hint="a segment is missing or damaged; the newest history is lost, resync from the primary",
            )
        for stem in self._leftovers:
            self._remove_stem(stem)
        self._drop_torn(claimed)
        return claimed

    def drop_unclosed(self) -> None:
        """Cut behind the last indicator: the rest of that window is in the log still."""
        number = last_indicated(self.segments)
        keep = max(self._tail, self.segments[number].indicator_seqs[-1] if number >= 0 else 0)
        self._remove_from(max(number, 0) + 1)
        if self.segments and self.segments[-1].next_seq > keep + 1:
            self.segments[-1].cut(max(keep + 1, self.segments[-1].header.first))
        self.head = keep
        times = [time for each in self.segments for time in (*each.times[-1:], *each.indicator_times[-1:])]
        self.head_time_ns = max(times, default=self._tail_time_ns)

    def _remove_from(self, number: int) -> None:
        for segment in self.segments[number:]:
            segment.remove()
            segment.close()
        del self.segments[number:]

    def _stems(self) -> list[str]:
        """Return the names of all segments without suffix, ascending; data without descriptors is a leftover."""
        stems: dict[str, set[str]] = {".ext": set(), ".dat": set()}
        for name in self._storage.names(DIRECTORY):
            stem, suffix = name[:-4], name[-4:]
            if suffix not in stems or len(stem) != _STEM_DIGITS or not (stem.isascii() and stem.isdigit()):
                raise CorruptionError(f"{DIRECTORY}/{name} is no file of ours", hint="move it out of the store")
            stems[suffix].add(stem)
        self._leftovers = sorted(stems[".dat"] - stems[".ext"])
        return sorted(stems[".ext"])

    def _recover_segment(self, stem: str, durable: int) -> int:
        """Read one segment; return the highest seq that its records call durable.

        A segment that doesn't follow the one before is behind a torn end: it is only asked what it calls durable.
        """
        try:
            segment = Segment.open(self._storage, f"{DIRECTORY}/{stem}", Kind.FORWARD, self._uuid)
        except CorruptionError:
            if self.head < durable or not self._is_blank(stem):
                raise
            self._leftovers.append(stem)  # created after the last durable moment, not even its header was written
            return 0
        claimed = max(segment.claimed_durable, segment.claims_beyond_end())
        if segment.header.first != int(stem):
            segment.close()
            raise CorruptionError(
                f"{segment.ext.name} begins at seq {segment.header.first}", hint="the file was renamed"
            )
        first_is_right = (
            segment.header.first <= self.head + 1 if not self.segments else (segment.header.first == self.head + 1)
        )
        if not first_is_right:
            segment.close()
            if segment.header.first - 1 <= max(claimed, durable):
                raise CorruptionError(
                    f"forward journal has no events {self.head + 1} to {segment.header.first - 1}",
                    hint=f"a segment before {segment.ext.name} is missing or damaged",
                )
            self._leftovers.append(stem)
            return claimed
        self.segments.append(segment)
        self.head = segment.next_seq - 1
        times = [segment.times[-1:], segment.indicator_times[-1:]]
        self.head_time_ns = max(self.head_time_ns, *(time[0] for time in times if time), 0)
        return claimed

    def _is_blank(self, stem: str) -> bool:
        """Say whether the header of a segment was never durable: nothing else in it was then, either."""
        file = self._storage.open(f"{DIRECTORY}/{stem}.ext")
        try:
            data = bytearray(min(file.size(), HEADER_SIZE))
            file.read_into(data, 0)
        finally:
            file.close()
        return len(data) < HEADER_SIZE or not any(data)

    def _drop_torn(self, durable: int) -> None:
        """Cut at the first event that isn't durable and whose data isn't what its checksum says."""
        for number, segment in enumerate(self.segments):
            if segment.next_seq - 1 < durable and number < len(self.segments) - 1:
                continue
            if segment.cut_torn(durable):
                self._remove_from(number + 1)
                self.head = segment.next_seq - 1
                return

    def _remove_stem(self, stem: str) -> None:
        for suffix in (".ext", ".dat"):
            if self._storage.exists(f"{DIRECTORY}/{stem}{suffix}"):
                self._storage.unlink(f"{DIRECTORY}/{stem}{suffix}")
