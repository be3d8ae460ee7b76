"""Claims about dmafs.service.following: what is complete on the primary comes into the journal, or there is a gap."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from dmafs.core.ondisk import Flag
from dmafs.core.verify import Differences, compare
from dmafs.core.work import Work
from dmafs.errors import LogLostError, ReadOnlyError, TapBusyError, TapError
from dmafs.service import failures as source_failures
from dmafs.service import following
from dmafs.service.following import TICKS_MAX, FollowingEngine
from dmafs.taps.dm import DmTap
from dmafs.units import SECTOR
from tests.unit.rig import SIZE, TICK_S, Rig
from tests.unit.test_engine import until
from tests.unit.tools import fill


async def begun(rig: Rig, call: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Begin a call in the background."""
    rig.nursery.start_soon(call, *arguments)
    await trio.testing.wait_all_tasks_blocked()


# -- windows and barriers ---------------------------------------------------------------------------------------------


async def test_windows_become_points(rig: Rig, follower: FollowingEngine) -> None:
    """Each flush is a moment that can be had, bit for bit; nothing between two flushes is."""
    await rig.newest()
    for value in range(1, 20):
        rig.kernel.write(value, fill(value, 3))
        rig.kernel.discard(value + 9, 2)
        rig.kernel.write(value + 40, fill(value + 50), fua=True)
        rig.flush()
    await follower.settle()
    points = await rig.points()
    assert [image for image in points if image in rig.moments] == rig.moments
    marks = [value for value in rig.kernel.entries if value.mark]
    assert len(points) <= len(rig.moments) + len(marks) + 1
    assert follower.windows >= len(rig.moments)


async def test_one_barrier_is_for_all_who_asked_before_it(rig: Rig) -> None:
    """While one barrier is under way others ask: they get a second one together, and none of them the first."""
    rig.tick_s = 1000
    engine = await rig.start()
    before = len(rig.device.marks)
    done: list[str] = []

    async def ask(name: str) -> None:
        await engine.settle()
        done.append(name)

    rig.device.held.clear()
    await begun(rig, ask, "first")
    rig.kernel.write(1, fill(1))
    for number in range(5):
        await begun(rig, ask, f"later {number}")
    assert done == []
    rig.device.held.set()
    await until(lambda: len(done) == 6)
    assert len(rig.device.marks) - before == 2
    assert done[0] == "first"
    assert rig.volume.journal.head == 1


async def test_settle_waits_for_what_was_complete_and_no_longer(rig: Rig) -> None:
    """It ends when its own mark has been read back: what is written afterwards isn't waited for."""
    rig.tick_s = 1000
    engine = await rig.start()
    rig.kernel.write(1, fill(1))
    scan = engine.log.scan
    engine.log.scan = lambda: None  # type: ignore[method-assign]
    done = trio.Event()

    async def ask() -> None:
        await engine.settle()
        done.set()

    await begun(rig, ask)
    await until(lambda: rig.device.marks[-1] in engine._barriers)
    rig.kernel.write(2, fill(2))
    assert not done.is_set()
    engine.log.scan = scan  # type: ignore[method-assign]
    await until(done.is_set)
    assert bytes(rig.volume.live.read(SECTOR, 2 * SECTOR)) == fill(1) + fill(7)


async def test_ticks_go_on_while_nothing_is_read_back(rig: Rig, follower: FollowingEngine) -> None:
    """Each tick has a barrier, up to TICKS_MAX under way; afterwards all of them end, and there are new ones."""
    scan = follower.log.scan
    follower.log.scan = lambda: None  # type: ignore[method-assign]
    for value in range(1, 20):
        rig.kernel.write(value, fill(value))
        await trio.sleep(TICK_S)
    await until(lambda: len(follower._barriers) == TICKS_MAX)
    await trio.sleep(4 * TICK_S)
    assert len(follower._barriers) == TICKS_MAX
    follower.log.scan = scan  # type: ignore[method-assign]
    await until(lambda: not follower._barriers and rig.volume.journal.durable == rig.volume.journal.head == 19)
    rig.kernel.write(20, fill(20))
    await until(lambda: rig.volume.journal.durable == 20)


async def test_idle_volumes_have_no_barriers(rig: Rig, follower: FollowingEngine) -> None:
    """Without writes the device is left alone."""
    await until(lambda: rig.device.asked > 0)  # the first answer is always yes
    await until(lambda: not follower._barriers and rig.volume.journal.is_clean())
    await trio.sleep(4 * TICK_S)
    marks = len(rig.device.marks)
    await trio.sleep(6 * TICK_S)
    assert len(rig.device.marks) == marks


