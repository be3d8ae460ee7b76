"""What is tried of the formats on disk. Each function judges so many mutants; see ``test_mutants``."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final
from uuid import UUID

import numpy as np
import xxhash

from dmafs.core import ondisk
from dmafs.core.extent import MAX_EXTENT_SECTORS
from dmafs.core.index import Owner, decode, encode
from dmafs.core.layers import Layer
from dmafs.core.ondisk import (
    EVENT_FLAGS,
    HEADER_SIZE,
    POINTERS_SIZE,
    RECORD_DTYPE,
    RECORD_SIZE,
    SIZE_SECTORS_MAX,
    SLOT_OFFSETS,
    DigestHeader,
    Flag,
    Header,
    Kind,
    Pointers,
    VolumeInfo,
    decode_records,
    seal_records,
)
from dmafs.core.overlay import BLOCK_SECTORS, Overlay
from dmafs.core.partitions import ENTRIES_MAX, LINKS_MAX, PARTITIONS_MAX, find_partitions
from dmafs.core.pointers import PointerFile
from dmafs.core.segment import Segment, read_header
from dmafs.core.storage import Storage
from dmafs.core.vbm import ZERO
from dmafs.errors import CorruptionError, VersionError
from dmafs.taps.logformat import HEADER_BYTES, Entry, LogFlag, Super, decode_mark, encode_mark
from dmafs.taps.logreader import LogReader
from dmafs.units import SECTOR
from tests.disklabels import gpt_entries, gpt_entry, gpt_header, mbr_sector, sealed
from tests.fuzz.mutation import mutants, odd_numbers, seeded, shown, text_mutants
from tests.logs import DISK_SECTORS, FLUSH, MemoryFile, discard, log_of, mark, write

Rng = np.random.Generator
REFUSALS: Final = (CorruptionError, VersionError)
OURS: Final = UUID(int=0x1234567890ABCDEF)
SALT: Final = 0xC0FFEE
_KINDS: Final = [int(flag) for flag in Flag]


def _headers() -> list[Header]:
    return [
        Header(Kind.FORWARD, OURS, SALT, 1),
        Header(Kind.FORWARD, OURS, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1),
        Header(Kind.BACKWARD, OURS, SALT, 7, 6, 5, temporary=True, name="x", frozen=True, instant_ns=9),
        Header(Kind.BACKWARD, OURS, SALT, 7, 6, 5, name="é" * 128),
        Header(Kind.CLONE, OURS, 0, 1, name="n" * 256),
    ]


def _pointers() -> list[Pointers]:
    return [
        Pointers(OURS),
        Pointers(OURS, 5, True, True, 9, 8, 7, 6, 5, 4, 3, 2, 1, OURS),  # noqa: FBT003 - all fields
        Pointers(OURS, *([2**64 - 1, False, True] + [2**64 - 1] * 9)),  # type: ignore[arg-type]  # by their order
    ]


def _sealed(block: bytes) -> bytes:
    """Give a block of 512 bytes the checksum that is right for it."""
    return block[:-8] + ondisk.checksum(block[:-8]).to_bytes(8, "little")


def _block(rng: Rng, count: int, kept: Sequence[Any], decode: Callable[[bytes, str], Any]) -> None:
    """Blocks of 512 bytes: with the old checksum all are refused; with a right one what is taken comes out again."""
    originals = [each.encode() for each in kept]
    assert [decode(data, "it") for data in originals] == list(kept)
    for number, mutant in enumerate(mutants(rng, originals, count)):
        sealed = number % 2 == 1
        data = _sealed(mutant) if sealed else mutant
        try:
            found = decode(data, "it")
        except REFUSALS as error:
            assert "it" in error.message
            assert error.hint
        else:
            assert sealed, shown(data)
            again = found.encode()
            assert decode(again, "it") == found, shown(data)
            assert len(again) == len(data)


def headers(rng: Rng, count: int) -> None:
    """Headers of segments."""
    _block(rng, count, _headers(), Header.decode)


def pointers(rng: Rng, count: int) -> None:
    """Pointer slots."""
    _block(rng, count, _pointers(), Pointers.decode)


def digest_headers(rng: Rng, count: int) -> None:
    """The header of the mirror's digests."""
    _block(rng, count, [DigestHeader(OURS), DigestHeader(UUID(int=0))], DigestHeader.decode)


