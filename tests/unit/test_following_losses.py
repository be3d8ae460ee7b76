"""Claims about dmafs.service.following: whatever is lost is in a gap, the gap ends, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
import trio

from dmafs.core import copy
from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync
from dmafs.errors import DmafsError, LogLostError, StoreError, StoreFullError, TapError
from dmafs.service.checking import RESYNC
from dmafs.service.following import FollowingEngine
from dmafs.units import SECTOR
from tests.unit.rig import BOOT, SIZE, Rig
from tests.unit.test_engine import until
from tests.unit.tools import fill


class Asker:
    """Somebody who asks for something in the background."""

    def __init__(self, rig: Rig, call: Callable[[], Any]) -> None:
        self.done = False
        self.error: DmafsError | None = None
        self._call = call
        rig.nursery.start_soon(self._ask)

    async def _ask(self) -> None:
        try:
            await self._call()
        except DmafsError as error:
            self.error = error
        self.done = True


def fill_log(rig: Rig) -> None:
    """Write until the log has stopped, and a bit more, which is lost."""
    rig.device.disabled = True
    rig.kernel.write(11, fill(111))
    rig.kernel.flush()


def held_copy(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Have copying wait: return the events that it has begun, and that it may go on."""
    begun, go_on = threading.Event(), threading.Event()
    plain = copy._copy_chunk

    def slow(*arguments: Any) -> None:
        plain(*arguments)
        begun.set()
        assert go_on.wait(10)

    monkeypatch.setattr(copy, "_copy_chunk", slow)
    return begun, go_on


# -- gaps -------------------------------------------------------------------------------------------------------------


async def test_a_loss_is_a_gap(rig: Rig, follower: FollowingEngine) -> None:
    """Noticed within a tick; who waits is told; a resync ends it; times inside mean the moment before it."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    before, time_ns = await rig.newest(), rig.volume.journal.head_time_ns
    resync = rig.volume.journal.head
    rig.device.held.clear()
    asker = Asker(rig, follower.settle)
    await trio.testing.wait_all_tasks_blocked()
    fill_log(rig)
    rig.device.held.set()
    await until(lambda: asker.done)
    assert isinstance(asker.error, TapError)
    assert "a gap has begun" in asker.error.message
    await rig.whole()
    (gap,) = rig.volume.journal.gaps
    assert gap.begin == resync
    assert gap.end is not None
    assert len(rig.alarms) == 1
    assert bytes(await follower.read(rig.volume.image(gap.begin), 0, SIZE * SECTOR)) == before
    for seq in range(gap.begin + 1, gap.end):
        assert not rig.volume.recoverable(seq)
    assert rig.volume.recoverable(gap.end)
    assert gap.end_time_ns is not None
    assert time_ns < gap.end_time_ns
    rig.kernel.write(2, fill(2))
    assert await rig.newest() == rig.kernel.disk


async def test_a_loss_of_nothing_but_the_log(rig: Rig, follower: FollowingEngine) -> None:
    """A log that is damaged, or gone: what was written since is compared, whoever tells of it."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    rig.kernel.write(2, fill(2))
    rig.device.damages = True
    rig.kernel.flush()
    await until(lambda: rig.alarms)
    await rig.whole()
    assert len(rig.volume.journal.gaps) == 1


async def test_capture_goes_on_when_a_new_log_can_be_had(rig: Rig, follower: FollowingEngine) -> None:
    """A restart that fails is tried again; nobody waits meanwhile, and the gap is told once."""
    failures = 0
    restart = follower.log.restart

    def failing() -> int:
        nonlocal failures
        failures += 1
        if failures < 5:
            raise StoreError("no log can be made")
        return restart()

    follower.log.restart = failing  # type: ignore[method-assign]
    fill_log(rig)
    await until(lambda: failures > 1)
    with pytest.raises(TapError, match="a gap has begun"), trio.fail_after(10):
        await follower.settle()
    await rig.whole()
    assert failures == 5
    assert len(rig.alarms) == len(rig.volume.journal.gaps) == 1


