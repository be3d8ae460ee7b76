"""Forward journals as they can be found, for ``test_recovery_cases``: each is in the state of some rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag
from dmafs.core.recovery import DIRECTORY
from dmafs.core.storage import RealStorage
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import OURS, Ticking, fill, flip

Open = Callable[[], object]
Scenario = Callable[[Path], Open]

LIMITS = SegmentLimits(data_sectors=1000, records=4)
scenarios: dict[str, Scenario] = {}


def reaches(*reached: str) -> Callable[[Scenario], Scenario]:
    """Register what makes a store that is in the state of some rows, and returns what opens it."""

    def register(scenario: Scenario) -> Scenario:
        for label in reached:
            assert label not in scenarios
            scenarios[label] = scenario
        return scenario

    return register


# -- the forward journal --------------------------------------------------------------------------------------------


def recover(path: Path, *, tail: int = 0, durable: int = 0, windowed: bool = False) -> ForwardJournal:
    journal = ForwardJournal(RealStorage(path), OURS, LIMITS, Ticking(), index=IndexLimits(), windowed=windowed)
    try:
        journal.recover(tail=tail, tail_time_ns=0, durable=durable)
    except BaseException:
        journal.close()
        raise
    return journal


def opening(path: Path, *, tail: int = 0, durable: int = 0, windowed: bool = False) -> Open:
    """Return what opens a journal and looks at all of it that isn't damaged."""

    def call() -> None:
        with contextlib.closing(recover(path, tail=tail, durable=durable, windowed=windowed)) as journal:
            for part in journal.parts:
                if part.damage:
                    with pytest.raises(CorruptionError):
                        journal.segment_of(part.first)
            if not any(part.damage for part in journal.parts):
                journal.check()

    return call


def journal(path: Path, *, count: int = 12, sealed: bool = False) -> None:
    """Make a journal with segments from 1, 5 and 9 on, all of it on the disk; unless *sealed* nothing says so."""
    (path / DIRECTORY).mkdir()
    with contextlib.closing(recover(path)) as made:
        for seq in range(1, count + 1):
            made.append(seq, 1, fill(seq))
        if sealed:
            run(made.take_dirty())


def ext(path: Path, first: int) -> Path:
    return path / DIRECTORY / f"{first:020d}.ext"


def tear(path: Path, seq: int) -> None:
    """Damage the descriptor of an event."""
    first = (seq - 1) // 4 * 4 + 1
    flip(ext(path, first), HEADER_SIZE + (seq - first) * RECORD_SIZE + 20)


def successor_without_content(path: Path) -> None:
    """Make a journal whose last segment had no record yet when the one before was sealed, and never got its header."""
    journal(path, count=8)
    with contextlib.closing(recover(path)) as made:
        made._add_segment(made._begin_segment(9))
        run(made.take_dirty())
    ext(path, 9).write_bytes(b"")


@reaches("R1")
def foreign_file(path: Path) -> Open:
    journal(path)
    (path / DIRECTORY / "notes.txt").write_text("mine")
    return opening(path)


@reaches("R2")
def data_alone(path: Path) -> Open:
    journal(path)
    (path / DIRECTORY / f"{99:020d}.dat").write_bytes(b"x")
    return opening(path)


@reaches("R3", "R13", "R18", "R24", "R30")
def nothing_to_do(path: Path) -> Open:
    journal(path, sealed=True)
    return opening(path)


@reaches("R4")
def behind_the_tail(path: Path) -> Open:
    journal(path)
    return opening(path, tail=8, durable=12)


@reaches("R5")
def no_header_yet(path: Path) -> Open:
    journal(path)
    ext(path, 9).write_bytes(bytes(100))
    return opening(path)


@reaches("R6")
def damaged_header(path: Path) -> Open:
    journal(path)
    flip(ext(path, 9), 50)
    return opening(path)


@reaches("R7")
def damaged_header_of_a_sealed_segment(path: Path) -> Open:
    journal(path, sealed=True)
    flip(ext(path, 5), 50)
    return opening(path)


@reaches("R8")
def damaged_header_behind_a_missing_segment(path: Path) -> Open:
    journal(path, sealed=True)
    ext(path, 1).unlink()
    flip(ext(path, 5), 50)
    return opening(path, durable=12)


@reaches("R9")
def damaged_header_of_the_last_segment(path: Path) -> Open:
    journal(path)
    flip(ext(path, 9), 50)
    return opening(path, durable=12)


@reaches("R10")
def damaged_header_of_a_segment_that_was_durable_in_part(path: Path) -> Open:
    journal(path)
    flip(ext(path, 5), 50)
    return opening(path, durable=6)


@reaches("R11", "R17")
def torn_in_the_middle(path: Path) -> Open:
    journal(path)
    tear(path, 6)
    return opening(path)


@reaches("R12")
def missing_segment(path: Path) -> Open:
    journal(path, sealed=True)
    ext(path, 5).unlink()
    return opening(path)


@reaches("R14")
def not_sealed_yet(path: Path) -> Open:
    journal(path)
    return opening(path)


@reaches("R15")
def damaged_descriptor_where_no_seal_was_yet(path: Path) -> Open:
    journal(path)
    tear(path, 6)
    return opening(path, durable=12)


@reaches("R16")
def damaged_descriptor_of_what_was_durable(path: Path) -> Open:
    journal(path)
    tear(path, 6)
    return opening(path, durable=7)


@reaches("R19")
def damaged_end(path: Path) -> Open:
    journal(path)
    tear(path, 10)
    return opening(path, durable=12)


@reaches("R20")
def all_segments_missing(path: Path) -> Open:
    (path / DIRECTORY).mkdir()
    return opening(path, durable=5)


@reaches("R21")
def place_in_the_log_missing(path: Path) -> Open:
    journal(path, count=4)
    return opening(path, tail=8, durable=8, windowed=True)


@reaches("R22")
def rest_of_a_release(path: Path) -> Open:
    journal(path, count=4)
    return opening(path, tail=8, durable=8)


@reaches("R23")
def nothing_there(path: Path) -> Open:
    (path / DIRECTORY).mkdir()
    return opening(path)


@reaches("R25")
def sealed_end(path: Path) -> Open:
    successor_without_content(path)
    return opening(path)


@reaches("R26")
def sealed_end_that_is_damaged(path: Path) -> Open:
    successor_without_content(path)
    tear(path, 6)
    return opening(path)


@reaches("R27")
def torn_data(path: Path) -> Open:
    journal(path)
    flip(path / DIRECTORY / f"{9:020d}.dat", SECTOR + 7)
    return opening(path)


@reaches("R28")
def unclosed_window(path: Path) -> Open:
    closed_window(path)
    with contextlib.closing(recover(path, windowed=True)) as made:
        made.append(5, 1, fill(5))
    return opening(path, windowed=True)


@reaches("R29")
def closed_window(path: Path) -> Open:
    (path / DIRECTORY).mkdir()
    with contextlib.closing(recover(path, windowed=True)) as made:
        window = made.begin_window()
        window.write([(seq, 1, fill(seq)) for seq in range(1, 7)])
        window.close(Flag.FLUSH, position=40, retained=0)
        made.publish(window)
    return opening(path, windowed=True)
