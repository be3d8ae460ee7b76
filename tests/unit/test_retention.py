"""Claims about dmafs.core.retention: what is kept, why, and that no rule breaks another."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whenever import Instant, PlainDateTime, ZonedDateTime

from dmafs.core.retention import Groups, KeepRules, Verdict, plan_shrink, plan_thinning
from dmafs.core.snapshot import Snapshot
from dmafs.errors import InputError

ZONE = "Europe/Berlin"
HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS
NONE = KeepRules(within_s=0, hourly=0, daily=0, weekly=0, monthly=0, yearly=0, minimum=0, named=False)
COUNTS = ("hourly", "daily", "weekly", "monthly", "yearly")


def at(text: str) -> int:
    """Return a local time of Berlin in nanoseconds."""
    zoned = PlainDateTime.parse_iso(text).assume_tz(ZONE, disambiguation="raise")
    return zoned.timestamp(unit="nanosecond")


def snapshot(time_ns: int, name: str = "", *, pinned: bool = False) -> Snapshot:
    return Snapshot(time_ns, 0, time_ns, time_ns, frozen=False, name=name, temporary=False, serial=1, pinned=pinned)


def groups_of(*times: str | int) -> dict[str, dict[str, Snapshot]]:
    """Return a group for each time, called as that is given."""
    return {str(time): {"disk": snapshot(at(time) if isinstance(time, str) else time)} for time in times}


def thin(groups: Groups, rules: KeepRules, now: str | int, held: Mapping[str, int] | None = None) -> list[Verdict]:
    return plan_thinning(groups, rules, at(now) if isinstance(now, str) else now, held=held, timezone=ZONE)


def kept(verdicts: Iterable[Verdict]) -> set[str]:
    return {verdict.id for verdict in verdicts if verdict.kept}


def reasons(verdicts: Iterable[Verdict]) -> dict[str, tuple[str, ...]]:
    return {verdict.id: verdict.reasons for verdict in verdicts}


# -- examples -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_promised_ones() -> None:
    """Without a configuration a day is kept whole, then 24 hours, 7 days, 4 weeks, 12 months, 3 years, names, and 3."""
    assert dataclasses.astuple(KeepRules()) == (86400.0, 24, 7, 4, 12, 3, 3, True, 0)


def test_the_newest_snapshot_of_each_of_the_newest_periods_is_kept() -> None:
    """Periods without a snapshot don't count."""
    groups = groups_of(
        "2026-07-28T09:10", "2026-07-28T11:10", "2026-07-28T11:50", "2026-07-27T23:00", "2026-06-01T12:00"
    )
    now = "2026-07-28T12:00"
    assert kept(thin(groups, dataclasses.replace(NONE, hourly=2), now)) == {"2026-07-28T11:50", "2026-07-28T09:10"}
    assert kept(thin(groups, dataclasses.replace(NONE, daily=3), now)) == {
        "2026-07-28T11:50",
        "2026-07-27T23:00",
        "2026-06-01T12:00",
    }
    assert kept(thin(groups, dataclasses.replace(NONE, monthly=1), now)) == {"2026-07-28T11:50"}
    assert kept(thin(groups, dataclasses.replace(NONE, yearly=9), now)) == {"2026-07-28T11:50"}


def test_each_volume_has_what_the_rules_promise() -> None:
    """A newer snapshot of one volume alone, as a sync leaves, doesn't take the place of another volume's."""
    both, alone = at("2026-07-28T11:10"), at("2026-07-28T11:50")
    groups = {"group": {"a": snapshot(both), "b": snapshot(both)}, "sync": {"b": snapshot(alone)}}
    for rules in ({"hourly": 1}, {"yearly": 1}, {"minimum": 1}):
        assert kept(thin(groups, dataclasses.replace(NONE, **rules), "2027-07-28T12:00")) == {"group", "sync"}  # type: ignore[arg-type]  # all are numbers
    minimum = dataclasses.replace(NONE, minimum=1)
    assert kept(plan_shrink(groups, minimum, 10, held={"group": 10, "sync": 10})) == {"group", "sync"}
    later = {**groups, "later": {"a": snapshot(alone + 1)}}
    assert kept(thin(later, dataclasses.replace(NONE, hourly=1), "2027-07-28T12:00")) == {"sync", "later"}


