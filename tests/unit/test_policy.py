"""Claims about dmafs.core.policy: when a volume is synced, and that the target always is one a sync may go to."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dmafs.core.ondisk import Flag
from dmafs.core.policy import (
    NS,
    SnapshotSchedule,
    SyncPolicy,
    Target,
    VolumeFacts,
    facts_of,
    has_past,
    next_by_age,
    plan,
)
from dmafs.core.sync import Stops, stops_of, sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.units import SECTOR
from tests.unit.tools import Clock, copied_volume, fill

HOUR_NS = 3600 * NS
NOW = 1_700_000_000 * NS
NEVER = SyncPolicy(age_s=0, free=0)
NO_STOPS = Stops(*(np.empty(0, np.int64) for _ in range(3)))


def facts(
    *stops: tuple[int, int, int],
    oldest_ns: int = NOW,
    data: int = 0,
    free: float = 1.0,
    starved: bool = False,
    marks: tuple[tuple[int, str], ...] = (),
) -> VolumeFacts:
    columns = np.array(stops, np.int64).reshape(-1, 3).T
    return VolumeFacts(oldest_ns, data, free, starved, 0, lambda: Stops(*columns), lambda: marks)


# An indicator each hour of the last two days; each hour wrote ten events of 100 bytes together.
TWO_DAYS = tuple((10 * hour, NOW - (48 - hour) * HOUR_NS, 1000 * (48 - hour)) for hour in range(1, 49))
FACTS = facts(*TWO_DAYS, oldest_ns=NOW - 48 * HOUR_NS, data=48_000)


# --- each trigger


def test_young_journals_stay() -> None:
    """Nothing is due as long as the oldest event is younger than the age; then what is older than ``exact`` goes."""
    policy = SyncPolicy()
    assert plan(replace(FACTS, oldest_ns=NOW - 24 * HOUR_NS), policy, NOW) is None
    assert plan(replace(FACTS, oldest_ns=NOW - 24 * HOUR_NS), policy, NOW + 1) == Target(360, "age")
    assert plan(FACTS, policy, NOW) == Target(360, "age")
    assert next_by_age(FACTS, policy) == NOW - 24 * HOUR_NS
    assert plan(FACTS, NEVER, NOW) is None


def test_what_a_sync_by_age_leaves_exact_stays_exact() -> None:
    """The target is the last indicator that isn't younger; if there is none, nothing is done."""
    policy = SyncPolicy(exact_s=12 * 3600)
    assert plan(facts((5, NOW - 12 * HOUR_NS, 0), oldest_ns=1), policy, NOW) == Target(5, "age")
    assert plan(facts((5, NOW - 12 * HOUR_NS + 1, 0), oldest_ns=1), policy, NOW) is None


def test_a_time_of_day_syncs_what_is_old_enough() -> None:
    """It goes as far as a sync by age, however young the oldest event."""
    assert plan(FACTS, NEVER, NOW, time_came=True) == Target(360, "time of day")
    assert plan(replace(FACTS, oldest_ns=0), NEVER, NOW, time_came=True) == Target(360, "time of day")


def test_a_journal_that_is_too_big_is_halved() -> None:
    """The target is the first indicator that leaves half of the bound at most; the newest if all leave more."""
    policy = replace(NEVER, journal_bytes=10_000)
    assert plan(replace(FACTS, data_bytes=10_000), policy, NOW) is None
    assert plan(replace(FACTS, data_bytes=10_001), policy, NOW) == Target(430, "journal size")
    assert plan(facts((1, 1, 9000), (2, 2, 8000), data=12_000), policy, NOW) == Target(2, "journal size")


def test_little_space_syncs_all() -> None:
    """Below the share, and where writes are refused, everything durable goes."""
    policy = replace(NEVER, free=0.1)
    assert plan(replace(FACTS, free=0.1), policy, NOW) is None
    assert plan(replace(FACTS, free=0.09), policy, NOW) == Target(480, "free space")
    assert plan(replace(FACTS, starved=True), NEVER, NOW) == Target(480, "store full")


def test_marks_that_match_are_synced_up_to() -> None:
    """The newest durable mark whose name fits a pattern is a target."""
    policy = replace(NEVER, marks=("backup-*", "[0-9]"))
    marks = ((100, "backup-1"), (200, "backup-2"), (250, "other"), (485, "backup-not-durable"))
    assert plan(replace(FACTS, marks=lambda: marks), policy, NOW) == Target(200, "mark backup-2")
    assert plan(replace(FACTS, marks=lambda: marks[2:]), policy, NOW) is None
    assert plan(replace(FACTS, marks=lambda: ((30, "7"),)), policy, NOW) == Target(30, "mark 7")


