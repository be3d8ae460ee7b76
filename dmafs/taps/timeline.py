"""When the windows of a recorded log were: a log has no times, but some of its marks can be given one.

A mark's time is that of all before it, back to the timed mark before: the last window of such an interval has exactly
that time, each window before it one nanosecond less. So a time between two marks shows the state at the earlier one,
and yet each window is a moment of its own. What comes behind the last timed mark has the time of the import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from dmafs.errors import InputError, NoSuchPointError
from dmafs.units import AtTime, TimeNs, format_rfc3339, parse_spelling

TIMES_LIMIT: Final = 16 << 20
"""No file of times is longer."""

_ABSOLUTE: Final = re.compile(r"@[0-9.]+|[0-9]{4}-?[0-9]{2}-?[0-9]{2}[T ].+")


class Timeline:
    """The times of windows, which are numbered from 0 in the order of the log."""

    def __init__(self, now: int) -> None:
        """Begin without marks; *now* is the time of the import."""
        self._now = now
        self._timed: list[tuple[int, int]] = []  # window, time

    def add(self, window: int, time_ns: int, mark: str) -> None:
        """Say that a window ends at a time; InputError unless that leaves each window before it a time of its own."""
        before, before_ns = self._timed[-1] if self._timed else (-1, 0)
        if time_ns > self._now:
            raise InputError(f"{mark}: {format_rfc3339(time_ns)} is in the future", hint="a log has recorded the past")
        if time_ns - (window - before) < before_ns:
            raise InputError(
                f"{mark}: {format_rfc3339(time_ns)} leaves no time for the {window - before} windows since "
                f"{format_rfc3339(before_ns)}",
                hint="times have to increase along the log",
            )
        self._timed.append((window, time_ns))

    def finish(self, windows: int) -> None:
        """Say how many windows there are."""
        last = self._timed[-1][0] if self._timed else -1
        if windows - 1 > last:
            self.add(windows - 1, self._now, "end of the log")

    def times(self) -> Iterator[int]:
        """Yield the time of each window."""
        begin = 0
        for window, time_ns in self._timed:
            yield from range(time_ns - (window - begin), time_ns + 1)
            begin = window + 1

    @property
    def origin_ns(self) -> int:
        """Return a time just before the first window, or the time of the import."""
        return next(self.times(), self._now + 1) - 1


class MarkTimes:
    """What marks say of their times: nothing."""

    def time_of(self, mark: str) -> int | None:
        """Return the time of the next mark of a log, by its text; None if it has none."""
        del mark
        return None

    def finish(self) -> None:
        """Say that there are no more marks."""


class TimesInMarks(MarkTimes):
    """Of marks whose text is a time; URL-quoted, where it would be more than one word else."""

    def time_of(self, mark: str) -> int | None:
        """See ``MarkTimes``."""
        spelled = unquote(mark)
        if not _ABSOLUTE.fullmatch(spelled):
            return None
        try:
            return _time(spelled)
        except NoSuchPointError:
            return None


class TimesInFile(MarkTimes):
    """Of marks that a file lists, each of which has to be in the log, once."""

    def __init__(self, path: Path) -> None:
        """Read the lines ``MARK TIME`` of a file."""
        self._path = path
        self._times = times_in_file(path)
        self._seen: set[str] = set()

    def time_of(self, mark: str) -> int | None:
        """See ``MarkTimes``."""
        time_ns = self._times.get(mark)
        if time_ns is not None:
            if mark in self._seen:
                raise InputError(f"mark {mark!a} is in the log twice", hint="leave it out of the file of times")
            self._seen.add(mark)
        return time_ns

    def finish(self) -> None:
        """See ``MarkTimes``."""
        missing = sorted(set(self._times) - self._seen)
        if missing:
            raise InputError(f"mark {missing[0]!a} of {self._path} is not in the log", hint="list marks that are there")


def times_in_file(path: Path) -> dict[str, int]:
    """Return what the lines ``MARK TIME`` of a file say; empty ones and those that begin with # say nothing."""
    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(TIMES_LIMIT + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"file {path} can't be read: {(reason or '').lower()}", hint="check the path") from error
    if len(content) > TIMES_LIMIT:
        raise InputError(f"file {path} has more than {TIMES_LIMIT} characters", hint="give lines: MARK TIME")
    return _times_in_lines(path, content.splitlines())


def _times_in_lines(path: Path, lines: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        mark, _, spelled = line.strip().partition(" ")
        if not mark or mark.startswith("#"):
            continue
        if mark in found:
            raise InputError(f"{path}, line {number}: mark {mark!a} is there already", hint="give each mark once")
        try:
            found[mark] = _time(spelled.strip())
        except NoSuchPointError as error:
            raise InputError(f"{path}, line {number}: {error.message}", hint="give lines: MARK TIME") from error
    return found


def _time(spelled: str) -> int:
    """Return an absolute time; NoSuchPointError for anything else."""
    point = parse_spelling(spelled, now=TimeNs(0)) if _ABSOLUTE.fullmatch(spelled) else None
    if not isinstance(point, AtTime):
        raise NoSuchPointError(
            f"time {spelled[:64]!a} not understood", hint="give RFC 3339 or @<epoch seconds>, such as @1785249005.25"
        )
    return point.time