def test_all_reasons_are_given() -> None:
    """A verdict says everything that keeps a snapshot, or that nothing does."""
    groups: dict[str, dict[str, Snapshot]] = groups_of("2026-07-28T09:10", "2026-07-01T00:00")
    groups["pin"] = {"disk": snapshot(at("2026-06-30T00:00"), pinned=True)}
    groups["before"] = {"disk": snapshot(at("2026-06-29T00:00"), "before")}
    rules = KeepRules(hourly=1, daily=1, weekly=1, monthly=2, yearly=1, minimum=1)
    verdicts = thin(groups, rules, "2026-07-28T12:00", held={"pin": 7})
    assert [verdict.id for verdict in verdicts] == ["before", "pin", "2026-07-01T00:00", "2026-07-28T09:10"]
    assert reasons(verdicts) == {
        "before": ("named",),
        "pin": ("pinned", "monthly"),
        "2026-07-01T00:00": ("no rule",),
        "2026-07-28T09:10": ("minimum", "within 24h", "hourly", "daily", "weekly", "monthly", "yearly"),
    }
    assert verdicts[1] == Verdict("pin", at("2026-06-30T00:00"), kept=True, reasons=("pinned", "monthly"), held_bytes=7)


@pytest.mark.parametrize(
    ("seconds", "text"), [(86400.0, "24h"), (172800.0, "2d"), (5400.0, "90min"), (90.0, "90s"), (0.5, "0.5s")]
)
def test_the_age_is_told_in_one_unit(seconds: float, text: str) -> None:
    """Within is spelled as people would."""
    verdicts = thin(groups_of(10**18), dataclasses.replace(NONE, within_s=seconds), 10**18)
    assert verdicts[0].reasons == (f"within {text}",)


def test_within_ends_where_it_says() -> None:
    """A snapshot exactly that old is no longer newer; one of the future is."""
    rules = dataclasses.replace(NONE, within_s=1)
    now = 10**18
    assert kept(thin(groups_of(now - 10**9, now - 10**9 + 1, now + 1), rules, now)) == {
        str(now - 10**9 + 1),
        str(now + 1),
    }


def test_weeks_are_iso_weeks_and_days_are_local() -> None:
    """A week begins on Monday, and the first days of January can belong to the old year's last week."""
    weekly = dataclasses.replace(NONE, weekly=2)
    groups = groups_of("2026-12-27T23:59", "2026-12-28T00:00", "2027-01-03T23:59", "2027-01-04T00:00")
    assert kept(thin(groups, weekly, "2027-02-01T00:00")) == {"2027-01-03T23:59", "2027-01-04T00:00"}
    late, early = at("2026-07-27T23:30"), at("2026-07-28T00:30")  # one day in UTC, two in Berlin
    assert len(kept(thin(groups_of(late, early), dataclasses.replace(NONE, daily=2), early))) == 2


def test_the_repeated_hour_is_two_hours() -> None:
    """When summer time ends, the hour that comes twice counts twice; the day that has 25 hours counts once."""
    first = ZonedDateTime(2026, 10, 25, 2, 30, tz=ZONE, disambiguation="earlier").timestamp(unit="nanosecond")
    groups = groups_of(first, first + HOUR_NS)
    now = first + DAY_NS
    assert len(kept(thin(groups, dataclasses.replace(NONE, hourly=2), now))) == 2
    assert kept(thin(groups, dataclasses.replace(NONE, daily=2), now)) == {str(first + HOUR_NS)}


def test_a_group_has_the_time_of_its_last_volume_and_stays_whole() -> None:
    """What one volume's snapshot deserves, all of the group get."""
    early, late = at("2026-07-27T23:59"), at("2026-07-28T00:01")
    groups = {
        "a": {"one": snapshot(early), "two": snapshot(late)},
        "b": {"one": snapshot(early, pinned=True), "two": snapshot(early)},
    }
    verdicts = thin(groups, NONE, late)
    assert [(verdict.id, verdict.time_ns, verdict.kept) for verdict in verdicts] == [
        ("b", early, True),
        ("a", late, False),
    ]


def test_the_quota_takes_the_oldest_above_the_floor() -> None:
    """Whole snapshots go, oldest first, until the rest is within the quota; those that hold nothing stay."""
    times = [at("2026-07-28T10:00") + number * 60 * 10**9 for number in range(6)]
    groups: dict[str, dict[str, Snapshot]] = groups_of(*times)
    pin, empty, old, newer, *last = map(str, times)
    groups[pin] = {"disk": snapshot(times[0], pinned=True)}
    held = dict.fromkeys(groups, 10) | {empty: 0}
    for quota, gone in [(50, set()), (49, {old}), (40, {old}), (39, {old, newer}), (1, {old, newer})]:
        verdicts = thin(groups, KeepRules(minimum=2, quota=quota), "2026-07-28T12:00", held)
        assert kept(verdicts) == set(groups) - gone, quota
        assert {verdict.reasons for verdict in verdicts if not verdict.kept} <= {("quota",)}
    assert set(last) <= kept(verdicts)


