"""Claims about sealed segments: opening costs the same whatever is in them, memory keeps few, damage stays local."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag
from dmafs.core.points import landmarks
from dmafs.core.recovery import DIRECTORY, stem
from dmafs.core.seal import SEAL_SIZE, Seal, read_seal
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import OURS, Ticking, copied_volume, fill, flip, image_bytes, tree

LIMITS = SegmentLimits(data_sectors=1000, records=8)
INDEX = IndexLimits(journals=4, records=20)


class CountingFile(RealFile):
    """Counts what is read."""

    counts: Counter[str]

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        self.counts["reads"] += 1
        self.counts["bytes"] += len(buffer)
        super().read_into(buffer, offset)


class CountingStorage(RealStorage):
    """Counts what is opened and read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: Counter[str] = Counter()

    def _open(self, name: str, flags: int) -> CountingFile:
        self.counts["opens"] += 1
        plain = super()._open(name, flags)
        file = CountingFile(plain.fileno(), plain.name)
        file.counts = self.counts
        return file


class Bench:
    """A journal's directory, and journals on it."""

    def __init__(self, path: Path) -> None:
        self.root = path
        (path / DIRECTORY).mkdir()
        self.storage = CountingStorage(path)
        self.clock = Ticking()
        self.opened: list[ForwardJournal] = []

    def recover(self, *, limits: SegmentLimits = LIMITS, durable: int = 0, windowed: bool = False) -> ForwardJournal:
        self.storage.counts.clear()
        journal = ForwardJournal(self.storage, OURS, limits, self.clock, index=INDEX, windowed=windowed)
        self.opened.append(journal)
        journal.recover(tail=0, tail_time_ns=0, durable=durable)
        return journal

    def filled(self, events: int, *, limits: SegmentLimits = LIMITS) -> ForwardJournal:
        """Return a journal with so many events and an indicator behind each seventh, all durable."""
        journal = self.recover(limits=limits)
        for seq in range(1, events + 1):
            journal.append(seq, 1, fill(seq % 251) if events < 1000 else None)
            if seq % 7 == 0:
                journal.indicate(Flag.TICK)
        flush(journal)
        return journal

    def ext(self, first: int) -> Path:
        return self.root / f"{stem(first)}.ext"

    def seal(self, first: int) -> Seal | None:
        segment = self.recover().segment_of(first)
        return read_seal(segment.ext, segment.header.salt, first)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Nothing is cut here, so nothing has to be durable."""
    monkeypatch.setattr(RealFile, "datasync", lambda _self: None)
    bench = Bench(tmp_path)
    yield bench
    for journal in bench.opened:
        journal.close()


def flush(journal: ForwardJournal, flag: Flag = Flag.FLUSH, name: str = "") -> None:
    """Do what a volume's flush does."""
    journal.indicate(flag, name)
    run(journal.take_dirty())
    journal.durable = journal.head


def loaded(journal: ForwardJournal) -> list[int]:
    """Return the first seqs of the segments whose descriptors are in memory."""
    return [part.first for part in journal.parts if part.segment is not None]


def unload(journal: ForwardJournal) -> None:
    for segment in journal.unload():
        segment.close()


# -- opening --------------------------------------------------------------------------------------------------------


