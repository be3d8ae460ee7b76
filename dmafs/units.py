"""Sectors, seqs and times: their types, how they are printed, and how what a user typed is understood.

Inside the program a length is sectors, a point in history is a seq, a time is UTC nanoseconds since 1970. Text appears
only at the edges, and all its rules are here. The grammar of a *spelling*, the way to name a moment::

    spelling   = point [ "~" duration ]              so much before the point
    point      = time | "seq:" digits | name
    time       = date ("T" | " ") clock [ zone ]     ISO 8601; no zone: local time
               | date " " clock " " zone             as stat, ls --time-style=full-iso and git print it
               | "@" digits [ "." fraction ]         seconds since 1970
               | ("yesterday" | "today") " " HH:MM[:SS[.fraction]]       local time
               | duration " ago"
    date clock = YYYY-MM-DD HH:MM[:SS[.fraction]]    extended
               | YYYY-MM-DD HHMM[SS[.fraction]]      as in canonical names
               | YYYYMMDD   HHMM[SS[.fraction]]      basic
    fraction   = 1 to 9 digits                       in clocks also after ","
    zone       = "Z" | ("+" | "-") HH[[:]MM]
    duration   = [n "w"] [n "d"] [n "h"] [n "min"] [n "s"] [n "ms"] [n "us"] [n "ns"]   at least one, in this order
    name       = [A-Za-z0-9][A-Za-z0-9._-]{0,63}     with the exceptions of check_name

    canonical  = YYYY-MM-DDTHHMMSS.fffffffffZ        the one form that is printed as a folder's name

What holds:

1. *Never a guess.* What the grammar doesn't list is refused, as are the clock times that a change to or from summer
   time skips or repeats (unless a zone says which), leap seconds, and ``m``, which could be minutes or months. A day
   is 24 hours and a week 168; neither follows the calendar.
2. *One moment, one canonical name.* ``parse_canonical`` and ``format_time`` are inverse to each other, and canonical
   names sort as their times do.
3. *A name is never a time.* No text is both, and nothing that looks like a date can become a name, not even a
   mistyped one: neither ``2026-07-28`` nor ``20261328`` is a spelling or a name.
4. *Only errors of the tree.* Whatever text comes in, it is understood or raises NoSuchPointError (spellings) or
   InputError (names, sizes, and a local time zone that doesn't exist, which is a fault of the configuration).

Whether a seq, a name or a time exists is for the volume to say; a time in the future is a good spelling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import ClassVar, Final, NewType

from whenever import SYSTEM_TZ, Date, Instant, PlainDateTime, RepeatedTime, SkippedTime, Time, TimeZoneNotFoundError

from dmafs.errors import InputError, NoSuchPointError

Seq = NewType("Seq", int)
"""The number of a write event in its volume."""
TimeNs = NewType("TimeNs", int)
"""UTC nanoseconds since 1970-01-01T00:00:00Z."""

SECTOR: Final = 512
"""Bytes in a sector."""
SPELLING_CHARS_MAX: Final = 255
"""No file name is longer, so no spelling under ``at/`` is."""

_INT64_END: Final = 2**63  # exclusive: times and seqs have to fit the signed 64-bit fields on disk and in FUSE
_SECOND_NS: Final = 1_000_000_000
_MINUTE_NS: Final = 60 * _SECOND_NS
_HOUR_NS: Final = 60 * _MINUTE_NS
_DAY_NS: Final = 24 * _HOUR_NS
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_PRINTABLE_NS_END: Final = (date.max.toordinal() + 1 - _EPOCH_DAY) * _DAY_NS  # the year 10000

_SHOWN_CHARS_MAX: Final = 80  # of a refused text in a message
_POINT_HINT: Final = (
    "accepted are 2026-07-28T143005.123456789Z, 2026-07-28T14:30[:05][Z|+02:00], @1785249005[.5], seq:7, "
    "'2h ago', 'yesterday 14:00', 'today 14:00', a name, and any of these with ~5min; units are w d h min s ms us ns"
)
_NAME_HINT: Final = (
    "a name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and begins with a letter or digit; "
    "it must not end in .img, look like a date, or be latest, now, today or yesterday"
)


# --- sizes

_IEC_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_BYTES: Final = re.compile(r"([0-9]{1,19}) ?(?:B|([KMGTPE])(?:iB?)?)?", re.IGNORECASE | re.ASCII)


def format_bytes(n: int) -> str:
    """Return *n* >= 0 bytes for humans: ``512 B``, ``64 MiB`` when exact, ``1.5 GiB`` when exact or rounded."""
    assert n >= 0, n
    power = 0
    # The rounded tenths decide, so that just below 1 MiB gives "1.0 MiB" and not "1024.0 KiB".
    while (tenths := _tenths(n, power)) >= 10 * 1024 and power < len(_IEC_UNITS) - 1:
        power += 1
    exact = n % (1 << 10 * power) == 0
    return f"{n >> 10 * power if exact else f'{tenths // 10}.{tenths % 10}'} {_IEC_UNITS[power]}"


def _tenths(n: int, power: int) -> int:
    """Return *n* bytes as tenths of 1024 ** *power* bytes, rounded half up."""
    unit = 1 << 10 * power
    return (20 * n + unit) // (2 * unit)


def parse_bytes(text: str) -> int:
    """Return the bytes that *text* names: ``4096``, ``64MiB``, ``64 MiB``, ``1G`` (of 1024s).

    InputError for anything else: fractions, ``MB`` (which may mean 1000 or 1024), 2**63 and more.
    """
    match = _BYTES.fullmatch(text)
    if match is not None:
        number, unit = match.groups()
        n = int(number) << 10 * " KMGTPE".index((unit or " ").upper())
        if n < _INT64_END:
            return n
    raise InputError(f"size {_shown(text)} not understood", hint="use whole bytes, or K M G T P E: 4096, 64MiB, 1G")


# --- durations, shares and times of day, as the configuration has them

_SHARE: Final = re.compile(r"([0-9]{1,2})(?:\.([0-9]))? ?%")
_TIME_OF_DAY: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")


def parse_duration_s(text: str) -> int:
    """Return the seconds of a duration as in ``2h ago``: ``24h``, ``1h30min``; InputError if they aren't whole."""
    try:
        if len(text) > SPELLING_CHARS_MAX:
            raise _not_understood(text)
        seconds, rest = divmod(_parse_duration(text, text), _SECOND_NS)
    except NoSuchPointError:
        seconds, rest = 0, 1
    if rest:
        raise InputError(
            f"duration {_shown(text)} not understood", hint="use whole seconds, in the units w d h min s: 24h, 1h30min"
        )
    return seconds


