"""Claims about dmafs.core.journal: after an unclean stop it is a prefix, and damage is told from a torn end."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag
from dmafs.core.recovery import DIRECTORY
from dmafs.core.segment import DATA_AHEAD, RECORDS_AHEAD
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.work import run
from dmafs.errors import CorruptionError, DmafsError
from dmafs.units import SECTOR
from tests.unit.tools import FOREIGN, OURS, Clock, files, fill, flip, segments_of, tree

LIMITS = SegmentLimits(data_sectors=1000, records=4)


class Bench:
    """A journal's directory, and journals on it."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.path = path / DIRECTORY
        self.path.mkdir()
        self.clock = Clock()
        self.opened: list[ForwardJournal] = []

    def recover(
        self, *, tail: int = 0, durable: int = 0, limits: SegmentLimits = LIMITS, tail_time_ns: int = 0
    ) -> ForwardJournal:
        journal = ForwardJournal(RealStorage(self.root), OURS, limits, self.clock, index=IndexLimits())
        self.opened.append(journal)
        journal.recover(tail=tail, tail_time_ns=tail_time_ns, durable=durable)
        journal.check()
        return journal

    def ext(self, first: int) -> Path:
        return self.path / f"{first:020d}.ext"

    def dat(self, first: int) -> Path:
        return self.path / f"{first:020d}.dat"

    def close(self) -> None:
        for journal in self.opened:
            journal.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def flush(journal: ForwardJournal, flag: Flag = Flag.FLUSH, name: str = "") -> None:
    """Do what a volume's flush does."""
    journal.indicate(flag, name)
    run(journal.take_dirty())
    journal.durable = journal.head


def append(journal: ForwardJournal, count: int) -> None:
    for _ in range(count):
        seq = journal.head + 1
        assert journal.append(seq, 1, fill(seq)) == seq


def contents(journal: ForwardJournal) -> list[tuple[int, int, int, bytes]]:
    """Return all events: start, length, time and data."""
    return [
        (segment.starts[index], segment.lengths[index], segment.times[index], bytes(segment.verify(index)))
        for segment in segments_of(journal)
        for index in range(len(segment))
    ]


def seqs(journal: ForwardJournal) -> list[int]:
    """Return the seqs of all events; each writes its seq to the sector of that number."""
    for start, _, _, data in contents(journal):
        assert data == fill(start)
    return [start for start, _, _, _ in contents(journal)]


def long_journal(bench: Bench, *, flushed: int = 10) -> ForwardJournal:
    """Return twelve events in segments from 1, 5 and 9; *flushed* are durable, but no record says so."""
    journal = bench.recover()
    append(journal, 12)
    journal.durable = flushed
    return journal


# --- appending


def test_appended_events_are_recovered(bench: Bench) -> None:
    """Writes, discards and indicators of all kinds are there again after reopening, in order."""
    one = bench.recover()
    one.append(5, 2, fill(1, 2))
    one.append(7, 2**32 - 1, None)
    flush(one)
    flush(one, Flag.MARK, "before")
    one.append(0, 1, fill(2))
    flush(one, Flag.TICK)
    two = bench.recover()
    assert (two.head, two.durable) == (3, 2)
    assert [(seg.starts.tolist(), seg.times.tolist()) for seg in segments_of(two)] == [
        (seg.starts.tolist(), seg.times.tolist()) for seg in segments_of(one)
    ]
    assert [mark.name for mark in two.marks()] == ["before"]
    assert two.head_time_ns == one.head_time_ns


def test_segments_roll_by_records(bench: Bench) -> None:
    """A segment holds at most the records of the limit, and each begins where the one before ended."""
    journal = bench.recover()
    append(journal, 12)
    assert [(segment.header.first, len(segment)) for segment in segments_of(journal)] == [(1, 4), (5, 4), (9, 4)]
    assert files(bench.path) == sorted(f"{n:020d}{s}" for n in (1, 5, 9) for s in (".ext", ".dat"))
    assert seqs(bench.recover()) == list(range(1, 13))


def test_segments_roll_by_data(bench: Bench) -> None:
    """A write that would exceed the data of a segment begins the next; one larger than a segment still fits alone."""
    journal = bench.recover(limits=SegmentLimits(data_sectors=4, records=100))
    for length in (3, 1, 1, 6, 1):
        journal.append(0, length, fill(1, length))
    assert [segment.lengths.tolist() for segment in segments_of(journal)] == [[3, 1], [1], [6], [1]]
    assert journal.data_bytes() == 12 * SECTOR


