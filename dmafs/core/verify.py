"""Verify: where the primary really differs from the newest image, found out while writes go on.

``compare`` is the one algorithm; a verify is a comparison of everything, a resync (resync.py) one that journals what it
finds, and a tap may have single extents compared that it is in doubt about. Both sides are on this machine, so bytes
are compared with bytes: a digest would read as much and prove less.

A tap may see a write long after it is complete on the primary. So that two sides differ says nothing by itself. Each
part of at most 1 MiB is read once, in a thread, with whatever goes on; only the sectors that differ then are suspects,
and they are decided in rounds:

1. The journal's head is noted, then the primary is read, then the tap *settles*: every write that was complete on the
   primary before is an event now.
2. A suspect that an event behind that head covers is left for the next round. Any other has in the newest image what it
   had at that head; if the primary had the same the suspicion was unfounded.
3. Otherwise it differs, or a write was just under way that the primary showed and the tap couldn't know yet. So it
   counts only if the next round finds it so again, with the same bytes on the primary.

A sector that is still suspect after ROUNDS rounds is *busy*: it is being written all the time. That is no difference,
since an event that covers a sector brings the image what the primary got, whatever was there before. So sectors are
judged, not blocks, of which a part may be written all the time and another one differ.

The primary has to be read past every cache that writes through the tap don't go through.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dmafs.core.extent import MAX_EXTENT_SECTORS, Ints, chop
from dmafs.core.image import ZEROS, Piece
from dmafs.core.storage import File
from dmafs.core.throttle import Throttle, pause
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import CorruptionError, NoSuchPointError, SourceError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

PART_SECTORS: Final = MAX_EXTENT_SECTORS
"""What is read at once."""
GRAIN_SECTORS: Final = 8
"""Differences are told, and journaled, in units of 4 KiB, the block size of most filesystems."""
ROUNDS: Final = 8
"""How often suspects are looked at. Two rounds decide, unless what is compared is just being written."""
EXTENTS_MAX: Final = 4096
"""How many extents are kept of a comparison; the others are counted."""

Mask = npt.NDArray[np.bool_]
"""A truth for each sector of a part."""


def at_once(change: Callable[[], None]) -> Work[object]:
    """Do something without waiting for anybody."""
    change()
    yield from ()
    return None


@dataclass(frozen=True, slots=True)
class Steps:
    """What a comparison needs of whoever drives it, as work."""

    settle: Callable[[], Work[object]]
    """Have all writes that are complete on the primary when this begins be events when it ends."""
    pause: Callable[[float], Work[object]] = pause
    """Do nothing for so many seconds."""
    throttle: Throttle = field(default_factory=Throttle)
    append: Callable[[Callable[[], None]], Work[object]] = at_once
    """Do what appends to the journal, when nobody else is about to."""


class Found(NamedTuple):
    """A part of which sectors differ: *differs* says which, *data* is what the primary had after event *head*."""

    start: int
    data: bytearray
    differs: Mask
    head: int

    def still(self, volume: Volume) -> list[tuple[int, int]]:
        """Return the extents that differ, without what events until now cover. No sync has passed *head*."""
        covered = _covered(volume, self.head, self.start, len(self.differs))
        assert covered is not None
        return _runs(self.differs & ~covered, self.start)

    def bytes_of(self, start: int, stop: int) -> memoryview:
        """Return what the primary had in an extent."""
        return memoryview(self.data)[(start - self.start) * SECTOR : (stop - self.start) * SECTOR]


@dataclass(slots=True)
class Differences:
    """What a comparison has found: extents, ascending and joined, at most EXTENTS_MAX; what is beyond is counted."""

    extents: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    """Extents, those that aren't kept too."""
    sectors: int = 0
    """Sectors in all of them."""
    compared_sectors: int = 0
    busy_sectors: int = 0
    """Sectors that were written anew each time they were looked at."""
    _last_stop: int = -1

    def add(self, start: int, stop: int) -> None:
        """Take in an extent behind all others."""
        assert self._last_stop <= start < stop
        self.sectors += stop - start
        if start != self._last_stop:
            self.count += 1
            if self.count <= EXTENTS_MAX:
                self.extents.append((start, stop))
        elif self.count <= EXTENTS_MAX:
            self.extents[-1] = self.extents[-1][0], stop
        self._last_stop = stop

    @property
    def cut(self) -> bool:
        """Say whether not all extents are kept."""
        return self.count > EXTENTS_MAX

    @property
    def columns(self) -> tuple[Ints, Ints]:
        """Return starts and stops of the extents that are kept."""
        pairs = np.array(self.extents, np.int64).reshape(-1, 2)
        return pairs[:, 0].copy(), pairs[:, 1].copy()


