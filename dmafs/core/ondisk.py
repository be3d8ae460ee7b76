"""The on-disk formats: segment headers, descriptor records, pointer slots, volume.json.

All integers are little-endian, all checksums xxh3-64. That of a record is seeded with the *salt* of the file it stands
in, so records left over from an earlier life of a file can never look valid; the others have seed 0.

Segment header, the first 512 bytes of each ``.ext`` file::

    offset  bytes  field
         0      8  magic "DMAFSEXT"
         8      4  format version
        12      4  kind: 1 forward, 2 backward, 3 clone
        16     16  volume UUID
        32      8  salt
        40      8  first: seq of the first event (forward), 1 (backward, clone)
        48      8  seq of the snapshot (backward), of the base (clone), 0 (forward)
        56      8  time_ns of the snapshot (backward), of the base (clone), 0 (forward)
        64      4  flags: 1 temporary (a snapshot kept only while somebody holds its image open),
                     2 frozen (a hook had brought what uses the disk to rest)
        68      4  length of the name in bytes
        72    256  name, UTF-8, padded with zeros
       328      8  instant: canonical time_ns of the moment across all volumes that it was taken with (backward), 0
                     (forward)
       336      8  sealed: how many entries are durable (backward), 0 (forward, clone); the only field that changes
       344    160  zeros
       504      8  checksum of bytes 0-503, seed 0

Descriptor record, 64 bytes each from offset 512 on (fig. 7, queue 701; fig. 13, queue 1300)::

    offset  bytes  field
         0      8  seq: dense from ``first`` for events; of the last event before it for sync indicators
         8      8  time_ns at capture
        16      8  start, sector in the logical address space; of a sync indicator: the place in the log of the tap
                     behind what was captured until then, 0 if there is no log
        24      4  length in sectors
        28      4  flags: 1 data, 2 zeros (discard, hole), 4 flush, 8 tick, 16 mark,
                     32 gap begins, 64 copy complete, 128 gap ends
        32      8  physical, sector in the .dat file
        40      8  checksum of the data; of a sync indicator without a name: from where on the log of the tap is
                     still needed; else 0
        48      8  durable: journal and primary were durable up to this seq when the record was written;
                     in a backward journal, in the tick behind what belongs together: the number of entries before;
                     in a clone: the number of records that were durable when it was written
        56      8  checksum of bytes 0-55, seed: the file's salt

A record is valid iff (1) its checksum matches; (2) flags hold exactly one kind; (3) an event's seq is that of the event
before it plus one, an indicator's is that of the event before it; (4) an event's length isn't 0, and of data at most
``MAX_EXTENT_SECTORS``. The queue ends before its first invalid record. A mark's name is one sector of data.

Seal, the last 512 bytes of the ``.ext`` file of a segment that is sealed; what stands before it is in ``seal``::

    offset  bytes  field
         0      8  magic "DMAFSEND"
         8      4  format version
        12      4  zeros
        16      8  records in the segment
        24      8  seq of the event behind its last one
        32      8  sectors of data
        40      8  time_ns of the first event, 0 without one
        48      8  time_ns of the last event or indicator, whichever is later
        56      8  certain: seq up to which the journal was durable when the segment was sealed
        64      8  durable: seq up to which journal and primary were durable, as its records say
        72      8  sync indicators in the segment
        80      8  seq of the first of them, 0 without one
        88      8  place in the log of the tap that the last one says
        96      8  from where on that log was still needed: what an indicator said last
       104      4  landmarks before the seal
       108      4  names before the seal
       112      8  checksum of all records, seed: the file's salt
       120      8  checksum of landmarks and names, seed: the file's salt
       128    376  zeros
       504      8  checksum of bytes 0-503, seed: the file's salt

Pointer slot, 512 bytes, at offset 0 and at offset 4096 of ``pointers``; the valid one of the higher generation counts::

    offset  bytes  field
         0      8  magic "DMAFSPTR"
         8      4  format version
        12      4  flags: 1 clean (closed in order), 2 copied (the initial copy is complete)
        16     16  volume UUID
        32      8  generation
        40      8  durable: the head; journal and primary are durable up to this seq
        48      8  mirror: the tail; seq of the mirror's content
        56      8  time_ns of the mirror's content
        64      8  target of the sync in progress, 0 if none
        72      8  time_ns of that target
        80      8  seq of the open snapshot, 0 if none
        88      8  copied: sectors done by the initial copy
        96      8  origin: seq of the first recoverable point
       104      8  time_ns of the origin
       112     16  boot id of the kernel under which the volume was opened last
       128    376  zeros
       504      8  checksum of bytes 0-503, seed 0

Digest header, the first 512 bytes of ``digests``; from byte 4096 on there are 8 bytes for each block of 4096 bytes of
the mirror: the checksum of its data, where that is 0 then 1, or 0 for a block that is all zeros, or LOST::

    offset  bytes  field
         0      8  magic "DMAFSDIG"
         8      4  format version
        12      4  zeros
        16     16  volume UUID
        32    472  zeros
       504      8  checksum of bytes 0-503, seed 0

Index header, the first 512 bytes of each ``.idx`` file; what follows it is in ``index``::

    offset  bytes  field
         0      8  magic "DMAFSIDX"
         8      4  format version
        12      4  zeros
        16     16  volume UUID
        32      8  records in the ``.ext`` file that it is of
        40      8  digest of that file: of a segment's records, as its seal says; of a snapshot the checksum of header
                     and last 64 records, seed 0
        48      8  entries
        56      8  checksum of all that follows the header, seed: the digest
        64    440  zeros
       504      8  checksum of bytes 0-503, seed 0

LOST, 2**64 - 1, is no data's checksum: of what would have it that of 2**64 - 2 is taken instead. It stands, here and in
the descriptors of backward journals, for data that was found damaged when it had to be moved.

``volume.json`` has the keys format, uuid, name, size_sectors, source, tap, created_ns, log.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
import xxhash

from dmafs.core.extent import MAX_EXTENT_SECTORS
from dmafs.errors import CorruptionError, VersionError

FORMAT_VERSION: Final = 4
HEADER_SIZE: Final = 512
RECORD_SIZE: Final = 64
SLOT_SIZE: Final = 512
SLOT_OFFSETS: Final = (0, 4096)
POINTERS_SIZE: Final = 8192
NO_BOOT: Final = UUID(int=0)
VOLUME_JSON_LIMIT: Final = 65536
NAME_LIMIT: Final = 256
LOG_DIRECTORY: Final = "log"
LOG_NAME: Final = re.compile(r"([0-9]{20})\.log")
"""Of a mapped device's logs, in that directory."""
SIZE_SECTORS_MAX: Final = (2**63 - 1) // 512
"""The largest size whose bytes the operating system can address."""