def test_salts_of_segments_differ(bench: Bench) -> None:
    """Each segment has a salt of its own."""
    journal = bench.recover()
    append(journal, 12)
    assert len({segment.header.salt for segment in segments_of(journal)}) == 3


def test_times_increase_with_a_standing_clock(bench: Bench) -> None:
    """Times of events strictly increase even if the clock stands still or is set back, over reopening too."""
    bench.clock.now = 5_000
    journal = bench.recover()
    append(journal, 3)
    bench.clock.now = 10
    append(journal, 2)
    assert [journal.time_of(seq) for seq in range(1, 6)] == [5_000, 5_001, 5_002, 5_003, 5_004]
    flush(journal)
    again = bench.recover(durable=5)
    append(again, 1)
    assert again.time_of(6) == 5_005
    bench.clock.now = 9_000
    append(again, 1)
    assert again.time_of(7) == 9_000


def test_indicator_after_the_newest_event_holds_back_no_time(bench: Bench) -> None:
    """An indicator may have the time of the event before it, and later events come after it."""
    journal = bench.recover()
    append(journal, 1)
    flush(journal)
    found = journal.last_indicator(1)
    assert found is not None
    assert found.time_ns == journal.time_of(1)
    bench.clock.now = 50_000
    flush(journal, Flag.MARK, "a")
    bench.clock.now = 0
    again = bench.recover(durable=1)
    append(again, 1)
    assert again.time_of(2) == 50_001


def test_times_go_on_behind_the_tail(bench: Bench) -> None:
    """With no segment left the first event is later than the mirror's time."""
    bench.clock.now = 0
    journal = bench.recover(tail=7, durable=7, tail_time_ns=99)
    append(journal, 1)
    assert (journal.head, journal.time_of(8)) == (8, 100)


def test_repeated_flushes_write_nothing(bench: Bench) -> None:
    """Without an event in between a flush or tick adds no record; marks and other kinds always do."""
    journal = bench.recover(limits=SegmentLimits())
    flush(journal)
    append(journal, 1)
    for flag in (Flag.FLUSH, Flag.FLUSH, Flag.TICK):
        flush(journal, flag)
    again = bench.recover(durable=1, limits=SegmentLimits())
    flush(again)
    assert [found.flag for found in segments_of(again)[0].indicators()] == [Flag.FLUSH, Flag.FLUSH]
    flush(again, Flag.MARK, "a")
    flush(again, Flag.COPIED)
    assert len(segments_of(again)[0].indicator_seqs) == 4


def test_flush_works_where_the_first_event_was_torn(bench: Bench) -> None:
    """When an unclean stop left a segment with no event and no indicator, the next flush gives one."""
    append(bench.recover(), 1)
    flip(bench.ext(1), HEADER_SIZE)
    journal = bench.recover()
    assert journal.head == 0
    flush(journal)
    assert journal.is_indicated(0)


# --- looking up


def test_seq_at_is_the_last_event_not_after_a_time(bench: Bench) -> None:
    """A time means after every event with a time not after it, over all segments; before the first the default."""
    journal = bench.recover()
    times = [1_000, 1_000, 2_000, 2_500, 9_000, 9_000, 9_500]
    for now in times:
        bench.clock.now = now
        append(journal, 1)
    real = [journal.time_of(seq) for seq in range(1, 8)]
    for time_ns in range(990, 9_600):
        expected = sum(time <= time_ns for time in real) or 42
        assert journal.seq_at(time_ns, default=42) == expected


def test_last_indicator(bench: Bench) -> None:
    """The last indicator at or before a seq is found in any segment, the last of several at one seq."""
    journal = bench.recover()
    assert journal.last_indicator(5) is None
    append(journal, 2)
    flush(journal)
    flush(journal, Flag.MARK, "a")
    append(journal, 5)
    flush(journal, Flag.TICK)
    for at in (journal, bench.recover(durable=7)):
        found = [at.last_indicator(seq) for seq in range(9)]
        assert [one and (one.seq, one.flag, one.name) for one in found] == [
            *[None] * 2,
            *[(2, Flag.MARK, "a")] * 5,
            *[(7, Flag.TICK, "")] * 2,
        ]
        assert [at.is_indicated(seq) for seq in range(8)] == [seq in {2, 7} for seq in range(8)]