async def test_named_marks_are_moments(rig: Rig, follower: FollowingEngine) -> None:
    """Each at its moment; a foreign mark's text is a name too, if it can be one."""
    for name in ("one", "Two.2_x-y"):
        rig.kernel.write(1, name.encode().ljust(SECTOR))
        await follower.settle(mark=name)
    rig.device.mark("foreign")
    rig.device.mark("no%name")
    await follower.settle()
    assert [mark.name for mark in rig.volume.journal.marks()] == ["one", "Two.2_x-y", "foreign"]
    image = rig.volume.image(next(rig.volume.journal.marks()).seq)
    assert bytes(image.read(SECTOR, 3)) == b"one"


async def test_a_flush_makes_durable_and_then_the_log_is_let_go_of(rig: Rig) -> None:
    """What is punched in the log is durable in the journal before, at every tick, over rotations."""
    rig.log_bytes = 256 << 10
    engine = await rig.start()
    release, logs = engine.log.release, set()
    seen: list[tuple[int, int]] = []

    def watch(place: int) -> None:
        seen.append((place, rig.volume.journal.durable_retained))
        logs.add(rig.device.log)
        release(place)

    engine.log.release = watch  # type: ignore[method-assign]
    for value in range(200):
        rig.kernel.write(value % SIZE, fill(value))
        if value % 9 == 0:
            await engine.flush()
            assert rig.volume.journal.durable == rig.volume.journal.head == value + 1
    await until(lambda: len(logs) > 1)
    assert all(place <= durable for place, durable in seen)
    assert await rig.newest() == rig.kernel.disk
    await rig.kill()
    await rig.start()
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []


async def test_a_request_that_fails_is_told(rig: Rig, follower: FollowingEngine) -> None:
    """Who asked gets the error, also if a gap has begun meanwhile; the next one has a barrier again."""
    rig.device.fails = "can't be flushed"
    with pytest.raises(TapError, match="can't be flushed"):
        await follower.settle()
    rig.device.held.clear()
    problems: list[str] = []

    async def ask() -> None:
        try:
            await follower.settle()
        except TapError as error:
            problems.append(error.message)

    await begun(rig, ask)
    follower._lose(LogLostError("lost"))
    await until(lambda: rig.alarms)
    rig.device.held.set()
    await until(lambda: problems)
    rig.device.fails = ""
    await rig.whole()


async def test_a_volume_that_takes_nothing_settles_never(rig: Rig, follower: FollowingEngine) -> None:
    """Who asks, or is waiting already, gets the reason instead of waiting for ever; so does a detach."""
    scan = follower.log.scan
    follower.log.scan = lambda: None  # type: ignore[method-assign]
    problems: list[ReadOnlyError] = []

    async def ask() -> None:
        try:
            await follower.settle()
        except ReadOnlyError as error:
            problems.append(error)

    await begun(rig, ask)
    rig.kernel.write(1, fill(1))
    rig.kernel.flush()
    rig.volume.gate.failure = "broken"
    follower.log.scan = scan  # type: ignore[method-assign]
    await until(lambda: problems)
    with pytest.raises(ReadOnlyError):
        await follower.flush()
    with pytest.raises(ReadOnlyError), trio.fail_after(10):
        await follower.detach()
    assert rig.kernel.device is None


# -- doubts -----------------------------------------------------------------------------------------------------------


async def test_doubts_are_compared_and_corrected(rig: Rig, follower: FollowingEngine) -> None:
    """Where the primary has neither the plain nor the FUA write's bytes, it is asked again, and is right."""
    await follower.settle()
    rig.kernel.write(3, fill(1))
    rig.kernel.write(3, fill(2), fua=True)
    rig.kernel.write(3, fill(9), logged=False)
    await until(lambda: bytes(rig.volume.live.read(3 * SECTOR, 1)) == b"\x09")
    assert rig.volume.journal.gaps == []
    await rig.whole()


