"""Claims about dmafs.units: sizes, names, times and the spellings of points in time."""

from __future__ import annotations

import re
import string
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmafs.errors import InputError, NoSuchPointError
from dmafs.units import (
    AtName,
    AtSeq,
    AtTime,
    Seq,
    Spelling,
    TimeNs,
    check_name,
    format_bytes,
    format_rfc3339,
    format_time,
    parse_bytes,
    parse_canonical,
    parse_duration_s,
    parse_share,
    parse_spelling,
    parse_time_of_day,
    valid_name,
)

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 60 * MINUTE_NS
DAY_NS = 24 * HOUR_NS
END = 2**63
YEAR_10000_NS = 253_402_300_800 * SECOND_NS
WHOLE = TimeNs(1_785_249_005 * SECOND_NS)  # 2026-07-28T14:30:05Z
EXACT = TimeNs(WHOLE + 123_456_789)
MINUTE = TimeNs(WHOLE - 5 * SECOND_NS)  # 2026-07-28T14:30Z
BERLIN = "Europe/Berlin"

times = st.integers(0, END - 1)
words = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=70)
# Text made of the grammar's own pieces gets much further into the parser than any text does.
pieces = st.sampled_from(
    [
        *["2026", "07", "28", "14", "30", "05", "60", "24", "2026-07-28", "14:30", "0001-01-01", "9999-12-31"],
        *["-", ":", "T", " ", "Z", ".", ",", "+", "@", "~", "seq:", " ago", "yesterday", "today", "now", "latest"],
        *["2", "1", "0", "9" * 30, "w", "d", "h", "min", "s", "m", "ns", "a", "\u0663", "\udc80", "\xe9", "\n"],
    ],
)
texts = st.text(max_size=300) | st.lists(pieces, max_size=12).map("".join) | words


def spell(text: str, *, now: int = EXACT, timezone: str | None = BERLIN) -> Spelling:
    """Parse *text* as somebody in Berlin would at EXACT, which is 16:30:05 there."""
    return parse_spelling(text, now=TimeNs(now), timezone=timezone)


def refuse(text: str, pattern: str = "", *, timezone: str | None = BERLIN) -> NoSuchPointError:
    """Return the error that refuses *text*, which names the text, has a hint, and matches *pattern*."""
    with pytest.raises(NoSuchPointError, match=pattern) as caught:
        spell(text, timezone=timezone)
    assert ascii(text)[1:60] in caught.value.message
    assert caught.value.message[0].islower()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1025, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (64 * 2**20, "64 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**63 - 1, "8.0 EiB"),
        (5000 * 2**60, "5000 EiB"),
    ],
)
def test_format_bytes(n: int, text: str) -> None:
    """Bytes are shown in the largest IEC unit that fits, rounding into the next one where needed."""
    assert format_bytes(n) == text


@given(st.integers(0, 2**63 - 1))
def test_format_bytes_close(n: int) -> None:
    """The shown number is within half a tenth of the unit, and where it is whole, parse_bytes gives it back."""
    text = format_bytes(n)
    number, unit = text.split(" ")
    size = parse_bytes("1" + unit)
    assert abs(20 * n - 2 * int(float(number) * 10 + 0.5) * size) <= size or "." not in number
    if "." not in number:
        assert parse_bytes(text) == n


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64MiB", 2**26),
        ("64 MiB", 2**26),
        ("1G", 2**30),
        ("1k", 1024),
        ("2Ti", 2**41),
        ("7E", 7 * 2**60),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_parse_bytes(text: str, n: int) -> None:
    """Units are of 1024, in either case, with or without B and a space."""
    assert parse_bytes(text) == n


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "B",
        "-1",
        "+1",
        "1.5G",
        "1MB",
        "1 000",
        "8E",
        "9" * 19,
        "9" * 400,
        "\u0663",
        "1\n",
        "1  G",
        "1_0",
        "1\u212a",
    ],
)
def test_parse_bytes_refuses(text: str) -> None:
    """Fractions, signs, decimal units, other digits and 2**63 are InputErrors with a hint."""
    with pytest.raises(InputError, match=r"size .* not understood") as caught:
        parse_bytes(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "disk",
        "a",
        "0",
        "2h",
        "2hago",
        "ago",
        "before-upgrade",
        "a" * 64,
        "v1.2_3-4",
        "2026-07",
        "2026-07-28-x",
        "latest1",
        "img",
        "a.",
    ],
)
def test_names(text: str) -> None:
    """Ordinary names are taken as they are, by check_name and as spellings."""
    assert valid_name(text)
    assert check_name(text, "volume") == text
    assert spell(text) == AtName(text)


