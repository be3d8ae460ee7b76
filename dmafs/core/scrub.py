"""Scrub: all that has a checksum is read from the disk and compared with it (promise 5), and repaired where possible.

The mirror is walked first, then the snapshots, oldest first, then the forward journal up to where its head was when
that walk began. Each step, of a MiB at most, is done *at rest*, while no sync and no drop is under way; in between the
volume may change. What a sync or a drop moves it verifies itself, so nothing is missed whichever way it goes.

A place is repaired where the primary's bytes have the checksum that the store knows of it; zeros need no primary. What
can't be repaired stays an I/O error, in the moments that show it and nowhere else. These moments follow on each other:
a place of the forward journal is shown from its event on until something newer covers it, one of the mirror also before
as long as no snapshot holds what was there, one of a snapshot likewise down from its own moment. So two bisections over
the moments, by the images' maps, find the first and the last one.

How far a scrub is stands in ``scrub`` in the volume's directory, and so does what the last one has found. Whoever
begins one goes on where the last one was cut off.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from dmafs.core.digests import HOLE, matches
from dmafs.core.files import replace_whole
from dmafs.core.image import Piece
from dmafs.core.mirror import NAME as MIRROR_NAME
from dmafs.core.ondisk import FORMAT_VERSION, RECORD_SIZE, checksum, decode_records
from dmafs.core.segment import Segment
from dmafs.core.storage import File
from dmafs.core.throttle import Throttle, pause
from dmafs.core.volume import Volume
from dmafs.core.vrmo import MIRROR
from dmafs.core.work import Work
from dmafs.errors import CorruptionError, DmafsError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

NAME: Final = "scrub"
STEP_BLOCKS: Final = 256
STEP_BYTES: Final = 1 << 20
STEP_EVENTS: Final = 4096
SAVED_NS: Final = 10 * 10**9
"""How often the position is written down."""
DAMAGE_MAX: Final = 4096
"""How many damaged places are kept; the others are counted."""
_STATE_LIMIT: Final = 4 << 20
_PLACES: Final = ("mirror", "backward", "forward")

Moment = tuple[int, int]
"""Seq and time."""


class Place(NamedTuple):
    """Where the bytes of some sectors of the volume are."""

    kind: str
    """mirror, backward or forward."""
    file: str
    """Its path within the volume's directory."""
    start: int
    stop: int


@dataclass(slots=True)
class Damage:
    """A damaged place: where the bytes of some sectors of the volume are, and which moments show them."""

    place: str
    """mirror, backward or forward."""
    file: str
    start: int
    stop: int
    first: Moment | None
    """The first moment that shows it; None if none does, or it isn't known since descriptors are damaged."""
    last: Moment | None
    newest: bool
    """Whether the newest image shows it."""
    repaired: bool