def test_extents_of_a_range(bench: Bench) -> None:
    """Any run of events across segments is returned whole and in order."""
    journal = long_journal(bench)
    for after in range(13):
        for upto in range(after, 13):
            starts, stops = journal.extents(after, upto)
            assert starts.tolist() == list(range(after + 1, upto + 1))
            assert (stops - starts).tolist() == [1] * (upto - after)


# --- releasing


@pytest.mark.parametrize(("tail", "left"), [(0, 3), (3, 3), (4, 2), (7, 2), (8, 1), (11, 1), (12, 0)])
def test_release_takes_what_is_wholly_behind_the_tail(bench: Bench, tail: int, left: int) -> None:
    """Segments all of whose events are at or before the tail are let go, sealed or not."""
    journal = long_journal(bench)
    if tail == 8:
        run(journal.take_dirty())
    released = journal.release(tail)
    assert [part.first for part in released + journal.parts] == [1, 5, 9]
    assert len(journal.parts) == left
    for part in released:
        part.remove(RealStorage(bench.root))
    journal.check()
    again = bench.recover(tail=tail, durable=12)
    assert seqs(again) == list(range(13 - 4 * left, 13))


@pytest.mark.parametrize("flag", [Flag.MARK, Flag.GAP])
def test_a_last_segment_of_use_stays(bench: Bench, flag: Flag) -> None:
    """A mark at the tail, and a gap that begins there, keep the last segment."""
    journal = long_journal(bench)
    journal.indicate(flag, "name" if flag == Flag.MARK else "")
    last = journal.parts[-1]
    journal.release(12)
    assert journal.parts == [last]
    assert [mark.name for mark in journal.marks()] == (["name"] if flag == Flag.MARK else [])
    assert len(journal.gaps) == (flag == Flag.GAP)


def test_interrupted_release_is_finished(bench: Bench) -> None:
    """Segments wholly behind the tail that a cut left, even half of one, are unlinked on recovery."""
    long_journal(bench)
    bench.dat(5).unlink()
    journal = bench.recover(tail=8, durable=12)
    assert seqs(journal) == [9, 10, 11, 12]
    assert files(bench.path) == files(bench.path)[:2] == [bench.dat(9).name, bench.ext(9).name]


# --- recovery: torn ends. Nothing behind what is durable may be missed, nothing wrong may stay.


def tear_record(bench: Bench, first: int, index: int) -> None:
    flip(bench.ext(first), HEADER_SIZE + index * RECORD_SIZE + 20)


def tear_data(bench: Bench, first: int, index: int) -> None:
    flip(bench.dat(first), index * SECTOR + 100)


def lose_records(bench: Bench, first: int, index: int) -> None:
    with bench.ext(first).open("r+b") as file:
        file.truncate(HEADER_SIZE + index * RECORD_SIZE + 30)


def lose_data(bench: Bench, first: int, index: int) -> None:
    with bench.dat(first).open("r+b") as file:
        file.truncate(index * SECTOR + 30)


TEARS = [tear_record, tear_data, lose_records, lose_data]
Tear = Callable[[Bench, int, int], None]


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("seq", [1, 2, 4, 5, 8, 9, 12])
def test_torn_event_that_was_not_durable_ends_the_journal(bench: Bench, tear: Tear, seq: int) -> None:
    """The journal ends before the torn event; later segments are unlinked; a second time changes nothing."""
    long_journal(bench).close()
    first = (seq - 1) // 4 * 4 + 1
    tear(bench, first, seq - first)
    journal = bench.recover()
    assert seqs(journal) == list(range(1, seq))
    assert journal.head == seq - 1
    before = tree(bench.path)
    assert {int(name.partition(".")[0]) for name in files(bench.path)} == {n for n in (1, 5, 9) if n <= first}
    assert seqs(bench.recover()) == list(range(1, seq))
    assert tree(bench.path) == before


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("seq", [1, 2, 4, 5, 8, 9, 10])
@pytest.mark.parametrize("by", ["pointers", "record"])
def test_damage_to_what_was_durable_is_an_error(bench: Bench, tear: Tear, seq: int, by: str) -> None:
    """An event that the pointers or a later record call durable is never taken for torn, however often one opens."""
    journal = long_journal(bench)
    if by == "record":
        append(journal, 1)
        run(journal.take_dirty())
        journal.trim()
    journal.close()
    first = (seq - 1) // 4 * 4 + 1
    tear(bench, first, seq - first)
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            contents(bench.recover(durable=10 if by == "pointers" else 0))
        assert tree(bench.path) == before


