"""Retention: which snapshots are kept, which are dropped, and why. Pure; whoever drops them is elsewhere.

What is judged is a *group*: the snapshots of one moment in all volumes, kept or dropped as a whole. Not every group has
all volumes (a sync keeps the moment of one mirror), so what counts snapshots counts each volume's for itself, and
a group is kept when any of its volumes needs it. The *floor* is what nothing ever drops: pinned groups, named ones
(unless the rules say otherwise), and the newest few.

``plan_thinning`` keeps what a rule keeps. Then, if there is a quota, it drops from the oldest on, down to the floor,
until what is left is within it. ``plan_shrink`` is for a store that runs full: it drops from the oldest on, down to the
floor, until enough is freed.

Invariants, for the same rules, time and time zone:

1. The order in which groups are given doesn't matter; of equal times twins are told apart, then ids.
2. The floor is kept: nothing pinned is ever dropped, and never are fewer than ``minimum`` left of a volume that were
   there.
3. Without a quota thinning is idempotent: what is left is kept as a whole. A period that has lost its other snapshots
   still has the one kept for it, so the newest N periods with a snapshot stay the same.
4. Without a quota it is monotone: a longer ``within`` and higher counts never drop what lower ones keep. With the same
   rules a larger quota never drops what a smaller one keeps.

What a drop frees is known only when it is done, since it moves to the next older snapshot what that lacks (see
``snapshots``). Both plans count all bytes of a dropped group as freed: they are the least that has to go. Whoever drops
asks again, until nothing more is to be dropped; then invariant 3 holds with a quota, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from whenever import SYSTEM_TZ, Instant, TimeZoneNotFoundError, ZonedDateTime

from dmafs.core.snapshot import Snapshot
from dmafs.errors import InputError

Groups = Mapping[str, Mapping[str, Snapshot]]
"""Snapshots by id, then by volume."""
Held = Mapping[str, int]
"""Bytes of the backward journal that the snapshots of an id hold; none that isn't named."""

NO_RULE: Final = "no rule"
QUOTA: Final = "quota"
SPACE: Final = "space"
NOT_NEEDED: Final = "not needed"
_SECOND_NS: Final = 1_000_000_000
_UNITS_S: Final = (("d", 86400, 2), ("h", 3600, 1), ("min", 60, 1))  # a unit is used from so many of it on


@dataclass(frozen=True, slots=True)
class KeepRules:
    """What is kept. A count is a number of calendar periods in local time; weeks are ISO weeks."""

    within_s: float = 86400.0
    """All that are newer than this."""
    hourly: int = 24
    """Of each of the newest so many hours that have a snapshot, the newest snapshot in it; likewise the others."""
    daily: int = 7
    weekly: int = 4
    monthly: int = 12
    yearly: int = 3
    minimum: int = 3
    """The newest so many, whatever else the rules say."""
    named: bool = True
    """All that have a name."""
    quota: int = 0
    """Bytes that the backward journal may have, 0 for no limit."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one group, and all reasons for it."""

    id: str
    time_ns: int
    kept: bool
    reasons: tuple[str, ...]
    held_bytes: int


def _day(local: ZonedDateTime) -> tuple[int, ...]:
    return local.year, local.month, local.day


def _week(local: ZonedDateTime) -> tuple[int, ...]:
    week = local.date().iso_week_date()
    return week.year, week.week


Period = Callable[[ZonedDateTime], tuple[int, ...]]

_PERIODS: Final[tuple[tuple[str, Period], ...]] = (
    # The offset tells apart the two hours that the end of summer time gives one name.
    ("hourly", lambda local: (*_day(local), local.hour, int(local.offset.total("seconds")))),
    ("daily", _day),
    ("weekly", _week),
    ("monthly", lambda local: (local.year, local.month)),
    ("yearly", lambda local: (local.year,)),
)