def volume_infos(rng: Rng, count: int) -> None:
    """``volume.json``: a description in its ranges, or a refusal."""
    kept = [
        VolumeInfo(OURS, "disk", 2048, "/dev/sdb", "fuse", 5),
        VolumeInfo(OURS, "é", SIZE_SECTORS_MAX, "", "log", 0, "/x"),
    ]
    texts = [each.encode().decode() for each in kept]
    assert [VolumeInfo.decode(text.encode(), "it") for text in texts] == kept
    words = [
        "{",
        "[" * 3000,
        "null",
        "NaN",
        "1e999",
        '"',
        "\\ud800",
        '"format": 3,',
        "true",
        "-1",
        str(2**63),
        '"uuid"',
    ]
    for mutant in text_mutants(seeded(rng), texts, count, words=words):
        try:
            found = VolumeInfo.decode(mutant.encode(), "it")
        except REFUSALS as error:
            assert error.message.startswith("it ")
        else:
            assert 0 < found.size_sectors <= SIZE_SECTORS_MAX, shown(mutant)
            assert VolumeInfo.decode(json.dumps(json.loads(found.encode())).encode(), "it") == found, shown(mutant)


def indexes(rng: Rng, count: int) -> None:
    """Indexes of layers: none is taken that isn't as it was written; with right checksums only what can be."""
    owner, base = Owner(OURS, 40, SALT), 1 << 62
    edges = np.sort(rng.permutation(2000)[:60].astype(np.int64))
    numbers = rng.permutation(30).astype(np.int64) + ZERO * rng.integers(0, 2, 30)
    content = encode(owner, Layer(edges[::2], edges[1::2], numbers + base), base=base)
    assert decode(memoryview(content), owner, "it", base=base).references.tolist() == (numbers + base).tolist()
    for number, mutant in enumerate(mutants(rng, [content], count)):
        cut = mutant[: int(rng.integers(0, len(mutant) + 1))] if number % 7 == 0 else mutant
        sealed = number % 2 == 1 and len(cut) >= HEADER_SIZE
        body = cut[HEADER_SIZE:]
        digest = xxhash.xxh3_64_intdigest(body, seed=SALT).to_bytes(8, "little")
        data = _sealed(content[:56] + digest + cut[64:HEADER_SIZE]) + body if sealed else cut
        try:
            found = decode(memoryview(data), owner, "it", base=base)
        except REFUSALS as error:
            assert "it" in error.message
            continue
        assert sealed, shown(data)
        events = (found.references - base) & ~ZERO
        assert len(found) == 30
        assert (events >= 0).all()
        assert (events < 40).all()
        assert (np.diff(np.stack([found.starts, found.stops], 1).ravel()) >= 0).all()
        assert (found.starts < found.stops).all()


# --- descriptor records


def _queue(rng: Rng, length: int) -> np.ndarray[Any, Any]:
    """Return valid records of a forward journal that begins with event 1."""
    found = np.zeros(length, RECORD_DTYPE)
    found["flags"] = rng.choice(_KINDS + [1] * 8, length)
    event = np.isin(found["flags"], EVENT_FLAGS)
    found["seq"] = np.cumsum(event)
    found["time_ns"] = np.cumsum(rng.integers(0, 1000, length)) + 10**18
    found["start"] = rng.integers(0, DISK_SECTORS - 64, length)
    found["length"] = np.where(event, rng.integers(1, 64, length), 0)
    found["physical"] = np.cumsum(found["length"]) - found["length"]
    found["durable"] = np.maximum(found["seq"].astype(np.int64) - 3, 0)
    seal_records(found, SALT)
    return found