def test_the_farthest_target_serves_all() -> None:
    """If several triggers have come, one sync does for all of them."""
    policy = replace(SyncPolicy(), journal_bytes=10_000, marks=("m",))
    assert plan(replace(FACTS, marks=lambda: ((40, "m"),)), policy, NOW) == Target(430, "journal size")
    assert plan(replace(FACTS, marks=lambda: ((440, "m"),)), policy, NOW) == Target(440, "mark m")


def test_what_was_begun_is_finished_first() -> None:
    """A sync that stopped behind its commit goes on, whatever the policy."""
    assert plan(replace(FACTS, unfinished=7), NEVER, NOW) == Target(7, "unfinished sync")


def test_nothing_to_go_to() -> None:
    """Without a stop there is no target, whatever has come."""
    none = replace(FACTS, stops=lambda: NO_STOPS, free=0, starved=True, marks=lambda: ((1, "m"),))
    assert plan(none, SyncPolicy(journal_bytes=1, marks=("*",)), NOW, time_came=True) is None


@hypothesis.given(
    gaps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 5)), max_size=20),
    age=st.integers(1, 60),
    exact=st.integers(0, 59),
    journal=st.integers(0, 60),
    free=st.booleans(),
    time_came=st.booleans(),
)
def test_any_target_serves_what_has_come(
    *,
    gaps: list[tuple[int, int, int]],
    age: int,
    exact: int,
    journal: int,
    free: bool,
    time_came: bool,
) -> None:
    """The target is a stop; it leaves what ``exact`` wants unless space is short, and half the journal if it can."""
    seqs = list(itertools.accumulate(gap[0] + 1 for gap in gaps))
    ages = list(itertools.accumulate(gap[1] for gap in reversed(gaps)))[::-1]
    left = list(itertools.accumulate(gap[2] for gap in reversed(gaps)))[::-1]
    stops = tuple(zip(seqs, (NOW - age * NS for age in ages), left, strict=True))
    oldest = NOW - (ages[0] + 1) * NS if ages else 0
    policy = SyncPolicy(age_s=age, exact_s=min(exact, age - 1), journal_bytes=journal, free=0.5 if free else 0)
    found = plan(facts(*stops, oldest_ns=oldest, data=sum(left), free=0.4), policy, NOW, time_came=time_came)
    too_big = journal and sum(left) > journal
    if found is None:
        assert not stops or not (free or too_big)
        return
    [(_, time_ns, rest)] = [stop for stop in stops if stop[0] == found.seq]
    if found.reason in {"age", "time of day"}:
        assert time_ns <= NOW - policy.exact_s * NS
    if too_big:
        assert rest <= journal // 2 or found.seq == seqs[-1]
    if free:
        assert found.seq == seqs[-1]


# --- facts of real volumes


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = copied_volume(tmp_path / "v", bytes(64 * SECTOR))
    yield made
    made.close()


def real(volume: Volume, *, free: float = 1.0, starved: bool = False) -> VolumeFacts:
    return facts_of(volume, free=free, starved=starved)


def test_facts_of_a_volume(volume: Volume) -> None:
    """Stops are the durable indicators past the mirror, with what they leave; marks are those past the mirror."""
    assert (real(volume).oldest_ns, real(volume).data_bytes) == (0, 0)
    volume.write(0, fill(1, 3))
    run(volume.flush())
    volume.write(3, fill(2, 2))
    run(volume.flush(flag=Flag.MARK, name="m"))
    volume.discard(9, 9)
    volume.write(9, fill(3, 1))
    volume.indicate()
    found = real(volume)
    assert found.oldest_ns == volume.journal.time_of(1)
    assert found.marks() == [(2, "m")]
    stops = found.stops()
    assert stops.seqs.tolist() == [1, 2]
    assert stops.left_bytes.tolist()[-1] == SECTOR  # of the last write
    run(volume.flush())
    assert stops_of(volume).seqs.tolist() == [1, 2, 4]
    run(sync(volume, target=2))
    assert stops_of(volume).seqs.tolist() == [4]
    assert real(volume).data_bytes == SECTOR
    assert real(volume).marks() == []


def test_a_gap_has_no_stops(volume: Volume) -> None:
    """Inside a gap nothing is offered; its beginning and its end are."""
    volume.write(0, fill(1))
    run(volume.flush(flag=Flag.GAP))
    for value in (2, 3):
        volume.write(0, fill(value))
        run(volume.flush())
    assert set(stops_of(volume).seqs) == {1}
    assert plan(real(volume, starved=True), NEVER, NOW) == Target(1, "store full")
    run(volume.flush(flag=Flag.RESYNCED))
    assert set(stops_of(volume).seqs) == {1, 3}


def test_nothing_passes_a_moment_that_is_reserved(volume: Volume) -> None:
    """What is about to become a snapshot limits the stops."""
    for value in (1, 2, 3):
        volume.write(0, fill(value))
        run(volume.flush())
    with volume.reserved(2):
        assert stops_of(volume).seqs.tolist() == [1, 2]


