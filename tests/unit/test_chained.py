"""Claims about dmafs.taps.chained: logs that follow each other are one row of windows, and what is missing is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from dmafs.errors import LogLostError
from dmafs.taps.chained import ChainedTap
from dmafs.taps.logformat import END_MARK, LogFlag
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, MemoryFile, log_of, mark, write
from tests.unit.tools import fill

FUA: Final = int(LogFlag.FUA)
DISK: Final = 16
SIZE: Final = 50
END: Final = mark(END_MARK)


class Chain(ChainedTap):
    """Logs in a directory, all of one size."""

    def __init__(self, folder: Path) -> None:
        super().__init__(MemoryFile(fill(9, DISK), "primary"), DISK, sector_bytes=SECTOR)
        self.folder = folder

    def log_paths(self) -> list[Path]:
        return [*self.folder.iterdir()]

    def put(self, first: int, *entries: Logged) -> None:
        """Make a log, or let it grow."""
        path = self.folder / f"{first:020d}.log"
        path.write_bytes(log_of([*entries]).ljust(SIZE * SECTOR, b"\0"))

    def check(self) -> None:
        raise AssertionError("not used here")

    def restart(self) -> int:
        raise AssertionError("not used here")

    def punch(self, path: Path, sectors: int) -> None:
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, bytes(sectors * SECTOR), 0)
        os.close(fd)

    def places(self) -> list[tuple[int, int]]:
        """Return begin and end of all windows that there are."""
        found = []
        while (scanned := self.scan()) is not None:
            found.append((scanned.begin, scanned.end))
        return found


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_the_end_of_a_log_is_the_beginning_of_the_next(chain: Chain) -> None:
    """The place behind the end mark is that of the next log's first byte, whether it is there yet or not."""
    chain.put(0, FLUSH, END)
    chain.begin(0, 0)
    assert chain.places() == [(1, 2), (2, SIZE)]
    assert chain.ended
    chain.put(SIZE, mark("a"), END)
    chain.put(2 * SIZE, FLUSH)
    assert chain.places() == [(SIZE + 1, SIZE + 2), (SIZE + 2, 2 * SIZE), (2 * SIZE + 1, 2 * SIZE + 2)]
    assert not chain.ended


def test_a_journal_that_ends_with_a_log_goes_on_in_the_next(chain: Chain) -> None:
    """With or without the old log, with or without the next one."""
    chain.put(0, FLUSH, END)
    chain.begin(SIZE, SIZE)
    assert chain.places() == []
    chain.put(SIZE, FLUSH)
    assert chain.places() == [(SIZE + 1, SIZE + 2)]
    (chain.folder / f"{0:020d}.log").unlink()
    again = Chain(chain.folder)
    again.begin(SIZE, SIZE)
    assert again.places() == [(SIZE + 1, SIZE + 2)]


def test_what_is_retained_is_remembered_from_its_place_on(chain: Chain) -> None:
    """Over the end of a log, up to the journal's place; then capture goes on."""
    chain.put(0, FLUSH, write(1, fill(1), FUA), mark("a"), END)
    chain.put(SIZE, write(2, fill(2), FUA), mark("b"), FLUSH)
    chain.begin(SIZE + 4, 2)
    assert chain.arbiter.retained == 2
    assert chain.captured_place == SIZE + 4
    assert chain.places() == [(SIZE + 4, SIZE + 5)]
    chain.arbiter.forget(3)
    assert chain.arbiter.retained == SIZE + 1


def test_what_nobody_needs_is_let_go(chain: Chain) -> None:
    """Logs wholly before a place go, but the last; of the others the beginning, super block too. Reading goes on."""
    chain.put(0, FLUSH, END)
    chain.put(SIZE, FLUSH, FLUSH, mark("a"))
    chain.begin(0, 0)
    assert len(chain.places()) == 5
    chain.release(SIZE + 3)
    assert chain.firsts() == [SIZE]
    assert not any((chain.folder / f"{SIZE:020d}.log").read_bytes()[: 3 * SECTOR])
    again = Chain(chain.folder)
    again.begin(SIZE + 3, SIZE + 3)
    assert again.places() == [(SIZE + 3, SIZE + 4)]
    again.release(10 * SIZE)
    assert again.firsts() == [SIZE]
    assert again.next_first() == 2 * SIZE


def test_a_log_without_an_end_before_another_one_has_lost_something(chain: Chain) -> None:
    """Its windows count; then it is told."""
    chain.put(0, FLUSH, write(1, fill(1)))
    chain.begin(0, 0)
    assert chain.places() == [(1, 2)]
    chain.put(SIZE, FLUSH)
    with pytest.raises(LogLostError, match="stops without an end"):
        chain.scan()


def test_an_end_that_came_since_the_last_look_is_seen_before_the_next_log(chain: Chain) -> None:
    """What was read along earlier isn't taken for a log that stops."""
    chain.put(0, FLUSH)
    chain.begin(0, 0)
    assert chain.scan() is not None
    chain.put(0, FLUSH, FLUSH, END)
    chain.put(SIZE, FLUSH)
    assert chain.places() == [(2, 3), (3, SIZE), (SIZE + 1, SIZE + 2)]


def test_a_log_that_is_missing_in_between_is_told(chain: Chain) -> None:
    """Places have no holes."""
    chain.put(0, END)
    chain.put(2 * SIZE, FLUSH)
    chain.begin(0, 0)
    assert chain.scan() is not None
    with pytest.raises(LogLostError, match=f"between places {SIZE} and {2 * SIZE}"):
        chain.scan()


@pytest.mark.parametrize(
    ("position", "retained", "reason"),
    [(10, 10, "no log reaches back"), (SIZE + 3, 10, "no log reaches back"), (SIZE + 2, SIZE + 1, "no entry where")],
)
def test_a_place_that_no_log_has_is_told(chain: Chain, position: int, retained: int, reason: str) -> None:
    """Before the first log, in the middle of an entry, or of a window."""
    chain.put(SIZE, write(1, fill(1), FUA), FLUSH)
    with pytest.raises(LogLostError, match=reason):
        chain.begin(position, retained)


def test_damage_on_the_way_to_the_place_is_a_loss(chain: Chain) -> None:
    """As it is behind it."""
    chain.put(0, FLUSH, Logged(0, 1, 1 << 20), FLUSH)
    with pytest.raises(LogLostError, match="unknown flags"):
        chain.begin(4, 0)
    chain.begin(2, 0)
    with pytest.raises(LogLostError, match="unknown flags"):
        chain.scan()


def test_places_grow_though_all_logs_are_gone(chain: Chain) -> None:
    """A new log begins behind what the journal has."""
    with pytest.raises(LogLostError):
        chain.begin(777, 700)
    assert chain.next_first() == 777