def _is_valid(record: bytes, expected: int) -> bool:
    """Say whether a record is valid, by what the format's description says; *expected*: the next event's seq."""
    seq, _, _, length, flags, _, _, _, stored = struct.unpack("<QQQIIQQQQ", record)
    if xxhash.xxh3_64_intdigest(record[:-8], seed=SALT) != stored or flags not in _KINDS:
        return False
    if flags not in EVENT_FLAGS:
        return bool(seq == (expected - 1) % 2**64)
    return bool(seq == expected % 2**64 and length and (flags != Flag.DATA or length <= MAX_EXTENT_SECTORS))


def _mutate_records(rng: Rng, queue: np.ndarray[Any, Any]) -> tuple[bytes, int]:
    """Change about half of the records, half of these with a right checksum; return all and how many were changed."""
    hit = np.flatnonzero(rng.integers(0, 2, len(queue)))
    data = bytearray(queue.tobytes())
    for index, mutant in zip(hit.tolist(), mutants(rng, [bytes(RECORD_SIZE)], len(hit)), strict=True):
        begin = index * RECORD_SIZE
        changed = int.from_bytes(data[begin : begin + RECORD_SIZE], "little") ^ int.from_bytes(mutant, "little")
        data[begin : begin + RECORD_SIZE] = changed.to_bytes(RECORD_SIZE, "little")
    fields = ["seq", "time_ns", "start", "length", "flags", "physical", "data_checksum", "durable"]
    array = np.frombuffer(data, RECORD_DTYPE)
    sealed = hit[rng.integers(0, 2, len(hit)) == 0]
    array[sealed] = queue[sealed]
    for index, value in zip(sealed.tolist(), odd_numbers(rng, len(sealed)), strict=True):
        name = fields[value % len(fields)]
        array[name][index] = value % (2 ** (8 * array.dtype[name].itemsize))
        body = array[index].tobytes()[:-8]
        array["checksum"][index] = xxhash.xxh3_64_intdigest(body, seed=SALT)
    return bytes(data), len(hit)


def records(rng: Rng, count: int) -> None:
    """Queues of records: from each place on as many are taken as the format's description says, to the last bit."""
    while count > 0:
        queue = _queue(rng, 512)
        assert (decode_records(queue.tobytes(), SALT, next_seq=1) == queue).all()
        data, changed = _mutate_records(rng, queue)
        count -= changed
        place = 0
        while place < len(queue):
            expected = int(queue["seq"][place - 1]) + 1 if place else 1
            stop = min(place + 24, len(queue))
            found = decode_records(data[place * RECORD_SIZE : stop * RECORD_SIZE], SALT, next_seq=expected)
            taken, following = 0, expected
            while place + taken < stop:
                record = data[(place + taken) * RECORD_SIZE :][:RECORD_SIZE]
                if not _is_valid(record, following):
                    break
                following += int.from_bytes(record[28:32], "little") in EVENT_FLAGS
                taken += 1
            assert found.tobytes() == data[place * RECORD_SIZE : (place + taken) * RECORD_SIZE], (
                place,
                taken,
                len(found),
            )
            place += max(taken, 1)


def segments(rng: Rng, count: int) -> None:
    """Whole descriptor files: what counts of one is a prefix of valid records, all within its data."""
    header = Header(Kind.FORWARD, OURS, SALT, 1)
    queue = _queue(rng, 12)
    content = header.encode() + queue.tobytes()
    data_bytes = int(queue["length"].sum()) * SECTOR
    dat = MemoryFile(name="it.dat")
    for number, mutant in enumerate(mutants(rng, [content], count)):
        dat.truncate(data_bytes if number % 3 else int(rng.integers(0, data_bytes + 1)))
        changed = header.encode() + mutant[HEADER_SIZE:] if number % 2 else mutant
        ext = MemoryFile(changed, "it.ext")
        ext.truncate(len(changed) if number % 5 else int(rng.integers(0, len(changed) + 1)))
        try:
            found = read_header(ext, Kind.FORWARD, OURS)
        except REFUSALS:
            continue
        segment = Segment(None, "it", found, ext, dat)  # type: ignore[arg-type]  # nothing is made or removed
        segment._scan()
        segment.claims_beyond_end()
        assert segment.records <= len(queue)
        assert segment.ext_size <= ext.size()
        for index in range(len(segment)):
            if segment.flags[index] == Flag.DATA:
                assert (segment.physicals[index] + segment.lengths[index]) * SECTOR <= dat.size()


