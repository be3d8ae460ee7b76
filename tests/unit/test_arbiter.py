"""Claims about dmafs.taps.arbiter: where a log's order isn't the disk's, the disk decides, sector by sector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import pytest

from dmafs.taps.arbiter import Arbiter, Verdict
from dmafs.taps.logformat import LogFlag
from dmafs.taps.logreader import LoggedWindow, LogReader
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, MemoryFile, discard, log_of, mark, write
from tests.unit.tools import fill

FUA: Final = int(LogFlag.FUA)
DISK: Final = 64
OLD, PLAIN, FORCED, NEWER = 1, 2, 3, 4


class Bench:
    """A log that is read window by window, and a primary."""

    def __init__(self, entries: list[Logged], *, name: str = "a.log", primary: MemoryFile | None = None) -> None:
        self.file = MemoryFile(log_of(entries), name)
        self.primary = primary or MemoryFile(fill(OLD, DISK), "primary")
        self.arbiter = Arbiter(self.primary)
        self.reader = LogReader(self.file, size_sectors=DISK)

    def put(self, sector: int, value: int, count: int = 1) -> None:
        self.primary.write([fill(value, count)], sector * SECTOR)

    def window(self) -> tuple[LoggedWindow, int]:
        window = self.reader.scan()
        assert window is not None
        return window, window.begin // SECTOR

    def judge(self, arbiter: Arbiter | None = None, *, first: int = 0) -> Verdict:
        """Judge the next window, and remember it."""
        window, begin = self.window()
        arbiter = arbiter or self.arbiter
        verdict = arbiter.judge(self.file, window, first + begin)
        arbiter.remember(self.file, window, first + begin)
        return verdict


def corrected(verdict: Verdict) -> list[tuple[int, int, bytes]]:
    return [(start, length, bytes(data or b"")) for start, length, data in verdict.corrections]


def doubted(verdict: Verdict) -> list[tuple[int, int]]:
    return list(zip(*(side.tolist() for side in verdict.doubts), strict=True))


def overtaken(plain: Logged | None = None) -> list[Logged]:
    """Return a window in which a FUA write stands before a plain one of the same two sectors."""
    return [write(8, fill(FORCED, 2), FUA), plain or write(8, fill(PLAIN, 2)), FLUSH]


def test_where_the_primary_has_the_plain_write_the_log_is_right() -> None:
    """First row of the table."""
    bench = Bench(overtaken())
    bench.put(8, PLAIN, 2)
    verdict = bench.judge()
    assert (corrected(verdict), doubted(verdict)) == ([], [])


def test_where_the_primary_has_the_fua_write_that_is_put_behind() -> None:
    """Second row."""
    bench = Bench(overtaken())
    bench.put(8, FORCED, 2)
    verdict = bench.judge()
    assert (corrected(verdict), doubted(verdict)) == ([(8, 2, fill(FORCED, 2))], [])


def test_where_the_primary_has_neither_there_is_a_doubt() -> None:
    """Third row: nothing is changed."""
    bench = Bench(overtaken())
    bench.put(8, NEWER, 2)
    verdict = bench.judge()
    assert (corrected(verdict), doubted(verdict)) == ([], [(8, 10)])


def test_each_sector_is_decided_by_itself() -> None:
    """Of one write some sectors may be newer on the primary than others; neighbours that are alike make one extent."""
    entries = [write(8, fill(FORCED, 6), FUA), write(8, fill(PLAIN, 6)), FLUSH]
    bench = Bench(entries)
    for sector, value in enumerate([FORCED, FORCED, PLAIN, NEWER, FORCED, NEWER], start=8):
        bench.put(sector, value)
    verdict = bench.judge()
    assert corrected(verdict) == [(8, 2, fill(FORCED, 2)), (12, 1, fill(FORCED))]
    assert doubted(verdict) == [(11, 12), (13, 14)]


def test_only_what_overlaps_is_compared() -> None:
    """Several writes of either kind: what is in dispute is where the last one is plain and a FUA write came before."""
    entries = [
        write(0, fill(FORCED, 8), FUA),
        write(6, fill(PLAIN, 4)),  # 6, 7 in dispute
        write(20, fill(PLAIN, 4)),
        write(21, fill(FORCED, 2), FUA),  # the last of its sectors
        write(2, fill(PLAIN, 1)),
        write(2, fill(NEWER, 1)),  # 2 in dispute; the last plain write counts
        FLUSH,
    ]
    bench = Bench(entries)
    bench.put(0, FORCED, 8)
    bench.primary.read = 0
    verdict = bench.judge()
    assert sorted(corrected(verdict)) == [(2, 1, fill(FORCED)), (6, 2, fill(FORCED, 2))]
    assert doubted(verdict) == []
    assert bench.primary.read == 3 * SECTOR


def test_the_last_of_several_fua_writes_counts() -> None:
    """What the primary may have instead of the plain write is the newest FUA write's data."""
    bench = Bench([write(8, fill(NEWER, 2), FUA), write(9, fill(FORCED, 1), FUA), write(8, fill(PLAIN, 2)), FLUSH])
    bench.put(8, NEWER)
    bench.put(9, FORCED)
    assert corrected(bench.judge()) == [(8, 1, fill(NEWER)), (9, 1, fill(FORCED))]


