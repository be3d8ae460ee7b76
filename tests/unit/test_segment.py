"""Claims about dmafs.core.segment: what was appended is read back, and damage is never served."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core.columns import Indicator
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag, Header, Kind, new_salt
from dmafs.core.segment import Segment
from dmafs.core.storage import RealStorage
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import FOREIGN, OURS, fill, flip

STEM = "s"
FIRST = 11


class Bench:
    """One segment in a directory, closed at the end of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage = RealStorage(path)
        self.opened: list[Segment] = []
        self.ext, self.dat = path / "s.ext", path / "s.dat"

    def create(self, kind: Kind = Kind.FORWARD) -> Segment:
        segment = Segment.create(self.storage, STEM, Header(kind, OURS, new_salt(), FIRST))
        self.opened.append(segment)
        return segment

    def open(self, kind: Kind = Kind.FORWARD, uuid: Any = OURS) -> Segment:
        segment = Segment.open(self.storage, STEM, kind, uuid)
        self.opened.append(segment)
        segment.check()
        return segment

    def filled(self) -> Segment:
        """Return a segment with three events and three indicators, one of them a mark with a name."""
        segment = self.create()
        segment.append_event(time_ns=101, start=5, length=2, data=fill(1, 2), durable=3)
        segment.append_indicator(Flag.FLUSH, time_ns=102, durable=4)
        segment.append_event(time_ns=103, start=9, length=7, data=None, durable=4)
        segment.append_indicator(Flag.MARK, time_ns=104, durable=4, name="before-upgrade")
        segment.append_event(time_ns=105, start=6, length=3, data=fill(2, 3), durable=11)
        segment.append_indicator(Flag.TICK, time_ns=106, durable=11)
        segment.check()
        return segment


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for segment in bench.opened:
        segment.close()


def state(segment: Segment) -> tuple[object, ...]:
    """Return all that a segment knows, its data included."""
    data = [bytes(segment.verify(index)) for index in range(len(segment))]
    columns = (segment.starts, segment.lengths, segment.physicals, segment.times)
    return (
        [column.tolist() for column in columns],
        data,
        list(segment.indicators()),
        segment.records,
        segment.data_sectors,
    )


def read(segment: Segment, index: int, skip: int = 0, length: int = 1) -> bytes:
    buffer = bytearray(length * SECTOR)
    segment.read_into(index, skip, memoryview(buffer))
    return bytes(buffer)


def test_reopened_equals_appended(bench: Bench) -> None:
    """A segment opened again has the same columns, indicators and data, and knows what was called durable."""
    one = bench.filled()
    two = bench.open()
    assert state(two) == state(one)
    assert (len(two), two.next_seq, two.claimed_durable, two.claims_beyond_end()) == (3, FIRST + 3, 11, 0)
    assert list(two.indicators()) == [
        Indicator(11, 102, Flag.FLUSH),
        Indicator(12, 104, Flag.MARK, "before-upgrade"),
        Indicator(13, 106, Flag.TICK),
    ]
    assert list(two.marks()) == [Indicator(12, 104, Flag.MARK, "before-upgrade")]


def test_appending_goes_on_after_reopening(bench: Bench) -> None:
    """What is appended after reopening follows what was there."""
    bench.filled().close()
    two = bench.open()
    two.append_event(time_ns=107, start=0, length=1, data=fill(3), durable=0)
    assert two.physicals.tolist() == [0, 2, 3, 6]
    assert state(bench.open()) == state(two)


def test_names_of_marks_survive(bench: Bench) -> None:
    """A mark has its name back, whatever script it is written in; one without a name takes no data."""
    segment = bench.create()
    names = ["a", "über", "", "名" * 20]
    for name in names:
        segment.append_indicator(Flag.MARK, time_ns=1, durable=0, name=name)
    assert [mark.name for mark in bench.open().marks()] == names
    assert segment.data_sectors == 3


def test_reading_parts(bench: Bench) -> None:
    """Any run of sectors of an event can be read; zeros take no data."""
    segment = bench.create()
    segment.append_event(time_ns=1, start=0, length=3, data=fill(1) + fill(2) + fill(3), durable=0)
    segment.append_event(time_ns=2, start=0, length=1000, data=None, durable=0)
    assert read(segment, 0, 1, 2) == fill(2) + fill(3)  # first reading: verified
    assert read(segment, 0, 2) == fill(3)  # second: straight from the file
    assert segment.is_zero(1)
    assert read(segment, 1, 990, 10) == fill(0, 10)
    assert segment.dat.size() == 3 * SECTOR


