"""The mirror in the middle (fig. 8): a raw sparse image of the size and addresses of the primary, at a known seq.

Which seq that is stands in the pointers, not here. The mirror is overwritten only by the initial copy and by a sync
whose commit record is durable.

Each block of 4 KiB has a digest (digests.py). Data is served only after the whole block was verified once since the
volume was opened, or since a sync changed it (promise 5). While a sync overwrites, the blocks that it touches are in
*flux*: what readers may still want of them, the sectors that the sync leaves alone, is served unverified. Blocks that
are overwritten in part were verified before the sync was committed (``prove``), so nothing damaged gets a new digest.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from dmafs.core.digests import BLOCK, BLOCK_SECTORS, Digests, Verdicts, digest_of, matches, partial_blocks, unequal
from dmafs.core.extent import Ints, join, united
from dmafs.core.ondisk import LOST, VolumeInfo
from dmafs.core.opening import open_ours
from dmafs.core.storage import Buffer, File, Storage
from dmafs.errors import CorruptionError, StoreError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

NAME: Final = "mirror.img"
AROUND_BLOCKS: Final = 16
"""Blocks that are verified along with one of them, if they are in the page cache."""

_NOTHING: Final = np.empty(0, np.int64)
_CHECK_BLOCKS: Final = 256


def open_mirror(storage: Storage, info: VolumeInfo) -> File:
    """Open the mirror's file; CorruptionError if it is missing or of another size."""
    file = open_ours(storage, NAME, needed="all history needs it")
    size, right = file.size(), info.size_sectors * SECTOR
    if size != right:
        file.close()
        raise CorruptionError(
            f"{file.name} has {size} bytes instead of {right}",
            hint="the file was truncated or extended from outside; restore it",
        )
    return file


