"""The forward journal when it is opened: which segments there are, and what of them counts. Cases are in ``recovery``.

1. What had been durable is known by what all segments claim; so all are looked at before anything is decided. Those
   that are sealed and not the last one cost three reads each at most, however long they are.
2. No file is changed before it is known that nothing durable is missing in what isn't sealed: damage is reported each
   time. What is cut off is truncated durably before anything is appended.
3. Nothing that is sealed is cut off: behind it everything was durable, up to an indicator, before it was sealed.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

from dmafs.core.files import INDEX, discard_index, unlink_if_there
from dmafs.core.ondisk import HEADER_SIZE, Kind
from dmafs.core.opening import open_ours
from dmafs.core.part import Part
from dmafs.core.recovery import (
    DIRECTORY,
    PASSED_OVER,
    REFUSED,
    STEM_DIGITS,
    Durable,
    FoundSegment,
    Header,
    Refuse,
    case,
    end_case,
    file_case,
    index_case,
    refuse,
    segment_case,
    stem,
    tail_case,
)
from dmafs.core.seal import Seal, read_seal
from dmafs.core.segment import Segment, read_header
from dmafs.core.storage import Storage
from dmafs.errors import CorruptionError, StoreError, VersionError

log = logging.getLogger(__name__)

_IN_MIRROR: Final = FoundSegment(
    needed=False, header="good", follows=True, later=True, sealed=True, whole=True, durable="none"
)
"""Nobody looks at a segment that isn't needed."""


def last_indicated(parts: Sequence[Part]) -> int:
    """Return the number of the last part that has an indicator, or may have had one, or -1."""
    numbers = range(len(parts) - 1, -1, -1)
    return next((number for number in numbers if parts[number].has_indicator or parts[number].damage), -1)


@dataclass(slots=True)
class _Look:
    """What was seen of one segment before anything is decided."""

    first: int
    stop: int | None
    """Where the next one begins."""
    header: Header = "good"
    seal: Seal | None = None
    segment: Segment | None = None
    """Read if it isn't known by its seal."""
    error: StoreError | None = None
    durable: int = 0
    """Up to where its records say that journal and primary were durable."""
    certain: int = 0
    """Up to where its seal says that the journal was."""