@dataclass(slots=True)
class Scrubbed:
    """What a scrub has found so far, and where it is."""

    begun_ns: int
    ended_ns: int = 0
    walk: int = 0
    """Number of the place that is being walked; 3 when all are done."""
    position: tuple[int, ...] = (0,)
    """Where in it: a block; a snapshot's seq and twin, and an entry; a seq, and the last one to look at."""
    read_bytes: int = 0
    done_sectors: int = 0
    count: int = 0
    """Damaged places."""
    repaired: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Return how many damaged places could not be repaired."""
        return self.count - self.repaired

    def encode(self) -> bytes:
        """Return the content of the file."""
        return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}).encode()

    @classmethod
    def decode(cls, content: bytes) -> Scrubbed:
        """Return what the file says; ValueError, KeyError or TypeError if it says nothing."""
        found = json.loads(content)
        if not isinstance(found, dict) or found.pop("format") != FORMAT_VERSION:
            raise ValueError
        state = cls(**found)
        numbers = (state.begun_ns, state.ended_ns, state.read_bytes, state.done_sectors, state.count, state.repaired)
        state.position = tuple(state.position)
        if not all(type(number) is int and number >= 0 for number in (state.walk, *numbers, *state.position)):
            raise ValueError
        if len(state.position) != (1, 3, 2, 1)[state.walk]:
            raise ValueError
        state.damage = [Damage(**one) for one in found["damage"]]
        for one in state.damage:
            one.first, one.last = _moment(one.first), _moment(one.last)
        return state


def _moment(found: list[int] | Moment | None) -> Moment | None:
    if found is None:
        return None
    seq, time_ns = found
    return int(seq), int(time_ns)


def last_scrub(volume: Volume) -> Scrubbed | None:
    """Return what the last scrub has found, or has found so far; None if there was none."""
    try:
        return Scrubbed.decode(volume.storage.read_bytes(NAME, _STATE_LIMIT))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, IndexError, CorruptionError, OSError) as error:
        log.warning("volume %s: file %s can't be used (%s): the next scrub begins anew", volume.info.name, NAME, error)
        return None


def scope_sectors(volume: Volume) -> int:
    """Return how many sectors there are to go through now, with the journals' descriptors: a little too many."""
    backward = sum(volume.snapshots.held_bytes(snapshot) for snapshot in volume.snapshots.all())
    return volume.info.size_sectors + (backward + volume.journal.data_bytes()) // SECTOR


def anywhen(work: Work[Any]) -> Work[Any]:
    """Do work where nothing else works on the volume."""
    return (yield from work)


@dataclass(frozen=True, slots=True)
class Rest:
    """What a scrub needs of whoever drives it, as work."""

    at_rest: Callable[[Work[Any]], Work[Any]] = anywhen
    """Do work while no sync and no drop is under way."""
    pause: Callable[[float], Work[object]] = pause
    """Do nothing for so many seconds."""
    throttle: Throttle = field(default_factory=Throttle)


def scrub(volume: Volume, primary: File | None, rest: Rest, progress: Callable[[int], None]) -> Work[Scrubbed]:
    """Go through everything, or on from where the last scrub was cut off; return what all of it has found.

    Damage is repaired from *primary* if there is one. *progress* is told the sectors done so far.
    """
    state: Scrubbed | None = yield partial(last_scrub, volume)
    if state is None or state.ended_ns:
        state = Scrubbed(volume.clock())
    walker = _Walker(volume, primary, state)
    saved_ns = volume.clock()
    while state.walk < len(_PLACES):
        read = yield from rest.at_rest(walker.step())
        state.read_bytes += read
        progress(state.done_sectors)
        if volume.clock() - saved_ns > SAVED_NS:
            yield partial(_save, volume, state)
            saved_ns = volume.clock()
        if (seconds := rest.throttle.take(read)) > 0:
            yield from rest.pause(seconds)
    state.ended_ns = volume.clock()
    yield partial(_save, volume, state)
    return state


def _save(volume: Volume, state: Scrubbed) -> None:
    try:
        replace_whole(volume.storage, NAME, state.encode())
    except OSError as error:
        log.warning("volume %s: how far the scrub is can't be written down: %s", volume.info.name, error)