@pytest.mark.parametrize(
    "text",
    [
        *["", ".", "..", "-a", "_a", "a/b", "a b", "a:b", "a~b", "@1", "a" * 65, "é", "a\n", "\u0663", "a\0", "\udc80"],
        *["disk.img", "disk.IMG", "latest", "Latest", "now", "today", "yesterday"],
        *["2026-07-28", "20260728", "20261328", "20260728T1430", "2026-07-28T143005.123456789Z", "2026-07-28t1430z"],
    ],
)
def test_names_refused(text: str) -> None:
    """Other characters, words for times and everything that looks like a date can't be names."""
    assert not valid_name(text)
    with pytest.raises(InputError, match=f"volume name {re.escape(ascii(text))} ") as caught:
        check_name(text, "volume")
    assert caught.value.hint


@given(texts)
def test_names_are_no_times(text: str) -> None:
    """A name is understood as that name and as nothing else."""
    if valid_name(text):
        assert spell(text) == AtName(text)
        assert parse_canonical(text) is None
    else:
        with pytest.raises(InputError):
            check_name(text, "snapshot")


@given(st.integers(0, YEAR_10000_NS - 1))
def test_canonical_round_trip(time_ns: int) -> None:
    """parse_canonical inverts format_time, for every nanosecond of the years 1970 to 9999."""
    text = format_time(time_ns)
    assert len(text) == len("2026-07-28T143005.123456789Z")
    assert parse_canonical(text) == time_ns


@given(st.integers(0, YEAR_10000_NS - 1), st.integers(0, YEAR_10000_NS - 1))
def test_canonical_sorts(a: int, b: int) -> None:
    """Canonical names and RFC 3339 texts sort as the times do."""
    assert (format_time(a) < format_time(b)) == (a < b)
    assert (format_rfc3339(a) < format_rfc3339(b)) == (a < b)


def test_canonical_examples() -> None:
    """The forms are those of the documentation, and times beyond the years 1970 to 9999 are bugs."""
    assert format_time(EXACT) == "2026-07-28T143005.123456789Z"
    assert format_rfc3339(EXACT) == "2026-07-28T14:30:05.123456789Z"
    assert format_time(0) == "1970-01-01T000000.000000000Z"
    assert format_time(YEAR_10000_NS - 1) == "9999-12-31T235959.999999999Z"
    for time_ns in (-1, YEAR_10000_NS):
        with pytest.raises(AssertionError):
            format_time(time_ns)