async def test_a_loss_during_a_resync(rig: Rig, follower: FollowingEngine) -> None:
    """The gap lasts until a resync that began behind the last loss is done, also when the first one is about to end."""
    rounds = 0
    plain = follower.end_gap

    async def end_gap(is_over: Callable[[], bool]) -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 4:
            fill_log(rig)
            rig.kernel.write(20 + rounds, fill(rounds))
            await until(lambda: len(rig.alarms) == rounds + 1 and follower._loss is None)
            async with follower._commit:
                await follower.commit(Flag.RESYNCED, only_if=is_over)
            assert needs_resync(rig.volume)
        else:
            await plain(is_over)

    follower.end_gap = end_gap  # type: ignore[method-assign]
    fill_log(rig)
    await until(lambda: rounds >= 4)
    await rig.whole()
    assert len(rig.volume.journal.gaps) == 1


async def test_a_check_of_a_log_that_was_given_up_means_nothing(rig: Rig, follower: FollowingEngine) -> None:
    """A tick that looked at the old log and tells of its loss when capture goes on already begins no second gap."""
    begun, go_on = threading.Event(), threading.Event()
    check = follower.log.check

    def slow() -> None:
        if not follower._barriers and not begun.is_set():  # a tick's, not that of who waits for a barrier
            begun.set()
            assert go_on.wait(10)
            raise LogLostError("the old log")
        check()

    follower.log.check = slow  # type: ignore[method-assign]
    await until(begun.is_set)
    follower._lose(LogLostError("the same"))
    await until(lambda: follower._restarts)
    await rig.whole()
    go_on.set()
    rig.kernel.write(1, fill(1))
    await rig.whole()
    assert (follower._restarts, len(rig.alarms)) == (1, 1)


async def test_a_resync_on_demand_after_a_gap(rig: Rig, follower: FollowingEngine) -> None:
    """What was written past the device is found and journaled, while others write."""
    rig.kernel.write(9, fill(99), logged=False)
    check = follower.checking.begin(RESYNC)
    while not check.done.is_set():
        rig.kernel.write(1, fill(1))
        await trio.sleep(0.005)
    assert check.found is not None
    assert check.found.sectors == 8
    await rig.whole()


# -- the initial copy -------------------------------------------------------------------------------------------------