def test_opening_reads_no_descriptors_of_sealed_segments(bench: Bench) -> None:
    """Calls and bytes are a constant for each sealed segment, however many records it has, and for the last one."""
    found = {}
    for records in (8, 64):
        for segments in (2, 10, 50):
            for path in (bench.root / DIRECTORY).iterdir():
                path.unlink()
            limits = SegmentLimits(1 << 20, records)
            made = bench.filled(1, limits=limits)
            while len(made.parts) <= segments:
                made.append(1, 1, None)
            flush(made)
            made.trim()
            journal = bench.recover(limits=limits)
            assert len(journal.parts) == segments + 1
            assert loaded(journal) == [journal.parts[-1].first]
            found[records, segments] = dict(bench.storage.counts)
    for records in (8, 64):
        for what in ("opens", "reads", "bytes"):
            few, some, many = (found[records, segments][what] for segments in (2, 10, 50))
            assert (some - few) * 40 == (many - some) * 8, "linear in the number of segments"
    for segments in (2, 10, 50):
        assert found[8, segments] == found[64, segments]
    each = {what: (found[8, 50][what] - found[8, 10][what]) // 40 for what in ("opens", "reads", "bytes")}
    assert each == {"opens": 1, "reads": 2, "bytes": HEADER_SIZE + SEAL_SIZE}


def test_what_is_known_at_opening_is_what_was(bench: Bench) -> None:
    """Gaps, marks, times, the place in the log and the bytes of data are found without descriptors."""
    made = bench.filled(20)
    flush(made, Flag.MARK, "before")
    flush(made, Flag.GAP)
    for seq in range(21, 30):
        made.append(seq, 2, fill(1, 2))
    flush(made, Flag.RESYNCED)
    for seq in range(30, 60):
        made.append(seq, 1, None)
    flush(made)
    again = bench.recover()
    assert len(loaded(again)) == 1
    assert len(again.parts) > 6
    assert again.gaps == made.gaps
    assert len(again.gaps) == 1
    assert [(mark.seq, mark.name) for mark in again.marks()] == [(20, "before")]
    assert (again.head, again.head_time_ns, again.data_bytes()) == (made.head, made.head_time_ns, made.data_bytes())
    assert loaded(again) == [again.parts[-1].first], "none of that needed a descriptor"
    for seq in range(1, 60):
        assert again.time_of(seq) == made.time_of(seq)
        assert again.data_after(seq) == made.data_after(seq)
        assert again.last_indicator(seq) == made.last_indicator(seq)
        assert again.seq_at(made.time_of(seq) + 1, default=0) == seq
    for one, other in ((again.extents(3, 50), made.extents(3, 50)), (again.indicators(3, 50), made.indicators(3, 50))):
        assert [column.tolist() for column in one] == [column.tolist() for column in other]
    again.check()


def test_place_in_the_log_is_known_by_the_seal(bench: Bench) -> None:
    """Also where the last window began a segment and wasn't closed."""
    made = bench.recover(windowed=True)
    for position in (100, 200):
        window = made.begin_window()
        window.write([(seq, 1, fill(seq)) for seq in range(1, 10)])
        window.close(Flag.FLUSH, position=position, retained=position // 2)
        made.publish(window)
    run(made.take_dirty())
    again = bench.recover(windowed=True)
    assert (again.position, again.retained, again.head) == (200, 100, 18)
    assert len(loaded(again)) == 1
    window = again.begin_window()
    window.write([(seq, 1, fill(seq)) for seq in range(1, 30)])
    third = bench.recover(windowed=True)
    assert (third.position, third.head) == (200, 18)
    third.check()


# -- memory ---------------------------------------------------------------------------------------------------------


def test_memory_stays_within_its_bound(bench: Bench) -> None:
    """While 1,000 segments are read through, no more descriptors are in memory than the limits say."""
    bench.filled(1000, limits=SegmentLimits(1 << 20, 1))
    journal = bench.recover()
    assert len(journal.parts) == 1001, "the last one has the last indicator"
    most = 0
    for part in journal.parts[:-1]:
        assert journal.segment_of(part.first).starts[0] == part.first
        if journal.excess():
            unload(journal)
        kept = [part.records for part in journal.parts if part.segment is not None]
        most = max(most, len(kept))
    assert most == INDEX.journals + 1, "and the last segment"
    assert journal.extents(0, journal.head)[0].tolist() == list(range(1, 1001))
    assert len(journal.indicators(0, journal.head)[0]) == 143
    run(journal.prepare(journal.head))
    assert len(loaded(journal)) <= most, "who goes through all of them keeps none"


def test_what_is_used_is_kept(bench: Bench) -> None:
    """Those that weren't used for longest are forgotten first."""
    bench.filled(70)
    journal = bench.recover()
    firsts = [part.first for part in journal.parts]
    for number in (0, 1, 2, 0):
        journal.segment_of(firsts[number])
    unload(journal)
    assert loaded(journal) == [firsts[0], firsts[2], firsts[-1]]


def test_a_journal_that_goes_on_forgets_too(bench: Bench) -> None:
    """What is sealed while the daemon runs is forgotten like what was found."""
    journal = bench.filled(700)
    assert journal.excess()
    unload(journal)
    assert not journal.excess()
    assert len(loaded(journal)) <= 3
    journal.check()


def test_images_are_read_through_forgotten_segments(tmp_path: Path) -> None:
    """Images, syncs and snapshots are the same with a bound of one segment, before and after reopening."""
    limits = VolumeLimits(segments=SegmentLimits(8, 6), index=IndexLimits(0, 1, 1), images=1, reserve_bytes=0)
    volume = copied_volume(tmp_path / "disk", fill(9, 16), limits=limits)
    expected = {volume.journal.head: bytearray(fill(9, 16))}
    for number in range(60):
        seq = volume.write(number * 5 % 16, fill(number + 1))
        content = bytearray(expected[seq - 1])
        content[number * 5 % 16 * SECTOR : (number * 5 % 16 + 1) * SECTOR] = fill(number + 1)
        expected[seq] = content
        if number % 4 == 0:
            run(volume.flush())
    run(volume.flush())
    for attempt in range(3):
        for seq, content in expected.items():
            if volume.recoverable(seq):
                assert image_bytes(volume, seq) == content
                for segment in volume.take_garbage():
                    segment.close()
                assert len(loaded(volume.journal)) <= 2
        volume.check()
        if attempt == 1:
            run(sync(volume, target=volume.journal.indicators(20, 40)[0].tolist()[0]))
            continue
        volume.close()
        volume = open_volume(tmp_path / "disk", limits=limits, clock=Ticking(10**6))
    volume.close()


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [20, HEADER_SIZE + 20, HEADER_SIZE + 5 * RECORD_SIZE])
@pytest.mark.parametrize("which", [0, 2])
def test_damage_in_a_sealed_segment_is_local(
    tmp_path: Path, where: int, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The store opens; moments before the segment are as they were, those that need it fail, no file is changed."""
    limits = VolumeLimits(segments=SegmentLimits(1000, 6), reserve_bytes=0)
    volume = copied_volume(tmp_path / "disk", fill(9, 16), limits=limits)
    origin = volume.journal.head
    clock = volume.clock
    assert isinstance(clock, Ticking)
    for number in range(30):
        clock.now += 10**9
        volume.write(number % 16, fill(number + 1))
    run(volume.flush())
    parts = [(part.first, part.next_seq) for part in volume.journal.parts]
    before = {seq: image_bytes(volume, seq) for seq in range(origin, volume.journal.head + 1)}
    volume.mark_clean()
    volume.close()
    first, _ = parts[which]
    flip(tmp_path / "disk" / f"{stem(first)}.ext", where)
    kept = tree(tmp_path / "disk" / DIRECTORY)
    for _ in range(2):
        again = open_volume(tmp_path / "disk", limits=limits, clock=Ticking(10**12))
        for seq, content in before.items():
            if seq < first:
                assert image_bytes(again, seq) == content
            else:
                with pytest.raises(CorruptionError, match=f"{first:020d}.ext"):
                    image_bytes(again, seq)
        listed = [point.seq for point in landmarks(again)]
        assert listed[0] == origin
        assert listed[-1] == again.journal.head
        again.close()
        assert tree(tmp_path / "disk" / DIRECTORY) == kept
    assert ("moments after" in caplog.text) == (where < HEADER_SIZE)


@pytest.mark.parametrize("lost", [1, SEAL_SIZE, SEAL_SIZE + 1])
def test_a_lost_seal_is_made_again(bench: Bench, lost: int) -> None:
    """Where only the seal is missing the records are there: they are read, and sealed with the next flush."""
    bench.filled(60)
    before = bench.seal(bench.recover().parts[1].first)
    first = bench.recover().parts[1].first
    with bench.ext(first).open("r+b") as file:
        file.truncate(bench.ext(first).stat().st_size - lost)
    again = bench.recover()
    assert loaded(again) == [first, again.parts[-1].first]
    again.append(1, 1, None)
    flush(again)
    made = bench.seal(first)
    assert before is not None
    assert made is not None
    assert (made.digest, made.landmarks) == (before.digest, before.landmarks)
    assert made.summary.certain == 61


def test_a_flipped_seal_is_none(bench: Bench) -> None:
    """Whichever byte of seal and landmarks is flipped, it isn't taken for a seal, and the records count."""
    journal = bench.filled(20)
    flush(journal, Flag.MARK, "name")
    for seq in range(21, 40):
        journal.append(seq, 1, None)
    flush(journal)
    [part] = [part for part in journal.parts if part.landmarks(Flag.MARK)]
    whole = bench.ext(part.first).read_bytes()
    size = len(whole)
    begin = HEADER_SIZE + part.records * RECORD_SIZE
    assert size - begin > SEAL_SIZE + SECTOR
    for offset in range(begin, size, 41):
        flip(bench.ext(part.first), offset)
        again = bench.recover()
        assert part.first in loaded(again)
        assert [mark.name for mark in again.marks()] == ["name"]
        again.close()
        bench.ext(part.first).write_bytes(whole)


def test_landmarks_are_no_records(bench: Bench) -> None:
    """Where a seal is torn, the copies of records before it don't count as records of the queue."""
    journal = bench.filled(6)
    for name in ("one", "two"):
        flush(journal, Flag.MARK, name)
    for seq in range(7, 20):
        journal.append(seq, 1, None)
    flush(journal)
    path = bench.ext(1)
    records = journal.parts[0].records
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - SEAL_SIZE)
    again = bench.recover()
    assert again.parts[0].records == records
    assert [mark.name for mark in again.marks()] == ["one", "two"]


def test_a_seal_of_another_file_is_none(bench: Bench) -> None:
    """Bytes of another segment's life never look like a seal."""
    bench.filled(60)
    firsts = [part.first for part in bench.recover().parts]
    one, other = bench.ext(firsts[1]), bench.ext(firsts[2])
    one.write_bytes(one.read_bytes()[:-SEAL_SIZE] + other.read_bytes()[-SEAL_SIZE:])
    assert firsts[1] in loaded(bench.recover())


def test_without_space_nothing_is_sealed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush works all the same, leaves nothing half written, and a later one seals."""
    journal = bench.recover()
    for seq in range(1, 20):
        journal.append(seq, 1, None)
    journal.indicate(Flag.FLUSH)
    write = RealFile.write

    def full(file: RealFile, buffers: Any, offset: int) -> None:
        write(file, [bytes(buffers[0])[:100]], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "write", full)
        run(journal.take_dirty())
    assert [part.seal for part in journal.parts] == [None] * 3
    for part in journal.parts:
        content = bench.ext(part.first).read_bytes()
        assert not any(content[HEADER_SIZE + part.records * RECORD_SIZE :])
    journal.append(20, 1, None)
    flush(journal)
    assert [part.seal is not None for part in journal.parts] == [True, True, False]
    assert len(loaded(bench.recover())) == 1


def test_what_is_not_what_was_written_is_not_sealed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A record that was damaged before it was sealed doesn't become right by that."""
    journal = bench.recover()
    for seq in range(1, 20):
        journal.append(seq, 1, None)
    flip(bench.ext(1), HEADER_SIZE + 70)
    flush(journal)
    assert [part.seal is not None for part in journal.parts] == [False, True, False]
    assert "can't be sealed" in caplog.text
    with pytest.raises(CorruptionError):
        bench.recover(durable=19).segment_of(1)


def test_the_order_of_sealing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seal is written only when all that was appended until then is durable, names too; then it is made durable."""
    calls: list[str] = []
    journal = bench.recover()
    for seq in range(1, 20):
        journal.append(seq, 1, fill(seq))
    journal.indicate(Flag.FLUSH)
    for name in ("write", "datasync"):
        real = getattr(RealFile, name)

        def watched(file: RealFile, *arguments: Any, _real: Any = real, _name: str = name) -> None:
            calls.append(f"{_name} {file.name[-7:]}")
            _real(file, *arguments)

        monkeypatch.setattr(RealFile, name, watched)
    monkeypatch.setattr(RealStorage, "sync_directory", lambda _self, name: calls.append(f"directory {name}"))
    run(journal.take_dirty())
    begin = calls.index("write 001.ext")
    assert calls[begin - 1] == "directory forward"
    assert calls[:2] == ["write 017.dat", "write 017.ext"], "ahead"
    assert calls[begin:] == ["write 001.ext", "datasync 001.ext", "write 009.ext", "datasync 009.ext"]
    assert sorted(calls[2 : begin - 1]) == sorted(
        f"datasync {first:03d}.{suffix}" for first in (1, 9, 17) for suffix in ("ext", "dat")
    )


def test_volumes_share_no_limits(tmp_path: Path) -> None:
    """The bound of a volume's journal is the one of its configuration."""
    limits = VolumeLimits(segments=SegmentLimits(8, 6), index=INDEX, reserve_bytes=0)
    volume: Volume = copied_volume(tmp_path / "disk", fill(9, 16), limits=limits)
    for number in range(100):
        volume.discard(number % 16, 1)
    run(volume.flush())
    assert volume.excess()
    for segment in volume.take_garbage():
        segment.close()
    assert not volume.excess()
    volume.check()
    volume.close()
