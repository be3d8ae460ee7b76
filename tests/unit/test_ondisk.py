"""Claims about dmafs.core.ondisk: the formats are what the tables say, and damage is told from records."""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dmafs.core import ondisk
from dmafs.core.extent import MAX_EXTENT_SECTORS, MAX_ZERO_SECTORS
from dmafs.core.ondisk import (
    EVENT_FLAGS,
    FORMAT_VERSION,
    HEADER_SIZE,
    NAME_LIMIT,
    POINTERS_SIZE,
    RECORD_DTYPE,
    RECORD_SIZE,
    SLOT_OFFSETS,
    SLOT_SIZE,
    Flag,
    Header,
    Kind,
    Pointers,
    VolumeInfo,
    checksum,
    decode_records,
    encode_record,
)
from dmafs.core.seal import SEAL_SIZE, Summary, encode
from dmafs.errors import CorruptionError, VersionError

SALT = 0x5A17
u64 = st.integers(0, 2**64 - 1)
uuids = st.integers(0, 2**128 - 1).map(lambda number: UUID(int=number))
names = st.text(max_size=64).filter(lambda text: _encodable(text) and "\0" not in text)
headers = st.builds(Header, st.sampled_from(Kind), uuids, u64, u64, u64, u64, st.booleans(), names)
pointers = st.builds(
    Pointers, uuids, u64, st.booleans(), st.booleans(), u64, u64, u64, u64, u64, u64, u64, u64, u64, uuids
)
infos = st.builds(
    VolumeInfo,
    uuid=uuids,
    name=st.text(max_size=20),
    size_sectors=st.integers(1, 2**54 - 1),
    source=st.text(max_size=40),
    tap=st.sampled_from(["fuse", "dm", "log", "none"]),
    created_ns=st.integers(0, 2**63 - 1),
    log=st.text(max_size=40),
)
# (is an event, flag, length): what a run of valid records is made of
kinds = st.one_of(
    st.tuples(st.just(Flag.DATA), st.integers(1, MAX_EXTENT_SECTORS)),
    st.tuples(st.just(Flag.ZERO), st.integers(1, MAX_ZERO_SECTORS)),
    st.tuples(st.sampled_from([flag for flag in Flag if flag not in EVENT_FLAGS]), st.integers(0, 1)),
)


def _encodable(text: str) -> bool:
    try:
        return len(text.encode()) <= NAME_LIMIT
    except UnicodeEncodeError:
        return False


def record(seq: int = 1, salt: int = SALT, **changes: int) -> bytes:
    """Return one record, a write of one sector unless *changes* say something else."""
    fields = {
        "time_ns": 100 + seq,
        "start": 7,
        "length": 1,
        "flags": int(Flag.DATA),
        "physical": 0,
        "data_checksum": 9,
        "durable": 0,
    }
    return encode_record(salt, seq=seq, **{**fields, **changes})


def run_of(parts: list[tuple[Flag, int]], first: int) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Return a valid run of records and (seq, flag, length) of each."""
    seq, expected = first - 1, []
    for flag, length in parts:
        seq += flag in EVENT_FLAGS
        expected.append((seq, int(flag), length))
    return b"".join(record(seq, flags=flag, length=length) for seq, flag, length in expected), expected


def tables() -> dict[str, list[tuple[int, int, str]]]:
    """Return (offset, bytes, field) of each table of the module's docstring by its title."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    title = ""
    for line in (ondisk.__doc__ or "").splitlines():
        if heading := re.match(r"Segment header|Descriptor record|Seal|Pointer slot|Digest header|Index header", line):
            title = heading[0]
        if match := re.match(r"^ +(\d+) +(\d+)  (\S.*)$", line):
            found.setdefault(title, []).append((int(match[1]), int(match[2]), match[3]))
    return found


@pytest.mark.parametrize(
    ("title", "size"),
    [
        ("Segment header", HEADER_SIZE),
        ("Descriptor record", RECORD_SIZE),
        ("Seal", SEAL_SIZE),
        ("Pointer slot", SLOT_SIZE),
        ("Digest header", 512),
        ("Index header", 512),
    ],
)
def test_tables_cover_every_byte_once(title: str, size: int) -> None:
    """The fields of each table follow each other without gap or overlap and fill the whole."""
    at = 0
    for offset, length, _ in tables()[title]:
        assert offset == at
        at += length
    assert at == size