async def test_a_loss_while_copying(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy begins anew, and its origin has what was lost; there is no gap. A slow restart isn't overtaken by it."""
    begun, go_on = held_copy(monkeypatch)
    engine = await rig.start(copied=False)
    restart, restarted, restarting = engine.log.restart, threading.Event(), threading.Event()

    def slow() -> int:
        restarting.set()
        assert restarted.wait(10)
        return restart()

    engine.log.restart = slow  # type: ignore[method-assign]
    rig.kernel.write(1, fill(1))
    await until(begun.is_set)
    fill_log(rig)
    rig.kernel.write(2, fill(2))
    await until(lambda: rig.alarms)
    go_on.set()
    await until(restarting.is_set)
    await trio.sleep(0.1)
    assert not rig.volume.pointers.now.copied
    restarted.set()
    await until(lambda: rig.volume.pointers.now.copied)
    assert rig.volume.journal.gaps == []
    origin = rig.volume.image(rig.volume.pointers.now.origin_seq)
    assert bytes(await engine.read(origin, 0, SIZE * SECTOR)) == rig.kernel.disk
    await rig.whole()


@pytest.mark.parametrize("held", ["request", "read back"])
async def test_a_loss_while_the_copy_settles(rig: Rig, held: str) -> None:
    """The flush at a copy's end waits for a barrier that never comes: it is told, and nobody waits for the other."""
    rig.open()
    await rig.engine.recover(BOOT)
    scan = rig.engine.log.scan
    if held == "request":
        rig.device.held.clear()
    rig.engine.log.scan = lambda: None  # type: ignore[method-assign]
    rig.tasks = trio.CancelScope()
    await rig.nursery.start(rig._run)
    await until(lambda: rig.engine._barriers)
    extra = [Asker(rig, rig.engine.settle) for _ in range(3)]
    fill_log(rig)
    await trio.testing.wait_all_tasks_blocked()
    rig.engine._lose(LogLostError("lost"))
    rig.engine.log.scan = scan  # type: ignore[method-assign]
    await trio.sleep(0.05)
    rig.device.held.set()
    await until(lambda: all(asker.done for asker in extra))
    await until(lambda: rig.volume.pointers.now.copied)
    await rig.whole()
    assert rig.volume.journal.gaps == []


async def test_a_start_without_a_log_is_a_loss(rig: Rig, follower: FollowingEngine) -> None:
    """The log's files are gone while nobody reads them: a gap begins at the start, and ends."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    await rig.kill()
    rig.kernel.write(2, fill(2))
    rig.device.log.rename(rig.device.log.with_name(f"{1 << 30:020d}.log"))
    rig.device.log = rig.device.log.with_name(f"{1 << 30:020d}.log")
    await rig.start()
    await until(lambda: rig.alarms)
    await rig.whole()
    assert len(rig.volume.journal.gaps) == 1


async def test_another_boot_without_a_device_is_a_loss(rig: Rig, follower: FollowingEngine) -> None:
    """After a power cut the device is gone and what was in its log with it: attached anew, a resync ends the gap."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    await rig.kill()
    rig.kernel.device = None
    rig.kernel.write(2, fill(2), logged=False)
    rig.open()
    await rig.engine.recover(UUID(int=2))
    assert needs_resync(rig.volume)
    rig.tasks = trio.CancelScope()
    await rig.nursery.start(rig._run)
    await rig.whole()


# -- no space ---------------------------------------------------------------------------------------------------------


def full(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have the store be full as long as the list that is returned has an entry."""
    lasts = [True]

    def require_space(needed: int) -> None:
        if lasts and needed:
            raise StoreFullError("store is full")

    monkeypatch.setattr(rig.volume, "require_space", require_space)
    monkeypatch.setattr(rig.volume.storage, "free_bytes", lambda: 0 if lasts else 1 << 40)
    return lasts


async def test_space_is_asked_for_before_anything_is_lost(
    rig: Rig, follower: FollowingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can make room is told how much is needed; then the window that was scanned already is captured."""
    lasts = full(rig, monkeypatch)
    asked: list[int] = []

    async def make_room(needed: int) -> None:
        asked.append(needed)
        await trio.lowlevel.checkpoint()
        if len(asked) == 3:
            lasts.clear()

    follower.make_room = make_room
    rig.kernel.write(1, fill(1, 5))
    assert await rig.newest() == rig.kernel.disk
    assert asked == [5 * SECTOR] * 3
    assert rig.volume.journal.gaps == []


async def test_without_space_the_log_is_thrown_away(
    rig: Rig, follower: FollowingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space is asked for some times, then a gap begins, the log is let go of, and with space again a resync ends it."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    lasts = full(rig, monkeypatch)
    asker = Asker(rig, lambda: follower.settle(mark="lost"))
    for value in range(2, 20):
        rig.kernel.write(value, fill(value))
        await trio.sleep(0.01)
    await until(lambda: asker.done)
    assert asker.error is not None
    punched = rig.device.punched[-1]
    rig.kernel.write(30, fill(30))
    rig.kernel.flush()
    await until(lambda: rig.device.punched[-1] > punched)
    assert needs_resync(rig.volume)
    await rig.kill()  # what was let go of isn't looked for any more
    await rig.start()
    lasts.clear()
    await rig.whole()
    assert [mark.name for mark in rig.volume.journal.marks()] == []
    assert len(rig.volume.journal.gaps) == 1


async def test_trouble_while_the_log_is_thrown_away(
    rig: Rig, follower: FollowingEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that can't be read either ends nothing but itself: capture goes on in a new one."""
    lasts = full(rig, monkeypatch)

    def broken() -> None:
        lasts.clear()
        raise LogLostError("can't be read either")

    follower.log.discard = broken  # type: ignore[method-assign]
    rig.kernel.write(1, fill(1))
    await until(lambda: rig.alarms)
    await rig.whole()
    assert "can't be read either" in caplog.text
    assert len(rig.volume.journal.gaps) == 1


async def test_making_room_waits_for_nothing_that_waits_for_room(
    rig: Rig, follower: FollowingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An early sync of the very volume that has no space goes through, also while another sync waits for the tap."""
    rig.kernel.write(1, fill(1))
    await follower.settle()
    lasts = full(rig, monkeypatch)
    rig.kernel.write(2, fill(2))
    asker = Asker(rig, follower.sync)
    await trio.testing.wait_all_tasks_blocked()

    async def make_room(_needed: int) -> None:
        with trio.fail_after(10):
            await follower.sync_early()
        lasts.clear()

    follower.make_room = make_room
    await until(lambda: asker.done)
    assert asker.error is None
    assert rig.volume.pointers.now.mirror_seq == 2
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []


# -- the device goes --------------------------------------------------------------------------------------------------


async def test_a_detach_of_a_log_that_has_stopped(rig: Rig, follower: FollowingEngine) -> None:
    """It has no end, so a gap begins; the detach ends all the same, and a resync without the device ends the gap."""
    fill_log(rig)
    with trio.fail_after(10):
        await follower.detach()
    await rig.whole()
    assert rig.is_clean()
    assert len(rig.volume.journal.gaps) == 1
    await follower.attach(BOOT)
    rig.kernel.write(1, fill(1))
    await rig.whole()
    assert len(rig.volume.journal.gaps) == 1


async def test_an_attach_that_fails_leaves_the_engine_as_it_was(rig: Rig, follower: FollowingEngine) -> None:
    """The next one has the device, without a gap."""
    await follower.detach()
    rig.kernel.busy = True
    with pytest.raises(DmafsError, match="is in use"):
        await follower.attach(BOOT)
    await follower.settle()
    await follower._keep_log()  # there is no log now
    assert rig.is_clean()
    rig.kernel.busy = False
    await follower.attach(BOOT)
    rig.kernel.write(1, fill(1))
    assert await rig.newest() == rig.kernel.disk
    assert rig.volume.journal.gaps == []


async def test_the_end_does_not_wait_for_a_barrier(rig: Rig, follower: FollowingEngine) -> None:
    """Nobody reads it back when the tasks end: a resync that waits for one ends with them, and goes on at the start."""
    await follower.settle()
    follower.log.scan = lambda: None  # type: ignore[method-assign]
    rig.kernel.write(9, fill(99), logged=False)
    async with follower._commit:
        await follower.commit(Flag.GAP)
    follower.checking.gap_begun()
    await until(lambda: follower.checking.current and follower._barriers)
    with trio.fail_after(5):
        await rig.kill()
    await rig.start()
    await rig.whole()


async def test_work_that_flushes_ends_with_the_tasks(follower: FollowingEngine) -> None:
    """So does the flush of a copy."""
    scan = follower.log.scan
    follower.log.scan = lambda: None  # type: ignore[method-assign]
    with trio.fail_after(5), trio.move_on_after(0.1) as scope:
        await follower.drive(follower.flush_step(Flag.TICK), stoppable=True)
    assert scope.cancelled_caught
    follower.log.scan = scan  # type: ignore[method-assign]


async def test_kills_while_capture_is_lost(rig: Rig) -> None:
    """Ended at any moment of a loss and started again, image and primary are equal in the end, over many of them."""
    await rig.start()
    for round_ in range(20):
        rig.kernel.write(round_, fill(round_ + 1))
        fill_log(rig)
        rig.kernel.write(round_ + 30, fill(round_ + 1))
        with trio.move_on_after(round_ % 5 * 0.012):
            await until(lambda: not needs_resync(rig.volume) and rig.engine._restarts > 0)
        await rig.kill()
        await rig.start()
        if round_ % 4 == 0:
            await rig.whole()
    await until(lambda: not rig.device.disabled)
    await rig.whole()
