"""What a time means: which moment of each volume, what that is, and why it is that one."""

from __future__ import annotations

from dmafs.answers import Moment, MomentOfVolume, NoMoment
from dmafs.core.moments import Volumes, canonical, time_meant
from dmafs.core.points import consistency, seq_at
from dmafs.core.volume import Volume
from dmafs.errors import NoSuchPointError
from dmafs.service.report import volume_of
from dmafs.units import SECTOR, format_rfc3339, format_time, greatest_units


def moment_of(volumes: Volumes, text: str, name: str | None = None) -> Moment:
    """Return what a spelling means in all volumes, or in the one that is named.

    Each is told with its seq, time, kind and consistency, and why it is that one; a volume that has no point at that
    time with a problem and a hint instead. NoSuchPointError if no volume, or not the named one, has one.
    """
    if name is not None:
        volume_of(volumes, name)
    asked_ns = time_meant(volumes, text)
    instant_ns = canonical(volumes, asked_ns)
    found: list[MomentOfVolume | NoMoment] = []
    for each, volume in volumes.items():
        if name not in {None, each}:
            continue
        try:
            seq = seq_at(volume, instant_ns)
        except NoSuchPointError as error:
            if name is not None:
                raise
            found.append({"volume": each, "problem": error.message, "hint": error.hint})
        else:
            found.append(_told(volume, seq, asked_ns))
    return {"asked": format_rfc3339(asked_ns), "at": format_time(instant_ns), "volumes": found}


def _told(volume: Volume, seq: int, asked_ns: int) -> MomentOfVolume:
    kind, called = _kind(volume, seq)
    time_ns = volume.time_of(seq)
    return {
        "volume": volume.info.name,
        "size_bytes": volume.info.size_sectors * SECTOR,
        "kind": kind,
        "name": called,
        "seq": seq,
        "time": format_rfc3339(time_ns),
        "consistency": consistency(volume, seq),
        "earlier_ns": asked_ns - time_ns,
        "why": _why(volume, seq, asked_ns),
    }


def _kind(volume: Volume, seq: int) -> tuple[str, str]:
    """Return what stands at a recoverable seq, as ``ls`` calls it, and its name; ``write`` where it has no name."""
    snapshot = volume.snapshots.visible_at(seq)
    if snapshot is not None:
        return "snapshot", snapshot.name
    for mark in volume.journal.marks():
        if mark.seq == seq:
            return "mark", mark.name
    now = volume.pointers.now
    named = {now.mirror_seq: "mirror", now.origin_seq: "origin"}
    return named.get(seq, "write"), ""


def _why(volume: Volume, seq: int, asked_ns: int) -> str:
    first = max(volume.floor, volume.pointers.now.origin_seq)
    time_ns = volume.time_of(seq)
    if seq < first:
        following = next((snapshot.time_ns for snapshot in volume.snapshots if snapshot.seq > seq), None)
        until = volume.time_of(first) if following is None else following
        which = (
            "is of exactly that time"
            if asked_ns == time_ns
            else f"is the newest then, {span(asked_ns - time_ns)} earlier"
        )
        return (
            f"before the mirror ({format_rfc3339(volume.time_of(first))}) there are only snapshots; this one {which}; "
            f"the next moment is {format_rfc3339(until)}"
        )
    gap = volume.journal.gap_around(max(volume.journal.seq_at(asked_ns, default=first), first))
    if gap is not None:
        end = format_rfc3339(gap.end_time_ns) if gap.end is not None else "now"
        return (
            f"that time lies in a gap, from {format_rfc3339(gap.begin_time_ns)} to {end}, in which capture was not "
            "complete; the moment is the gap's beginning"
        )
    subject = "the end of the initial copy" if seq == volume.pointers.now.origin_seq else "the mirror's moment"
    if seq > first:
        subject = "a write"
    why = f"{subject} is of exactly that time"
    if asked_ns > time_ns and seq > first:
        why = f"the last write at or before that time is {span(asked_ns - time_ns)} earlier"
    elif asked_ns > time_ns:
        why = f"nothing was written from {subject}, {span(asked_ns - time_ns)} earlier, up to that time"
    if seq < volume.journal.head:
        return f"{why}; the next write is {span(volume.journal.time_of(seq + 1) - asked_ns)} later"
    return f"{why}; nothing has been written since"


def span(ns: int) -> str:
    """Return a duration for humans: ``12 ns``, ``1.9 ms``, ``3.2 s``, ``5 min 3 s``, ``2 d 4 h``."""
    for size, unit, below in ((1, "ns", 10**3), (10**3, "us", 10**6), (10**6, "ms", 10**9), (10**9, "s", 60 * 10**9)):
        if ns < below:
            return f"{ns} {unit}" if size == 1 else f"{ns / size:.1f} {unit}"
    return " ".join(f"{count} {unit}" for count, unit in greatest_units(ns // 10**9))