def test_sizes_are_the_documented_ones() -> None:
    """Headers and slots have one sector, records 64 bytes; the slots of a pointer file lie in different pages."""
    assert (HEADER_SIZE, RECORD_SIZE, SLOT_SIZE, SLOT_OFFSETS, POINTERS_SIZE) == (512, 64, 512, (0, 4096), 8192)
    assert FORMAT_VERSION == 4


def number(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "little")


def at(title: str, field: str) -> tuple[int, int]:
    """Return offset and length of the field of a table that begins with *field*."""
    [(offset, length)] = [(o, n) for o, n, text in tables()[title] if re.match(rf"{re.escape(field)}\b", text)]
    return offset, length


def test_header_has_each_field_where_the_table_says() -> None:
    """A segment header's bytes are those of the table."""
    uuid = UUID(int=0x0102030405060708090A0B0C0D0E0F10)
    header = Header(
        Kind.BACKWARD, uuid, 11, 12, 13, 14, temporary=True, name="näm", frozen=True, instant_ns=15, sealed=16
    )
    data = header.encode()
    assert len(data) == HEADER_SIZE
    assert data[:8] == b"DMAFSEXT"
    assert data[16:32] == uuid.bytes
    fields = {
        "format version": FORMAT_VERSION,
        "kind": 2,
        "salt": 11,
        "first": 12,
        "seq of": 13,
        "time_ns of": 14,
        "flags": 3,
        "instant": 15,
        "sealed": 16,
    }
    for field, value in fields.items():
        assert number(data, *at("Segment header", field)) == value, field
    assert number(data, *at("Segment header", "length")) == len("näm".encode())
    assert data[72:328] == "näm".encode().ljust(256, b"\0")
    assert data[344:504] == bytes(160)
    assert number(data, 504, 8) == xxhash.xxh3_64_intdigest(data[:504], seed=0)
    assert Header.decode(data, "f") == header


def test_record_has_each_field_where_the_table_says() -> None:
    """A descriptor record's bytes are those of the table, and its checksum is seeded with the salt."""
    fields = {
        "time_ns": 2,
        "start": 3,
        "length": 4,
        "flags": 5,
        "physical": 6,
        "data_checksum": 7,
        "durable": 8,
    }
    data = encode_record(SALT, seq=1, **fields)
    assert len(data) == RECORD_SIZE
    fields["checksum of the data"] = fields.pop("data_checksum")
    for field, value in {"seq": 1, **fields}.items():
        assert number(data, *at("Descriptor record", field)) == value, field
    assert number(data, 56, 8) == xxhash.xxh3_64_intdigest(data[:56], seed=SALT)


def test_seal_has_each_field_where_the_table_says() -> None:
    """A seal's bytes are those of the table; what stands before it is landmarks, then names."""
    landmarks = np.zeros(3, RECORD_DTYPE)
    front = landmarks.tobytes() + b"n" * 1024
    data = encode(Summary(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), landmarks, [b"n" * 512, b"n" * 512], SALT, 12)
    assert data[: len(front)] == front
    data = data[len(front) :]
    assert (len(data), data[:8], number(data, 8, 4)) == (SEAL_SIZE, b"DMAFSEND", FORMAT_VERSION)
    fields = {
        "records in": 1,
        "seq of the event": 2,
        "sectors": 3,
        "time_ns of the first": 4,
        "time_ns of the last": 5,
        "certain": 6,
        "durable": 7,
        "sync indicators": 8,
        "seq of the first": 9,
        "place": 10,
        "from where": 11,
        "landmarks": 3,
        "names": 2,
        "checksum of all": 12,
        "checksum of landmarks": xxhash.xxh3_64_intdigest(front, seed=SALT),
        "checksum of bytes": xxhash.xxh3_64_intdigest(data[:504], seed=SALT),
    }
    for field, value in fields.items():
        assert number(data, *at("Seal", field)) == value, field


