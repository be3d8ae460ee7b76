"""Claims about dmafs.service.scheduler: what happens by itself, and when. Time is simulated: days pass in a moment."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from dmafs.core.policy import NS, SnapshotSchedule, SyncPolicy, VolumeFacts
from dmafs.core.sync import Stops
from dmafs.errors import StoreError, StoreFullError
from dmafs.service import scheduler
from dmafs.service.scheduler import ATTEMPTS_MAX, RETRY_S, RETRY_S_MAX, SPACE_PAUSE_S, Scheduler
from dmafs.units import local_offset_s

HOUR = 3600
DAY = 24 * HOUR
NEVER = SyncPolicy(age_s=0, free=0)
NO_SNAPSHOTS = SnapshotSchedule(every_s=0)
SLACK = 2.0  # the loops look once a second, but for days
DAYS_SLACK = 60.0


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * NS


class Wall:
    """The wall clock over the simulated one; it can be set."""

    def __init__(self, clock: MockClock, begin: str) -> None:
        self.clock = clock
        self.begin_ns = utc(begin)
        self.began = clock.current_time()

    def __call__(self) -> int:
        return self.begin_ns + int((self.clock.current_time() - self.began) * NS)

    def shown(self) -> str:
        return datetime.fromtimestamp(self() // NS, UTC).strftime("%d %H:%M:%S")


class Disk:
    """A volume: a flushed write each *step* seconds since the mirror, of 1000 bytes."""

    def __init__(self, wall: Wall, *, step: int = 60) -> None:
        self.wall, self.step = wall, step
        self.zero_ns = wall()
        self.mirror = 0
        self.free = 1.0
        self.short = False
        self.flushes = 0
        self.synced: list[tuple[float, int]] = []
        self.failing: list[Exception] = []

    def facts(self) -> VolumeFacts:
        head = max(self.mirror, (self.wall() - self.zero_ns) // NS // self.step)
        seqs = np.arange(self.mirror + 1, head + 1, dtype=np.int64)
        stops = Stops(seqs, self.zero_ns + seqs * self.step * NS, (head - seqs) * 1000)
        oldest = int(stops.times[0]) if len(seqs) else 0
        return VolumeFacts(oldest, len(seqs) * 1000, self.free, self.short, 0, lambda: stops, list)

    async def flush(self) -> None:
        self.flushes += 1
        await trio.lowlevel.checkpoint()

    async def sync_to(self, target: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.failing:
            self.synced.append((trio.current_time(), -1))
            raise self.failing.pop(0)
        self.mirror = target
        self.synced.append((trio.current_time(), target))
        return target


class Taker:
    """The appliance: records what is taken."""

    def __init__(self, wall: Wall) -> None:
        self.wall = wall
        self.news = True
        self.taken: list[str] = []
        self.log: list[str] = []
        self.failing: list[Exception] = []

    def has_news(self) -> bool:
        return self.news

    async def take_scheduled(self, *, frozen: bool) -> str:
        await trio.lowlevel.checkpoint()
        if self.failing:
            self.log.append("failed")
            raise self.failing.pop(0)
        self.log.append("frozen" if frozen else "taken")
        self.taken.append(self.wall.shown())
        return f"id{len(self.taken)}"

    def hook(self, outcome: Callable[[str], bool]) -> Callable[[Sequence[str]], object]:
        async def run(command: Sequence[str]) -> bool:
            self.log.append(command[0])
            await trio.sleep(3)
            return outcome(command[0])

        return run


class Rig:
    """A scheduler over two volumes in simulated time."""

    def __init__(
        self,
        clock: MockClock,
        policy: SyncPolicy = NEVER,
        schedule: SnapshotSchedule = NO_SNAPSHOTS,
        *,
        begin: str = "2026-07-28T12:34:56",
        outcome: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.wall = Wall(clock, begin)
        self.disks = {"a": Disk(self.wall), "b": Disk(self.wall, step=3600)}
        self.taker = Taker(self.wall)
        self.scheduler = Scheduler(
            self.disks,
            self.taker,
            policy,
            schedule,
            environment={},
            clock=self.wall,
            offset=partial(local_offset_s, timezone="Europe/Berlin"),
            hook=self.taker.hook(outcome),  # type: ignore[arg-type]  # an async function by another name
        )

    def report(self) -> Any:
        """Return what is planned, and what was done last."""
        return self.scheduler.report()

    async def run(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.scheduler.run()


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loops look once a minute: so days pass in a moment."""
    monkeypatch.setattr(scheduler, "CHECK_S", DAYS_SLACK)