@given(texts | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{6}\.[0-9]{9}Z"))
def test_canonical_strict(text: str) -> None:
    """Whatever parse_canonical takes, format_time prints exactly so."""
    time_ns = parse_canonical(text)
    assert time_ns is None or format_time(time_ns) == text


@pytest.mark.parametrize(
    "text",
    [
        *["2026-07-28T143005.12345678Z", "2026-07-28T143005Z", "2026-07-28T14:30:05.123456789Z"],
        *["2026-02-30T000000.000000000Z", "2026-07-28T240000.000000000Z", "2026-07-28T143060.000000000Z"],
        *["1969-12-31T235959.999999999Z", "0000-01-01T000000.000000000Z", "2026-07-28T143005.123456789Z\n"],
        *["2026-07-28t143005.123456789z", "\uff12026-07-28T143005.123456789Z", "2026-00-28T143005.123456789Z"],
    ],
)
def test_canonical_refuses(text: str) -> None:
    """Near misses of the canonical form are None."""
    assert parse_canonical(text) is None


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("2026-07-28T143005.123456789Z", EXACT),
        ("2026-07-28T14:30:05.123456789Z", EXACT),
        ("2026-07-28 14:30:05,123456789Z", EXACT),
        ("20260728T143005.123456789Z", EXACT),
        ("2026-07-28T163005.123456789+0200", EXACT),
        ("2026-07-28T20:00:05.123456789+05:30", EXACT),
        ("2026-07-28T06:30:05.123456789-08", EXACT),
        ("2026-07-28 16:30:05.123456789 +0200", EXACT),
        ("2026-07-28 14:30 Z", MINUTE),
        ("2026-07-28T14:30:05Z", WHOLE),
        ("2026-07-28T14:30:05.5Z", WHOLE + SECOND_NS // 2),
        ("20260728 1430-0000", MINUTE),
        ("2026-07-28T1430Z", MINUTE),
        ("2026-07-29T00:30+1000", MINUTE),
        ("2026-07-28 16:30", MINUTE),
        ("20260728T163005", WHOLE),
        ("2026-10-25T02:30+02:00", 1_792_888_200 * SECOND_NS),
        ("2026-10-25T02:30+01:00", 1_792_891_800 * SECOND_NS),
        ("2026-03-29 01:59:59.999999999", 1_774_746_000 * SECOND_NS - 1),
        ("2026-03-29 03:00", 1_774_746_000 * SECOND_NS),
        ("1970-01-01T00:00Z", 0),
        ("1970-01-01T01:00", 0),
        ("2262-04-11T234716.854775807Z", END - 1),
        ("@0", 0),
        ("@1785249005", WHOLE),
        ("@1785249005.123456789", EXACT),
        ("@1785249005.5", WHOLE + SECOND_NS // 2),
        ("yesterday 14:00", MINUTE - DAY_NS - 150 * MINUTE_NS),
        ("today 16:30", MINUTE),
        ("today 16:30:05", WHOLE),
        ("today 16:30:05.123456789", EXACT),
        ("today 23:59", MINUTE + 449 * MINUTE_NS),
        ("2h ago", EXACT - 2 * HOUR_NS),
        ("90s ago", EXACT - 90 * SECOND_NS),
        ("1d ago", EXACT - DAY_NS),
        ("1h30min ago", EXACT - 90 * MINUTE_NS),
        ("1w1d1h1min1s1ms1us1ns ago", EXACT - 8 * DAY_NS - HOUR_NS - MINUTE_NS - SECOND_NS - 1_001_001),
        ("0s ago", EXACT),
        ("2026-07-28T143005.123456789Z~5min", EXACT - 5 * MINUTE_NS),
        ("2h ago~10s", EXACT - 2 * HOUR_NS - 10 * SECOND_NS),
        ("@10~10s", 0),
        ("today 16:30~1h", MINUTE - HOUR_NS),
    ],
)
def test_times(text: str, time_ns: int) -> None:
    """Every form of the grammar gives the time it says, with Berlin as the local zone."""
    spelling = spell(text)
    assert spelling == AtTime(TimeNs(time_ns))
    assert spelling.offset_ns == 0


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("seq:0", AtSeq(Seq(0))),
        ("seq:007", AtSeq(Seq(7))),
        ("seq:9223372036854775807", AtSeq(Seq(END - 1))),
        ("seq:7~10s", AtSeq(Seq(7), 10 * SECOND_NS)),
        ("before-upgrade", AtName("before-upgrade")),
        ("before-upgrade~5min", AtName("before-upgrade", 5 * MINUTE_NS)),
        ("seq~1d", AtName("seq", DAY_NS)),
    ],
)
def test_references(text: str, spelling: Spelling) -> None:
    """Seqs and names stay references, with the offset beside them."""
    assert spell(text) == spelling


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "~", "~5min", "a~", "a~5", "a~5m", "a~min", "a~-5min", "a~5min~5min", "a~5min ago", "a ~5min"],
        *["now", "latest", "today", "yesterday", "tomorrow 14:00", "Yesterday 14:00", "latest~5min", "now~5min"],
        *["yesterday 1400", "yesterday 4:00", "yesterday  14:00", "yesterday 24:00", "today 14:00Z", "today 14:00:60"],
        *["2026-07-28", "20260728", "2026-07-28T14", "2026-7-28T14:30", "2026-07-28T4:30", "26-07-28T14:30"],
        *["20260728T14:30", "2026-07-28T14:3005", "2026-07-28T1430:05", "2026-0728T1430", "202607-28T1430"],
        *["2026-07-28t14:30z", "2026-07-28T14:30z", "2026-07-28  14:30", "2026-07-28T14:30 Z", " 2026-07-28T14:30"],
        *["2026-07-28 14:30  Z", "2026-07-28 14:30 ", "2026-07-28T14:30 +0200", "2026-07-28 16:30 02:00"],
        *["2026-07-28T14:30.5Z", "2026-07-28T14:30:05.Z", "2026-07-28T14:30:05.1234567890Z", "2026-07-28T14:30Z\n"],
        *["2026-07-28T14:30+24:00", "2026-07-28T14:30+02:60", "2026-07-28T14:30+2", "2026-07-28T14:30+02:"],
        *["2026-07-28T14:30[Europe/Berlin]", "2026-07-28T14:30Z[UTC]", "2026-W31-2T14:30", "2026-209T14:30"],
        *["2026-12-31T23:59:60Z", "2026-07-28T24:00Z", "2026-07-28T14:60Z", "2026-13-28T14:30Z", "2026-02-29T14:30Z"],
        *["@", "@-1", "@+1", "@1.", "@.5", "@1.1234567890", "@1e9", "@ 1", "@1,5", "@0x10", "@1_0"],
        *["seq:", "seq:-1", "seq:+1", "seq: 1", "seq:1.0", "SEQ:1", "seq:9223372036854775808", "seq:" + "9" * 200],
        *["2h  ago", "2 h ago", " ago", "h ago", "5m ago", "1.5h ago", "30min1h ago", "1h1h ago"],
        *["2h ago ", "2H ago", "2y ago", "2 hours ago", "-2h ago"],
        *[
            "seq:\u0663",
            "\u0663h ago",
            "@\u0663",
            "\uff12026-07-28T14:30Z",
            "a~\u0663s",
            "disk.img",
            "a/b",
            "\udc80",
            "\0",
            "a\0",
        ],
        *["a" * 65, "a" * 256, "2h ago" + " " * 250, "0" * 260 + "s ago"],
    ],
)
def test_not_understood(text: str) -> None:
    """What the grammar doesn't list is refused, never guessed."""
    refuse(text, "^point .* not understood")