def test_shrinking_takes_the_oldest_above_the_floor() -> None:
    """As many as are needed, whatever the rules would keep them for; pinned, named and the newest few stay."""
    times = [at("2026-07-28T10:00") + number for number in range(7)]
    groups: dict[str, dict[str, Snapshot]] = groups_of(*times)
    groups[str(times[0])] = {"disk": snapshot(times[0], "named")}
    groups[str(times[1])] = {"disk": snapshot(times[1], pinned=True)}
    held = dict.fromkeys(groups, 10) | {str(times[2]): 0}
    rules = KeepRules(minimum=2)
    for wanted, count in [(0, 0), (1, 1), (10, 1), (11, 2), (99, 2)]:
        verdicts = plan_shrink(groups, rules, wanted, held=held)
        dropped = [verdict.id for verdict in verdicts if not verdict.kept]
        assert dropped == [str(time) for time in times[3:5]][:count], wanted
    assert reasons(verdicts) == {
        str(time): (reason,)
        for time, reason in zip(
            times, ["named", "pinned", "not needed", "space", "space", "minimum", "minimum"], strict=True
        )
    }
    everything = plan_shrink(groups, NONE, 99, held=held)
    assert kept(everything) == {str(times[1]), str(times[2])}


def test_nothing_is_thinned_where_there_is_nothing() -> None:
    """No snapshots, no verdicts."""
    assert thin({}, KeepRules(quota=1), 1) == plan_shrink({}, KeepRules(), 1, held={}) == []


def test_a_zone_that_is_not_there_is_an_error_of_the_tree() -> None:
    """Calendar periods need a zone."""
    with pytest.raises(InputError, match="time zone Europe/Atlantis not found"):
        plan_thinning(groups_of(1), KeepRules(), 1, timezone="Europe/Atlantis")


# -- properties -----------------------------------------------------------------------------------------------------

BEGIN = Instant.from_utc(2024, 2, 27).timestamp(unit="nanosecond")

times = st.one_of(
    st.integers(0, 5 * 365 * 24).map(lambda hours: BEGIN + hours * HOUR_NS),  # round hours fall together
    st.integers(0, 5 * 365 * DAY_NS).map(lambda ns: BEGIN + ns),
    st.integers(0, 200).map(lambda minutes: BEGIN + 240 * DAY_NS + minutes * 20 * 60 * 10**9),  # summer time ends
)
members = st.tuples(times, st.booleans(), st.sampled_from([True, False, False, False]), st.integers(0, 50))
counts = st.sampled_from([0, 1, 2, 3, 5, 40])
rules_ = st.builds(
    KeepRules,
    within_s=st.sampled_from([0.0, 3600.0, 86400.0, 1e7]),
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    yearly=counts,
    minimum=counts,
    named=st.booleans(),
    quota=st.sampled_from([0, 0, 1, 40, 200]),
)


@st.composite
def histories(draw: Any) -> tuple[dict[str, dict[str, Snapshot]], dict[str, int]]:
    """Draw groups of one or two volumes, and what they hold."""
    groups: dict[str, dict[str, Snapshot]] = {}
    held = {}
    for number, (time_ns, named, pinned, size) in enumerate(draw(st.lists(members, max_size=40))):
        name = f"n{number}" if named else ""
        group = groups[f"g{number}"] = {}
        if number % 4 != 1:
            group["a"] = snapshot(time_ns, name, pinned=pinned)
        if number % 4 < 2:
            group["b"] = snapshot(time_ns - number, name, pinned=pinned and number % 4 == 1)
        held[f"g{number}"] = size
    return groups, held


EXAMPLES = int(os.environ.get("DMAFS_TEST_EXAMPLES", "60"))
NOW = BEGIN + 5 * 365 * DAY_NS
PROFILE = settings(max_examples=EXAMPLES, deadline=None)


@PROFILE
@given(histories(), rules_)
def test_the_floor_stays_and_the_rest_has_a_reason(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules
) -> None:
    """Pinned is never dropped, named not unless the rules say so, and the newest of each volume stay."""
    groups, held = history
    for verdicts in (thin(groups, rules, NOW, held), plan_shrink(groups, rules, 10**9, held=held)):
        stay = kept(verdicts)
        assert sorted(verdict.id for verdict in verdicts) == sorted(groups)
        assert [verdict.time_ns for verdict in verdicts] == sorted(verdict.time_ns for verdict in verdicts)
        for volume in "ab":
            ids = [verdict.id for verdict in reversed(verdicts) if volume in groups[verdict.id]]
            assert set(ids[: rules.minimum]) <= stay
        for name, group in groups.items():
            if any(one.pinned for one in group.values()) or (rules.named and any(one.name for one in group.values())):
                assert name in stay
        assert all(verdict.reasons for verdict in verdicts)
        assert all(verdict.held_bytes == held[verdict.id] for verdict in verdicts)