class _OneFile:
    """A storage that has one file."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def open(self, _name: str) -> MemoryFile:
        return self._file


def pointer_files(rng: Rng, count: int) -> None:
    """Two slots, of which one may be damaged: the newer one that is whole counts, or there is a refusal."""
    slots = [_pointers()[1], dataclasses.replace(_pointers()[1], generation=6, durable=77)]
    content = bytearray(POINTERS_SIZE)
    for slot, offset in zip(slots, SLOT_OFFSETS, strict=True):
        content[offset : offset + 512] = slot.encode()
    for mutant in mutants(rng, [bytes(content)], count):
        storage: Storage = _OneFile(MemoryFile(mutant, "pointers"))  # type: ignore[assignment]  # as much as is used
        whole = [
            slot
            for slot, offset in zip(slots, SLOT_OFFSETS, strict=True)
            if mutant[offset : offset + 512] == slot.encode()
        ]
        try:
            found = PointerFile(storage, OURS)
        except REFUSALS:
            assert len(whole) < 2, shown(mutant)
        else:
            assert found.now == whole[-1], shown(mutant)


def overlays(rng: Rng, count: int) -> None:
    """Records of clones: the blocks that count are within the clone, or there is a refusal, in bounded memory."""
    header = Header(Kind.CLONE, OURS, SALT, 1, name="it")
    size = 999 * BLOCK_SECTORS + 3
    queue = np.zeros(40, RECORD_DTYPE)
    queue["flags"], queue["seq"] = int(Flag.DATA), np.arange(1, 41)
    queue["start"] = queue["physical"] = rng.permutation(40) * 9 * BLOCK_SECTORS
    queue["length"] = rng.integers(1, 9, 40) * BLOCK_SECTORS
    queue["durable"] = np.maximum(np.arange(1, 41) - 8, 0)
    dat = MemoryFile(name="dat")
    dat.truncate(size * SECTOR)
    while count > 0:
        seal_records(queue, SALT)
        data, changed = _mutate_records(rng, queue) if count % 3 else (next(mutants(rng, [queue.tobytes()], 1)), 1)
        count -= changed
        ext = MemoryFile(header.encode() + data, "ext")
        try:
            overlay = Overlay(header, ext, dat, size)
        except REFUSALS:
            continue
        assert overlay.blocks == int(overlay.held(0, 1000).sum()) <= 1000
        assert ext.size() <= HEADER_SIZE + len(data)


# --- logs of dm-log-writes


def log_headers(rng: Rng, count: int) -> None:
    """Super blocks and entries: what is taken can be on the disk, and comes out again."""
    supers = [Super(0), Super(2**64 - 1, 4096), Super(7, 1024)]
    originals = [each.encode()[:HEADER_BYTES] for each in supers]
    for mutant in mutants(rng, originals, count // 3):
        try:
            found = Super.decode(mutant, "it")
        except CorruptionError as error:
            assert error.message.startswith("it ")
        else:
            assert found is None or found.encode()[:28] == mutant[:28], shown(mutant)
    disk = DISK_SECTORS * SECTOR
    entries = [
        Entry(0, 1, 0),
        Entry(8, 8, LogFlag.DISCARD, 4096),
        Entry(0, 0, LogFlag.FLUSH),
        Entry(0, 0, LogFlag.MARK, 9),
    ]
    for mutant in mutants(rng, [entry.encode() for entry in entries], count - 2 * (count // 3)):
        entry = Entry.decode(mutant)
        assert entry.encode() == mutant
        try:
            entry.check(sector_bytes=SECTOR, size_bytes=disk, where="it")
        except CorruptionError as error:
            assert error.message.startswith("it: ")
        else:
            assert entry.flags & LogFlag.MARK or (entry.sector + entry.sectors) * SECTOR <= disk or not entry.sectors
            assert entry.data_sectors * SECTOR <= disk
    for mutant in mutants(rng, [b"a mark of twenty one", "é ü 2026-01-01 ✓".encode()[:20]], count // 3):
        try:
            text = decode_mark(mutant, "it")
        except CorruptionError:
            continue
        assert text.isprintable()
        assert Entry.decode(encode_mark(text)).data_bytes == len(mutant)


def logs(rng: Rng, count: int) -> None:
    """Whole logs: windows within the disk, or one refusal."""
    entries = [write(1, b"x" * 1024), FLUSH, discard(9, 4), mark("a"), write(3, b"y" * 512, LogFlag.FUA), FLUSH]
    content = log_of(entries, tail=1)
    for mutant in mutants(rng, [content, content[::-1], log_of(entries, counted=0, tail=1)], count):
        reader = LogReader(MemoryFile(mutant), size_sectors=DISK_SECTORS)
        try:
            while (window := reader.scan(len(entries))) is not None:
                window.check()
                assert not len(window) or int((window.starts + window.lengths).max()) <= DISK_SECTORS
                reader.read(window, 0, len(window))
        except CorruptionError as error:
            assert error.message.startswith("a.log at byte ")


# --- partition tables

DISK: Final = 4 << 20
_LAST: Final = DISK // SECTOR - 1


def _gpt_tables() -> list[bytes]:
    """Protective MBRs, headers, and four entries each, with the header of the end behind them."""
    found = []
    for numbers in ({1: gpt_entry(40, 99, "one"), 3: gpt_entry(100, _LAST)}, {4: gpt_entry(64, 64)}):
        entries = gpt_entries(numbers, 4)
        headers = [gpt_header(place, _LAST, 2, entries).ljust(SECTOR, b"\0") for place in (1, _LAST)]
        found.append(mbr_sector([(0xEE, 1, _LAST)]) + headers[0] + entries + headers[1])
    return found


def _mbr_tables() -> list[bytes]:
    """Four sectors, an MBR first; which of them a sector of the disk is, its number says."""
    links = [mbr_sector([(0x83, 1, 60), (5, number * 7 + 2, 64)]) for number in range(3)]
    return [mbr_sector([(0x83, 1, 9), (5, 64, 4096), (0x07, 5000, 9000)]) + b"".join(links)]


def partition_tables(rng: Rng, count: int) -> None:
    """Partition tables: ranges within the disk, whatever is read, and few small reads."""
    for number, mutant in enumerate(mutants(rng, _gpt_tables(), count // 2)):
        header, entries, other = (mutant[begin : begin + SECTOR] for begin in (512, 1024, 1536))
        if number % 4:  # with the right checksums, so that what they are of is looked at
            checksum = zlib.crc32(entries).to_bytes(4, "little")
            header, other = (sealed(each[:88] + checksum + each[92:]) for each in (header, other))
        _judge_table([mutant[:SECTOR], header, entries, other], shown(mutant))
    for mutant in mutants(rng, _mbr_tables(), count - count // 2):
        _judge_table([mutant[begin : begin + SECTOR] for begin in range(0, 2048, SECTOR)], shown(mutant))


def _judge_table(sectors: list[bytes], label: str) -> None:
    reads = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        assert 0 <= offset < offset + length <= DISK, label
        assert length <= ENTRIES_MAX * 128, label
        first = offset // SECTOR
        if first == _LAST:
            return sectors[3][:length]
        return b"".join(sectors[number % 4] for number in range(first, first - (-length // SECTOR)))[:length]

    found = find_partitions(read, DISK)
    assert reads <= LINKS_MAX + 8, label
    assert len(found) <= PARTITIONS_MAX, label
    numbers = [partition.number for partition in found]
    assert numbers == sorted(set(numbers)), label
    for partition in found:
        assert partition.number > 0, label
        assert 0 <= partition.start < partition.start + partition.length <= DISK, label
        assert (partition.start | partition.length) % SECTOR == 0, label