@pytest.mark.parametrize(
    "text",
    [
        *["1969-12-31T23:59:59.999999999Z", "1970-01-01T00:00+01:00", "0001-01-01T00:00Z"],
        *[
            "2262-04-11T234716.854775808Z",
            "9999-12-31T23:59Z",
            "9999-12-31T23:59-23:59",
            "@9223372036.854775807~15250w2d",
        ],
        *[
            "@9223372036.854775808",
            "@" + "9" * 200,
            "@0~1ns",
            "100000d ago",
            "9" * 200 + "w ago",
            "a~" + "9" * 200 + "s",
        ],
        *["a~9223372036854775808ns", "0001-01-01T00:00", "9999-12-31T23:59", "2263-01-01 00:00"],
    ],
)
def test_out_of_range(text: str) -> None:
    """Times before 1970 or beyond 2**63-1 ns are points that can't be, east and west of Greenwich."""
    for timezone in (BERLIN, "America/New_York"):
        refuse(text, "is out of range", timezone=timezone)


@pytest.mark.parametrize(
    ("text", "now", "fault"),
    [
        ("2026-10-25T02:30", 0, "ambiguous"),
        ("2026-10-25 02:00", 0, "ambiguous"),
        ("20261025T023000.5~5min", 0, "ambiguous"),
        ("2026-03-29T02:30", 0, "skipped"),
        ("today 02:30", 1_792_900_000, "ambiguous"),
        ("yesterday 02:30", 1_792_986_400, "ambiguous"),
        ("yesterday 02:30", 1_774_800_000 + 86_400, "skipped"),
    ],
)
def test_summer_time(text: str, now: int, fault: str) -> None:
    """A local time that happened twice or never is an error that asks for a zone."""
    with pytest.raises(NoSuchPointError, match=f"^local time {text!a} is {fault} in .*{BERLIN}") as caught:
        spell(text, now=now * SECOND_NS)
    assert "give a zone" in caught.value.hint


def test_yesterday_is_the_local_day() -> None:
    """Yesterday and today count local days: 23:30Z is already tomorrow in Berlin; a day of 25 hours is one day."""
    late = parse_canonical("2026-07-28T233000.000000000Z")
    assert late is not None
    assert spell("today 00:00", now=late) == AtTime(TimeNs(late - 90 * MINUTE_NS))
    assert spell("today 00:00", now=late, timezone="UTC") == AtTime(TimeNs(late - 1410 * MINUTE_NS))
    after = parse_canonical("2026-10-26T110000.000000000Z")
    assert after is not None
    assert spell("yesterday 00:00", now=after) == AtTime(TimeNs(after - 37 * HOUR_NS))