def greatest_units(seconds: int) -> list[tuple[int, str]]:
    """Return a duration as counts of its greatest unit and the one below, rounded down, without those that are 0."""
    found: list[tuple[int, str]] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count or found:
            found.append((count, unit))
    return [(count, unit) for count, unit in found[:2] if count]


def format_span(seconds: float) -> str:
    """Return a duration for humans, in its two greatest units, rounded down: ``3d4h``, ``2min5s``, ``0s``."""
    return "".join(f"{count}{unit}" for count, unit in greatest_units(int(seconds))) or "0s"


def parse_share(text: str) -> float:
    """Return the part of 1 that *text* names: ``10%``, ``2.5%``; less than all. InputError for anything else."""
    match = _SHARE.fullmatch(text)
    if match is None:
        raise InputError(f"share {_shown(text)} not understood", hint="use percent, less than 100: 10%, 2.5%")
    return (int(match[1]) * 10 + int(match[2] or 0)) / 1000


def parse_time_of_day(text: str) -> int:
    """Return the seconds since midnight of ``HH:MM``; InputError for anything else."""
    match = _TIME_OF_DAY.fullmatch(text)
    if match is None:
        raise InputError(f"time of day {_shown(text)} not understood", hint="use HH:MM, from 00:00 to 23:59")
    return int(match[1]) * 3600 + int(match[2]) * 60


