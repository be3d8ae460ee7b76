"""The seal of a segment of the forward journal: what there is to know of it without reading its descriptors.

When a segment is full and all of it is durable, it is *sealed*: behind its last record the ``.ext`` file gets, at once,

- the *landmarks*, 64 bytes each: the records of its marks, of the beginnings and ends of gaps, and of its last sync
  indicator whatever that is, with 0 for their checksums, so that they can't be taken for records;
- the names of these marks, 512 bytes each;
- the seal, 512 bytes, whose table is in ``ondisk``.

So the seal is found from the file's end. It is valid iff (1) magic, version and its checksum are right; (2) the parts
together are as long as the file; (3) the checksum of landmarks and names matches. Whether the records are as they were
is told by one checksum of all of them, when they are needed. Checksums are seeded with the file's salt.

Nothing is ever appended behind a seal, and nothing of a sealed segment is torn: it is whole, or damaged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from dmafs.core.batch import name_of
from dmafs.core.columns import Indicator
from dmafs.core.ondisk import (
    EVENT_FLAGS,
    FORMAT_VERSION,
    HEADER_SIZE,
    RECORD_DTYPE,
    RECORD_SIZE,
    Flag,
    Records,
)
from dmafs.core.storage import File
from dmafs.units import SECTOR

SEAL_SIZE: Final = 512
SEAL: Final = struct.Struct("<8sIIQQQQQQQQQQQIIQQ376x")
SEAL_MAGIC: Final = b"DMAFSEND"
LANDMARKS: Final = (Flag.MARK, Flag.GAP, Flag.RESYNCED)
_CHECKSUM: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a seal says, but for checksums and landmarks."""

    records: int
    next_seq: int
    """Of the event behind its last one."""
    data_sectors: int
    first_time_ns: int
    """Of its first event, 0 without one."""
    last_time_ns: int
    """Of its last event or indicator, whichever is later."""
    certain: int
    """Up to where the journal was durable when it was sealed; never less than its last event."""
    durable: int
    """What its records say last of journal and primary."""
    indicators: int
    first_indicator: int
    """Seq of its first sync indicator, 0 without one."""
    position: int
    """What its last indicator says of the tap's log."""
    retained: int
    """What the last indicator that is no mark says of it, 0 without one."""


@dataclass(frozen=True, slots=True)
class Seal:
    """The seal of one segment: a summary, its landmarks in order, and the checksum of its records."""

    summary: Summary
    landmarks: tuple[Indicator, ...]
    digest: int

    @property
    def last_indicator(self) -> Indicator | None:
        """Return the last sync indicator."""
        return self.landmarks[-1] if self.landmarks else None


def digest_of(parts: list[bytearray], salt: int) -> int:
    """Return the checksum of a run of bytes that is given in parts."""
    digest = xxhash.xxh3_64(seed=salt)
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def landmarks_of(records: Records) -> Records:
    """Return copies of those of a segment's records that are landmarks."""
    indicators = records[~np.isin(records["flags"], EVENT_FLAGS)]
    chosen = np.isin(indicators["flags"], LANDMARKS)
    chosen[-1:] = True
    found = indicators[chosen].copy()
    found["checksum"] = 0
    return found


def encode(summary: Summary, landmarks: Records, names: list[bytes], salt: int, digest: int) -> bytes:
    """Return the bytes that stand behind the last record; *names* are the sectors of those landmarks that have one."""
    front = landmarks.tobytes() + b"".join(names)
    body = SEAL.pack(
        SEAL_MAGIC,
        FORMAT_VERSION,
        0,
        summary.records,
        summary.next_seq,
        summary.data_sectors,
        summary.first_time_ns,
        summary.last_time_ns,
        summary.certain,
        summary.durable,
        summary.indicators,
        summary.first_indicator,
        summary.position,
        summary.retained,
        len(landmarks),
        len(names),
        digest,
        xxhash.xxh3_64_intdigest(front, seed=salt),
    )
    return front + body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed=salt))


def read_seal(ext: File, salt: int, first: int) -> Seal | None:
    """Return the seal at the end of a descriptor file, or None if it has no valid one. Two reads at most."""
    size = ext.size()
    if size < HEADER_SIZE + SEAL_SIZE:
        return None
    data = bytearray(SEAL_SIZE)
    ext.read_into(data, size - SEAL_SIZE)
    body = memoryview(data)[:-8]
    if data[:8] != SEAL_MAGIC or _CHECKSUM.unpack_from(data, SEAL_SIZE - 8)[0] != _salted(body, salt):
        return None
    (_, version, _, *fields, landmarks, names, digest, front_digest) = SEAL.unpack(body)
    summary = Summary(*fields)
    begin = HEADER_SIZE + summary.records * RECORD_SIZE
    length = landmarks * RECORD_SIZE + names * SECTOR
    if version != FORMAT_VERSION or begin + length + SEAL_SIZE != size or summary.next_seq < first:
        return None
    front = bytearray(length)
    if length:
        ext.read_into(front, begin)
        if _salted(front, salt) != front_digest:
            return None
    return Seal(summary, tuple(_indicators(front, landmarks)), digest)


def _salted(data: bytearray | memoryview, salt: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=salt)


def _indicators(front: bytearray, count: int) -> list[Indicator]:
    """Return the landmarks in the bytes before a seal."""
    records = np.frombuffer(front, RECORD_DTYPE, count) if count else np.empty(0, RECORD_DTYPE)
    found, at = [], count * RECORD_SIZE
    for record in records:
        name = ""
        if record["flags"] == int(Flag.MARK) and record["length"]:
            name, at = name_of(front[at : at + SECTOR]), at + SECTOR
        found.append(Indicator(int(record["seq"]), int(record["time_ns"]), Flag(int(record["flags"])), name))
    return found