@pytest.mark.parametrize(("there", "corrections", "doubts"), [(0, 0, 0), (FORCED, 1, 0), (NEWER, 0, 1)])
def test_discards_are_plain_writes_of_zeros(there: int, corrections: int, doubts: int) -> None:
    """A discard may have been overtaken, too."""
    bench = Bench(overtaken(discard(8, 2)))
    bench.put(8, there, 2)
    verdict = bench.judge()
    assert (len(verdict.corrections), len(doubted(verdict))) == (corrections, doubts)


def test_without_overlap_the_primary_is_not_read() -> None:
    """Windows without FUA writes, or with some elsewhere, or at last, cost no read."""
    bench = Bench(
        [
            write(1, fill(PLAIN)),
            FLUSH,
            write(1, fill(PLAIN)),
            write(2, fill(FORCED), FUA),
            FLUSH,
            write(5, fill(PLAIN)),
            write(5, fill(FORCED), FUA),
            FLUSH,
        ]
    )
    bench.primary.read = 0
    for _ in range(3):
        assert bench.judge().corrections == []
    assert bench.primary.read == 0


def test_fua_writes_are_remembered_over_windows() -> None:
    """The plain write that was overtaken may come many windows later."""
    bench = Bench([write(8, fill(FORCED, 2), FUA), mark("a"), FLUSH, mark("b"), write(9, fill(PLAIN, 2)), FLUSH])
    bench.put(8, FORCED, 2)
    bench.put(10, PLAIN)
    for _ in range(3):
        assert bench.judge().corrections == []
    assert corrected(bench.judge()) == [(9, 1, fill(FORCED))]


def test_fua_writes_are_remembered_over_logs() -> None:
    """What is remembered is read from its own log."""
    one = Bench([write(8, fill(FORCED), FUA), mark("a")])
    two = Bench([write(8, fill(PLAIN)), FLUSH], name="b.log", primary=one.primary)
    one.put(8, FORCED)
    one.judge()
    assert corrected(two.judge(one.arbiter, first=1000)) == [(8, 1, fill(FORCED))]


def test_forgetting_goes_by_the_place_of_the_window() -> None:
    """What is retained begins with the oldest window that has a FUA write that isn't forgotten."""
    bench = Bench([write(1, fill(FORCED), FUA), mark("a"), FLUSH, write(2, fill(FORCED), FUA), mark("b")])
    begins = []
    for _ in range(3):
        window, begin = bench.window()
        bench.arbiter.remember(bench.file, window, begin)
        begins.append(begin)
    assert bench.arbiter.retained == begins[0] == 1
    bench.arbiter.forget(begins[0])
    assert bench.arbiter.retained == begins[0]
    bench.arbiter.forget(begins[1])
    assert bench.arbiter.retained == begins[2]
    bench.arbiter.forget(begins[2] + 1)
    assert bench.arbiter.retained is None


def test_a_window_that_is_tried_again_is_remembered_once() -> None:
    """While a store is full the same window comes again and again; what is remembered doesn't grow."""
    bench = Bench([write(1, fill(FORCED), FUA), mark("a")])
    window, begin = bench.window()
    for _ in range(3):
        bench.arbiter.remember(bench.file, window, begin)
    assert len(bench.arbiter._remembered) == 1


def test_what_is_forgotten_overtakes_nothing() -> None:
    """After that the log is right."""
    bench = Bench([write(8, fill(FORCED), FUA), mark("a"), write(8, fill(PLAIN)), FLUSH])
    bench.put(8, FORCED)
    bench.judge()
    bench.arbiter.forget(1 << 40)
    assert bench.judge().corrections == []


def shuffled(seed: int) -> Iterable[tuple[int, int, bool]]:
    rng = np.random.default_rng(seed)
    for _ in range(30):
        yield int(rng.integers(0, DISK - 8)), int(rng.integers(1, 8)), bool(rng.random() < 0.4)


@pytest.mark.parametrize("seed", range(20))
def test_any_window_is_judged_as_sector_by_sector(seed: int) -> None:
    """What the columns say is what a look at each sector says."""
    rng = np.random.default_rng(seed)
    last: dict[int, tuple[int, bool]] = {}
    forced: dict[int, int] = {}
    entries = []
    for number, (start, length, fua) in enumerate(shuffled(seed), start=10):
        entries.append(write(start, fill(number, length), FUA if fua else 0))
        for sector in range(start, start + length):
            last[sector] = number, fua
            if fua:
                forced[sector] = number
    bench = Bench([*entries, FLUSH])
    expected, doubts = {}, set()
    for sector, (number, fua) in last.items():
        there = int(rng.choice([number, forced.get(sector, number), 250]))
        bench.put(sector, there)
        if not fua and sector in forced and there != number:
            if there == forced[sector]:
                expected[sector] = fill(there)
            else:
                doubts.add(sector)
    verdict = bench.judge()
    found = {
        start + at: data[at * SECTOR : (at + 1) * SECTOR]
        for start, length, data in corrected(verdict)
        for at in range(length)
    }
    assert found == expected
    assert {sector for start, stop in doubted(verdict) for sector in range(start, stop)} == doubts