# --- syncs


@pytest.mark.usefixtures("days")
async def test_syncs_by_age(autojump_clock: MockClock) -> None:
    """Each volume by its own events: when the oldest is a day old, half a day is left, and half a day later again."""
    rig = Rig(autojump_clock, SyncPolicy())
    await rig.run(3 * DAY)
    for name, hours in (("a", [24, 36, 48, 60]), ("b", [25, 38, 51, 64])):
        disk = rig.disks[name]
        assert [round(at / HOUR) for at, _ in disk.synced] == hours
        for at, target in disk.synced:
            assert 0 <= at - 12 * HOUR - target * disk.step <= disk.step + DAYS_SLACK
    report = rig.report()["syncs"]["a"]
    assert report["last"]["reason"] == "age"
    assert report["next"] is not None


async def test_syncs_by_size(autojump_clock: MockClock) -> None:
    """The journal never is much longer than its bound, and never shorter than a half after a sync."""
    rig = Rig(autojump_clock, SyncPolicy(age_s=0, journal_bytes=10_000, free=0))
    await rig.run(HOUR)
    disk = rig.disks["a"]
    assert [target for _, target in disk.synced] == [6, 12, 18, 24, 30, 36, 42, 48, 54]
    assert disk.facts().data_bytes <= 10_000
    assert rig.disks["b"].synced == []


@pytest.mark.usefixtures("days")
async def test_syncs_by_time_of_day(autojump_clock: MockClock) -> None:
    """At the local time, and not again until the next day."""
    rig = Rig(autojump_clock, SyncPolicy(age_s=0, exact_s=HOUR, free=0, times=(4 * HOUR,)))
    await rig.run(2 * DAY)
    times = [rig.wall.begin_ns + int(at * NS) for at, _ in rig.disks["a"].synced]
    assert [
        abs(at - utc(text)) <= DAYS_SLACK * NS
        for at, text in zip(times, ("2026-07-29T02:00", "2026-07-30T02:00"), strict=True)
    ]
    assert rig.report()["syncs"]["a"]["next"] == "2026-07-31T02:00:00.000000000Z"


@pytest.mark.usefixtures("days")
async def test_what_came_before_the_start_is_not_caught_up_with(autojump_clock: MockClock) -> None:
    """A daemon that starts after a time of day waits for the next one."""
    rig = Rig(
        autojump_clock,
        SyncPolicy(age_s=0, exact_s=0, free=0, times=(4 * HOUR,)),
        SnapshotSchedule(every_s=0, times=(4 * HOUR,)),
        begin="2026-07-28T02:00:01",
    )
    await rig.run(23 * HOUR)
    assert rig.disks["a"].synced == []
    assert rig.taker.taken == []


async def test_little_space_is_looked_at_once_a_minute(autojump_clock: MockClock) -> None:
    """On a disk that simply is rather full, there still are moments that are exact to the write."""
    rig = Rig(autojump_clock, SyncPolicy(age_s=0, free=0.1))
    rig.disks["a"].step = 1
    rig.disks["a"].free = 0.05
    await rig.run(10 * SPACE_PAUSE_S + SLACK)
    assert 9 <= len(rig.disks["a"].synced) <= 11


async def test_a_touched_reserve_syncs(autojump_clock: MockClock) -> None:
    """As long as the reserve is touched, whatever can be synced is."""
    rig = Rig(autojump_clock)
    rig.disks["a"].short = True
    await rig.run(600)
    assert [target for _, target in rig.disks["a"].synced] == list(range(1, 10))
    assert rig.disks["a"].flushes >= 9
    assert rig.report()["syncs"]["a"]["last"]["reason"] == "store full"