def test_flags_are_the_documented_ones() -> None:
    """The numbers of the kinds of records and of the journals are those of the tables."""
    [text] = re.findall(r"flags: (1 data.*?)\n +\d+ +8  physical", ondisk.__doc__ or "", re.DOTALL)
    assert [int(n) for n in re.findall(r"\d+", text)] == [int(flag) for flag in Flag]
    assert (int(Flag.DATA), int(Flag.ZERO)) == (1, 2) == EVENT_FLAGS
    assert (int(Kind.FORWARD), int(Kind.BACKWARD)) == (1, 2)


def test_slot_has_each_field_where_the_table_says() -> None:
    """A pointer slot's bytes are those of the table."""
    uuid, boot = UUID(int=3), UUID(int=4)
    data = Pointers(uuid, 21, False, True, 22, 23, 24, 25, 26, 27, 28, 29, 30, boot).encode()  # noqa: FBT003 - by place
    assert len(data) == SLOT_SIZE
    assert data[:8] == b"DMAFSPTR"
    assert (number(data, 8, 4), number(data, 12, 4)) == (FORMAT_VERSION, 2)
    assert Pointers(uuid, clean=True).encode()[12] == 1
    assert data[16:32] == uuid.bytes
    assert [number(data, offset, 8) for offset in range(32, 112, 8)] == list(range(21, 31))
    names = ["generation", "durable", "mirror", "time_ns", "target", "time_ns", "seq", "copied", "origin", "time_ns"]
    assert [text.split(":")[0].split()[0] for o, _, text in tables()["Pointer slot"] if 32 <= o < 112] == names
    assert data[112:128] == boot.bytes
    assert data[128:504] == bytes(376)
    assert number(data, 504, 8) == xxhash.xxh3_64_intdigest(data[:504], seed=0)


@given(headers)
def test_header_round_trip(header: Header) -> None:
    """What is encoded is decoded."""
    assert Header.decode(header.encode(), "x") == header


@given(pointers)
def test_slot_round_trip(slot: Pointers) -> None:
    """What is encoded is decoded."""
    assert Pointers.decode(slot.encode(), "x") == slot


@given(infos)
def test_info_round_trip(info: VolumeInfo) -> None:
    """What is encoded is decoded, whatever the path of the source has in it."""
    assert VolumeInfo.decode(info.encode(), "x") == info


def test_info_has_the_documented_keys() -> None:
    """volume.json has the keys of the docstring and no others."""
    info = VolumeInfo(UUID(int=1), "disk", 8, "/dev/sdx", "fuse", 5)
    assert list(json.loads(info.encode())) == list(GOOD)


@given(st.lists(kinds, max_size=20), st.integers(1, 2**62), u64)
def test_records_round_trip(parts: list[tuple[Flag, int]], first: int, salt: int) -> None:
    """A run of records is decoded to what it was made of."""
    _, expected = run_of(parts, first)
    data = b"".join(record(seq, salt, flags=flag, length=length) for seq, flag, length in expected)
    records = decode_records(data, salt, next_seq=first)
    assert [(int(r["seq"]), int(r["flags"]), int(r["length"])) for r in records] == expected


def test_last_partial_record_is_no_record() -> None:
    """A torn last record ends the run."""
    data = record(1) + record(2)
    assert len(decode_records(data[:-1], SALT, next_seq=1)) == 1
    assert len(decode_records(b"", SALT, next_seq=1)) == 0


