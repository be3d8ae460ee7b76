"""Verifies and resyncs in the daemon: one at a time, told as they go on, given up with who wanted them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync
from dmafs.core.work import Work
from dmafs.errors import CheckBusyError, ReadOnlyError, StoreError
from dmafs.service.checking import RESYNC, VERIFY, Check, Checking
from dmafs.service.control import _events
from dmafs.service.driver import Await
from dmafs.service.passing import PassThroughEngine
from tests.unit.test_engine import BOOT, SECTORS, make_engine, sector, until


def event(text: str) -> tuple[str, Any]:
    """Return name and data of a server-sent event."""
    found = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", text)
    assert found is not None, text
    return found[1], json.loads(found[2])


async def told(check: Check) -> list[tuple[str, Any]]:
    """Return all that is told of a check."""
    return [event(text) async for text in _events(check)]


@pytest.fixture
async def engine(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[PassThroughEngine]:
    engine = make_engine(tmp_path)
    await engine.recover(BOOT)
    await nursery.start(engine.run)
    await until(lambda: engine.volume.pointers.now.copied)
    yield engine
    nursery.cancel_scope.cancel()
    await engine.close()


def damage(engine: PassThroughEngine, at: int, text: str) -> None:
    engine.tap.primary.write([sector(text)], at * 512)


async def done(check: Check) -> Check:
    with trio.fail_after(10):
        await check.done.wait()
    return check


async def test_a_verify_finds_and_changes_nothing(engine: PassThroughEngine) -> None:
    """What was written behind the tap's back is found; the journal isn't touched."""
    engine.through.write(0, sector("captured"))
    damage(engine, 9, "not captured")
    await engine.flush()
    check = await done(engine.checking.begin(VERIFY))
    assert check.found is not None
    assert check.found.extents == [(8, 16)]
    assert (engine.volume.journal.head, engine.volume.journal.gaps) == (1, [])
    assert engine.checking.last is not None
    assert (engine.checking.last["kind"], engine.checking.last["bytes"]) == (VERIFY, 4096)
    assert engine.checking.current is None


async def test_a_resync_takes_over_what_differs(engine: PassThroughEngine, caplog: pytest.LogCaptureFixture) -> None:
    """There is a gap around what was journaled, and a verify is clean afterwards."""
    damage(engine, 9, "not captured")
    check = await done(engine.checking.begin(RESYNC))
    assert check.found is not None
    assert check.found.extents == [(8, 16)]
    (gap,) = engine.volume.journal.gaps
    assert (gap.begin, gap.end) == (0, 1)
    assert bytes(await engine.read(engine.volume.live, 9 * 512, 512)) == sector("not captured")
    clean = await done(engine.checking.begin(VERIFY))
    assert clean.found is not None
    assert clean.found.count == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "volume disk: resynced, 4 KiB of the source differed"
    ]


async def test_a_resync_of_equal_sides_is_no_gap(engine: PassThroughEngine) -> None:
    """Where a verify finds nothing there is nothing to mend."""
    engine.through.write(0, sector("captured"))
    check = await done(engine.checking.begin(RESYNC))
    assert check.found is not None
    assert check.found.count == 0
    assert engine.volume.journal.gaps == []


async def test_there_is_one_at_a_time(engine: PassThroughEngine) -> None:
    """A second one is refused, by the name of the first; so is one while a gap lasts."""
    first = engine.checking.begin(VERIFY)
    with pytest.raises(CheckBusyError, match="volume disk: a verify is under way already"):
        engine.checking.begin(RESYNC)
    await done(first)
    await engine.flush(Flag.GAP)
    with pytest.raises(CheckBusyError, match="a resync is under way"):
        engine.checking.begin(VERIFY)
    engine.checking.gap_begun()
    await until(lambda: not needs_resync(engine.volume))
    await until(lambda: engine.checking.current is None)
    await done(engine.checking.begin(VERIFY))


def settling(
    engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch, settle: Callable[[], Awaitable[object]]
) -> None:
    """Have comparisons settle in a way of their own; flushes don't."""
    plain = engine.steps

    def step() -> Work[object]:
        return (yield Await(settle, stoppable=True))

    monkeypatch.setattr(engine, "steps", lambda throttle: dataclasses.replace(plain(throttle), settle=step))