def plan_thinning(
    groups: Groups, rules: KeepRules, now_ns: int, *, held: Held | None = None, timezone: str | None = None
) -> list[Verdict]:
    """Return what is to be kept and dropped of *groups*, oldest first. O(n log n).

    *held* is needed for a quota and for what the verdicts say. *timezone* is the IANA name of the zone of calendar
    periods, None for the system's; InputError if there is none of that name.
    """
    times = _times(groups)
    reasons = _floor(groups, times, rules)
    for identifier, time_ns in times.items():
        if now_ns - time_ns < rules.within_s * _SECOND_NS:
            reasons[identifier].append(f"within {_spelled(rules.within_s)}")
    locals_ = {identifier: _local(time_ns, timezone) for identifier, time_ns in times.items()}
    series = _by_volume(groups, times)
    for name, period in _PERIODS:
        newest = [_newest_of_periods(locals_, ids, period, getattr(rules, name)) for ids in series]
        for identifier in set().union(*newest):
            reasons[identifier].append(name)
    kept = [identifier for identifier in times if reasons[identifier]]
    dropped = {identifier: NO_RULE for identifier in times if not reasons[identifier]}
    if rules.quota:
        floor = _floor(groups, times, rules)
        total = sum((held or {}).get(identifier, 0) for identifier in kept)
        for identifier in kept:
            if total <= rules.quota:
                break
            if not floor[identifier] and (held or {}).get(identifier, 0):
                dropped[identifier] = QUOTA
                total -= (held or {})[identifier]
    return _verdicts(times, reasons, dropped, held or {})


def plan_shrink(groups: Groups, rules: KeepRules, bytes_wanted: int, *, held: Held) -> list[Verdict]:
    """Return which of *groups* go to free *bytes_wanted*, oldest first: fewer bytes only where the floor is reached.

    Groups that hold nothing are passed over. O(n log n).
    """
    times = _times(groups)
    reasons = _floor(groups, times, rules)
    dropped, missing = {}, bytes_wanted
    for identifier in times:
        if reasons[identifier]:
            continue
        if missing > 0 and held.get(identifier, 0):
            dropped[identifier] = SPACE
            missing -= held[identifier]
        else:
            reasons[identifier].append(NOT_NEEDED)
    return _verdicts(times, reasons, dropped, held)


def _verdicts(
    times: Mapping[str, int], reasons: Mapping[str, list[str]], dropped: Mapping[str, str], held: Held
) -> list[Verdict]:
    return [
        Verdict(
            identifier,
            time_ns,
            identifier not in dropped,
            (dropped[identifier],) if identifier in dropped else tuple(reasons[identifier]),
            held.get(identifier, 0),
        )
        for identifier, time_ns in times.items()
    ]


def _times(groups: Groups) -> dict[str, int]:
    """Return the time of each group, the last of its volumes'; oldest first, of one moment in the order of twins."""
    ordered = sorted(
        (max((snapshot.time_ns, snapshot.twin) for snapshot in group.values()), name) for name, group in groups.items()
    )
    return {name: time_ns for (time_ns, _), name in ordered}


def _by_volume(groups: Groups, times: Mapping[str, int]) -> list[list[str]]:
    """Return for each volume the ids of the groups that it has a snapshot in, oldest first as *times* are."""
    found: dict[str, list[str]] = {}
    for identifier in times:
        for volume in groups[identifier]:
            found.setdefault(volume, []).append(identifier)
    return list(found.values())


def _floor(groups: Groups, times: Mapping[str, int], rules: KeepRules) -> dict[str, list[str]]:
    """Return why each group belongs to the floor; nothing for those that don't. *times* are oldest first."""
    reasons: dict[str, list[str]] = {}
    newest = {identifier for ids in _by_volume(groups, times) for identifier in ids[-rules.minimum or len(ids) :]}
    for identifier in times:
        snapshots = groups[identifier].values()
        found = {
            "pinned": any(snapshot.pinned for snapshot in snapshots),
            "named": rules.named and any(snapshot.name for snapshot in snapshots),
            "minimum": identifier in newest,
        }
        reasons[identifier] = [reason for reason, holds in found.items() if holds]
    return reasons


def _newest_of_periods(
    locals_: Mapping[str, ZonedDateTime], ids: list[str], period: Period, count: int
) -> Iterable[str]:
    """Return the newest of *ids* in each of the newest *count* periods that have one; *ids* are oldest first."""
    newest: dict[tuple[int, ...], str] = {}
    for identifier in reversed(ids):
        key = period(locals_[identifier])
        if key not in newest:
            if len(newest) == count:
                break
            newest[key] = identifier
    return newest.values()


def _local(time_ns: int, timezone: str | None) -> ZonedDateTime:
    try:
        return Instant.from_timestamp(time_ns, unit="nanosecond").to_tz(SYSTEM_TZ if timezone is None else timezone)
    except TimeZoneNotFoundError as error:
        raise InputError(
            f"time zone {timezone or 'of this system'} not found, which retention needs",
            hint="set an IANA name such as Europe/Berlin",
        ) from error


def _spelled(seconds: float) -> str:
    """Return a duration for humans, in one unit: ``24h``, ``3d``, ``90s``."""
    for unit, length, least in _UNITS_S:
        if seconds >= least * length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"