def test_yesterday_of_the_first_day() -> None:
    """Yesterday on 1 January 1970 is out of range, and nothing worse."""
    with pytest.raises(NoSuchPointError, match="out of range"):
        spell("yesterday 00:00", now=0, timezone="UTC")
    refuse("1970-01-01T00:59", "out of range", timezone=BERLIN)  # an hour ahead even then


@pytest.mark.parametrize("timezone", ["Europe/Nowhere", "", "../../etc/passwd", "\udc80"])
def test_unknown_zone(timezone: str) -> None:
    """A local zone that doesn't exist is an InputError, but only where the spelling needs one."""
    for text in ("2026-07-28T14:30", "today 14:30"):
        with pytest.raises(InputError, match=r"time zone .* not found"):
            spell(text, timezone=timezone)
    assert spell("2026-07-28T14:30Z", timezone=timezone) == AtTime(MINUTE)


def test_system_zone() -> None:
    """Without a zone given, the system's is taken."""
    spelling = spell("2026-07-15T12:00", timezone=None)
    noon = parse_canonical("2026-07-15T120000.000000000Z")
    assert noon is not None
    assert isinstance(spelling, AtTime)
    assert abs(spelling.time - noon) <= 14 * HOUR_NS


@given(times, st.sampled_from([BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]))
def test_local_times(time_ns: int, timezone: str) -> None:
    """A printed local time is understood as that time, or refused since its clock showed it twice (zoneinfo agrees)."""
    local = datetime.fromtimestamp(time_ns // SECOND_NS, UTC).astimezone(ZoneInfo(timezone))
    text = f"{local:%Y-%m-%d %H:%M:%S}.{time_ns % SECOND_NS:09}"
    if local.replace(fold=0).utcoffset() == local.replace(fold=1).utcoffset():
        assert spell(text, timezone=timezone) == AtTime(TimeNs(time_ns))
    else:
        refuse(text, "ambiguous", timezone=timezone)


@given(times)
def test_all_spellings_of_a_time_agree(time_ns: int) -> None:
    """The canonical name, RFC 3339, the basic form and seconds since 1970 name the same time."""
    canonical = format_time(time_ns)
    rfc3339 = format_rfc3339(time_ns)
    epoch = f"@{time_ns // SECOND_NS}.{time_ns % SECOND_NS:09}"
    basic = canonical.replace("-", "")
    for text in (
        canonical,
        rfc3339,
        rfc3339.replace("T", " "),
        basic,
        epoch,
        rfc3339[:-1] + "+00:00",
        canonical + "~0s",
    ):
        assert spell(text) == AtTime(TimeNs(time_ns))


@given(texts, times)
def test_never_another_error(text: str, now: int) -> None:
    """Any text is understood, and what comes out is in range; or it is NoSuchPointError, printable and bounded."""
    try:
        spelling = spell(text, now=now)
    except NoSuchPointError:
        with pytest.raises(NoSuchPointError, match=r"^[ -~]{1,1500}$") as caught:  # 80 characters, escaped, twice
            spell(text, now=now)
        assert caught.value.hint
        return
    assert 0 <= spelling.offset_ns < END
    if isinstance(spelling, AtName):
        assert valid_name(spelling.name)
    else:
        assert 0 <= (spelling.seq if isinstance(spelling, AtSeq) else spelling.time) < END


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("1h30min", 5400), ("0s", 0), ("2w1d", 1296000), ("1000ms", 1)]
)
def test_durations(text: str, seconds: int) -> None:
    """Durations are those of spellings, of whole seconds."""
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "1.5h", "h", "24H", "1m", "-1h", "1500ms", "1 h", f"{10**20}w"])
def test_what_is_no_duration(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(InputError, match="duration"):
        parse_duration_s(text)


def test_shares_and_times_of_day() -> None:
    """Percent, less than all, with one decimal at most; hours and minutes with two digits each."""
    assert [parse_share(text) for text in ("10%", "2.5 %", "0%", "99.9%")] == [0.1, 0.025, 0, 0.999]
    assert [parse_time_of_day(text) for text in ("00:00", "06:30", "23:59")] == [0, 23400, 86340]
    for text in ("100%", "10", "0.1", "-1%", "2.55%", "%"):
        with pytest.raises(InputError, match="share"):
            parse_share(text)
    for text in ("24:00", "6:30", "06:60", "06:30:00", "0630", "noon"):
        with pytest.raises(InputError, match="time of day"):
            parse_time_of_day(text)
