"""The digest table of the mirror: an xxh3 digest of each of its blocks of 4 KiB, so that damage is never served.

``digests`` is a header, see ondisk.py, and from byte 4096 on 8 bytes a block, little-endian: 0.2 % of the mirror. It is
sparse like the mirror: HOLE is a block that is all zeros. LOST is a block whose data is known to be gone; nothing has
that digest, so the block can't be read until it is overwritten as a whole or repaired.

The table is written where the mirror is, by the initial copy and by a sync whose commit record is durable, and made
durable with it. So after a cut the same work writes both again. What is *put* is kept in memory until ``flush``, and
then written in the order of blocks. One thread puts and flushes; any thread may read blocks that nobody is changing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from struct import unpack
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
import xxhash

from dmafs.core.extent import Ints
from dmafs.core.ondisk import LOST, DigestHeader, checksum
from dmafs.core.opening import open_ours
from dmafs.core.storage import Storage
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR

NAME: Final = "digests"
BLOCK_SECTORS: Final = 8
BLOCK: Final = BLOCK_SECTORS * SECTOR
"""What file systems write at once: a sync hardly ever has to read the rest of a block for its digest."""
HOLE: Final = 0
TABLE_OFFSET: Final = 4096
PENDING_DIGESTS: Final = 1 << 18
"""Digests kept in memory at most, about 30 MiB, before they are written."""
VERDICT_CHUNKS: Final = 2048
"""Verdicts are kept in chunks of CHUNK_BLOCKS, a byte each: 32 MiB at most, for 128 GiB of the mirror."""
CHUNK_BLOCKS: Final = 1 << 14
_WINDOW: Final = 512  # entries of the table that are read and written at once: 4 KiB
_ENTRY: Final = 8
_ZEROS: Final = xxhash.xxh3_64_intdigest(bytes(BLOCK))
_SMALL_ZERO: Final = 512  # a longer run of zeros is punched out of the table

Digest = npt.NDArray[np.uint64]


def any_set(data: bytearray | memoryview) -> bool:
    """Say whether a byte of whole sectors isn't zero; most often the first few tell."""
    return data[0] != 0 or bool(np.frombuffer(data, np.uint64).any())


def digest_of(data: bytes | bytearray | memoryview) -> int:
    """Return the digest of a block's data, never HOLE or LOST."""
    return checksum(data) or 1


def matches(data: memoryview, digest: int) -> bool:
    """Say whether a block's data is what its digest says."""
    return not any_set(data) if digest == HOLE else digest_of(data) == digest


def partial_blocks(starts: Ints, stops: Ints, size_sectors: int) -> Ints:
    """Return the blocks that have an end of an extent inside of them, ascending; the volume's end isn't inside."""
    heads = starts[starts % BLOCK_SECTORS != 0] // BLOCK_SECTORS
    tails = stops[(stops % BLOCK_SECTORS != 0) & (stops != size_sectors)] // BLOCK_SECTORS
    return np.unique(np.concatenate([heads, tails]))


def unequal(data: memoryview, digests: Sequence[int]) -> list[int]:
    """Return the numbers of those blocks of *data* that aren't what their digests say."""
    xxh3 = xxhash.xxh3_64_intdigest  # nearly all are equal at once, and nothing more is called for them
    return [
        number
        for number, digest in enumerate(digests)
        if (xxh3(data[number * BLOCK : number * BLOCK + BLOCK]) != (digest or _ZEROS) or digest == LOST)
        and not matches(data[number * BLOCK : number * BLOCK + BLOCK], digest)
    ]


