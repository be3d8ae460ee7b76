"""Claims about dmafs.core.calendar: what comes at local times, also when the clocks change."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

import hypothesis
import pytest
from hypothesis import strategies as st

from dmafs.core.calendar import DAY_S, next_round_time, next_time_of_day
from dmafs.errors import InputError
from dmafs.units import local_offset_s

BERLIN = partial(local_offset_s, timezone="Europe/Berlin")
SAO_PAULO = partial(local_offset_s, timezone="America/Sao_Paulo")
HOUR = 3600


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def clock(hour: int, minute: int = 0) -> int:
    return hour * HOUR + minute * 60


def times_after(after: str, count: int, *times: int) -> list[int]:
    found = [utc(after)]
    for _ in range(count):
        when = next_time_of_day(times, found[-1], BERLIN)
        assert when is not None
        found.append(when)
    return found[1:]


def test_times_of_day_are_local() -> None:
    """Each day at the local time, in summer another UTC hour than in winter; the next one is never the present."""
    assert times_after("2026-01-10T12:00", 3, clock(3, 30), clock(14)) == [
        utc("2026-01-10T13:00"),
        utc("2026-01-11T02:30"),
        utc("2026-01-11T13:00"),
    ]
    assert times_after("2026-07-10T12:00", 1, clock(14)) == [utc("2026-07-11T12:00")]
    assert next_time_of_day((), 0, BERLIN) is None


def test_a_time_of_day_that_is_skipped_comes_at_the_change() -> None:
    """On 2026-03-29 Berlin has no 02:30: it comes when the clocks go from 02:00 to 03:00."""
    assert times_after("2026-03-28T12:00", 2, clock(2, 30)) == [utc("2026-03-29T01:00"), utc("2026-03-30T00:30")]


def test_a_time_of_day_that_is_repeated_comes_once() -> None:
    """On 2026-10-25 Berlin has 02:30 twice: it comes the first time only."""
    assert times_after("2026-10-24T12:00", 2, clock(2, 30)) == [utc("2026-10-25T00:30"), utc("2026-10-26T01:30")]


def test_round_times_are_local() -> None:
    """Six hours are 0, 6, 12 and 18 o'clock, in summer too."""
    found = [utc("2026-03-28T20:00")]
    for _ in range(4):
        found.append(next_round_time(6 * HOUR, found[-1], BERLIN))
    assert found[1:] == [
        utc("2026-03-28T23:00"),
        utc("2026-03-29T04:00"),
        utc("2026-03-29T10:00"),
        utc("2026-03-29T16:00"),
    ]


def test_hours_and_quarters_stay_real_when_the_clocks_go_back() -> None:
    """What the clocks show twice comes twice: nobody goes two hours without a snapshot."""
    for step in (HOUR, HOUR // 4):
        at = utc("2026-10-24T23:00")
        for _ in range(5):
            at, before = next_round_time(step, at, BERLIN), at
            assert at == before + step


def test_a_midnight_that_is_skipped_comes_at_the_change() -> None:
    """Where clocks go from 24:00 to 01:00, the day still begins."""
    assert next_round_time(DAY_S, utc("2018-11-03T12:00"), SAO_PAULO) == utc("2018-11-04T03:00")
    assert next_round_time(DAY_S, utc("2018-11-04T03:00"), SAO_PAULO) == utc("2018-11-05T02:00")


zones = st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.integers(-400, 400))


@hypothesis.given(zone=zones, step=st.integers(1, 150), after=st.integers(-500, 500))
def test_round_times_by_looking_at_each_second(zone: tuple[int, int, int], step: int, after: int) -> None:
    """The next round time is the first second that shows a multiple of the step, or jumps over one."""
    before_s, after_s, change = zone

    def offset(time_s: int) -> int:
        return before_s if time_s < change else after_s

    def is_due(time_s: int) -> bool:
        shown, shown_before = time_s + offset(time_s), time_s - 1 + offset(time_s - 1)
        return shown % step == 0 or (shown > shown_before and shown // step > shown_before // step)

    expected = next(time_s for time_s in range(after + 1, after + 500) if is_due(time_s))
    assert next_round_time(step, after, offset) == expected


@hypothesis.given(
    zone=st.tuples(st.integers(-9, 9), st.integers(-2, 2), st.integers(-40, 40)),
    times=st.sets(st.integers(0, 95), max_size=3),
    after=st.integers(-300, 300),
)
@hypothesis.settings(max_examples=60)
def test_times_of_day_by_looking_at_each_quarter(zone: tuple[int, int, int], times: set[int], after: int) -> None:
    """A time of day comes when the clocks first show it or a later one; all in quarters of an hour."""
    ahead, jump, change = zone
    quarter = HOUR // 4

    def offset(time_s: int) -> int:
        return (ahead + (jump if time_s >= change * quarter else 0)) * quarter

    def first_shown(local: int) -> int:
        guess = local // quarter - 20
        while guess * quarter + offset(guess * quarter) < local:
            guess += 1
        return guess * quarter

    begin = after * quarter
    coming = [first_shown((begin // DAY_S + day) * DAY_S + time * quarter) for day in range(-3, 5) for time in times]
    expected = min((when for when in coming if when > begin), default=None)
    assert next_time_of_day({time * quarter for time in times}, begin, offset) == expected


def test_a_time_zone_that_is_not_there_is_an_error() -> None:
    """Local times need a zone."""
    with pytest.raises(InputError, match="Nowhere/Land"):
        local_offset_s(0, "Nowhere/Land")