def test_a_volume_that_stopped_writing_is_left_alone(volume: Volume) -> None:
    """After a failed write there is nothing that a sync could do."""
    volume.write(0, fill(1))
    run(volume.flush())
    volume.gate.failure = "broken"
    assert plan(real(volume, starved=True), SyncPolicy(), NOW) is None


def test_a_first_sync_keeps_a_past(volume: Volume) -> None:
    """There is a past to rely on once a snapshot stands at or before the mirror."""
    assert not has_past(volume)
    volume.write(0, fill(1))
    run(volume.take_snapshot(name="ahead"))
    volume.write(0, fill(2))
    run(volume.flush())
    assert not has_past(volume)
    run(sync(volume))
    assert has_past(volume)


WEIGHTS = {"write": 12, "discard": 1, "flush": 6, "indicate": 1, "mark": 2, "gap": 1, "resynced": 3, "pass": 6}
RARE = {"snapshot": 2, "reserve": 1, "sync": 6}
steps = st.tuples(
    st.sampled_from([name for name, weight in {**WEIGHTS, **RARE}.items() for _ in range(weight)]),
    st.integers(0, 31),
    st.integers(1, 4),
)


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(history=st.lists(steps, min_size=10, max_size=60))
def test_a_policy_on_a_real_volume(
    history: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever has happened: the target is durable, indicated, outside of gaps, within the limit; syncing to it works.

    After a sync by size at most half of the bound is left, unless what is left can't be synced yet.
    """
    volume = copied_volume(tmp_path_factory.mktemp("v") / "v", bytes(64 * SECTOR))
    clock = Clock(volume.journal.head_time_ns)
    volume.clock = volume.journal._clock = clock
    with contextlib.ExitStack() as held:
        held.callback(volume.close)
        for step, number, length in history:
            _step(volume, clock, (step, number, length), held)
        volume.check()


def _step(volume: Volume, clock: Clock, what: tuple[str, int, int], held: contextlib.ExitStack) -> None:
    step, number, length = what
    journal = volume.journal
    simple: dict[str, Callable[[], object]] = {
        "write": lambda: volume.write(number, fill(length, length)),
        "discard": lambda: volume.discard(number, length),
        "flush": lambda: run(volume.flush()),
        "indicate": volume.indicate,
        "mark": lambda: run(volume.flush(flag=Flag.MARK, name="abc"[number % 3])),
        "gap": lambda: run(volume.flush(flag=Flag.GAP)),
        "resynced": lambda: run(volume.flush(flag=Flag.RESYNCED)),
    }
    if step in simple:
        simple[step]()
    elif step == "pass":
        clock.now += number % 8 * NS
    elif step == "snapshot" and journal.gap_around(journal.head) is None:
        run(volume.take_snapshot())
    elif step == "reserve" and number < 4:
        held.enter_context(volume.reserved(volume.indicate().seq))
    elif step == "sync":
        _sync(volume, clock, number)


def _sync(volume: Volume, clock: Clock, number: int) -> None:
    bound = 8 * SECTOR if number & 1 else 0
    policy = SyncPolicy(
        age_s=5 if number & 2 else 0,
        exact_s=3,
        journal_bytes=bound,
        free=0.1 if number & 4 else 0,
        marks=("a", "b*") if number & 8 else (),
    )
    journal = volume.journal
    found = plan(real(volume, free=0.0), policy, clock.now, time_came=bool(number & 16))
    if found is None:
        return
    assert journal.is_indicated(found.seq)
    assert volume.pointers.now.mirror_seq < found.seq <= min(journal.durable, volume.sync_limit)
    assert journal.gap_around(found.seq) is None
    if found.reason in {"age", "time of day"}:
        assert volume.time_of(found.seq) <= clock.now - 3 * NS
    newest = int(stops_of(volume).seqs[-1])
    too_big = bound and journal.data_after(volume.pointers.now.mirror_seq) > bound
    assert run(sync(volume, target=found.seq, open_snapshot=not has_past(volume))) == found.seq
    assert volume.recoverable(found.seq)
    assert has_past(volume)
    if too_big and journal.data_after(found.seq) > bound // 2:
        assert found.seq == newest


# --- snapshots


def utc(_time_s: int) -> int:
    return 0


def test_schedules() -> None:
    """Round times and times of day are merged; neither gives nothing."""
    midnight = NOW // NS // 86400 * 86400 * NS
    assert SnapshotSchedule().next_after(midnight, utc) == midnight + HOUR_NS
    both = SnapshotSchedule(every_s=6 * 3600, times=(5 * 3600,))
    found = [midnight]
    for _ in range(3):
        when = both.next_after(found[-1], utc)
        assert when is not None
        found.append(when)
    assert [(when - midnight) // HOUR_NS for when in found] == [0, 5, 6, 12]
    assert SnapshotSchedule(every_s=0).next_after(midnight, utc) is None