def test_torn_event_after_the_durable_ones(bench: Bench) -> None:
    """The events right behind the durable ones are cut, the durable ones stay."""
    long_journal(bench, flushed=10).close()
    tear_data(bench, 9, 2)
    assert seqs(bench.recover(durable=10)) == list(range(1, 11))


@pytest.mark.parametrize("header", [b"", bytes(100), bytes(HEADER_SIZE), bytes(4096)], ids=len)
@pytest.mark.parametrize("first", [1, 5, 9])
def test_segment_whose_header_was_never_written_ends_the_journal(bench: Bench, header: bytes, first: int) -> None:
    """A segment created right before a power cut may have no header yet; it and those behind it are dropped."""
    long_journal(bench).close()
    bench.ext(first).write_bytes(header)
    journal = bench.recover()
    assert seqs(journal) == list(range(1, first))
    append(journal, 2)
    flush(journal)
    assert seqs(bench.recover()) == list(range(1, first + 2))


@pytest.mark.parametrize("first", [1, 5, 9])
@pytest.mark.parametrize("durable", [0, 10])
def test_damaged_header_is_an_error(bench: Bench, first: int, durable: int) -> None:
    """A header that was written and is wrong now is damage; no file is touched for it."""
    long_journal(bench).close()
    flip(bench.ext(first), 50)
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=f"{first:020d}.ext"):
            contents(bench.recover(durable=durable))
        assert tree(bench.path) == before


@pytest.mark.parametrize("first", [1, 5, 9])
@pytest.mark.parametrize("suffix", ["ext", "dat"])
def test_missing_file_of_durable_events_is_an_error(bench: Bench, first: int, suffix: str) -> None:
    """A missing first, middle or last segment, or half of one, is an error if it was durable; files are left alone."""
    long_journal(bench).close()
    (bench.path / f"{first:020d}.{suffix}").unlink()
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"missing|ends at seq|ends before seq|has no events"):
            contents(bench.recover(durable=10))
        assert tree(bench.path) == before


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("suffix", ["ext", "dat"])
def test_missing_file_that_a_later_record_calls_durable_is_an_error(bench: Bench, first: int, suffix: str) -> None:
    """The records of later segments are enough to notice that an earlier one is missing."""
    journal = long_journal(bench)
    append(journal, 1)
    journal.close()
    (bench.path / f"{first:020d}.{suffix}").unlink()
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"missing|ends at seq|ends before seq|has no events"):
            contents(bench.recover())
        assert tree(bench.path) == before


@pytest.mark.parametrize("first", [5, 9])
def test_missing_segment_that_was_not_durable_ends_the_journal(bench: Bench, first: int) -> None:
    """A power cut may lose the name of a segment that was never durable; those behind it are dropped."""
    long_journal(bench).close()
    bench.ext(first).unlink()
    journal = bench.recover()
    assert seqs(journal) == list(range(1, first))
    append(journal, 1)
    assert seqs(bench.recover()) == list(range(1, first + 1))


def test_stale_bytes_are_not_resurrected(bench: Bench) -> None:
    """What was cut off doesn't come back behind events appended later, though its records had the right seqs."""
    long_journal(bench).close()
    tear_record(bench, 9, 1)  # 10 is torn, 11 and 12 are still whole behind it
    journal = bench.recover()
    assert journal.head == 9
    journal.append(100, 1, fill(100))  # takes the place of 10, right before the old 11
    run(journal.take_dirty())
    again = bench.recover()
    assert [start for start, *_ in contents(again)] == [*range(1, 10), 100]


def test_old_events_of_a_segment_behind_the_tail_are_harmless(bench: Bench) -> None:
    """A tail inside of a segment leaves the segment whole; its older events are there but behind the tail."""
    long_journal(bench).close()
    journal = bench.recover(tail=6, durable=12)
    assert segments_of(journal)[0].header.first == 5
    assert journal.extents(6, 12)[0].tolist() == [7, 8, 9, 10, 11, 12]