class Digests:
    """The table of one volume."""

    def __init__(self, storage: Storage, uuid: UUID, size_sectors: int) -> None:
        """Open the table; CorruptionError if it is missing, foreign or of another size."""
        self.file = open_ours(storage, NAME, needed="without it nothing in the mirror can be trusted")
        try:
            self._require_ours(uuid, size_sectors)
        except BaseException:
            self.file.close()
            raise
        self._blocks = -(-size_sectors // BLOCK_SECTORS)
        self._pending: dict[int, int] = {}

    def _require_ours(self, uuid: UUID, size_sectors: int) -> None:
        data = bytearray(SECTOR)
        self.file.read_into(data, 0)
        header = DigestHeader.decode(data, self.file.name)
        if header.uuid != uuid:
            raise CorruptionError(
                f"{self.file.name} belongs to volume {header.uuid}, not to {uuid}",
                hint="the file comes from another store",
            )
        size, right = self.file.size(), table_size(size_sectors)
        if size != right:
            raise CorruptionError(
                f"{self.file.name} has {size} bytes instead of {right}",
                hint="the file was truncated or extended from outside; restore it",
            )

    @staticmethod
    def create(storage: Storage, uuid: UUID, size_sectors: int) -> None:
        """Create the table of a mirror that is one hole."""
        file = storage.create(NAME)
        try:
            file.truncate(table_size(size_sectors))
            file.write([DigestHeader(uuid).encode()], 0)
            file.datasync()
        finally:
            file.close()

    def read(self, first: int, last: int) -> Digest:
        """Return the digests of the blocks ``[first, last)`` as they are in the file."""
        return np.frombuffer(self._entries(first, last, nowait=False), "<u8")

    def read_few(self, first: int, last: int, *, nowait: bool = False) -> tuple[int, ...]:
        """Return the same as plain numbers; with *nowait* BlockingIOError when that has to wait for the disk."""
        return unpack(f"<{last - first}Q", self._entries(first, last, nowait=nowait))

    def _entries(self, first: int, last: int, *, nowait: bool) -> bytearray:
        data = bytearray((last - first) * _ENTRY)
        if nowait:
            self.file.read_into_nowait(data, TABLE_OFFSET + first * _ENTRY)
        else:
            self.file.read_into(data, TABLE_OFFSET + first * _ENTRY)
        return data

    def uncache(self, first: int, last: int) -> None:
        """Have the digests of blocks come from the disk when they are read next."""
        self.file.uncache(TABLE_OFFSET + first * _ENTRY, (last - first) * _ENTRY)

    def window(self) -> Callable[[int], int]:
        """Return a look-up of digests for many blocks in ascending order, which reads the table by windows."""
        at, table = -1, np.empty(0, np.uint64)

        def digest(block: int) -> int:
            nonlocal at, table
            if block // _WINDOW != at:
                at = block // _WINDOW
                table = self.read(at * _WINDOW, min((at + 1) * _WINDOW, self._blocks))
            return int(table[block - at * _WINDOW])

        return digest

    def put(self, block: int, digest: int) -> None:
        """Set the digest of a block."""
        self._pending[block] = digest
        if len(self._pending) >= PENDING_DIGESTS:
            self.flush()

    def put_holes(self, first: int, last: int) -> None:
        """Set the digests of blocks that are zeros now."""
        if last - first <= _SMALL_ZERO:
            for block in range(first, last):
                self.put(block, HOLE)
        else:
            self.flush()
            self.file.zero(TABLE_OFFSET + first * _ENTRY, (last - first) * _ENTRY)

    def flush(self) -> None:
        """Write what was put to the file. After an error all of it will be written again."""
        if not self._pending:
            return
        blocks = np.fromiter(self._pending.keys(), np.int64, len(self._pending))
        digests = np.fromiter(self._pending.values(), np.uint64, len(self._pending))
        order = np.argsort(blocks)
        blocks, digests = blocks[order], digests[order]
        window = blocks // _WINDOW
        edges = np.flatnonzero(np.append(True, window[1:] != window[:-1])).tolist()
        for begin, end in zip(edges, [*edges[1:], len(blocks)], strict=True):
            self._write(blocks[begin:end], digests[begin:end])
        self._pending.clear()

    def _write(self, blocks: Ints, digests: Digest) -> None:
        """Write digests of ascending blocks of one window."""
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        if last - first == len(blocks):
            table = digests
        else:
            table = self.read(first, last).copy()
            table[blocks - first] = digests
        self.file.write([table.astype("<u8").tobytes()], TABLE_OFFSET + first * _ENTRY)

    def datasync(self) -> None:
        """Write what was put and make it durable."""
        self.flush()
        self.file.datasync()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Verdicts:
    """Which blocks have been read and found to match since the store was opened. Thread-safe.

    Derived data: what is forgotten is checked again.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._chunks: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    def hold(self, first: int, last: int) -> bool:
        """Say whether all blocks ``[first, last)`` have been found to match."""
        for number, begin, end in _chunked(first, last):
            chunk = self._chunks.get(number)
            if chunk is None or chunk.find(0, begin, end) >= 0:
                return False
        return True

    def add(self, first: int, last: int) -> None:
        """Take note of blocks that match."""
        for number, begin, end in _chunked(first, last):
            with self._lock:
                chunk = self._chunks.get(number)
                if chunk is None:
                    if len(self._chunks) >= VERDICT_CHUNKS:
                        del self._chunks[next(iter(self._chunks))]
                    chunk = self._chunks[number] = bytearray(CHUNK_BLOCKS)
                chunk[begin:end] = b"\1" * (end - begin)

    def forget(self, firsts: Ints, lasts: Ints) -> None:
        """Forget the blocks of a disjoint list."""
        with self._lock:
            for number, chunk in self._chunks.items():
                begin, end = number * CHUNK_BLOCKS, (number + 1) * CHUNK_BLOCKS
                low, high = int(lasts.searchsorted(begin, "right")), int(firsts.searchsorted(end, "left"))
                if low < high:
                    change = np.zeros(CHUNK_BLOCKS + 1, np.int32)
                    np.add.at(change, np.maximum(firsts[low:high] - begin, 0), 1)
                    np.add.at(change, np.minimum(lasts[low:high] - begin, CHUNK_BLOCKS), -1)
                    np.frombuffer(chunk, np.uint8)[np.cumsum(change[:-1]) > 0] = 0


def _chunked(first: int, last: int) -> list[tuple[int, int, int]]:
    """Return the parts of chunks that blocks ``[first, last)`` are: number, begin and end within."""
    number, begin = divmod(first, CHUNK_BLOCKS)
    if begin + last - first <= CHUNK_BLOCKS:
        return [(number, begin, begin + last - first)]
    found = []
    while first < last:
        number, begin = divmod(first, CHUNK_BLOCKS)
        end = min(CHUNK_BLOCKS, begin + last - first)
        found.append((number, begin, end))
        first += end - begin
    return found


def table_size(size_sectors: int) -> int:
    """Return the bytes of the table of a volume of that size."""
    return TABLE_OFFSET + -(-size_sectors // BLOCK_SECTORS) * _ENTRY