def slow(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, trio.Event]:
    """Have the tap need a long time to settle: return the events that it has begun to, and that it may be done."""
    begun, go_on = trio.Event(), trio.Event()

    async def settle() -> None:
        begun.set()
        await go_on.wait()

    settling(engine, monkeypatch, settle)
    return begun, go_on


async def test_who_goes_away_ends_a_verify(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up while it waits for the tap, it ends at once, without a result."""
    begun, _ = slow(engine, monkeypatch)
    damage(engine, 9, "not captured")
    check = engine.checking.begin(VERIFY)
    await until(begun.is_set)
    check.abandon()
    await done(check)
    assert (check.found, check.failure, engine.checking.last) == (None, None, None)
    assert [(name, data["error"]) for name, data in await told(check)] == [("error", "ControlError")]


async def test_a_sync_does_not_wait_for_a_tap_that_settles(
    engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a comparison waits, it isn't a reader: a tap may need a sync to settle."""
    engine.through.write(0, sector("one"))
    damage(engine, 9, "not captured")
    begun, go_on = slow(engine, monkeypatch)
    check = engine.checking.begin(VERIFY)
    await until(begun.is_set)
    with trio.fail_after(10):
        assert await engine.sync() == 1
    go_on.set()
    await done(check)
    assert check.found is not None
    assert check.found.extents == [(8, 16)]


async def test_a_resync_that_has_found_something_goes_on(
    engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gap that it has begun is ended, whoever goes away."""
    damage(engine, 9, "not captured")
    check = engine.checking.begin(RESYNC)
    plain_secure = engine.secure

    async def secure(flag: Flag = Flag.FLUSH) -> None:
        check.abandon()
        await plain_secure(flag)

    monkeypatch.setattr(engine, "secure", secure)
    await done(check)
    assert check.found is not None
    assert not needs_resync(engine.volume)
    assert bytes(await engine.read(engine.volume.live, 9 * 512, 512)) == sector("not captured")


async def test_a_gap_that_begins_again_is_not_ended_by_an_older_resync(
    engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture that is lost during a resync is compared once more, from the beginning."""
    rounds = 0

    async def settle() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            engine.checking.gap_begun()
            damage(engine, 1, "lost too")
        await trio.lowlevel.checkpoint()

    settling(engine, monkeypatch, settle)
    await engine.flush(Flag.GAP)
    engine.checking.gap_begun()
    await until(lambda: not needs_resync(engine.volume))
    assert bytes(await engine.read(engine.volume.live, 512, 512)) == sector("lost too")
    assert rounds > 2


async def test_an_error_ends_a_check_and_is_told(engine: PassThroughEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk becomes one of the tree; a volume that takes no writes isn't mended."""

    def broken(_buffer: Any, _offset: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine.tap.primary, "read_into", broken)
    check = await done(engine.checking.begin(VERIFY))
    assert isinstance(check.failure, StoreError)
    assert "input/output error" in check.failure.message
    assert [(name, data["error"]) for name, data in await told(check)] == [("error", "StoreError")]
    monkeypatch.undo()
    damage(engine, 9, "not captured")
    engine.volume.gate.failure = "no more"
    check = await done(engine.checking.begin(RESYNC))
    assert isinstance(check.failure, ReadOnlyError)


async def test_progress_is_told_and_a_pause_ends_with_the_check(engine: PassThroughEngine) -> None:
    """Lines tell how far it is, the last one the result. A rate of a byte a second means a pause that nobody awaits."""
    check = engine.checking.begin(VERIFY, 1)
    stream = _events(check)
    name, first = event(await anext(stream))
    assert (name, first["kind"], first["total_bytes"]) == ("progress", VERIFY, SECTORS * 512)
    await until(lambda: check.report()["fraction"] == 1)
    assert not check.done.is_set()
    check.abandon()
    await done(check)
    assert event([text async for text in stream][-1])[0] == "error"
    check = engine.checking.begin(VERIFY)
    name, result = (await told(check))[-1]
    assert (name, result["compared_bytes"]) == ("result", SECTORS * 512)


async def test_the_rate_of_the_configuration_counts_unless_another_is_given(engine: PassThroughEngine) -> None:
    """0 is no limit, and may be asked for."""
    checking = Checking(engine, bytes_per_s=77)
    assert checking.begin(VERIFY).bytes_per_s == 77
    checking.current = None
    assert checking.begin(VERIFY, 0).bytes_per_s == 0
