"""Claims about dmafs.service.telling: alarms are told one after the other, and nobody waits for that."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from dmafs.service import telling
from dmafs.service.alarms import Alarms
from dmafs.service.telling import Teller
from tests.unit.test_engine import until
from tests.unit.tools import Clock


def teller_of(script: str, *, timeout_s: float = 20) -> tuple[Alarms, Teller]:
    alarms = Alarms(Clock())
    teller = Teller(["sh", "-c", script], timeout_s, {"DMAFS_STORE": "/s"})
    alarms.tell = teller.tell
    return alarms, teller


async def test_each_beginning_and_end_is_told_in_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    """With what it is; an alarm that is set again, or cleared without being on, is no news."""
    path = tmp_path / "told"
    names = "$DMAFS_ALARM $DMAFS_STATE $DMAFS_VOLUME,$DMAFS_STORE $DMAFS_MESSAGE"
    alarms, teller = teller_of(f'echo "{names}" >> {path}')
    nursery.start_soon(teller.run)
    alarms.clear("gap", "disk")
    alarms.set("gap", "one", volume="disk")
    alarms.set("gap", "two", volume="disk")
    alarms.set("gap", "other", volume="more")
    alarms.set("space", "full")
    alarms.clear("gap", "disk")
    await until(lambda: path.exists() and len(path.read_text().splitlines()) == 4)
    assert path.read_text().splitlines() == [
        "gap raised disk,/s one",
        "gap raised more,/s other",
        "space raised ,/s full",
        "gap cleared disk,/s two",
    ]
    assert alarms.raised == 3
    nursery.cancel_scope.cancel()


async def test_without_a_command_nothing_is_run() -> None:
    """Nothing waits, either."""
    teller = Teller([], 1, {})
    alarms = Alarms(Clock())
    alarms.tell = teller.tell
    for number in range(2 * telling.WAITING_MAX):
        alarms.set(f"k{number}", "text")


async def test_failures_are_logged_once(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it has succeeded again; it may take too long, too."""
    path = tmp_path / "fails"
    alarms, teller = teller_of(f"test ! -e {path}; exit $?")
    nursery.start_soon(teller.run)
    caplog.set_level(logging.INFO)

    def failures(level: int) -> int:
        return sum("ended with 1" in record.message and record.levelno == level for record in caplog.records)

    path.touch()
    for number in range(3):
        alarms.set(f"k{number}", "text")
    await until(lambda: failures(logging.INFO) == 2)
    assert failures(logging.WARNING) == 1
    path.unlink()
    alarms.clear("k0")
    await until(lambda: not teller._failing)
    path.touch()
    alarms.clear("k1")
    await until(lambda: failures(logging.WARNING) == 2)
    nursery.cancel_scope.cancel()


async def test_a_command_that_hangs_is_killed_and_keeps_nobody_waiting(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes meanwhile waits, up to a limit, which is told once."""
    path = tmp_path / "told"
    alarms, teller = teller_of(f"echo >> {path}; exec sleep 100", timeout_s=0.2)
    for number in range(telling.WAITING_MAX + 5):
        alarms.set(f"k{number}", "text")
    assert sum("alarms wait for sh already" in record.message for record in caplog.records) == 1
    nursery.start_soon(teller.run)
    await until(lambda: "took longer than 0.2 s and was killed" in caplog.text)
    await until(lambda: path.read_text().count("\n") > 1)
    nursery.cancel_scope.cancel()