LOST: Final = 2**64 - 1
"""The checksum that no data has."""

_HEADER = struct.Struct("<8sII16sQQQQII256sQQ160x")
_RECORD = struct.Struct("<QQQIIQQQ")
_CHECKSUM = struct.Struct("<Q")
_SLOT = struct.Struct("<8sII16sQQQQQQQQQQ16s376x")
_HEADER_MAGIC: Final = b"DMAFSEXT"
_TEMPORARY: Final = 1
_FROZEN: Final = 2
_SLOT_MAGIC: Final = b"DMAFSPTR"
_DIGESTS: Final = struct.Struct("<8sII16s472x")
_DIGESTS_MAGIC: Final = b"DMAFSDIG"

RECORD_DTYPE: Final = np.dtype(
    [
        ("seq", "<u8"),
        ("time_ns", "<u8"),
        ("start", "<u8"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("physical", "<u8"),
        ("data_checksum", "<u8"),
        ("durable", "<u8"),
        ("checksum", "<u8"),
    ]
)
Records = npt.NDArray[np.void]


class Kind(IntEnum):
    """What a segment belongs to."""

    FORWARD = 1
    BACKWARD = 2
    CLONE = 3


class Flag(IntFlag):
    """What a record is: one of these."""

    DATA = 1
    ZERO = 2
    FLUSH = 4
    TICK = 8
    MARK = 16
    GAP = 32
    COPIED = 64
    RESYNCED = 128


EVENT_FLAGS: Final = (int(Flag.DATA), int(Flag.ZERO))
_KINDS: Final = frozenset(int(flag) for flag in Flag)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return the checksum of an extent's data, never LOST."""
    digest = xxhash.xxh3_64_intdigest(data)
    return digest if digest != LOST else LOST - 1


def new_salt() -> int:
    """Return a fresh random salt."""
    return int.from_bytes(os.urandom(8), "little")


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a segment; see the table above."""

    kind: Kind
    uuid: UUID
    salt: int
    first: int
    snapshot_seq: int = 0
    snapshot_time_ns: int = 0
    temporary: bool = False
    name: str = ""
    frozen: bool = False
    instant_ns: int = 0
    sealed: int = 0

    def encode(self) -> bytes:
        """Return the 512 bytes of the header."""
        name = self.name.encode()
        assert len(name) <= NAME_LIMIT
        body = _HEADER.pack(
            _HEADER_MAGIC,
            FORMAT_VERSION,
            self.kind,
            self.uuid.bytes,
            self.salt,
            self.first,
            self.snapshot_seq,
            self.snapshot_time_ns,
            self.temporary * _TEMPORARY | self.frozen * _FROZEN,
            len(name),
            name,
            self.instant_ns,
            self.sealed,
        )
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def decode(cls, data: bytes | bytearray, where: str) -> Header:
        """Return the header in *data*; CorruptionError or VersionError naming *where* if it is none of ours."""
        check_block(data, HEADER_SIZE, _HEADER_MAGIC, where)
        (_, _, kind, uuid, salt, first, seq, time_ns, flags, length, name, instant, sealed) = _HEADER.unpack_from(data)
        try:
            if flags > _TEMPORARY | _FROZEN or length > NAME_LIMIT:
                raise ValueError
            temporary, frozen = bool(flags & _TEMPORARY), bool(flags & _FROZEN)
            name = name[:length].decode()
            return cls(
                Kind(kind), UUID(bytes=uuid), salt, first, seq, time_ns, temporary, name, frozen, instant, sealed
            )
        except ValueError as error:
            raise CorruptionError(f"header of {where} has a field out of range", hint="the file is foreign") from error


def check_block(data: bytes | bytearray, size: int, magic: bytes, where: str) -> None:
    """Check length, magic, version and checksum of a header or slot of 512 bytes."""
    if len(data) != size or data[:8] != magic:
        raise CorruptionError(f"{where} doesn't begin with {magic.decode()}", hint="the file is foreign or damaged")
    version = int.from_bytes(data[8:12], "little")
    if version != FORMAT_VERSION:
        raise VersionError(
            f"{where} has format version {version}, this program knows {FORMAT_VERSION}",
            hint="use the version of dmafs that wrote it",
        )
    if _CHECKSUM.unpack_from(data, size - 8)[0] != checksum(memoryview(data)[: size - 8]):
        raise CorruptionError(f"checksum of {where} doesn't match", hint="the file is damaged")


def encode_record(
    salt: int,
    *,
    seq: int,
    time_ns: int,
    start: int,
    length: int,
    flags: int,
    physical: int,
    data_checksum: int,
    durable: int,
) -> bytes:
    """Return the 64 bytes of a descriptor record."""
    body = _RECORD.pack(seq, time_ns, start, length, flags, physical, data_checksum, durable)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed=salt))


def seal_records(records: Records, salt: int) -> bytes:
    """Set the checksums of *records* and return their bytes."""
    body, digest = memoryview(records.tobytes()), xxhash.xxh3_64_intdigest
    ends = range(RECORD_SIZE - 8, len(body), RECORD_SIZE)
    records["checksum"] = [digest(body[end + 8 - RECORD_SIZE : end], seed=salt) for end in ends]
    return records.tobytes()


def decode_records(data: bytes | bytearray | memoryview, salt: int, *, next_seq: int) -> Records:
    """Return the longest valid run of records at the beginning of *data*, as an array of ``RECORD_DTYPE``.

    *next_seq* is the seq that the first event must have. Damaged bytes end the run and raise nothing. O(n).
    """
    view = memoryview(data)[: len(data) // RECORD_SIZE * RECORD_SIZE]
    records = np.frombuffer(view, RECORD_DTYPE)
    digest = xxhash.xxh3_64_intdigest
    count = 0
    for stored, offset in zip(records["checksum"].tolist(), range(0, len(view), RECORD_SIZE), strict=True):
        if digest(view[offset : offset + RECORD_SIZE - 8], seed=salt) != stored:
            break
        count += 1
    records = records[:count]
    flags = records["flags"]
    event = np.isin(flags, EVENT_FLAGS)
    expected = np.uint64((next_seq - 1) % 2**64) + np.cumsum(event, dtype=np.uint64)  # foreign bytes may say 0
    valid = np.isin(flags, list(_KINDS)) & (records["seq"] == expected)
    valid &= ~event | (records["length"] > 0)
    valid &= (flags != int(Flag.DATA)) | (records["length"] <= MAX_EXTENT_SECTORS)
    bad = np.flatnonzero(~valid)
    return records[: bad[0]] if len(bad) else records


@dataclass(frozen=True, slots=True)
class Pointers:
    """The contents of a pointer slot; see the table above."""

    uuid: UUID
    generation: int = 0
    clean: bool = False
    copied: bool = False
    durable: int = 0
    mirror_seq: int = 0
    mirror_time_ns: int = 0
    sync_target: int = 0
    sync_time_ns: int = 0
    open_snapshot: int = 0
    copied_sectors: int = 0
    origin_seq: int = 0
    origin_time_ns: int = 0
    boot_id: UUID = NO_BOOT

    def encode(self) -> bytes:
        """Return the 512 bytes of the slot."""
        body = _SLOT.pack(
            _SLOT_MAGIC,
            FORMAT_VERSION,
            int(self.clean) | int(self.copied) << 1,
            self.uuid.bytes,
            self.generation,
            self.durable,
            self.mirror_seq,
            self.mirror_time_ns,
            self.sync_target,
            self.sync_time_ns,
            self.open_snapshot,
            self.copied_sectors,
            self.origin_seq,
            self.origin_time_ns,
            self.boot_id.bytes,
        )
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def decode(cls, data: bytes | bytearray, where: str) -> Pointers:
        """Return the slot in *data*; CorruptionError or VersionError naming *where* if it is none of ours."""
        check_block(data, SLOT_SIZE, _SLOT_MAGIC, where)
        (_, _, flags, uuid, generation, d, m, mt, s, st, o, c, q, qt, boot_id) = _SLOT.unpack_from(data)
        clean, copied = bool(flags & 1), bool(flags & 2)
        return cls(UUID(bytes=uuid), generation, clean, copied, d, m, mt, s, st, o, c, q, qt, UUID(bytes=boot_id))


@dataclass(frozen=True, slots=True)
class DigestHeader:
    """The header of the mirror's digests; see the table above."""

    uuid: UUID

    def encode(self) -> bytes:
        """Return the 512 bytes of the header."""
        body = _DIGESTS.pack(_DIGESTS_MAGIC, FORMAT_VERSION, 0, self.uuid.bytes)
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def decode(cls, data: bytes | bytearray, where: str) -> DigestHeader:
        """Return the header in *data*; CorruptionError or VersionError naming *where* if it is none of ours."""
        check_block(data, HEADER_SIZE, _DIGESTS_MAGIC, where)
        return cls(UUID(bytes=_DIGESTS.unpack_from(data)[3]))


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """The contents of volume.json, written once when the volume is created."""

    uuid: UUID
    name: str
    size_sectors: int
    source: str
    tap: str
    created_ns: int
    log: str = ""
    """The log that a tap follows, or that the volume was imported from; empty if there is none."""

    def encode(self) -> bytes:
        """Return the JSON text."""
        fields = {"format": FORMAT_VERSION, **dataclasses.asdict(self), "uuid": str(self.uuid)}
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, where: str) -> VolumeInfo:
        """Return what the JSON text holds; CorruptionError or VersionError naming *where* otherwise."""
        try:
            fields = json.loads(data)
            version = fields.pop("format")
            if version != FORMAT_VERSION:
                raise VersionError(
                    f"{where} has format version {version}, this program knows {FORMAT_VERSION}",
                    hint="use the version of dmafs that wrote it",
                )
            info = cls(**{**fields, "uuid": UUID(fields["uuid"])})
            types = (
                (info.name, str),
                (info.source, str),
                (info.tap, str),
                (info.log, str),
                (info.created_ns, int),
                (info.size_sectors, int),
            )
            right = all(isinstance(value, kind) and not isinstance(value, bool) for value, kind in types)
            if not right or not 0 < info.size_sectors <= SIZE_SECTORS_MAX:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptionError(
                f"{where} doesn't describe a volume", hint="the file is foreign or damaged"
            ) from error
        return info