BAD: dict[str, dict[str, int]] = {
    "no kind": {"flags": 0},
    "two kinds": {"flags": 3},
    "an unknown kind": {"flags": 256},
    "an event and an indicator": {"flags": 5},
    "a repeated seq": {"seq": 1},
    "a skipped seq": {"seq": 3},
    "an indicator ahead": {"flags": 4, "length": 0, "seq": 2},
    "an indicator behind": {"flags": 4, "length": 0, "seq": 0},
    "no length": {"length": 0},
    "no length of zeros": {"length": 0, "flags": 2},
    "too much data": {"length": MAX_EXTENT_SECTORS + 1},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_each_rule_violated_ends_the_queue(changes: dict[str, int]) -> None:
    """A record with a right checksum that breaks one rule is invalid, and so is all behind it."""
    bad = record(**{"seq": 2, **changes})
    data = record(1) + bad + record(2) + record(3)
    assert decode_records(data, SALT, next_seq=1)["seq"].tolist() == [1]


def test_longest_lengths_are_valid() -> None:
    """MAX_EXTENT_SECTORS of data and MAX_ZERO_SECTORS of zeros are valid."""
    data = record(1, length=MAX_EXTENT_SECTORS) + record(2, flags=2, length=MAX_ZERO_SECTORS)
    assert len(decode_records(data, SALT, next_seq=1)) == 2


def test_first_event_has_to_be_the_expected_one() -> None:
    """A run that begins at another seq than expected is no run."""
    assert len(decode_records(record(2), SALT, next_seq=1)) == 0
    assert len(decode_records(record(2), SALT, next_seq=2)) == 1


@given(st.lists(kinds, min_size=1, max_size=8), u64, u64)
def test_records_of_another_salt_are_never_valid(parts: list[tuple[Flag, int]], salt: int, other: int) -> None:
    """Bytes left by an earlier life of a file, which had another salt, end the queue."""
    data, expected = run_of(parts, 1)
    stale = b"".join(record(seq, other, flags=flag, length=length) for seq, flag, length in expected)
    if salt != other:
        assert len(decode_records(stale, salt, next_seq=1)) == 0
    last = expected[-1][0]
    assert len(decode_records(data + record(last + 1, SALT + 1), SALT, next_seq=1)) == len(expected)


mutations = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)


def mutate(data: bytes, changes: list[tuple[int, int]]) -> tuple[bytes, int]:
    """Return *data* with bytes changed, and the place of the first that is different then."""
    out = bytearray(data)
    for place, mask in changes:
        out[place % len(data)] ^= mask
    first = next((i for i, (a, b) in enumerate(zip(data, out, strict=True)) if a != b), len(data))
    return bytes(out), first


@given(st.lists(kinds, min_size=1, max_size=8), mutations)
def test_mutated_records_are_a_shorter_run(parts: list[tuple[Flag, int]], changes: list[tuple[int, int]]) -> None:
    """Whatever bytes change, the records before the first changed one are left and nothing else."""
    data, _ = run_of(parts, 1)
    damaged, first = mutate(data, changes)
    left = decode_records(damaged, SALT, next_seq=1)
    assert left.tobytes() == data[: first // RECORD_SIZE * RECORD_SIZE]


@given(st.binary(max_size=300), st.integers(0, 2**63 - 1))
def test_any_bytes_are_some_run(data: bytes, next_seq: int) -> None:
    """Random bytes are no records and raise nothing, whatever seq is expected: a foreign one may be 0."""
    assert len(decode_records(data, SALT, next_seq=next_seq)) == 0


@given(headers, mutations)
def test_mutated_header_is_refused(header: Header, changes: list[tuple[int, int]]) -> None:
    """Whatever bytes of a header change, it is a CorruptionError or VersionError that names the file."""
    data = header.encode()
    damaged, _ = mutate(data, changes)
    if damaged != data:
        with pytest.raises((CorruptionError, VersionError), match="some/file"):
            Header.decode(damaged, "some/file")


@given(pointers, mutations)
def test_mutated_slot_is_refused(slot: Pointers, changes: list[tuple[int, int]]) -> None:
    """Whatever bytes of a slot change, it is a CorruptionError or VersionError that names the file."""
    data = slot.encode()
    damaged, _ = mutate(data, changes)
    if damaged != data:
        with pytest.raises((CorruptionError, VersionError), match="some/file"):
            Pointers.decode(damaged, "some/file")


@given(infos, mutations)
def test_mutated_info_is_an_info_or_refused(info: VolumeInfo, changes: list[tuple[int, int]]) -> None:
    """Whatever bytes of volume.json change, it describes a volume or is refused; it has no checksum of its own."""
    damaged, _ = mutate(info.encode(), changes)
    try:
        read = VolumeInfo.decode(damaged, "some/file")
    except (CorruptionError, VersionError) as error:
        assert "some/file" in error.message  # noqa: PT017 - both outcomes are right
    else:
        assert read.size_sectors > 0


BAD_INFOS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"format": "\xff"}',
    "a list": b"[1]",
    "a number": b"1",
    "no version": b"{}",
    "deep nesting": b"[" * 60_000,
    "a number of 5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("data", BAD_INFOS.values(), ids=BAD_INFOS.keys())