def everything(volume: Volume) -> tuple[Ints, Ints]:
    """Return the one extent that is the whole volume."""
    return np.array([0], np.int64), np.array([volume.info.size_sectors], np.int64)


def verify(volume: Volume, primary: File, steps: Steps, progress: Callable[[int], None]) -> Work[Differences]:
    """Compare the whole primary with the newest image; *progress* is told the sectors done so far."""
    if not volume.pointers.now.copied:
        raise NoSuchPointError(
            f"volume {volume.info.name} can't be compared: the initial copy isn't complete",
            hint="wait until dmafs status says protected",
        )
    return (yield from compare(volume, primary, everything(volume), steps, progress=progress))


def compare(
    volume: Volume,
    primary: File,
    extents: tuple[Ints, Ints],
    steps: Steps,
    *,
    progress: Callable[[int], None] = lambda _done: None,
    take: Callable[[Found], Work[object]] = lambda _found: at_once(lambda: None),
    ignore_discarded: bool = False,
) -> Work[Differences]:
    """Return where primary and newest image really differ within a disjoint list of extents.

    *take* gets each part with differences as soon as they are sure. With *ignore_discarded* sectors that the journal
    has as discarded never differ: a primary may keep what was there.
    """
    if primary.size() != volume.info.size_sectors * SECTOR:
        raise SourceError(
            f"source {primary.name} has {primary.size()} bytes instead of {volume.info.size_sectors * SECTOR}",
            hint="a source must keep its size",
        )
    differences = Differences()
    for start, stop in zip(*(column.tolist() for column in chop(*extents, limit=PART_SECTORS)), strict=True):
        part = _Part(volume, primary, start, stop, ignore_discarded=ignore_discarded)
        yield from _decide(part, steps, take)
        for extent in _runs(_in_grains(part.differs, start), start):
            differences.add(*extent)
        differences.busy_sectors += int(part.suspects.sum())
        differences.compared_sectors += stop - start
        progress(differences.compared_sectors)
        if (seconds := steps.throttle.take(part.read_bytes)) > 0:
            yield from steps.pause(seconds)
    return differences


