"""Claims about dmafs.taps.timeline: which time each window of a recorded log gets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from dmafs.errors import InputError
from dmafs.taps.timeline import MarkTimes, Timeline, TimesInFile, TimesInMarks

NOW = 10**18


def times_of(windows: int, *marks: tuple[int, int], now: int = NOW) -> list[int]:
    """Return the times of windows of which some end at marks: (window, time)."""
    timeline = Timeline(now)
    for window, time_ns in marks:
        timeline.add(window, time_ns, "mark")
    timeline.finish(windows)
    return list(timeline.times())


def test_without_marks_all_is_now() -> None:
    """The last window has the time of the import, each before it one nanosecond less."""
    assert times_of(3) == [NOW - 2, NOW - 1, NOW]
    assert times_of(0) == []


def test_an_interval_ends_at_its_mark() -> None:
    """Windows between two marks have times of their own that end at the later mark's."""
    assert times_of(5, (1, 100), (3, 200)) == [99, 100, 199, 200, NOW]
    assert times_of(4, (1, 100), (3, 200)) == [99, 100, 199, 200]


def test_intervals_may_touch() -> None:
    """Two marks may be as near to each other as there are windows."""
    assert times_of(4, (1, 100), (3, 102)) == [99, 100, 101, 102]
    with pytest.raises(InputError, match="leaves no time for the 2 windows since"):
        times_of(4, (1, 100), (3, 101))


@pytest.mark.parametrize("time_ns", [100, 50])
def test_times_increase(time_ns: int) -> None:
    """A mark that isn't later than the one before is an error."""
    with pytest.raises(InputError, match=r"mark: .* leaves no time"):
        times_of(4, (1, 100), (3, time_ns))


def test_times_begin_with_1970() -> None:
    """There has to be room for the windows before the first mark, and for what was before them."""
    assert times_of(2, (1, 2)) == [1, 2]
    with pytest.raises(InputError):
        times_of(2, (1, 1))


def test_nothing_is_in_the_future() -> None:
    """A log has recorded what has been; and what follows the last mark has to be later than it."""
    assert times_of(1, (0, NOW)) == [NOW]
    with pytest.raises(InputError, match="in the future"):
        times_of(1, (0, NOW + 1))
    with pytest.raises(InputError, match=r"end of the log: .* leaves no time"):
        times_of(2, (0, NOW))


def test_the_origin_is_before_the_first_window() -> None:
    """What the disk held before the log began has a time of its own."""
    timeline = Timeline(NOW)
    assert timeline.origin_ns == NOW
    timeline.add(2, 100, "mark")
    assert timeline.origin_ns == 97


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("@1785249005.25", 1785249005_250000000),
        ("2026-07-28T14:30:05.5Z", 1785249005_500000000),
        (quote("2026-07-28 16:30:05+02:00"), 1785249005_000000000),
        ("2026-07-28T143005.000000001Z", 1785249005_000000001),
    ],
)
def test_marks_that_are_times(text: str, time_ns: int) -> None:
    """RFC 3339 and seconds since 1970, URL-quoted where they are more than one word."""
    assert TimesInMarks().time_of(text) == time_ns
    assert MarkTimes().time_of(text) is None


@pytest.mark.parametrize(
    "text", ["before-upgrade", "2h ago", "yesterday", "@", "@1.2.3", "2026-13-01T10:00Z", "seq:5", ""]
)
def test_marks_that_are_no_times(text: str) -> None:
    """What is no absolute time is just a mark."""
    assert TimesInMarks().time_of(text) is None


def times_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_of_times(tmp_path: Path) -> None:
    """A line has a mark and its time; empty ones and comments say nothing."""
    marks = TimesInFile(times_file(tmp_path / "times", "# of the test\n\none @5\ntwo  2026-07-28 14:30Z\n"))
    assert marks.time_of("one") == 5_000000000
    assert marks.time_of("other") is None
    with pytest.raises(InputError, match=r"mark 'two' of .*/times is not in the log"):
        marks.finish()
    assert marks.time_of("two") == 1785249000_000000000
    marks.finish()
    with pytest.raises(InputError, match="mark 'two' is in the log twice"):
        marks.time_of("two")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one\n", "line 1: time '' not understood"),
        ("\none yesterday\n", "line 2: time 'yesterday' not understood"),
        ("one @5\none @6\n", "line 2: mark 'one' is there already"),
    ],
)
def test_a_wrong_file_of_times(tmp_path: Path, text: str, words: str) -> None:
    """The message names file, line and word."""
    with pytest.raises(InputError, match=f"/times, {words}"):
        TimesInFile(times_file(tmp_path / "times", text))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    """Missing or binary: an error that says so."""
    with pytest.raises(InputError, match="can't be read: no such file"):
        TimesInFile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="can't be read: it is no text"):
        TimesInFile(tmp_path / "binary")
