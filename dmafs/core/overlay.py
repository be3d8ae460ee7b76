"""An overlay: the blocks of a writable clone that were written since it was made. The others are its base image's.

``overlay.dat`` is sparse and as long as the volume. A block of 4 KiB is in it at its own address; only the volume's
last one may be shorter. ``overlay.ext`` says which blocks are: a segment header, then a descriptor record for each run
of blocks that came in.

Invariants:

1. A record is appended only after the block it names is durable. So after a power cut a block is in the overlay with
   all its bytes or isn't in it; what wasn't flushed is old, or new, or mixed of both by sector, never anything else.
2. Of each record the *durable* field is the number of records that were durable before it. An invalid record that a
   later one calls durable is damage; any other is the torn end of an unclean stop, and is truncated.
3. The bitmap in memory is what the records say, and the blocks written since the last flush.

Data has no checksums, like the mirror's. One call at a time, but for ``read_into``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from dmafs.core.extent import Ints, chop, join
from dmafs.core.ondisk import (
    HEADER_SIZE,
    RECORD_SIZE,
    Flag,
    Header,
    Kind,
    Records,
    decode_records,
    encode_record,
)
from dmafs.core.opening import open_ours
from dmafs.core.segment import read_header
from dmafs.core.storage import Buffer, File, Storage
from dmafs.core.work import Work
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

DAT: Final = "overlay.dat"
EXT: Final = "overlay.ext"
BLOCK_SECTORS: Final = 8
BLOCK: Final = BLOCK_SECTORS * SECTOR
PENDING_RUNS: Final = 65536
"""Runs of blocks that wait for their records, at most: about 10 MiB of memory."""
SCAN_BYTES: Final = 256 << 10
"""How much of the records is decoded at once: they may name a million blocks."""

_ONES: Final = np.array([number.bit_count() for number in range(256)], np.uint8)


class Overlay:
    """The two files of one clone of one volume. Made by ``create`` and then ``open``."""

    def __init__(self, header: Header, ext: File, dat: File, size_sectors: int) -> None:
        """Take ownership of two open files and read the records. O(records)."""
        self.header = header
        self.size_sectors = size_sectors
        self._ext = ext
        self._dat = dat
        self._map: npt.NDArray[np.uint8] = np.zeros(-(-self._block_count // 8), np.uint8)
        self._records = 0
        self._pending: list[tuple[int, int]] = []  # runs of blocks that no record names yet
        self.dirty = False
        self._recover()
        self.blocks = int(_ONES[self._map].sum(dtype=np.int64))

    @property
    def _block_count(self) -> int:
        return -(-self.size_sectors // BLOCK_SECTORS)

    @staticmethod
    def create(storage: Storage, directory: str, header: Header, size_sectors: int) -> None:
        """Make both files in an empty directory, durably."""
        with contextlib.ExitStack() as opened:
            dat = storage.create(f"{directory}/{DAT}")
            opened.callback(dat.close)
            dat.truncate(size_sectors * SECTOR)
            dat.datasync()
            ext = storage.create(f"{directory}/{EXT}")
            opened.callback(ext.close)
            ext.write([header.encode()], 0)
            ext.datasync()
        storage.sync_directory(directory)

    @classmethod
    def open(cls, storage: Storage, directory: str, uuid: UUID, size_sectors: int) -> Overlay:
        """Open both files and recover them; CorruptionError if they aren't whole."""
        with contextlib.ExitStack() as undo:
            ext = open_ours(storage, f"{directory}/{EXT}", needed="the clone is of no use without it")
            undo.callback(ext.close)
            dat = open_ours(storage, f"{directory}/{DAT}", needed="the clone is of no use without it")
            undo.callback(dat.close)
            header = read_header(ext, Kind.CLONE, uuid)
            if header.name != directory.rpartition("/")[2]:
                raise CorruptionError(
                    f"{ext.name} belongs to clone {header.name}", hint="the directory was renamed; rename it back"
                )
            overlay = cls(header, ext, dat, size_sectors)
            undo.pop_all()
        return overlay

    # -- recovery -----------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read the records up to the first invalid one, truncate the rest, and make what there is durable."""
        if self._dat.size() != self.size_sectors * SECTOR:
            raise CorruptionError(
                f"{self._dat.name} has {self._dat.size()} bytes instead of {self.size_sectors * SECTOR}",
                hint="the file was truncated or extended from outside; drop the clone",
            )
        size = self._ext.size()
        while self._end + RECORD_SIZE <= size:
            data = bytearray(min(SCAN_BYTES, (size - self._end) // RECORD_SIZE * RECORD_SIZE))
            self._ext.read_into(data, self._end)
            valid = self._valid(decode_records(data, self.header.salt, next_seq=self._records + 1))
            self._mark(valid)
            self._records += len(valid)
            if len(valid) * RECORD_SIZE < len(data):
                break
        claimed = self._claimed_behind(size)
        if claimed > self._records:
            raise CorruptionError(
                f"{self._ext.name} ends at record {self._records}, but {claimed} had been made durable",
                hint="the storage below the store is damaged; drop the clone",
            )
        if size != self._end:
            self._ext.truncate(self._end)
        self._dat.datasync()  # a killed process may have left both in the page cache only
        self._ext.datasync()

    @property
    def _end(self) -> int:
        """Return where the next record goes."""
        return HEADER_SIZE + self._records * RECORD_SIZE

    def _valid(self, records: Records) -> Records:
        """Return the records before the first one that names no blocks of this overlay."""
        starts, lengths = records["start"], records["length"].astype(np.uint64)
        stops = starts + lengths
        whole = (stops % np.uint64(BLOCK_SECTORS) == 0) | (stops == self.size_sectors)
        right = (records["flags"] == int(Flag.DATA)) & (starts % np.uint64(BLOCK_SECTORS) == 0) & whole
        right &= (starts < self.size_sectors) & (stops <= self.size_sectors) & (records["physical"] == starts)
        wrong = np.flatnonzero(~right)
        return records[: wrong[0]] if len(wrong) else records

    def _mark(self, records: Records) -> None:
        """Enter the blocks that records name into the bitmap."""
        starts = records["start"].astype(np.int64) // BLOCK_SECTORS
        counts = -(-records["length"].astype(np.int64) // BLOCK_SECTORS)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        self._enter(np.repeat(starts, counts) + np.arange(len(before)) - before)

    def _claimed_behind(self, size: int) -> int:
        """Return how many records those behind the first invalid one call durable."""
        highest = 0
        for begin in range(self._end + RECORD_SIZE, size - RECORD_SIZE + 1, SCAN_BYTES):
            data = bytearray(min(SCAN_BYTES, (size - begin) // RECORD_SIZE * RECORD_SIZE))
            self._ext.read_into(data, begin)
            for offset in range(0, len(data), RECORD_SIZE):
                record = memoryview(data)[offset : offset + RECORD_SIZE]
                found = decode_records(record, self.header.salt, next_seq=int.from_bytes(record[:8], "little"))
                highest = max(highest, *found["durable"].tolist(), 0)
        return highest

    # -- blocks -------------------------------------------------------------------------------------------------

    def _enter(self, blocks: Ints) -> None:
        bits = np.left_shift(1, blocks & 7).astype(np.uint8)
        np.bitwise_or.at(self._map, blocks >> 3, bits)

    def held(self, first: int, stop: int) -> npt.NDArray[np.bool_]:
        """Say of each block of a range whether it is here."""
        begin = first >> 3
        bits = np.unpackbits(self._map[begin : -(-stop // 8)], bitorder="little")
        return bits[first - 8 * begin : stop - 8 * begin].astype(bool)

    def runs(self, first: int, stop: int) -> list[tuple[int, int, bool]]:
        """Cut a range of blocks into runs that are here, or aren't."""
        return _runs(self.held(first, stop), first)

    def read_into(self, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        """Fill *buffer* with bytes of blocks that are here."""
        if nowait:
            self._dat.read_into_nowait(buffer, offset)
        else:
            self._dat.read_into(buffer, offset)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write bytes; of a block that isn't here yet all of it. Durable after ``flush``."""
        stop = offset + sum(len(buffer) for buffer in buffers)
        assert offset < stop <= self.size_sectors * SECTOR
        self.dirty = True
        self._dat.write(buffers, offset)
        for first, end, is_held in self.runs(offset // BLOCK, -(-stop // BLOCK)):
            if is_held:
                continue
            assert offset <= first * BLOCK
            assert min(end * BLOCK, self.size_sectors * SECTOR) <= stop
            self._enter(np.arange(first, end, dtype=np.int64))
            self.blocks += end - first
            touches = bool(self._pending) and self._pending[-1][1] == first
            self._pending.append((self._pending.pop()[0] if touches else first, end))

    @property
    def is_crowded(self) -> bool:
        """Say whether so many runs wait for their records that a flush is due."""
        return len(self._pending) >= PENDING_RUNS

    def flush(self, time_ns: int) -> Work[None]:
        """Make all writes durable. No write may come in between."""
        records, count = self._encoded(time_ns)
        end = self._end

        def durable() -> None:
            self._dat.datasync()
            if count:
                self._ext.write([records], end)
                self._ext.datasync()

        yield durable
        self._records += count
        self._pending = []
        self.dirty = False

    def _encoded(self, time_ns: int) -> tuple[bytes, int]:
        """Return the records of the blocks that no record names yet, and how many they are."""
        blocks = np.array(sorted(self._pending), np.int64).reshape(-1, 2)
        starts, stops = join(blocks[:, 0] * BLOCK_SECTORS, np.minimum(blocks[:, 1] * BLOCK_SECTORS, self.size_sectors))
        starts, stops = chop(starts, stops)
        records = [
            encode_record(
                self.header.salt,
                seq=seq,
                time_ns=time_ns,
                start=start,
                length=stop - start,
                flags=Flag.DATA,
                physical=start,
                data_checksum=0,
                durable=self._records,
            )
            for seq, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True), self._records + 1)
        ]
        return b"".join(records), len(records)

    # -- housekeeping -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close both files."""
        self._ext.close()
        self._dat.close()

    def check(self) -> None:
        """Assert the invariants: what the bitmap has is what the file's records name, and what waits for records."""
        assert self._dat.size() == self.size_sectors * SECTOR
        assert self._ext.size() >= self._end
        data = bytearray(self._end - HEADER_SIZE)
        self._ext.read_into(data, HEADER_SIZE)
        records = self._valid(decode_records(data, self.header.salt, next_seq=1))
        assert len(records) == self._records
        named = [(start // BLOCK_SECTORS, -(-(start + length) // BLOCK_SECTORS)) for start, length in _extents(records)]
        blocks = [block for first, stop in [*named, *self._pending] for block in range(first, stop)]
        assert len(set(blocks)) == len(blocks) == self.blocks, "each block comes in once"
        assert np.flatnonzero(self.held(0, self._block_count)).tolist() == sorted(blocks)


def _extents(records: Records) -> list[tuple[int, int]]:
    return list(zip(records["start"].tolist(), records["length"].tolist(), strict=True))


def _runs(flags: npt.NDArray[np.bool_], first: int) -> list[tuple[int, int, bool]]:
    """Return the runs of equal flags as (begin, end, flag), counted from *first* on."""
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return [(first + begin, first + end, bool(flags[begin])) for begin, end in itertools.pairwise(edges)]