class _Part:
    """One part, and what is known about its sectors."""

    def __init__(self, volume: Volume, primary: File, start: int, stop: int, *, ignore_discarded: bool) -> None:
        self.volume, self.primary = volume, primary
        self.start, self.stop = start, stop
        self._ignore_discarded = ignore_discarded
        self.suspects: Mask = np.ones(stop - start, np.bool_)
        self.differs: Mask = np.zeros(stop - start, np.bool_)
        self.unsure: Mask = np.zeros(stop - start, np.bool_)  # what the round before found to differ,
        self.seen = bytearray()  # and what the primary had then
        self.read_bytes = 0

    def read(self) -> bytearray:
        """Return what the primary has."""
        data = bytearray((self.stop - self.start) * SECTOR)
        self.primary.read_into(data, self.start * SECTOR)
        self.read_bytes += len(data)
        return data

    def locate(self) -> Work[list[Piece]]:
        """Return where the newest image is."""
        return self.volume.live.locate(self.start * SECTOR, (self.stop - self.start) * SECTOR)

    def unequal(self, data: bytearray, pieces: list[Piece]) -> Mask:
        """Return which sectors of the image aren't *data*, or can't be read since they are damaged."""
        try:
            found = _unequal(data, self.volume.live.read_pieces(pieces, self.start * SECTOR, len(data)))
        except CorruptionError as error:
            log.error("volume %s: %s", self.volume.info.name, error.message)
            found = self._unequal_where_whole(data, pieces)
        if self._ignore_discarded:
            for piece in pieces:
                if piece.entry == ZEROS:
                    found[piece.start - self.start : piece.stop - self.start] = False
        return found

    def _unequal_where_whole(self, data: bytearray, pieces: list[Piece]) -> Mask:
        """Return the same, read in grains: what is damaged differs, so that a resync takes it from the primary."""
        found: Mask = np.ones(self.stop - self.start, np.bool_)
        for start in range(self.start, self.stop, GRAIN_SECTORS):
            stop = min(start + GRAIN_SECTORS, self.stop)
            with contextlib.suppress(CorruptionError):
                mine = self.volume.live.read_pieces(
                    _clipped(pieces, start, stop), start * SECTOR, (stop - start) * SECTOR
                )
                part = slice(start - self.start, stop - self.start)
                found[part] = _unequal(data[part.start * SECTOR : part.stop * SECTOR], mine)
        return found

    def judge(self, data: bytearray, unequal: Mask, covered: Mask) -> Mask:
        """Take in a round: what the primary had, where that isn't the image, what may be newer. Return what is sure.

        That is whole grains, but for sectors that are covered or had something else in the round before.
        """
        decided = self.suspects & ~covered
        differs = decided & unequal
        stable = ~covered
        if self.seen:
            stable &= ~_unequal(data, self.seen)
        sure = differs & self.unsure & stable
        self.suspects &= ~(decided & ~unequal) & ~sure
        self.unsure, self.seen = differs, data
        self.differs |= sure
        return _in_grains(sure, self.start) & stable


def _decide(part: _Part, steps: Steps, take: Callable[[Found], Work[object]]) -> Work[None]:
    """Find out about each sector of a part; what is suspect at the end is busy."""
    volume = part.volume
    pieces = yield from part.locate()
    part.suspects = yield lambda: part.unequal(part.read(), pieces)
    for _ in range(ROUNDS):
        if not part.suspects.any():
            return
        head = volume.journal.head
        data = yield part.read
        yield from steps.settle()
        pieces = yield from part.locate()
        covered = _covered(volume, head, part.start, len(part.suspects))
        unequal = yield partial(part.unequal, data, pieces)
        if covered is None or volume.pointers.now.mirror_seq > head:
            continue
        sure = part.judge(data, unequal, covered)
        if sure.any():
            yield from take(Found(part.start, data, sure, head))


def _covered(volume: Volume, head: int, start: int, length: int) -> Mask | None:
    """Return which sectors events behind *head* cover; None if a sync has passed it, so that this isn't known."""
    if volume.pointers.now.mirror_seq > head:
        return None
    starts, stops = volume.journal.extents(head, volume.journal.head)
    touching = (starts < start + length) & (stops > start)
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, np.maximum(starts[touching] - start, 0), 1)
    np.add.at(change, np.minimum(stops[touching] - start, length), -1)
    covered: Mask = np.cumsum(change)[:length] > 0
    return covered


def _clipped(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """Return what pieces are within an extent."""
    found = []
    for piece in pieces:
        begin, end = max(piece.start, start), min(piece.stop, stop)
        if begin < end:
            found.append(piece._replace(start=begin, stop=end, skip=piece.skip + begin - piece.start))
    return found


def _unequal(one: bytearray, other: bytearray | memoryview) -> Mask:
    """Return which sectors of two buffers differ."""
    if one == other:
        return np.zeros(len(one) // SECTOR, np.bool_)
    sectors = (np.frombuffer(buffer, np.uint64).reshape(-1, SECTOR // 8) for buffer in (one, other))
    mine, theirs = sectors
    return np.asarray((mine != theirs).any(axis=1), np.bool_)


def _runs(mask: Mask, start: int) -> list[tuple[int, int]]:
    """Return the extents of a mask of the sectors from *start* on."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)) + start
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _in_grains(mask: Mask, start: int) -> Mask:
    """Widen a mask of the sectors from *start* on to whole grains, as far as they are within it."""
    grains = (np.arange(len(mask)) + start) // GRAIN_SECTORS
    grains -= grains[0]
    widened: Mask = np.bincount(grains, mask).astype(np.bool_)[grains]
    return widened