async def test_doubts_about_busy_sectors_stay(
    rig: Rig, follower: FollowingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written each time it is looked at is compared once more later, until it can be decided."""
    compared = 0

    def counted(*arguments: Any, **keywords: Any) -> Work[Differences]:
        nonlocal compared
        compared += 1
        found = yield from compare(*arguments, **keywords)
        found.busy_sectors += compared < 3
        return found

    monkeypatch.setattr(following, "compare", counted)
    follower._doubt(*rig.volume.journal.extents(0, 0))
    assert compared == 0
    rig.kernel.write(3, fill(1))
    await follower.settle()
    follower._doubt(*rig.volume.journal.extents(0, 1))
    await until(lambda: compared == 3)
    await trio.sleep(4 * TICK_S)
    assert compared == 3


async def test_doubts_outlast_a_gap_and_errors(rig: Rig, follower: FollowingEngine) -> None:
    """A doubt that arises while a resync compares isn't dispelled by it; one whose comparison fails isn't forgotten."""
    await rig.newest()
    await follower.flush(Flag.GAP)
    rig.kernel.write(3, fill(9), logged=False)
    rig.kernel.write(4, fill(1))
    await follower.settle()
    follower._doubt(*rig.volume.journal.extents(0, 1))
    await trio.sleep(2 * TICK_S)
    assert len(follower._doubts[0]) == 1
    rig.kernel.write(4, fill(8), logged=False)
    failures = 0
    read = follower.log.primary.read_into

    def broken(buffer: bytearray | memoryview, offset: int) -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise OSError(5, "Input/output error")
        read(buffer, offset)

    follower.log.primary.read_into = broken  # type: ignore[method-assign]
    await follower.end_gap(lambda: True)
    await until(lambda: bytes(rig.volume.live.read(4 * SECTOR, 1)) == b"\x08")
    assert failures >= 3


async def test_a_failed_write_is_compared(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the kernel tells of one, what was captured around that time is brought to what the primary has."""
    hear, tell = os.pipe()

    class Messages:
        """A kernel's log that has a message of a failure whenever something was written to a pipe."""

        def fileno(self) -> int:
            return hear

        def failed(self, devices: frozenset[str]) -> bool:
            return bool(os.read(hear, 1)) and devices == {"sdz"}

        def close(self) -> None:
            os.close(hear)

    monkeypatch.setattr(source_failures, "KernelLog", Messages)
    monkeypatch.setattr(following, "SUPPRESSED_S", 0.02)
    monkeypatch.setattr(DmTap, "devices", lambda _self: frozenset({"sdz"}))
    engine = await rig.start()
    rig.kernel.write(5, fill(5))
    await engine.settle()
    rig.kernel.write(5, fill(7), logged=False)  # what the primary has is the old data
    os.write(tell, b"!")
    await until(lambda: bytes(rig.volume.live.read(5 * SECTOR, 1)) == b"\x07")
    await rig.whole()
    os.close(tell)


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_a_close_takes_in_everything_and_leaves_the_device(rig: Rig, follower: FollowingEngine) -> None:
    """Not clean, since what comes then is in the log only; the next start goes on with it, without a gap."""
    rig.kernel.write(1, fill(1))
    await rig.stop()
    assert follower.windows
    rig.kernel.write(2, fill(2))
    rig.open()
    assert not rig.is_clean()
    assert rig.volume.journal.head == 1
    rig.engine.volume.close()
    rig.engine.tap.close()
    await rig.start()
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []


async def test_a_detach_is_an_end_in_order(
    rig: Rig, follower: FollowingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """All of the log is taken in, the volume is clean, nothing waits for a barrier any more; an attach begins anew."""
    rig.kernel.write(1, fill(1))
    rig.kernel.write(2, fill(2), fua=True)
    rig.device.users = 1
    with pytest.raises(TapBusyError):
        await follower.tap_report("detach")
    rig.device.users = 0
    detached = {"volume": "disk", "device": "/dev/mapper/dmafs-disk", "attached": False}
    assert await follower.tap_report("detach") == detached
    assert await follower.tap_report("detach") == await follower.tap_report("status")
    assert "its device was removed" in caplog.text
    assert rig.is_clean()
    await follower.settle()
    assert bytes(rig.volume.live.read(0, SIZE * SECTOR)) == rig.kernel.disk
    report = await follower.tap_report("attach")
    assert (report["attached"], report["logging"]) == (True, True)
    assert not rig.is_clean()
    rig.kernel.write(3, fill(3))
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []
    await follower.detach()
    await rig.stop()
    rig.open()
    assert rig.is_clean()
    rig.engine.volume.close()
    rig.engine.tap.close()
    await rig.start()


async def test_attach_and_detach_follow_each_other(rig: Rig, follower: FollowingEngine) -> None:
    """Asked for at once they are done one after the other, and all of them end."""
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for action in ("detach", "attach", "detach", "status", "attach"):
                nursery.start_soon(follower.tap_report, action)
    if rig.kernel.device is None:
        await follower.tap_report("attach")
    rig.kernel.write(3, fill(3))
    assert await rig.newest() == rig.kernel.disk


async def test_a_kill_at_any_moment_loses_nothing(rig: Rig) -> None:
    """Ended at forty moments while it captures, and started again, it goes on: no gap, no double."""
    await rig.start()
    value = 0
    for round_ in range(40):
        for _ in range(6):
            value += 1
            rig.kernel.write(value % SIZE, fill(value % 251))
            rig.kernel.write((value + 5) % SIZE, fill(value % 241), fua=True)
            rig.flush()
            for _ in range(round_ * 7 % 11):
                await trio.lowlevel.checkpoint()
        await trio.sleep(round_ % 7 * 0.001)
        await rig.kill()
        await rig.start()
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []
    points = await rig.points()
    assert [moment for moment in rig.moments if moment not in points] == []
    writes = sum(entry.sectors > 0 for entry in rig.kernel.entries)
    assert writes <= rig.volume.journal.head < writes + 50, "corrections and little else"
    rig.volume.check()