class Mirror:
    """The mirror of one volume; addresses in sectors."""

    def __init__(self, storage: Storage, info: VolumeInfo) -> None:
        """Open image and digests; CorruptionError if one is missing or of another size."""
        self.file = open_mirror(storage, info)
        self.size_sectors = info.size_sectors
        try:
            self.digests = Digests(storage, info.uuid, info.size_sectors)
        except BaseException:
            self.file.close()
            raise
        self._verdicts = Verdicts()
        self._flux = self._changing = _NOTHING, _NOTHING
        self._edges = self._mixed = _NOTHING
        self._spoiled: set[int] = set()
        self._allocated: tuple[Ints, Ints] | None = None

    @staticmethod
    def create(storage: Storage, info: VolumeInfo) -> None:
        """Create an image that is one hole, and its digests."""
        file = storage.create(NAME)
        try:
            file.truncate(info.size_sectors * SECTOR)
            file.datasync()
        finally:
            file.close()
        Digests.create(storage, info.uuid, info.size_sectors)

    @property
    def blocks(self) -> int:
        """Return the number of blocks; the last one may be shorter."""
        return -(-self.size_sectors // BLOCK_SECTORS)

    # -- reading ------------------------------------------------------------------------------------------------

    def read_into(self, buffer: memoryview | bytearray, start: int, *, nowait: bool = False) -> None:
        """Fill *buffer* from sector *start* on.

        CorruptionError when a block of it isn't what its digest says; with *nowait* BlockingIOError when that has to
        wait for the disk.
        """
        view = memoryview(buffer)
        stop = start + len(view) // SECTOR
        first, last = start // BLOCK_SECTORS, -(-stop // BLOCK_SECTORS)
        flux = self._flux  # taken before the data: a sync may end in between
        if self._verdicts.hold(first, last):
            self._read(view, start, nowait=nowait)
            return
        low, high = first // AROUND_BLOCKS * AROUND_BLOCKS, -(-last // AROUND_BLOCKS) * AROUND_BLOCKS
        if nowait and (low, high) != (first, last):
            with contextlib.suppress(BlockingIOError):  # not all around it is in the page cache
                self._read_verified(view, start, low, min(high, self.blocks), flux, nowait=True)
                return
        self._read_verified(view, start, first, last, flux, nowait=nowait)

    def _read_verified(
        self, view: memoryview, start: int, first: int, last: int, flux: tuple[Ints, Ints], *, nowait: bool
    ) -> None:
        """Fill *view* from sector *start* on, within the blocks ``[first, last)``, all of which are verified.

        CorruptionError only for those that *view* has a part of.
        """
        stop = start + len(view) // SECTOR
        begin = first * BLOCK_SECTORS
        end = min(last * BLOCK_SECTORS, self.size_sectors)
        whole = view if (begin, end) == (start, stop) else memoryview(bytearray((end - begin) * SECTOR))
        self._read(whole, begin, nowait=nowait)
        own = range(start // BLOCK_SECTORS, -(-stop // BLOCK_SECTORS))
        bad = [block for block in self._bad(whole, first, last, flux, nowait=nowait) if block in own]
        if bad:
            raise self._damage(bad)
        if whole is not view:
            view[:] = whole[(start - begin) * SECTOR : (stop - begin) * SECTOR]

    def prefetch(self, start: int, stop: int) -> None:
        """Have the system begin to read sectors."""
        self.file.prefetch(start * SECTOR, (stop - start) * SECTOR)

    def _read(self, buffer: memoryview, start: int, *, nowait: bool = False) -> None:
        if nowait:
            self.file.read_into_nowait(buffer, start * SECTOR)
        else:
            self.file.read_into(buffer, start * SECTOR)

    def _bad(
        self, data: memoryview, first: int, last: int, flux: tuple[Ints, Ints], *, nowait: bool = False
    ) -> list[int]:
        """Return those of the blocks ``[first, last)``, which have *data*, that aren't what their digests say."""
        wrong = {first + number for number in unequal(data, self.digests.read_few(first, last, nowait=nowait))}
        in_flux = _covered(*flux, first, last)
        run = first
        for block in [*sorted(wrong | in_flux), last]:
            if run < block:
                self._verdicts.add(run, block)
            run = block + 1
        return sorted(wrong - in_flux)

    def _damage(self, bad: list[int]) -> CorruptionError:
        what = f"block {bad[0]}" if len(bad) == 1 else f"{len(bad)} blocks from {bad[0]} on"
        start, stop = bad[0] * BLOCK_SECTORS, min((bad[-1] + 1) * BLOCK_SECTORS, self.size_sectors)
        return CorruptionError(
            f"digest of {what} of {self.file.name} doesn't match (extent {start}+{stop - start} sectors)",
            hint="the storage below the store is damaged; dmafs scrub finds all of it and repairs what it can",
        )

    def read_run(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield extents, which ascend, in parts: those that can be read with their data, damaged ones with None.

        For what a sync does before it is committed: nothing is in flux.
        """
        assert not len(self._flux[0])
        digests = self.digests.window()
        for start, stop in extents:
            first, last = start // BLOCK_SECTORS, -(-stop // BLOCK_SECTORS)
            begin, end = first * BLOCK_SECTORS, min(last * BLOCK_SECTORS, self.size_sectors)
            whole = memoryview(bytearray((end - begin) * SECTOR))
            self.file.read_into(whole, begin * SECTOR)
            bad = [
                block
                for at, block in enumerate(range(first, last))
                if not matches(whole[at * BLOCK : (at + 1) * BLOCK], digests(block))
            ]
            if bad:
                log.error("%s", self._damage(bad).message)
                yield from _split(start, stop, whole, set(bad))
            elif (begin, end) == (start, stop):
                yield start, stop, whole
            else:
                self._verdicts.add(first, last)  # it will be proved next
                yield start, stop, whole[(start - begin) * SECTOR : (stop - begin) * SECTOR]

    # -- a scrub ------------------------------------------------------------------------------------------------

    def examine(self, first: int, last: int) -> tuple[list[int], int]:
        """Return which of the blocks ``[first, last)`` on the disk aren't what their digests say, and the bytes read.

        Nothing is in flux.
        """
        assert not len(self._flux[0])
        begin, end = first * BLOCK_SECTORS * SECTOR, self.sectors(last - 1)[1] * SECTOR
        self.digests.uncache(first, last)
        digests = self.digests.read(first, last)
        if not digests.any() and next(self.file.data_ranges(begin, end), None) is None:
            return [], 0
        self.file.uncache(begin, end - begin)
        bad = []
        for block, digest in enumerate(digests.tolist(), first):
            start, stop = self.sectors(block)
            data = memoryview(bytearray((stop - start) * SECTOR))
            try:
                self._read(data, start)
            except StoreError as error:
                log.error("%s", error.message)
                bad.append(block)
            else:
                if not matches(data, digest):
                    bad.append(block)
        damaged = np.array(bad, np.int64)
        self._verdicts.forget(damaged, damaged + 1)
        return bad, end - begin

    def digest(self, block: int) -> int:
        """Return the digest of a block."""
        return int(self.digests.read(block, block + 1)[0])

    def repair(self, block: int, data: memoryview) -> None:
        """Write what a block's digest says, durably."""
        assert not len(self._flux[0])
        self.file.write([data], block * BLOCK)
        self.file.datasync()

    # -- the initial copy ---------------------------------------------------------------------------------------

    def forget_from(self, start: int) -> None:
        """Make everything from sector *start* on a hole: what an interrupted initial copy may have left there."""
        self.file.zero(start * SECTOR, (self.size_sectors - start) * SECTOR)  # not truncated: the size is never wrong
        self.digests.put_holes(start // BLOCK_SECTORS, self.blocks)
        self._allocated = None

    # -- a sync -------------------------------------------------------------------------------------------------

    def prepare(self, starts: Ints, stops: Ints) -> None:
        """Get ready to overwrite the extents of moves, disjoint but in any order."""
        order = np.argsort(starts)
        starts, stops = starts[order], stops[order]
        self._edges = partial_blocks(starts, stops, self.size_sectors)
        self._mixed = partial_blocks(*join(starts, stops), self.size_sectors)
        self._changing = united(starts // BLOCK_SECTORS, -(-stops // BLOCK_SECTORS))
        self._spoiled = set()

    def prove(self, starts: Ints, stops: Ints) -> None:
        """Get ready likewise, and verify the blocks that will be overwritten in part.

        What is damaged is marked as lost, durably: the rest of such a block must not get a digest that matches it.
        """
        self.prepare(starts, stops)
        unproved = [block for block in self._mixed.tolist() if not self._verdicts.hold(block, block + 1)]
        lost = [begin // BLOCK_SECTORS for begin, _, data in self.read_run(map(self.sectors, unproved)) if data is None]
        for block in lost:
            self.digests.put(block, LOST)
        if lost:
            self.digests.datasync()

    def begin(self) -> None:
        """Begin to overwrite: what is to be changed is in flux."""
        self._flux = self._changing

    def write(self, data: Buffer, start: int, *, digest: int | None = None) -> None:
        """Overwrite from sector *start* on; *digest* is the checksum of *data*, if it is known."""
        view = memoryview(data)
        stop = start + len(view) // SECTOR
        assert stop <= self.size_sectors
        self.file.write([view], start * SECTOR)
        self._allocated = None  # after it: another thread may have asked meanwhile
        first, last = -(-start // BLOCK_SECTORS), self._whole_blocks(stop)
        if digest and start == first * BLOCK_SECTORS and last - first == 1 and len(view) == BLOCK:
            self.digests.put(first, digest)
            return
        for block in range(first, last):
            at = (block * BLOCK_SECTORS - start) * SECTOR
            self.digests.put(block, digest_of(view[at : at + BLOCK]))

    def zero(self, start: int, stop: int) -> None:
        """Make sectors a hole."""
        self.file.zero(start * SECTOR, (stop - start) * SECTOR)
        self._allocated = None
        first, last = -(-start // BLOCK_SECTORS), self._whole_blocks(stop)
        if first < last:
            self.digests.put_holes(first, last)

    def _whole_blocks(self, stop: int) -> int:
        """Return the end of the blocks that end at sector *stop* or before."""
        return self.blocks if stop == self.size_sectors else stop // BLOCK_SECTORS

    def lose(self, start: int, stop: int) -> None:
        """Mark the blocks of sectors as lost: what should be written there is damaged."""
        for block in range(start // BLOCK_SECTORS, -(-stop // BLOCK_SECTORS)):
            self.digests.put(block, LOST)
            self._spoiled.add(block)

    def finish(self) -> None:
        """Give digests to the blocks that no single move has overwritten as a whole, and make everything durable."""
        mixed = set(self._mixed.tolist())
        for block in self._edges.tolist():
            was_lost = block in mixed and self.digest(block) == LOST
            if block not in self._spoiled and not was_lost:
                begin, end = self.sectors(block)
                data = memoryview(bytearray((end - begin) * SECTOR))
                self._read(data, begin)
                self.digests.put(block, digest_of(data))
        self.datasync()

    def end(self) -> None:
        """Have the blocks that were in flux be verified again from now on."""
        self._verdicts.forget(*self._flux)
        self._flux = self._changing = _NOTHING, _NOTHING
        self._edges = self._mixed = _NOTHING
        self._spoiled = set()

    def sectors(self, block: int) -> tuple[int, int]:
        """Return the sectors of a block."""
        return block * BLOCK_SECTORS, min((block + 1) * BLOCK_SECTORS, self.size_sectors)

    def datasync(self) -> None:
        """Make all writes durable, and the digests of what was written."""
        self.digests.flush()
        self.file.datasync()
        self.digests.datasync()

    # -- the rest -----------------------------------------------------------------------------------------------

    def allocated(self) -> tuple[Ints, Ints]:
        """Return the sectors that aren't holes as a disjoint list; kept until the next write. O(holes)."""
        if self._allocated is None:
            ranges = list(self.file.data_ranges(0, self.size_sectors * SECTOR))
            starts = np.array([start // SECTOR for start, _ in ranges], np.int64)
            stops = np.array([stop // SECTOR for _, stop in ranges], np.int64)
            self._allocated = starts, stops
        return self._allocated

    def close(self) -> None:
        """Close both files."""
        self.file.close()
        self.digests.close()

    def check(self) -> None:
        """Assert that each block that isn't in flux is what its digest says, or known to be lost. Reads everything."""
        assert self.file.size() == self.size_sectors * SECTOR
        for first in range(0, self.blocks, _CHECK_BLOCKS):
            last = min(first + _CHECK_BLOCKS, self.blocks)
            begin, end = first * BLOCK_SECTORS, min(last * BLOCK_SECTORS, self.size_sectors)
            data = memoryview(bytearray((end - begin) * SECTOR))
            self._read(data, begin)
            bad = self._bad(data, first, last, self._flux)
            digests = self.digests.read(first, last)
            assert all(digests[block - first] == LOST for block in bad), f"digests of blocks {bad}"


def _split(start: int, stop: int, whole: memoryview, bad: set[int]) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield an extent in parts of good and of *bad* blocks; *whole* has all of its blocks."""
    first, last = start // BLOCK_SECTORS, -(-stop // BLOCK_SECTORS)
    for damaged, blocks in itertools.groupby(range(first, last), bad.__contains__):
        part = list(blocks)
        low, high = max(part[0] * BLOCK_SECTORS, start), min((part[-1] + 1) * BLOCK_SECTORS, stop)
        at = first * BLOCK_SECTORS
        yield low, high, None if damaged else whole[(low - at) * SECTOR : (high - at) * SECTOR]


def _covered(firsts: Ints, lasts: Ints, first: int, last: int) -> set[int]:
    """Return which of the blocks ``[first, last)`` a disjoint list has."""
    low, high = int(lasts.searchsorted(first, "right")), int(firsts.searchsorted(last, "left"))
    runs = zip(firsts[low:high].tolist(), lasts[low:high].tolist(), strict=True)
    return {block for begin, end in runs for block in range(max(begin, first), min(end, last))}
