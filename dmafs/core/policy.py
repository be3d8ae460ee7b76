"""Policy: when a volume is synced and how far (fig. 20, step 2004), and when snapshots are taken. Pure.

``plan`` looks at the *facts* of a volume and answers with a target. The target always is a durable sync indicator past
the mirror, outside of gaps, and not past ``Volume.sync_limit``: the facts offer no others.

trigger       has come when                                         leads to
age           the oldest event in the forward journal is too old    the last indicator that leaves ``exact_s`` exact
time of day   the caller says so                                    the same
journal size  the events since the mirror have too much data        the first indicator that leaves half of it at most
free space    the store's file system is too full                   the newest indicator
store full    capture touches the reserve of the store              the newest indicator
mark          a mark whose name matches has become durable          that mark
unfinished    an earlier sync stopped behind its commit             where that leads to

If several have come, the farthest target serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from dmafs.core.calendar import Offset, next_round_time, next_time_of_day
from dmafs.core.sync import Stops, stops_of
from dmafs.core.volume import Volume

NS: Final = 10**9


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """When to sync a volume. Times in seconds, times of day in seconds since local midnight; 0 and () mean never."""

    age_s: int = 24 * 3600
    """A write may be that old before it is synced."""
    exact_s: int = 12 * 3600
    """A sync by age or time of day leaves so much exact to the write; less than ``age_s``."""
    journal_bytes: int = 0
    """So much data may be in the forward journal."""
    free: float = 0.1
    """The share of the store's file system that is to stay free."""
    times: tuple[int, ...] = ()
    marks: tuple[str, ...] = ()
    """Patterns (fnmatch) of the marks that are synced up to."""


@dataclass(frozen=True, slots=True)
class SnapshotSchedule:
    """When to take snapshots of all volumes, and the commands around each."""

    every_s: int = 3600
    """At each local time that is a multiple of this; 0: not."""
    times: tuple[int, ...] = ()
    before: tuple[str, ...] = ()
    """Brings what uses the disks to rest; if it succeeds, the snapshot is frozen."""
    after: tuple[str, ...] = ()
    """Lets it go on; always run."""
    hook_timeout_s: int = 60

    def next_after(self, time_ns: int, offset: Offset) -> int | None:
        """Return the time_ns of the next snapshot, None if there is none."""
        after_s = time_ns // NS
        coming = [next_time_of_day(self.times, after_s, offset)]
        if self.every_s:
            coming.append(next_round_time(self.every_s, after_s, offset))
        return min((when * NS for when in coming if when is not None), default=None)


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """What a policy has to know of a volume; what costs more than a look is a call."""

    oldest_ns: int
    """Time of the first event in the forward journal, 0 if there is none."""
    data_bytes: int
    """Data of the events in the forward journal."""
    free: float
    """The share of the store's file system that is free."""
    starved: bool
    """Whether capture touches the reserve."""
    unfinished: int
    """Where a sync leads that stopped behind its commit, 0 if none did."""
    stops: Callable[[], Stops]
    marks: Callable[[], Sequence[tuple[int, str]]]
    """Seqs and names of the marks past the mirror, ascending."""


class Target(NamedTuple):
    """A seq to sync to, and why."""

    seq: int
    reason: str


Choice = Callable[[Stops], int | None]


def plan(facts: VolumeFacts, policy: SyncPolicy, now_ns: int, *, time_came: bool = False) -> Target | None:
    """Return where to sync to now, None if nowhere. *time_came*: one of the policy's times of day has come."""
    if facts.unfinished:
        return Target(facts.unfinished, "unfinished sync")
    due = [*_due_by_time(facts, policy, now_ns, time_came=time_came), *_due_by_space(facts, policy)]
    if policy.marks:
        due += [
            (f"mark {name}", partial(_exactly, seq=seq))
            for seq, name in facts.marks()
            if any(fnmatchcase(name, pattern) for pattern in policy.marks)
        ]
    stops = facts.stops() if due else None
    targets = [Target(seq, reason) for reason, choose in due if stops and (seq := choose(stops)) is not None]
    return max(targets, key=lambda target: target.seq, default=None)


def next_by_age(facts: VolumeFacts, policy: SyncPolicy) -> int | None:
    """Return the time_ns at which the oldest event will be too old."""
    return facts.oldest_ns + policy.age_s * NS if facts.oldest_ns and policy.age_s else None


def _due_by_time(facts: VolumeFacts, policy: SyncPolicy, now_ns: int, *, time_came: bool) -> list[tuple[str, Choice]]:
    by_age = next_by_age(facts, policy)
    choice = partial(_last_before, time_ns=now_ns - policy.exact_s * NS)
    due: list[tuple[str, Choice]] = []
    if by_age is not None and by_age < now_ns:
        due.append(("age", choice))
    if time_came:
        due.append(("time of day", choice))
    return due


def _due_by_space(facts: VolumeFacts, policy: SyncPolicy) -> list[tuple[str, Choice]]:
    due: list[tuple[str, Choice]] = []
    if policy.journal_bytes and facts.data_bytes > policy.journal_bytes:
        due.append(("journal size", partial(_first_leaving, most=policy.journal_bytes // 2)))
    if facts.starved:
        due.append(("store full", _newest))
    elif facts.free < policy.free:
        due.append(("free space", _newest))
    return due


def _newest(stops: Stops) -> int | None:
    return int(stops.seqs[-1]) if len(stops.seqs) else None


def _last_before(stops: Stops, *, time_ns: int) -> int | None:
    index = int(np.searchsorted(stops.times, time_ns, "right")) - 1
    return int(stops.seqs[index]) if index >= 0 else None


def _first_leaving(stops: Stops, *, most: int) -> int | None:
    """Return the first stop with at most so much data behind it; the newest if all have more."""
    few = np.flatnonzero(stops.left_bytes <= most)
    return int(stops.seqs[few[0]]) if len(few) else _newest(stops)


def _exactly(stops: Stops, *, seq: int) -> int | None:
    return seq if seq in stops.seqs else None


def facts_of(volume: Volume, *, free: float, starved: bool, busy: bool = False) -> VolumeFacts:
    """Return the facts of a volume; *busy*: work is under way, so what it has committed isn't unfinished."""
    journal, now = volume.journal, volume.pointers.now
    begun = now.copied and journal.head > volume.floor
    return VolumeFacts(
        oldest_ns=journal.time_of(volume.floor + 1) if begun else 0,
        data_bytes=journal.data_after(volume.floor),
        free=free,
        starved=starved,
        unfinished=0 if busy or volume.failure else now.sync_target,
        stops=lambda: stops_of(volume),
        marks=lambda: [(mark.seq, mark.name) for mark in journal.marks() if mark.seq > volume.floor],
    )


def has_past(volume: Volume) -> bool:
    """Say whether a snapshot keeps something of what lies before the mirror: if none does, a sync has to open one."""
    first = next(iter(volume.snapshots), None)
    now = volume.pointers.now
    return first is not None and first.seq <= max(now.mirror_seq, now.origin_seq)