@PROFILE
@given(histories(), rules_)
def test_thinning_again_drops_nothing(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules
) -> None:
    """What was kept is kept at the same time, with a quota as far as drops free all they hold; without one, also for
    the same reasons."""
    groups, held = history
    first = thin(groups, rules, NOW, held)
    again = thin({name: groups[name] for name in kept(first)}, rules, NOW, held)
    assert kept(again) == kept(first)
    if not rules.quota:
        assert again == [verdict for verdict in first if verdict.kept]


@PROFILE
@given(histories(), rules_, st.randoms())
def test_order_does_not_matter(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules, rng: Any
) -> None:
    """The verdicts are the same in whatever order the groups come."""
    groups, held = history
    shuffled = list(groups.items())
    rng.shuffle(shuffled)
    assert thin(dict(shuffled), rules, NOW, held) == thin(groups, rules, NOW, held)
    assert plan_shrink(dict(shuffled), rules, 30, held=held) == plan_shrink(groups, rules, 30, held=held)


@PROFILE
@given(histories(), rules_, st.sampled_from([*COUNTS, "minimum", "within_s", "named"]), st.integers(1, 9))
def test_more_is_kept_when_a_rule_grows(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules, name: str, more: int
) -> None:
    """Without a quota a longer time or a higher count never drops what was kept before."""
    groups, held = history
    rules = dataclasses.replace(rules, quota=0)
    grown = dataclasses.replace(
        rules, **{name: name == "named" or getattr(rules, name) + more * (3600 if name == "within_s" else 1)}
    )
    assert kept(thin(groups, rules, NOW, held)) <= kept(thin(groups, grown, NOW, held))


@PROFILE
@given(histories(), rules_, st.integers(1, 300), st.integers(1, 300))
def test_more_is_kept_when_the_quota_grows(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules, quota: int, more: int
) -> None:
    """With the same rules; and what is kept is within the quota, or is the floor and what holds nothing."""
    groups, held = history
    small, large, none = (
        thin(groups, dataclasses.replace(rules, quota=size), NOW, held) for size in (quota, quota + more, 0)
    )
    assert kept(small) <= kept(large) <= kept(none)
    if sum(held[name] for name in kept(small)) > quota:
        floor = kept(plan_shrink(groups, rules, 10**9, held=held))
        assert kept(small) <= floor


@PROFILE
@given(histories(), rules_)
def test_counts_are_respected(history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules) -> None:
    """Of each kind and volume so many are kept, in as many periods, none of them older than a period that has none."""
    groups, held = history
    verdicts = thin(groups, dataclasses.replace(rules, quota=0), NOW, held)
    formats = {"hourly": "%F %H %z", "daily": "%F", "weekly": "%G %V", "monthly": "%Y %m", "yearly": "%Y"}
    for name, form in formats.items():
        period = {
            verdict.id: Instant.from_timestamp(verdict.time_ns, unit="nanosecond")
            .to_tz(ZONE)
            .to_stdlib()
            .strftime(form)
            for verdict in verdicts
        }
        expected = set()
        for volume in "ab":
            ids = [verdict.id for verdict in reversed(verdicts) if volume in groups[verdict.id]]
            newest = [next(run) for _, run in itertools.groupby(ids, period.get)]
            expected |= set(newest[: getattr(rules, name)])
        assert {verdict.id for verdict in verdicts if name in verdict.reasons} == expected


@PROFILE
@given(histories(), rules_, st.integers(0, 400))
def test_shrinking_drops_the_least_and_the_oldest(
    history: tuple[dict[str, dict[str, Snapshot]], dict[str, int]], rules: KeepRules, wanted: int
) -> None:
    """Without its last drop it would be too little; nothing older that holds something and may go is left."""
    groups, held = history
    verdicts = plan_shrink(groups, rules, wanted, held=held)
    dropped = [verdict for verdict in verdicts if not verdict.kept]
    assert sum(verdict.held_bytes for verdict in dropped[:-1]) < max(wanted, 1)
    everything = [verdict.id for verdict in plan_shrink(groups, rules, 10**9, held=held) if not verdict.kept]
    assert [verdict.id for verdict in dropped] == everything[: len(dropped)]
    if sum(verdict.held_bytes for verdict in dropped) < wanted:
        assert len(dropped) == len(everything)