class _Walker:
    """The steps of one scrub."""

    def __init__(self, volume: Volume, primary: File | None, state: Scrubbed) -> None:
        self.volume = volume
        self.primary = primary
        self.state = state

    def step(self) -> Work[int]:
        """Do one step; return how many bytes were read."""
        return (self._mirror, self._backward, self._forward)[self.state.walk]()

    def _next_walk(self, *position: int) -> int:
        self.state.walk += 1
        self.state.position = position
        return 0

    # -- the three walks ----------------------------------------------------------------------------------------

    def _mirror(self) -> Work[int]:
        mirror = self.volume.mirror
        (first,) = self.state.position
        last = min(first + STEP_BLOCKS, mirror.blocks)
        if first >= last:
            return self._next_walk(0, 0, 0)
        bad, read = yield partial(mirror.examine, first, last)
        mended = yield from self._mend_blocks(bad)
        for start, stop, repaired in _runs(bad, mended):
            place = Place("mirror", MIRROR_NAME, mirror.sectors(start)[0], mirror.sectors(stop - 1)[1])
            now = max(self.volume.pointers.now.mirror_seq, self.volume.pointers.now.origin_seq)
            yield from self._found(place, now, _on_mirror, repaired=repaired)
        self.state.position = (last,)
        self.state.done_sectors += mirror.sectors(last - 1)[1] - mirror.sectors(first)[0]
        return int(read)

    def _mend_blocks(self, blocks: list[int]) -> Work[list[bool]]:
        """Return which of some blocks could be repaired."""
        mended = []
        for block in blocks:
            repaired = yield from self._mend_block(block)
            mended.append(repaired)
        return mended

    def _backward(self) -> Work[int]:
        seq, twin, index = self.state.position
        snapshot = next((one for one in self.volume.snapshots.all() if one.key >= (seq, twin)), None)
        if snapshot is None:
            return self._next_walk(
                self.volume.journal.parts[0].first if self.volume.journal.parts else 0, self.volume.journal.head
            )
        index = index if snapshot.key == (seq, twin) else 0
        following = snapshot.seq, snapshot.twin + 1, 0
        try:
            segment = yield from self.volume.snapshots.load(snapshot)
            if not index:
                yield partial(_compare_records, segment)
        except DmafsError as error:
            yield from self._unreadable("backward", error, snapshot.stem + ".ext", self._first_seq(), snapshot.seq)
            self.state.position = following
            return 0
        index, read = yield from self._events(segment, index, len(segment), "backward", snapshot.seq)
        self.state.position = (*snapshot.key, index) if index < len(segment) else following
        return read

    def _forward(self) -> Work[int]:
        seq, upto = self.state.position
        part = next((one for one in self.volume.journal.parts if one.next_seq > seq), None)
        if part is None or max(seq, part.first) > upto:
            return self._next_walk(0)
        end = min(part.next_seq, upto + 1) - part.first
        try:
            yield from self.volume.journal.load_of(part.first)
            segment, _ = self.volume.journal.descriptor_nowait(part.first)
            assert segment is not None, "at rest nothing is released"
            if seq <= part.first:
                yield partial(_compare_records, segment)
        except DmafsError as error:
            head = self.volume.journal.head
            yield from self._unreadable("forward", error, part.stem + ".ext", part.first, head)
            self.state.position = (part.next_seq, upto)
            return 0
        needed = max(seq, self.volume.journal.tail + 1, part.first) - part.first  # the data before may be gone
        index, read = yield from self._events(segment, min(needed, end), end, "forward", None)
        self.state.position = (part.first + index, upto)
        return read

    def _events(
        self, segment: Segment, index: int, end: int, place: str, snapshot_seq: int | None
    ) -> Work[tuple[int, int]]:
        """Look at some entries from *index* on; return the number of the next one, and the bytes read."""
        stop, sectors = index, 0
        while stop < min(end, index + STEP_EVENTS) and (stop == index or sectors * SECTOR < STEP_BYTES):
            sectors += 0 if segment.is_zero(stop) else segment.lengths[stop]
            stop += 1
        bad = yield partial(_examine, segment, [one for one in range(index, stop) if not segment.is_zero(one)])
        for one in bad:
            repaired = yield from self._mend_event(segment, one)
            start = segment.starts[one]
            seq = segment.header.first + one if snapshot_seq is None else snapshot_seq

            def shows(piece: Piece, number: int = one) -> bool:
                same = piece.segment is not None and piece.segment.ext.name == segment.ext.name
                return same and piece.entry == number

            found = Place(place, f"{segment.stem}.dat", start, start + segment.lengths[one])
            yield from self._found(found, seq, shows, repaired=repaired)
        self.state.done_sectors += sectors
        return stop, sectors * SECTOR

    # -- damage -------------------------------------------------------------------------------------------------

    def _found(self, place: Place, seq: int, shows: Callable[[Piece], bool], *, repaired: bool) -> Work[None]:
        """Take in a damaged place that the moment at *seq* shows if any does."""
        try:
            first, last = yield from self._shown(place.start, place.stop, seq, shows)
        except DmafsError:
            first = last = None
        self._add(Damage(*place, first, last, self._is_newest(last), repaired))

    def _unreadable(self, place: str, error: DmafsError, file: str, first: int, last: int) -> Work[None]:
        """Take in a file whose descriptors can't be read: any sector may be in it."""
        log.error("volume %s: %s", self.volume.info.name, error.message)
        yield lambda: None
        moments = [(seq, self.volume.time_of(seq)) if self.volume.recoverable(seq) else None for seq in (first, last)]
        newest = last == self.volume.journal.head
        self._add(Damage(place, file, 0, self.volume.info.size_sectors, moments[0], moments[1], newest, repaired=False))

    def _add(self, damage: Damage) -> None:
        self.state.count += 1
        self.state.repaired += damage.repaired
        if len(self.state.damage) < DAMAGE_MAX:
            self.state.damage.append(damage)
        what = "repaired" if damage.repaired else "can't be read where moments show it"
        extent = f"extent {damage.start}+{damage.stop - damage.start} sectors"
        log.error("volume %s: scrub: %s is damaged (%s): %s", self.volume.info.name, damage.file, extent, what)

    def _is_newest(self, last: Moment | None) -> bool:
        return last is not None and last[0] == self.volume.journal.head

    def _first_seq(self) -> int:
        return next((one.seq for one in self.volume.snapshots), self.volume.pointers.now.mirror_seq)

    def _shown(
        self, start: int, stop: int, seq: int, shows: Callable[[Piece], bool]
    ) -> Work[tuple[Moment | None, Moment | None]]:
        """Return the first and the last moment that shows a place, given one that does if any does."""
        moments = _Moments(self.volume)

        def shown(number: int) -> Work[bool]:
            at = moments.point(moments[number])
            if not self.volume.recoverable(at):
                return False
            pieces = yield from self.volume.image(at).locate(start * SECTOR, (stop - start) * SECTOR)
            return any(map(shows, pieces))

        known = moments.number_of(seq)
        if known is None or not (yield from shown(known)):
            return None, None
        ends = []
        for beyond in (-1, len(moments)):
            inside, outside = known, beyond
            while abs(outside - inside) > 1:
                middle = (inside + outside) // 2
                if (yield from shown(middle)):
                    inside = middle
                else:
                    outside = middle
            at = moments.point(moments[inside])
            ends.append((at, self.volume.time_of(at)))
        return ends[0], ends[1]

    # -- repair -------------------------------------------------------------------------------------------------

    def _mend_block(self, block: int) -> Work[bool]:
        """Have a block of the mirror be what its digest says, if that can be; whether it is is read from the disk."""
        mirror = self.volume.mirror
        digest: int = yield partial(mirror.digest, block)
        start, stop = mirror.sectors(block)
        data = memoryview(bytes((stop - start) * SECTOR))
        if digest != HOLE:
            data = yield partial(self._primary_has, start, stop)
        if self.volume.failure or not matches(data, digest):
            return False
        try:
            yield partial(mirror.repair, block, data)
            left, _ = yield partial(mirror.examine, block, block + 1)
        except OSError as error:
            log.error("volume %s: %s can't be repaired: %s", self.volume.info.name, mirror.file.name, error)
            return False
        return not left

    def _mend_event(self, segment: Segment, index: int) -> Work[bool]:
        """Likewise for the data of an event."""
        start = segment.starts[index]
        data: memoryview = yield partial(self._primary_has, start, start + segment.lengths[index])
        if self.volume.failure or not data or checksum(data) != segment.checksums[index]:
            return False

        def rewrite() -> bool:
            segment.dat.write([data], segment.physicals[index] * SECTOR)
            segment.dat.datasync()
            return not _examine(segment, [index])

        try:
            repaired: bool = yield rewrite
        except OSError as error:
            log.error("volume %s: %s can't be repaired: %s", self.volume.info.name, segment.dat.name, error)
            return False
        return repaired

    def _primary_has(self, start: int, stop: int) -> memoryview:
        """Return what the primary has in an extent, nothing if it can't be read."""
        data = memoryview(bytearray((stop - start) * SECTOR))
        if self.primary is None:
            return data[:0]
        try:
            self.primary.read_into(data, start * SECTOR)
        except DmafsError as error:
            log.warning("volume %s: %s", self.volume.info.name, error.message)
            return data[:0]
        return data