def local_offset_s(time_s: int, timezone: str | None = None) -> int:
    """Return by how many seconds clocks in *timezone* (None: the system's) are ahead of UTC at a time."""
    try:
        local = Instant.from_timestamp(time_s).to_tz(SYSTEM_TZ if timezone is None else timezone)
    except TimeZoneNotFoundError as error:
        which = "of this system" if timezone is None else _shown(timezone)
        raise InputError(
            f"time zone {which} not found, which times of day need", hint="set TZ to a name such as Europe/Berlin"
        ) from error
    return int(local.offset.total("seconds"))


# --- names

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What every name matches; ``valid_name`` knows the few that can't be used although they do."""
_NAME: Final = re.compile(NAME_PATTERN)
_DATE_LIKE: Final = re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}(?:[Tt][0-9].*)?", re.DOTALL)
_WORDS_FOR_TIMES: Final = frozenset({"latest", "now", "today", "yesterday"})


def valid_name(text: str) -> bool:
    """Tell whether *text* can name a volume, a snapshot or a mark; O(length)."""
    lower = text.lower()  # people forget which case they used: refuse Latest and disk.IMG as well
    return (
        _NAME.fullmatch(text) is not None
        and not lower.endswith(".img")
        and lower not in _WORDS_FOR_TIMES
        and _DATE_LIKE.fullmatch(text) is None
    )


def check_name(text: str, what: str) -> str:
    """Return *text* if it can name a *what* (``volume``, ``snapshot``); else InputError."""
    if not valid_name(text):
        raise InputError(f"{what} name {_shown(text)} can't be used", hint=_NAME_HINT)
    return text


# --- times that are exact


def format_time(time_ns: int) -> str:
    """Return the canonical name of a time of the years 1970 to 9999: ``2026-07-28T143005.123456789Z``."""
    second, fraction_ns = _split(time_ns)
    return f"{second:%Y-%m-%dT%H%M%S}.{fraction_ns:09}Z"


def format_rfc3339(time_ns: int) -> str:
    """Return a time of the years 1970 to 9999 for humans and JSON: ``2026-07-28T14:30:05.123456789Z``."""
    second, fraction_ns = _split(time_ns)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{fraction_ns:09}Z"


def _split(time_ns: int) -> tuple[datetime, int]:
    """Return the whole second as calendar time and the nanoseconds after it."""
    assert 0 <= time_ns < _PRINTABLE_NS_END, time_ns
    seconds, fraction_ns = divmod(time_ns, _SECOND_NS)
    return datetime.fromtimestamp(seconds, UTC), fraction_ns


_CANONICAL: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([01][0-9]|2[0-3])([0-5][0-9])([0-5][0-9])\.([0-9]{9})Z",
)


def parse_canonical(text: str) -> TimeNs | None:
    """Return the time whose canonical name *text* is, exactly as ``format_time`` prints it, else None."""
    match = _CANONICAL.fullmatch(text)
    if match is None:
        return None
    # Plain arithmetic: this runs at every look-up in at/ (1.4 us on the machine of development).
    year, month, day, hour, minute, second, fraction_ns = map(int, match.groups())
    try:
        days = date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError:
        return None
    if days < 0:
        return None
    return TimeNs((((days * 24 + hour) * 60 + minute) * 60 + second) * _SECOND_NS + fraction_ns)


# --- spellings


@dataclass(frozen=True, slots=True)
class AtTime:
    """After every event at or before *time*; a ``~`` is already taken off, so ``offset_ns`` is always 0."""

    time: TimeNs
    offset_ns: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class AtSeq:
    """After the event *seq* or, unless 0, *offset_ns* nanoseconds before the time of that event."""

    seq: Seq
    offset_ns: int = 0


@dataclass(frozen=True, slots=True)
class AtName:
    """What a mark or snapshot of this name shows or, unless 0, *offset_ns* nanoseconds before its time."""

    name: str
    offset_ns: int = 0