def test_foreign_and_renamed_files_are_refused(bench: Bench) -> None:
    """A segment of another volume, one under another's name, and a file of somebody else's are errors."""
    long_journal(bench).close()
    with pytest.raises(CorruptionError, match=f"not to {FOREIGN}"):
        ForwardJournal(RealStorage(bench.root), FOREIGN, LIMITS, bench.clock, index=IndexLimits()).recover(
            tail=0, tail_time_ns=0, durable=0
        )
    for suffix in ("ext", "dat"):
        (bench.path / f"{9:020d}.{suffix}").rename(bench.path / f"{10:020d}.{suffix}")
    with pytest.raises(CorruptionError, match="begins at seq 9"):
        bench.recover()


def test_foreign_name_is_refused(bench: Bench) -> None:
    """A name that isn't a seq is an error of the tree, and nothing is unlinked for it."""
    long_journal(bench).close()
    (bench.path / "notes.ext").write_text("mine")
    before = tree(bench.path)
    with pytest.raises(DmafsError, match=r"notes\.ext"):
        bench.recover(tail=8)
    assert tree(bench.path) == before


def test_taken_dirty_segments_are_what_was_appended_to(bench: Bench) -> None:
    """One call makes durable every segment appended to since the last, and then there is nothing left to do."""
    synced: list[int] = []
    journal = long_journal(bench)
    run(journal.take_dirty())
    append(journal, 5)
    for segment in segments_of(journal):
        first = segment.header.first
        segment.dat.datasync = lambda first=first: synced.append(first)  # type: ignore[method-assign,misc]
    run(journal.take_dirty())
    assert synced == [13, 17]
    run(journal.take_dirty())
    assert synced == [13, 17]


# --- zeros ahead


def ahead(bench: Bench, journal: ForwardJournal) -> tuple[int, int]:
    """Return how many bytes of data and of records are behind what counts in the last segment; they are zeros."""
    segment = journal.newest
    assert segment is not None
    data = bench.dat(segment.header.first).read_bytes()[segment.data_sectors * SECTOR :]
    records = bench.ext(segment.header.first).read_bytes()[segment.ext_size :]
    assert not any(data)
    assert not any(records)
    return len(data), len(records)


def test_small_flushes_overwrite_zeros(bench: Bench) -> None:
    """They are written ahead again when few are left; until then nothing but what is appended is written."""
    journal = bench.recover(limits=SegmentLimits())
    left = DATA_AHEAD
    grown = 0
    for _ in range(300):
        journal.append(0, 8, fill(1, 8))
        flush(journal)
        data, records = ahead(bench, journal)
        grown += data > left
        left = data
        assert DATA_AHEAD // 16 - 4096 <= data <= DATA_AHEAD
        assert RECORDS_AHEAD // 16 - 2 * RECORD_SIZE <= records <= RECORDS_AHEAD
    assert grown == 1
    assert bench.recover(limits=SegmentLimits()).head == 300


def test_large_flushes_write_no_zeros(bench: Bench) -> None:
    """What they cost is their data."""
    journal = bench.recover(limits=SegmentLimits())
    for _ in range(3):
        journal.append(0, 256, fill(1, 256))
        flush(journal)
        assert ahead(bench, journal) == (0, 0)


def test_no_zeros_are_written_past_what_is_full(bench: Bench) -> None:
    """Nor are there any in a segment that is sealed, nor after an orderly end."""
    journal = bench.recover(limits=SegmentLimits(data_sectors=64, records=16))
    for _ in range(20):
        journal.append(0, 4, fill(1, 4))
        flush(journal)
        data, records = ahead(bench, journal)
        assert data <= 64 * SECTOR
        assert records <= 16 * RECORD_SIZE
    for part in journal.parts[:-1]:
        assert part.seal is not None
        assert bench.dat(part.first).stat().st_size == part.data_sectors * SECTOR
    journal.trim()
    assert ahead(bench, journal) == (0, 0)


@pytest.mark.parametrize(("number", "fails"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)])
def test_a_full_store_is_written_no_zeros(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    fails: bool,  # noqa: FBT001
) -> None:
    """Space for them isn't needed, and their lack is no failure; any other error is one."""
    journal = bench.recover(limits=SegmentLimits())
    append(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "write", failing(number))
        with pytest.raises(OSError, match="no") if fails else contextlib.nullcontext():
            run(journal.take_dirty())
    append(journal, 1)
    flush(journal)
    assert seqs(bench.recover(limits=SegmentLimits())) == [1, 2]


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, "no")

    return fail