class _Moments:
    """The moments that images can be had of, as far as damage is concerned: visible snapshots, then seqs, ascending."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        now = volume.pointers.now
        self._old = [one.seq for one in volume.snapshots if one.seq < now.mirror_seq]
        self._new = range(max(now.mirror_seq, now.origin_seq), volume.journal.head + 1)

    def __len__(self) -> int:
        return len(self._old) + len(self._new)

    def __getitem__(self, number: int) -> int:
        return self._old[number] if number < len(self._old) else self._new[number - len(self._old)]

    def number_of(self, seq: int) -> int | None:
        """Return the number of the moment at *seq*, or of the snapshot before it."""
        if seq in self._new:
            return len(self._old) + self._new.index(seq)
        before = [number for number, one in enumerate(self._old) if one <= seq]
        return before[-1] if before else None

    def point(self, seq: int) -> int:
        """Return the moment that a seq belongs to: the end of its window; within a gap that gap's beginning."""
        if seq not in self._new:
            return seq
        journal = self._volume.journal
        if seq > self._volume.pointers.now.mirror_seq and journal.splits_window(seq):
            seq = journal.seq_at(journal.time_of(seq), default=seq)
        gap = journal.gap_around(seq)
        return seq if gap is None else gap.begin


def _on_mirror(piece: Piece) -> bool:
    return piece.segment is None and piece.entry == MIRROR