Spelling = AtTime | AtSeq | AtName

_CLOCK_END: Final = r"(?:[.,](?P<fraction>[0-9]{1,9}))?"
_DATE_TIME: Final = re.compile(
    r"(?P<year>[0-9]{4})(?P<dash>-)?(?P<month>[0-9]{2})(?(dash)-)(?P<day>[0-9]{2})(?:T|(?P<blank> ))"
    r"(?P<hour>[0-9]{2})(?(dash)(?P<colon>:)?)(?P<minute>[0-9]{2})"
    rf"(?:(?(colon):)(?P<second>[0-9]{{2}}){_CLOCK_END})?"
    r"(?:(?(blank) ?)(?P<zone>Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?))?",
)
_DAY_TIME: Final = re.compile(
    rf"(?P<date>yesterday|today) (?P<hour>[0-9]{{2}}):(?P<minute>[0-9]{{2}})(?::(?P<second>[0-9]{{2}}){_CLOCK_END})?",
)
_EPOCH: Final = re.compile(r"@([0-9]+)(?:\.([0-9]{1,9}))?")
_SEQ: Final = re.compile(r"seq:([0-9]+)")
_UNITS_NS: Final = {
    "w": 7 * _DAY_NS,
    "d": _DAY_NS,
    "h": _HOUR_NS,
    "min": _MINUTE_NS,
    "s": _SECOND_NS,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_DURATION: Final = re.compile("".join(rf"(?:([0-9]+){unit})?" for unit in _UNITS_NS))


def parse_spelling(text: str, *, now: TimeNs, timezone: str | None = None) -> Spelling:
    """Return the point that *text* names by the grammar above.

    *now* is what ``ago``, ``yesterday`` and ``today`` count from. *timezone* is the IANA name of the zone of times
    that give none; None takes the system's. NoSuchPointError for what is not understood, is skipped or repeated in
    its zone, or lies before 1970 or beyond 2**63-1 ns; InputError if the local zone is needed and doesn't exist.
    """
    time = parse_canonical(text)
    if time is not None:
        return AtTime(_checked_time(time, text))
    if len(text) > SPELLING_CHARS_MAX:
        raise _not_understood(text, f"more than {SPELLING_CHARS_MAX} characters")
    point, tilde, duration = text.partition("~")
    offset_ns = _parse_duration(duration, text) if tilde else 0
    if valid_name(point):
        return AtName(point, offset_ns)
    if match := _SEQ.fullmatch(point):
        seq = int(match[1])
        if seq >= _INT64_END:
            raise _not_understood(text, "a seq is less than 2**63")
        return AtSeq(Seq(seq), offset_ns)
    return AtTime(_checked_time(_parse_time(point, text, now, timezone) - offset_ns, text))


def _parse_time(point: str, text: str, now: TimeNs, timezone: str | None) -> int:
    """Return the time that *point*, which is neither name nor seq, stands for; errors name the whole *text*."""
    if match := _DATE_TIME.fullmatch(point):
        day = _date(match, text)
        zone = match["zone"]
        if zone is None:
            return _local_ns(day.at(_clock(match, text)), text, timezone)
        return day.at(_clock(match, text)).assume_utc().timestamp(unit="nanosecond") - _zone_ns(zone)
    if match := _EPOCH.fullmatch(point):
        return int(match[1]) * _SECOND_NS + _fraction_ns(match[2])
    if point.endswith(" ago"):
        return now - _parse_duration(point.removesuffix(" ago"), text)
    if match := _DAY_TIME.fullmatch(point):
        clock = _clock(match, text)
        return _local_ns(_day(match["date"], now, text, timezone).at(clock), text, timezone)
    raise _not_understood(text)


def _date(match: re.Match[str], text: str) -> Date:
    """Return the calendar day of a match with year, month and day."""
    try:
        return Date(int(match["year"]), int(match["month"]), int(match["day"]))
    except ValueError:
        raise _not_understood(text, "no such day") from None


def _clock(match: re.Match[str], text: str) -> Time:
    """Return the time of day of a match with hour, minute, second and fraction; no 24:00, no leap second."""
    hour, minute, second = int(match["hour"]), int(match["minute"]), int(match["second"] or 0)
    try:
        return Time(hour, minute, second, nanosecond=_fraction_ns(match["fraction"]))
    except ValueError:
        raise _not_understood(text, "no such time of day") from None


def _fraction_ns(digits: str | None) -> int:
    """Return the nanoseconds of the *digits* after a decimal point."""
    return int((digits or "").ljust(9, "0"))


def _zone_ns(zone: str) -> int:
    """Return how far *zone* is ahead of UTC: 0 for ``Z``, else by ``+HH``, ``+HHMM`` or ``+HH:MM``."""
    if zone == "Z":
        return 0
    ahead_ns = int(zone[1:3]) * _HOUR_NS + int(zone[-2:] if len(zone) > len("+HH") else 0) * _MINUTE_NS
    return ahead_ns if zone[0] == "+" else -ahead_ns


def _day(word: str, now: TimeNs, text: str, timezone: str | None) -> Date:
    """Return the local day that is ``today`` or ``yesterday`` at *now*."""
    try:
        today = Instant.from_timestamp(now, unit="nanosecond").to_tz(SYSTEM_TZ if timezone is None else timezone).date()
    except TimeZoneNotFoundError as error:
        raise _no_zone(text, timezone) from error
    return today if word == "today" else today.subtract(days=1)


def _local_ns(local: PlainDateTime, text: str, timezone: str | None) -> int:
    """Return the one moment at which clocks in *timezone* showed *local*."""
    try:
        zoned = local.assume_tz(SYSTEM_TZ if timezone is None else timezone, disambiguation="raise")
    except (SkippedTime, RepeatedTime) as error:
        fault = "skipped" if isinstance(error, SkippedTime) else "ambiguous"
        raise NoSuchPointError(
            f"local time {_shown(text)} is {fault} in the time zone {timezone or 'of this system'}",
            hint="give a zone, as in 2026-07-28T14:30+02:00 or 2026-07-28T12:30Z",
        ) from None
    except TimeZoneNotFoundError as error:
        raise _no_zone(text, timezone) from error
    except ValueError:  # at the ends of the calendar, years 1 and 9999
        raise _out_of_range(text) from None
    return zoned.timestamp(unit="nanosecond")


def _parse_duration(duration: str, text: str) -> int:
    """Return the nanoseconds of a *duration* such as ``1h30min``; errors name the whole *text*."""
    match = _DURATION.fullmatch(duration)
    if match is None or not duration:
        raise _not_understood(text, f"no duration: {_shown(duration)}")
    total_ns = sum(int(n or 0) * unit_ns for n, unit_ns in zip(match.groups(), _UNITS_NS.values(), strict=True))
    if total_ns >= _INT64_END:
        raise _out_of_range(text)
    return total_ns


def _checked_time(time_ns: int, text: str) -> TimeNs:
    """Return *time_ns* if it is one that a write event can have."""
    if not 0 <= time_ns < _INT64_END:
        raise _out_of_range(text)
    return TimeNs(time_ns)


def _out_of_range(text: str) -> NoSuchPointError:
    return NoSuchPointError(f"time {_shown(text)} is out of range", hint="times reach from 1970 to April 2262")


def _not_understood(text: str, reason: str = "") -> NoSuchPointError:
    because = f" ({reason})" if reason else ""
    return NoSuchPointError(f"point {_shown(text)} not understood{because}", hint=_POINT_HINT)


def _no_zone(text: str, timezone: str | None) -> InputError:
    which = "of this system" if timezone is None else _shown(timezone)
    hint = "set an IANA name such as Europe/Berlin, or give times with a zone"
    return InputError(f"time zone {which} not found, which {_shown(text)} needs", hint=hint)


def _shown(text: str) -> str:
    """Return *text* quoted for a message: bounded, printable on any terminal."""
    return ascii(text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "...")
