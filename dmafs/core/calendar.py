"""Local times that come again and again: times of day, and round times.

All in whole seconds since 1970; *offset* says by how many seconds local clocks are ahead of UTC at a time. What a
change of these clocks (to or from summer time) skips or repeats:

- A time of day that the change skips comes at the change; one that it repeats comes once, the first time.
- Round times are those at which the clocks show a multiple of the step, counted from midnight of 1970-01-01. One that
  the change skips comes at the change; shown twice, it comes twice, so an hour has all its quarters whatever it is
  called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

Offset = Callable[[int], int]

DAY_S: Final = 24 * 3600


def next_time_of_day(times: Iterable[int], after_s: int, offset: Offset) -> int | None:
    """Return when the next of *times*, in seconds since midnight, comes after *after_s*; None if there are none."""
    today = (after_s + offset(after_s)) // DAY_S
    coming = (_when((today + days) * DAY_S + time, offset) for time in times for days in (-1, 0, 1, 2))
    return min((when for when in coming if when > after_s), default=None)


def _when(local_s: int, offset: Offset) -> int:
    """Return when clocks show *local_s* first, or jump over it."""
    guesses = sorted({local_s - offset(local_s - DAY_S), local_s - offset(local_s + DAY_S)})
    for guess in guesses:
        if guess + offset(guess) == local_s:
            return guess
    return _change(guesses[0], guesses[-1], offset)


def next_round_time(step_s: int, after_s: int, offset: Offset) -> int:
    """Return when clocks show a multiple of *step_s* next after *after_s*."""
    ahead = offset(after_s)
    due = after_s + step_s - (after_s + ahead) % step_s
    if offset(due) == ahead:
        return due
    change = _change(after_s, due, offset)
    instead, shown = change + ahead, change + offset(change)
    if shown // step_s * step_s >= instead:
        return change  # jumped over, or onto it
    return change + -shown % step_s


def _change(before_s: int, after_s: int, offset: Offset) -> int:
    """Return the first second after *before_s*, and at *after_s* at the latest, with another offset. O(log seconds)."""
    ahead = offset(before_s)
    while after_s - before_s > 1:
        middle = (before_s + after_s) // 2
        if offset(middle) == ahead:
            before_s = middle
        else:
            after_s = middle
    return after_s