def test_bad_info_is_corruption(data: bytes) -> None:
    """Text that is no object of ours is a CorruptionError that names the file."""
    with pytest.raises(CorruptionError, match=r"volume\.json"):
        VolumeInfo.decode(data, "volume.json")


GOOD: dict[str, Any] = {
    "format": FORMAT_VERSION,
    "uuid": str(UUID(int=1)),
    "name": "disk",
    "size_sectors": 8,
    "source": "/a",
    "tap": "fuse",
    "created_ns": 1,
    "log": "",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"size_sectors": 0},
        {"size_sectors": -1},
        {"size_sectors": 1.5},
        {"size_sectors": "8"},
        {"size_sectors": None},
        {"size_sectors": True},
        {"size_sectors": 2**60},
        {"uuid": "x"},
        {"uuid": 1},
        {"name": 1},
        {"source": None},
        {"tap": []},
        {"log": None},
        {"created_ns": "1"},
        {"more": 1},
    ],
    ids=str,
)
def test_info_with_a_bad_field_is_corruption(changes: dict[str, Any]) -> None:
    """Each field has its type and range, and there are no others."""
    VolumeInfo.decode(json.dumps(GOOD).encode(), "volume.json")
    with pytest.raises(CorruptionError, match=r"volume\.json"):
        VolumeInfo.decode(json.dumps({**GOOD, **changes}).encode(), "volume.json")


def rechecked(data: bytes) -> bytes:
    return data[:504] + checksum(data[:504]).to_bytes(8, "little")


@pytest.mark.parametrize("kind", [Header, Pointers])
@pytest.mark.parametrize("fix", [rechecked, bytes])
def test_wrong_version_is_named(kind: Any, fix: Any) -> None:
    """A header or slot of another version gives a VersionError with file and both versions, whatever its checksum."""
    one = Header(Kind.FORWARD, UUID(int=1), 1, 1) if kind is Header else Pointers(UUID(int=1))
    data = one.encode()
    with pytest.raises(VersionError, match=rf"version 238, this program knows {FORMAT_VERSION}"):
        kind.decode(fix(data[:8] + b"\xee" + data[9:]), "some/file")


def test_wrong_version_of_info_is_named() -> None:
    """volume.json of another version gives a VersionError, whatever else is in it."""
    with pytest.raises(VersionError, match=r"some/file has format version 238"):
        VolumeInfo.decode(b'{"format": 238, "new": 1}', "some/file")


@pytest.mark.parametrize("change", [(12, 4), (12, 0), (64, 4), (68, 255), (69, 2), (72, 0xFF)])
def test_header_field_out_of_range_is_corruption(change: tuple[int, int]) -> None:
    """A header with a right checksum but an unknown kind, flag, length or text is none of ours."""
    data = bytearray(Header(Kind.FORWARD, UUID(int=1), 1, 1, name="a").encode())
    data[change[0]] = change[1]
    if change == (68, 255):
        data[69] = 1
    with pytest.raises(CorruptionError, match="f has a field out of range"):
        Header.decode(rechecked(bytes(data)), "f")


@settings(max_examples=20)
@given(st.integers(0, 511))
def test_truncated_header_is_corruption(size: int) -> None:
    """A header that is cut short is refused."""
    with pytest.raises(CorruptionError, match="f doesn't begin"):
        Header.decode(Header(Kind.FORWARD, UUID(int=1), 1, 1).encode()[:size], "f")


def test_checksum_is_xxh3() -> None:
    """The checksum of data is xxh3-64 with seed 0 and takes any buffer."""
    data = np.arange(100, dtype=np.uint8).tobytes()
    assert checksum(data) == checksum(bytearray(data)) == checksum(memoryview(data)) == xxhash.xxh3_64_intdigest(data)