async def test_a_failed_sync_is_tried_again_ever_later(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures are logged, double the pause up to a limit, and end nothing; the other volume goes on."""
    rig = Rig(autojump_clock, SyncPolicy(age_s=2 * HOUR, exact_s=HOUR, free=0))
    rig.disks["a"].failing = [StoreError("no") for _ in range(9)]
    await rig.run(5 * HOUR)
    tries = [at for at, target in rig.disks["a"].synced if target == -1]
    pauses = [min(RETRY_S * 2**number, RETRY_S_MAX) for number in range(8)]
    assert [round(later - at) for at, later in itertools.pairwise(tries)] == pytest.approx(pauses, abs=SLACK)
    assert len(tries) == 9
    assert rig.disks["a"].mirror > 0
    assert rig.disks["b"].mirror > 0
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 9
    assert "volume a: sync by policy (age) failed: no" in errors[0].message


@pytest.mark.usefixtures("days")
async def test_a_time_of_day_is_given_up(autojump_clock: MockClock) -> None:
    """What a time of day has begun is tried a few times, then the next day."""
    rig = Rig(autojump_clock, SyncPolicy(age_s=0, exact_s=0, free=0, times=(4 * HOUR,)))
    rig.disks["a"].failing = [StoreFullError("full") for _ in range(ATTEMPTS_MAX)]
    await rig.run(DAY)
    assert [target for _, target in rig.disks["a"].synced] == [-1] * ATTEMPTS_MAX
    assert rig.report()["syncs"]["a"]["last"]["result"].startswith("failed: full")
    await rig.run(DAY)
    assert rig.disks["a"].mirror > 0


# --- snapshots


@pytest.mark.usefixtures("days")
async def test_snapshots_at_round_times(autojump_clock: MockClock) -> None:
    """At full local hours, and at times of day beside them."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=2 * HOUR, times=(15 * HOUR + 1800,)))
    await rig.run(6 * HOUR)
    assert [text[:8] for text in rig.taker.taken] == ["28 13:30", "28 14:00", "28 16:00", "28 18:00"]
    report = rig.report()["snapshots"]
    assert report["next"] == "2026-07-28T20:00:00.000000000Z"
    assert report["last"]["result"] == "snapshot id4"


@pytest.mark.usefixtures("days")
async def test_nothing_is_taken_of_nothing(autojump_clock: MockClock) -> None:
    """A moment at which nothing was written since the last snapshot is let pass, with its hooks."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=HOUR, before=("before",)))
    rig.taker.news = False
    await rig.run(3 * HOUR)
    assert rig.taker.log == []
    assert rig.report()["snapshots"]["last"]["result"] == "nothing new"


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        ("2026-03-28T23:30:00", ["29 00:00", "29 01:00", "29 02:00", "29 03:00"]),
        ("2026-10-24T23:30:00", ["25 00:00", "25 00:30", "25 01:00", "25 02:00", "25 03:00"]),
    ],
    ids=["to summer time", "from summer time"],
)
@pytest.mark.usefixtures("days")
async def test_snapshots_when_the_clocks_change(autojump_clock: MockClock, begin: str, expected: list[str]) -> None:
    """Hours stay hours; 02:30 comes at the change when it is skipped, and once when it is repeated."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=HOUR, times=(2 * HOUR + 1800,)), begin=begin)
    await rig.run(4 * HOUR)
    assert [text[:8] for text in rig.taker.taken] == expected


@pytest.mark.usefixtures("days")
async def test_a_clock_that_is_set_back_stops_nothing(autojump_clock: MockClock) -> None:
    """After it was set back by a day the next full hour is the next full hour."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=HOUR))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.run, 3 * HOUR)
        await trio.sleep(HOUR)
        rig.wall.begin_ns -= DAY * NS
    assert [text[:8] for text in rig.taker.taken] == ["28 13:00", "27 14:00", "27 15:00"]


async def test_hooks_in_their_order(autojump_clock: MockClock) -> None:
    """Before, snapshot, after; what a successful ``before`` allows is a frozen snapshot."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=HOUR, before=("before",), after=("after",)))
    await rig.run(HOUR)
    assert rig.taker.log == ["before", "frozen", "after"]
    assert rig.report()["snapshots"]["last"]["result"] == "frozen snapshot id1"


async def test_a_hook_that_fails(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """The snapshot is taken all the same, not frozen, with a warning; ``after`` runs."""
    rig = Rig(
        autojump_clock,
        schedule=SnapshotSchedule(every_s=HOUR, before=("before",), after=("after",)),
        outcome=lambda name: name != "before",
    )
    await rig.run(HOUR)
    assert rig.taker.log == ["before", "taken", "after"]
    assert "isn't frozen" in caplog.text


async def test_a_snapshot_that_fails_is_tried_again(autojump_clock: MockClock) -> None:
    """With its hooks, ``after`` each time, a bounded number of times; and the next hour comes."""
    rig = Rig(autojump_clock, schedule=SnapshotSchedule(every_s=HOUR, before=("before",), after=("after",)))
    rig.taker.failing = [StoreError("no") for _ in range(ATTEMPTS_MAX)]
    await rig.run(2 * HOUR)
    assert rig.taker.log == ["before", "failed", "after"] * ATTEMPTS_MAX + ["before", "frozen", "after"]
    assert [text[:8] for text in rig.taker.taken] == ["28 14:00"]


async def test_after_runs_when_the_daemon_ends(autojump_clock: MockClock) -> None:
    """A stop while ``before`` runs takes no snapshot, but lets ``after`` do its work to the end."""
    rig = Rig(
        autojump_clock,
        schedule=SnapshotSchedule(every_s=HOUR, before=("before",), after=("after",)),
        begin="2026-07-28T12:59:58",
    )
    begun = trio.current_time()
    await rig.run(4)
    assert rig.taker.log == ["before", "after"]
    assert trio.current_time() - begun == pytest.approx(4 + 3, abs=0.1)


@pytest.mark.usefixtures("days")
async def test_policies_do_not_see_each_other(autojump_clock: MockClock) -> None:
    """Facts that change meanwhile are those of the next look: no target is used twice."""
    rig = Rig(autojump_clock, replace(SyncPolicy(), age_s=HOUR, exact_s=HOUR // 2, journal_bytes=20_000))
    await rig.run(DAY)
    targets = [target for _, target in rig.disks["a"].synced]
    assert targets == sorted(set(targets))


# --- another configuration while it runs


async def adjusted(rig: Rig, policy: SyncPolicy, schedule: SnapshotSchedule, *, after_s: float, run_s: float) -> None:
    """Run, and have the scheduler go by something else after a while."""

    async def change() -> None:
        await trio.sleep(after_s)
        rig.scheduler.adjust(policy, schedule)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await rig.run(run_s)


@pytest.mark.usefixtures("days")
async def test_another_schedule_holds_at_once_and_catches_up_with_nothing(autojump_clock: MockClock) -> None:
    """Without snapshots for hours, the first one is the next full hour; then with none again there is none."""
    rig = Rig(autojump_clock)
    await adjusted(rig, NEVER, SnapshotSchedule(every_s=HOUR), after_s=5 * HOUR, run_s=7.5 * HOUR)
    assert [text[:8] for text in rig.taker.taken] == ["28 18:00", "28 19:00", "28 20:00"]
    await adjusted(rig, NEVER, NO_SNAPSHOTS, after_s=HOUR, run_s=5 * HOUR)
    assert [text[:8] for text in rig.taker.taken[3:]] == ["28 21:00"]
    assert rig.report()["snapshots"]["next"] is None


@pytest.mark.usefixtures("days")
async def test_another_policy_holds_at_once_and_catches_up_with_nothing(autojump_clock: MockClock) -> None:
    """A time of day that has passed comes tomorrow; an age holds for what is there already."""
    rig = Rig(autojump_clock)
    by_day = SyncPolicy(age_s=0, exact_s=0, free=0, times=(15 * HOUR,))  # local time; it is 14:34 now
    await adjusted(rig, by_day, NO_SNAPSHOTS, after_s=HOUR, run_s=12 * HOUR)
    assert rig.disks["a"].synced == []
    await adjusted(rig, SyncPolicy(age_s=HOUR, exact_s=0, free=0), NO_SNAPSHOTS, after_s=HOUR, run_s=1.5 * HOUR)
    assert rig.disks["a"].synced


async def test_a_snapshot_ends_with_the_hooks_it_has_begun_with(autojump_clock: MockClock) -> None:
    """What was frozen is thawed by the hook that belongs to it, though there are others meanwhile."""
    old = SnapshotSchedule(every_s=HOUR, before=("freeze",), after=("thaw",))
    new = SnapshotSchedule(every_s=HOUR, before=("lock",), after=("unlock",))
    rig = Rig(autojump_clock, schedule=old)  # at 12:34:56; a hook takes 3 seconds
    await adjusted(rig, NEVER, new, after_s=25 * 60 + 6, run_s=HOUR)
    assert rig.taker.log == ["freeze", "frozen", "thaw"]
    await rig.run(HOUR)
    assert rig.taker.log[3:] == ["lock", "frozen", "unlock"]