class Recovery:
    """The segments of a journal as they are found, in order."""

    def __init__(
        self,
        storage: Storage,
        uuid: UUID,
        tail: int,
        tail_time_ns: int,
        *,
        windowed: bool = False,
        refuse: Refuse = refuse,
    ) -> None:
        """Begin at the *tail*: events up to it are in the mirror.

        Of a *windowed* journal the segment of event *tail* is needed, too: where nothing behind counts, it has the last
        indicator. If *refuse*, which is told what is refused, doesn't raise it, all is looked at and nothing is done.
        """
        self._storage = storage
        self._told = refuse
        self.refused = False
        self._uuid = uuid
        self._tail, self._tail_time_ns = tail, tail_time_ns
        self._windowed = windowed
        self._first = tail if windowed else tail + 1  # the first event that is needed
        self._looks: list[_Look] = []
        self.parts: list[Part] = []
        self.head, self.head_time_ns = tail, tail_time_ns
        self._leftovers: list[int] = []  # segments that don't count, unlinked once the rest is known to be whole
        self._lonely: list[int] = []  # data without descriptors
        self._indexes: list[int] = []  # and indexes

    def read(self, durable: int) -> int:
        """Find out what counts, cut off what doesn't, and make the rest durable.

        Return up to which seq journal and primary had been durable; *durable* is what the pointers say.
        """
        try:
            claimed, durable = self._decide(durable)
            if self.refused:
                return durable
            lonely = [] if any(part.damage for part in self.parts) else self._lonely
            for first in [*self._leftovers, *lonely]:
                self._unlink(first)
            for first in self._indexes:
                discard_index(self._storage, stem(first))
            self._cut(claimed)
            for part in self.parts:
                if part.segment is not None:
                    part.segment.trim()
            self._storage.sync_directory(DIRECTORY)
        except BaseException:
            self.close()
            raise
        return durable

    def close(self) -> None:
        """Close all files."""
        for look in self._looks:
            if look.segment is not None:
                look.segment.close()

    def _refuse(self, name: str, error: StoreError) -> None:
        self.refused = True
        self._told(name, error)

    def _decide(self, durable: int) -> tuple[int, int]:
        """Go through the tables without changing a file; return what is claimed, and what the records say of it."""
        firsts = self._names()
        live = max(bisect_right(firsts, self._first) - 1, 0)
        for first in firsts[:live]:
            case(segment_case(_IN_MIRROR), stem(first))
        self._leftovers += firsts[:live]
        for first, stop in zip(firsts[live:], [*firsts[live + 1 :], None], strict=False):
            self._looks.append(self._look(first, stop))
        durable = max([durable, *(look.durable for look in self._looks)])
        claimed = max([durable, *(look.certain for look in self._looks)])
        for look in self._looks:
            self._take(look, claimed)
        self._end(claimed)
        return claimed, durable

    def _names(self) -> list[int]:
        """Return the first seqs of all segments, ascending; data without descriptors is a leftover."""
        found: dict[str, set[int]] = {".ext": set(), ".dat": set(), INDEX: set()}
        names = self._storage.names(DIRECTORY)
        for name in names:
            digits, suffix = name[:-4], name[-4:]
            ours = suffix in found and len(digits) == STEM_DIGITS and digits.isascii() and digits.isdigit()
            ext = ours and f"{digits}.ext" in names
            if ours and suffix == INDEX:
                case(index_case(beside=ext), name)
                found[suffix].add(int(digits))
            elif case(file_case(ours=ours, ext=ext), name) == "R1":
                path = f"{DIRECTORY}/{name}"
                foreign = f"{self._storage.path(path)} is no file of ours"
                self._refuse(path, CorruptionError(foreign, hint="move it out of the store"))
            else:
                found[suffix].add(int(digits))
        self._lonely = sorted(found[".dat"] - found[".ext"])
        self._indexes = sorted(found[INDEX] - found[".ext"])
        return sorted(found[".ext"])

    def _look(self, first: int, stop: int | None) -> _Look:
        """See what is in a segment: its header and its seal and, unless a later one makes these enough, all of it."""
        look = _Look(first, stop)
        try:
            ext = open_ours(self._storage, f"{stem(first)}.ext", needed="some of the history can't be read without it")
        except CorruptionError as error:
            look.header, look.error = "damaged", error
            return look
        try:
            header = read_header(ext, Kind.FORWARD, self._uuid)
            if header.first != first:
                raise CorruptionError(
                    f"{ext.name} begins at seq {header.first}",
                    hint=f"the file was renamed; give it back its name, which ends in {stem(header.first)}.ext",
                )
            look.seal = read_seal(ext, header.salt, first)
        except (CorruptionError, VersionError) as error:
            if isinstance(error, VersionError):
                self._refuse(f"{stem(first)}.ext", error)
            look.error = error
            data = bytearray(min(ext.size(), HEADER_SIZE))
            ext.read_into(data, 0)
            look.header = "damaged" if len(data) == HEADER_SIZE and any(data) else "blank"
            return look
        finally:
            ext.close()
        if look.seal is not None:
            look.certain, look.durable = look.seal.summary.certain, look.seal.summary.durable
            if stop is not None:
                return look
        try:
            look.segment = Segment.open(self._storage, stem(first), Kind.FORWARD, self._uuid)
        except CorruptionError as error:
            empty = self._storage.size(f"{stem(first)}.ext") <= HEADER_SIZE
            look.header, look.error = "blank" if empty else "damaged", error
            return look
        look.durable = max(look.durable, look.segment.claimed_durable, look.segment.claims_beyond_end())
        return look

    def _take(self, look: _Look, claimed: int) -> None:
        """Decide about one segment."""
        name = f"{stem(look.first)}.ext"
        follows = look.first <= self.head + 1 if not self.parts else look.first == self.head + 1
        known = look.stop is not None and look.seal is not None
        missing = self.head + 1
        if look.segment is not None and follows:
            missing = max(look.segment.next_seq, self._tail + 1)
        elif not self.parts and look.first <= self._tail:
            missing = self._first
        durable: Durable = "none" if claimed < missing else "some"
        if missing <= claimed and (look.stop is None or look.stop - 1 <= claimed):
            durable = "all"
        whole = look.segment is not None and look.segment.next_seq == look.stop
        found = FoundSegment(
            needed=known or whole or not self._was_being_removed(look),
            header=look.header,
            follows=follows,
            later=look.stop is not None,
            sealed=known,
            whole=whole,
            durable=durable,
        )
        label = case(segment_case(found), name)
        if label in REFUSED:
            self._refuse(name, self._reason(look, missing, claimed))
            self._pass_over(look, claimed)
        elif label in {"R4", "R5", "R11"}:
            self._leftovers.append(look.first)
            if look.segment is not None:
                look.segment.close()
        elif label in {"R7", "R15"}:
            assert look.stop is not None
            self._take_damaged(look, look.stop, missing)
        else:
            part = Part(stem(look.first), look.first, segment=look.segment, seal=look.seal if known else None)
            self.parts.append(part)
            self.head = part.next_seq - 1
            self.head_time_ns = max(self.head_time_ns, part.last_time_ns)

    def _was_being_removed(self, look: _Look) -> bool:
        """Say whether nothing is lost with a segment: its events are in the mirror, and a later one has an indicator.

        A cut may have taken its data, and left its name.
        """
        if look.stop is None or look.stop - 1 > self._tail:
            return False
        later = [each for each in self._looks if each.first > look.first]
        return any(
            each.seal.summary.indicators if each.seal else each.segment and each.segment.indicator_seqs
            for each in later
        )

    def _take_damaged(self, look: _Look, stop: int, missing: int) -> None:
        """Go on behind a segment that had been durable and can't be read; reads that need it will fail."""
        name = self._storage.path(f"{stem(look.first)}.ext")
        message = look.error.message if look.error else f"{name} or its data ends before seq {missing}"
        log.error("%s: moments after seq %d can't be read", message, look.first - 1)
        if look.segment is not None:
            look.segment.close()
        part = Part.damaged(stem(look.first), look.first, stop, time_ns=self.head_time_ns, message=message)
        self.parts.append(part)
        self.head = stop - 1

    def _reason(self, look: _Look, missing: int, claimed: int) -> StoreError:
        if look.error is not None:
            return look.error
        if look.first > missing:
            path = self._storage.path(f"{stem(missing)}.ext" if self.parts else DIRECTORY)
            events = f"events {missing} to {look.first - 1}, before {stem(look.first)}.ext"
            return CorruptionError(
                f"file {path} is missing: it had {events}" if self.parts else f"forward journal {path} has no {events}",
                hint="restore the segment that is missing; without it the volume can't be opened",
            )
        return self._ended(missing - 1, claimed, stem(look.first))

    def _pass_over(self, look: _Look, claimed: int) -> None:
        """Go on behind a segment that was refused, as if all were there up to the next one."""
        if look.error is None and look.first > self.head + 1:  # it is what is before that is missing
            self.head = look.first - 1
            self.parts.append(Part.damaged(stem(look.first), look.first, look.first, time_ns=0, message=PASSED_OVER[0]))
            self._take(look, claimed)
            return
        end = look.stop or max(claimed + 1, look.first)
        self.parts.append(Part.damaged(stem(look.first), look.first, end, time_ns=0, message=PASSED_OVER[1]))
        self.head = end - 1

    def _end(self, claimed: int) -> None:
        """Decide about the end of what counts."""
        ends: Literal["before", "behind", "there"] = "there"
        if self.head < claimed:
            ends = "behind" if self.head < self._tail == claimed else "before"
        label = case(end_case(ends=ends, last=self._last(), windowed=self._windowed), f"seq {self.head}")
        if label in {"R20", "R21"}:
            self._refuse(DIRECTORY, self._ended(self.head, claimed, self.parts[-1].stem if self.parts else ""))
        if label == "R26" and not self.refused:  # else that is what was refused
            name = f"{self.parts[-1].stem}.ext"
            end = f"{self._storage.path(name)}, the end of the forward journal, is damaged"
            self._refuse(name, CorruptionError(end, hint="restore the file; without it the volume can't be opened"))
        if label == "R22":
            self._leftovers += [part.first for part in self.parts]
            for part in self.parts:
                if part.segment is not None:
                    part.segment.close()
            self.parts, self.head = [], self._tail

    def _ended(self, head: int, claimed: int, last: str) -> CorruptionError:
        where = f", in {last}.ext" if last else ""
        return CorruptionError(
            f"forward journal {self._storage.path(DIRECTORY)} ends at seq {head}{where}, "
            f"but everything up to seq {claimed} had been made durable",
            hint="restore the segment that is missing or damaged; without it the volume can't be opened",
        )

    def _last(self) -> Literal["none", "open", "sealed", "damaged"]:
        """Say what the last segment is. A sealed one is read, since it will be appended to."""
        if not self.parts:
            return "none"
        last = self.parts[-1]
        indicated = last_indicated(self.parts)
        if last.damage or (self._windowed and indicated >= 0 and self.parts[indicated].damage):
            return "damaged"
        try:
            return "sealed" if self._open_last() else "open"
        except CorruptionError as error:
            log.error("%s", error.message)
            return "damaged"

    def _open_last(self) -> bool:
        """Bring the last segment into memory as one that isn't sealed; return whether it was."""
        last = self.parts[-1]
        if last.segment is not None:
            return False
        segment = last.open(self._storage, self._uuid)
        self._looks.append(_Look(last.first, None, segment=segment))
        self.parts[-1] = Part(last.stem, last.first, segment=segment)
        return True

    # -- what had not been durable ------------------------------------------------------------------------------

    def _cut(self, claimed: int) -> None:
        torn = self._cut_torn(claimed)
        number = last_indicated(self.parts) if self._windowed else -1
        closed = max(self._tail, self._last_indicator(number)) if self._windowed else self.head
        label = ""
        for found in (True, False) if torn else (False,):
            label = case(
                tail_case(torn=found, windowed=self._windowed, unclosed=closed < self.head), f"seq {self.head}"
            )
        if label == "R28":
            self._cut_behind(number, closed)

    def _cut_torn(self, claimed: int) -> bool:
        """Cut at the first event that isn't durable and whose data isn't what its checksum says."""
        for number, part in enumerate(self.parts):
            durable = part.next_seq - 1 < claimed and number < len(self.parts) - 1
            if part.segment is not None and not durable and part.segment.cut_torn(claimed):
                self._remove_from(number + 1)
                self.head = part.next_seq - 1
                return True
        return False

    def _last_indicator(self, number: int) -> int:
        found = self.parts[number].last_indicator if number >= 0 else None
        return found.seq if found is not None else 0

    def _cut_behind(self, number: int, keep: int) -> None:
        """Cut behind the last indicator, which part *number* has: the rest of that window is in the log still."""
        self._remove_from(max(number, 0) + 1)
        if self.parts:
            self._open_last()
            segment = self.parts[-1].segment
            if segment is not None and segment.next_seq > keep + 1:
                segment.cut(max(keep + 1, segment.header.first))
        self.head = keep
        self.head_time_ns = max([self._tail_time_ns, *(part.last_time_ns for part in self.parts)])

    def _remove_from(self, number: int) -> None:
        for part in self.parts[number:]:
            part.remove(self._storage)
            if part.segment is not None:
                part.segment.close()
        del self.parts[number:]

    def _unlink(self, first: int) -> None:
        for suffix in (".ext", ".dat"):
            unlink_if_there(self._storage, stem(first) + suffix)
        discard_index(self._storage, stem(first))