def _examine(segment: Segment, indexes: list[int]) -> list[int]:
    """Return those of some entries whose data on the disk isn't what their checksums say."""
    if not indexes:
        return []
    begin = min(segment.physicals[index] for index in indexes)
    end = max(segment.physicals[index] + segment.lengths[index] for index in indexes)
    segment.dat.uncache(begin * SECTOR, (end - begin) * SECTOR)
    bad = []
    for index in indexes:
        try:
            segment.verify(index)
        except DmafsError:
            segment.verified[index] = 0
            bad.append(index)
    return bad


def _compare_records(segment: Segment) -> None:
    """Raise CorruptionError if the descriptors on the disk aren't those in memory."""
    size = segment.records * RECORD_SIZE
    segment.ext.uncache(0, segment.ext_size)
    data = bytearray(size)
    segment.ext.read_into(data, segment.ext_size - size)
    records = decode_records(data, segment.header.salt, next_seq=segment.header.first)
    if len(records) != segment.records or not segment.agrees(records):
        raise CorruptionError(
            f"descriptors of {segment.ext.name} aren't what was written",
            hint="the storage below the store is damaged; moments that need this file can't be read",
        )


def _runs(blocks: list[int], mended: list[bool]) -> Iterator[tuple[int, int, bool]]:
    """Yield ascending blocks in runs of neighbours that were all repaired, or all not."""
    pairs = zip(blocks, mended, strict=True)
    for (_, repaired), run in itertools.groupby(enumerate(pairs), lambda one: (one[1][0] - one[0], one[1][1])):
        found = [block for _, (block, _) in run]
        yield found[0], found[-1] + 1, repaired