@pytest.mark.parametrize("offset", [0, 700, 2 * SECTOR - 1])
@pytest.mark.parametrize("skip", [0, 1])
def test_flipped_byte_of_data_is_named_and_never_served(bench: Bench, offset: int, skip: int) -> None:
    """A flipped byte anywhere in an extent fails each reading of any part of it, and names file and extent."""
    bench.filled().close()
    flip(bench.dat, offset)
    segment = bench.open()
    for _ in range(2):
        buffer = bytearray(SECTOR)
        with pytest.raises(CorruptionError, match=r"s\.dat at byte 0 .*extent 5\+2 sectors, seq 11"):
            segment.read_into(0, skip, memoryview(buffer))
        assert buffer == bytes(SECTOR)
    assert read(segment, 2) == fill(2)


def test_flipped_byte_of_a_name_is_never_served(bench: Bench) -> None:
    """A mark whose name is damaged is an error and not another name."""
    bench.filled().close()
    flip(bench.dat, 2 * SECTOR)
    with pytest.raises(CorruptionError, match=r"a mark in .*s\.dat at byte 1024"):
        list(bench.open().marks())


@pytest.mark.parametrize("record", range(6))
@pytest.mark.parametrize("byte", [0, 31, 63])
def test_flipped_byte_of_a_record_ends_the_queue(bench: Bench, record: int, byte: int) -> None:
    """A damaged record and all behind it don't count."""
    whole = bench.filled()
    flip(bench.ext, HEADER_SIZE + record * RECORD_SIZE + byte)
    segment = bench.open()
    assert segment.records == record
    assert segment.times.tolist() == whole.times.tolist()[: (record + 1) // 2]


@pytest.mark.parametrize(("damaged", "claimed"), [(0, 11), (3, 11), (4, 11), (5, 0)])
def test_claims_beyond_the_end_are_found(bench: Bench, damaged: int, claimed: int) -> None:
    """Valid records after an invalid one are asked what they call durable, even right before the end."""
    bench.filled()
    flip(bench.ext, HEADER_SIZE + damaged * RECORD_SIZE + 8)
    assert bench.open().claims_beyond_end() == claimed


def test_stale_bytes_claim_nothing(bench: Bench) -> None:
    """Records of another life of the file and garbage behind the end claim nothing and raise nothing."""
    bench.filled().close()
    stale = bench.ext.read_bytes()[HEADER_SIZE:]
    segment = bench.create()
    segment.append_event(time_ns=1, start=0, length=1, data=None, durable=0)
    with bench.ext.open("ab") as file:
        file.write(bytes(28) + b"\x01" + bytes(35) + stale + b"\xff" * 100)
    again = bench.open()
    assert (again.records, again.claimed_durable, again.claims_beyond_end()) == (1, 0, 0)


def test_partial_record_at_the_end_does_not_count(bench: Bench) -> None:
    """A torn last record is forgotten, and trim takes it away."""
    bench.filled().close()
    size = bench.ext.stat().st_size
    with bench.ext.open("ab") as file:
        file.write(b"x" * 40)
    segment = bench.open()
    assert segment.records == 6
    segment.trim()
    assert bench.ext.stat().st_size == size


@pytest.mark.parametrize("keep", range(4))
def test_cut_forgets_events_and_what_follows(bench: Bench, keep: int) -> None:
    """After a cut the segment is what it was before the event was appended, in memory and in the files."""
    segment = bench.filled()
    segment.cut(FIRST + keep)
    segment.check()
    assert len(segment) == keep
    assert [found.seq for found in segment.indicators()] == [11, 12, 13][:keep]
    assert segment.data_sectors == [0, 2, 3, 6][keep]
    assert bench.ext.stat().st_size == HEADER_SIZE + segment.records * RECORD_SIZE
    assert bench.dat.stat().st_size == segment.data_sectors * SECTOR
    assert state(bench.open()) == state(segment)


def test_cut_can_spare_the_event_and_forget_its_indicators(bench: Bench) -> None:
    """Indicators can be cut from a number on, without the event before them."""
    segment = bench.filled()
    segment.cut(FIRST + 2, indicators=1)
    assert len(segment) == 2
    assert [found.flag for found in segment.indicators()] == [Flag.FLUSH]
    assert segment.data_sectors == 2
    assert state(bench.open()) == state(segment)


def test_what_was_cut_never_comes_back(bench: Bench) -> None:
    """After a cut and new records of the same size the old ones behind them don't look valid."""
    segment = bench.filled()
    segment.cut(FIRST)
    segment.append_event(time_ns=200, start=1, length=1, data=fill(9), durable=0)
    assert state(bench.open()) == state(segment)


@pytest.mark.parametrize(("offset", "keep", "indicators"), [(0, 0, 0), (2 * SECTOR, 2, 1), (3 * SECTOR, 2, 2)])
def test_torn_data_is_cut_where_it_may_be(bench: Bench, offset: int, keep: int, indicators: int) -> None:
    """The first event or mark with wrong data is cut, with everything behind it; before that nothing is."""
    bench.filled().close()
    flip(bench.dat, offset)
    segment = bench.open()
    assert segment.cut_torn(10)
    assert (len(segment), len(segment.indicator_seqs)) == (keep, indicators)
    assert not segment.cut_torn(10)
    assert state(bench.open()) == state(segment)


def test_durable_data_is_never_cut(bench: Bench) -> None:
    """Wrong data at or before the durable seq is damage and stays, to be reported when it is read."""
    bench.filled().close()
    flip(bench.dat, 0)
    segment = bench.open()
    assert not segment.cut_torn(11)
    assert len(segment) == 3


@pytest.mark.parametrize(
    ("sectors", "keep", "indicators"), [(0, 0, 0), (1, 0, 0), (2, 2, 1), (3, 2, 2), (5, 2, 2), (6, 3, 3)]
)
def test_descriptors_without_data_do_not_count(bench: Bench, sectors: int, keep: int, indicators: int) -> None:
    """Where the data file ends early, the descriptors do too; what they called durable isn't forgotten."""
    bench.filled().close()
    with bench.dat.open("r+b") as file:
        file.truncate(sectors * SECTOR)
    segment = bench.open()
    assert (len(segment), len(segment.indicator_seqs)) == (keep, indicators)
    assert segment.claimed_durable == 11


def test_opening_changes_no_file(bench: Bench) -> None:
    """Opening a damaged pair leaves it as it is: who opens it decides whether the rest may be cut off."""
    bench.filled().close()
    with bench.dat.open("r+b") as file:
        file.truncate(SECTOR)
    before = bench.ext.read_bytes(), bench.dat.read_bytes()
    bench.open()
    assert (bench.ext.read_bytes(), bench.dat.read_bytes()) == before


def test_batch_is_published_as_a_whole(bench: Bench) -> None:
    """A written batch is in the files but doesn't count before it is published; then it is what reopening finds."""
    segment = bench.create(Kind.BACKWARD)
    batch = segment.write_batch([(4, 2, fill(1, 2)), (8, 100, None), (20, 1, fill(2))], 77)
    assert (len(segment), segment.data_sectors) == (0, 0)
    assert len(bench.open(Kind.BACKWARD)) == 3
    segment.publish(batch)
    segment.check()
    assert state(bench.open(Kind.BACKWARD)) == state(segment)
    assert segment.times.tolist() == [77, 77, 77]
    second = segment.write_batch([(40, 1, fill(5))], 78)
    segment.publish(second)
    assert read(segment, 3) == fill(5)
    assert state(bench.open(Kind.BACKWARD)) == state(segment)


def test_batch_has_its_data_durable_before_its_descriptors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor whose data a power cut took can't be there: write, sync the data; write, sync the descriptors."""
    segment = bench.create(Kind.BACKWARD)
    calls: list[str] = []

    def watch(file: Any, name: str, method: str) -> None:
        real = getattr(file, method)

        def watched(*arguments: Any) -> Any:
            calls.append(f"{name} {method}")
            return real(*arguments)

        monkeypatch.setattr(file, method, watched)

    for file, name in ((segment.dat, "dat"), (segment.ext, "ext")):
        for method in ("write", "datasync"):
            watch(file, name, method)
    segment.write_batch([(4, 2, fill(1, 2))], 7)
    assert calls == ["dat write", "dat datasync", "ext write", "ext datasync"]


def test_sealed_entries_are_never_taken_for_torn(bench: Bench) -> None:
    """Once entries are sealed a damaged one is an error; before that it is only the end of the queue."""
    segment = bench.create(Kind.BACKWARD)
    segment.publish(segment.write_batch([(4, 1, fill(1)), (8, 1, fill(2))], 7))
    opened = [bench.open(Kind.BACKWARD)]
    segment.seal()
    opened.append(bench.open(Kind.BACKWARD))
    assert [one.unsealed for one in (*opened, segment)] == [True, False, False]
    flip(bench.ext, HEADER_SIZE + RECORD_SIZE)
    again = bench.open(Kind.BACKWARD)
    assert (len(again), again.header.sealed) == (1, 2)


def test_unpublished_batch_is_replaced(bench: Bench) -> None:
    """A batch that was never published leaves no trace under the next one."""
    segment = bench.create(Kind.BACKWARD)
    segment.write_batch([(4, 2, fill(1, 2))], 7)
    segment.publish(segment.write_batch([(5, 2, fill(3, 2))], 8))
    assert state(bench.open(Kind.BACKWARD)) == state(segment)


@pytest.mark.parametrize("suffix", [".ext", ".dat"])
def test_missing_file_is_named(bench: Bench, suffix: str) -> None:
    """A missing half of the pair is a CorruptionError that names it."""
    bench.filled().close()
    (bench.path / f"s{suffix}").unlink()
    with pytest.raises(CorruptionError, match=rf"s\{suffix} is missing"):
        bench.open()


def test_foreign_segment_is_refused(bench: Bench) -> None:
    """A segment of another volume or of the other journal isn't taken."""
    bench.filled().close()
    with pytest.raises(CorruptionError, match=f"belongs to volume {OURS} .forward., not to {FOREIGN}"):
        bench.open(uuid=FOREIGN)
    with pytest.raises(CorruptionError, match="forward"):
        bench.open(Kind.BACKWARD)


def test_leftovers_are_replaced(bench: Bench) -> None:
    """Creating a pair over the leftovers of a creation that was cut off begins empty."""
    bench.ext.write_bytes(b"x" * 2000)
    bench.dat.write_bytes(b"y" * 2000)
    segment = bench.create()
    assert (segment.ext.size(), segment.dat.size(), len(bench.open())) == (HEADER_SIZE, 0, 0)


def test_removed_segment_is_gone(bench: Bench) -> None:
    """Removing a segment unlinks both files, and its data's space is free although they are open."""
    segment = bench.filled()
    assert segment.dat.allocated() > 0
    segment.remove()
    assert list(bench.path.iterdir()) == []
    assert segment.dat.allocated() == 0


def test_failed_append_did_not_happen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed append nothing counts, and the next one takes its place."""
    segment = bench.filled()
    before = state(segment)
    write = segment.ext.write

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment.ext, "write", fail)
    with pytest.raises(OSError, match="No space"):
        segment.append_event(time_ns=110, start=1, length=2, data=fill(7, 2), durable=0)
    with pytest.raises(OSError, match="No space"):
        segment.append_indicator(Flag.MARK, time_ns=110, durable=0, name="x")
    assert state(segment) == before
    monkeypatch.setattr(segment.ext, "write", write)
    segment.append_event(time_ns=111, start=1, length=1, data=fill(8), durable=0)
    assert read(segment, 3) == fill(8)
    assert state(bench.open()) == state(segment)


def test_long_queues_are_read_in_parts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue longer than what is decoded at once is read whole, marks included."""
    monkeypatch.setattr("dmafs.core.segment.SCAN_BYTES", 2 * RECORD_SIZE)
    one = bench.filled()
    assert state(bench.open()) == state(one)
    flip(bench.ext, HEADER_SIZE + 8)
    assert bench.open().claims_beyond_end() == 11


def test_what_a_failed_batch_left_is_cut_off_by_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a shorter one the rest of its records would look valid, and their data be another's."""
    segment = bench.create(Kind.BACKWARD)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segment.ext, "datasync", fail)
        with pytest.raises(OSError, match="No space"):
            segment.write_batch([(start, 1, fill(start)) for start in (1, 3, 5, 7)], 7)
    segment.publish(segment.write_batch([(start, 1, fill(start)) for start in (2, 4)], 8))
    again = bench.open(Kind.BACKWARD)
    assert state(again) == state(segment)
    assert again.starts.tolist() == [2, 4]
