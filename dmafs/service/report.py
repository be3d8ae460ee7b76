"""Reports: what ``status`` and ``ls`` say, as JSON-able dictionaries made from volumes alone.

The daemon and the commands that work without one make the same reports; the daemon fills in what only it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from dmafs.answers import (
    Clones,
    Difference,
    Differences,
    Failure,
    LastScrub,
    Place,
    Points,
    Scrubbed,
    Snapshots,
    VolumeStatus,
)
from dmafs.core import scrub, verify
from dmafs.core.diff import diff
from dmafs.core.gate import FAILED_HINT
from dmafs.core.image import Image
from dmafs.core.moments import clone_groups, instant, resolve, seqs_at, snapshot_groups
from dmafs.core.points import consistency, landmarks, oldest_point
from dmafs.core.resync import needs_resync
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import InputError, NoSuchPointError, NoSuchVolumeError, TapError
from dmafs.units import SECTOR, format_rfc3339, format_span, format_time

Report = dict[str, Any]

READ_CHUNK: Final = 1 << 20
"""What is read of an image at once for a command."""


def point(seq: int, time_ns: int) -> Place:
    """Return a point of history; its time is None before the first recoverable point."""
    return {"seq": seq, "time": format_rfc3339(time_ns) if time_ns else None}


def status_of(volume: Volume) -> VolumeStatus:
    """Return the state of one volume."""
    now = volume.pointers.now
    journal = volume.journal
    size = volume.info.size_sectors
    oldest = oldest_point(volume) if now.copied else None
    return {
        "name": volume.info.name,
        "uuid": str(volume.info.uuid),
        "source": volume.info.source,
        "tap": volume.info.tap,
        "size_bytes": size * SECTOR,
        "state": state_of(volume),
        "failure": failure_of(volume),
        "copy_fraction": 1.0 if now.copied else now.copied_sectors / size,
        "copy_bytes_per_s": 0,
        "origin": point(now.origin_seq, now.origin_time_ns) if now.copied else None,
        "oldest": point(oldest.seq, oldest.time_ns) if oldest else None,
        "newest": point(journal.head, journal.head_time_ns),
        "durable_seq": journal.durable,
        "gaps": [
            {
                "begin": point(gap.begin, gap.begin_time_ns),
                "end": point(gap.end, gap.end_time_ns) if gap.end is not None else None,
            }
            for gap in journal.gaps
        ],
        "mirror": point(now.mirror_seq, now.mirror_time_ns),
        "mirror_bytes": volume.mirror.file.allocated(),
        "forward": {
            "events": journal.head - now.mirror_seq,
            "segments": len(journal.parts),
            "bytes": journal.data_bytes(),
        },
        "snapshots": len(volume.snapshots),
        "syncs": volume.statistics.syncs,
        "sync_saved_bytes": volume.statistics.saved_sectors * SECTOR,
        "sync_applied_bytes": volume.statistics.applied_sectors * SECTOR,
        "syncing": False,
        "commits": 0,
        "device": None,
        "loss": "",
        "check": None,
        "last_check": None,
        "last_scrub": None,
    }


def summary_of(volumes: Mapping[str, Volume]) -> str:
    """Return the state of all volumes in one line: how long a history there is, and what of it isn't durable yet."""
    return "; ".join(f"{name} {_summary(volume)}" for name, volume in volumes.items())


def _summary(volume: Volume) -> str:
    state, journal = state_of(volume), volume.journal
    if not volume.pointers.now.copied:
        return state
    span_s = max(0, journal.head_time_ns - oldest_point(volume).time_ns) / 1e9
    lag_s = 0.0
    if journal.durable < journal.head:
        lag_s = max(0, volume.clock() - journal.time_of(journal.durable + 1)) / 1e9
    return f"{state}, history of {format_span(span_s)}, lag {lag_s:.1f} s"


def failure_of(volume: Volume) -> Failure | None:
    """Return why a volume is read-only: what failed, since when, and what to do; None if it isn't."""
    if not volume.failure:
        return None
    return {"what": volume.failure, "since": format_rfc3339(volume.gate.failed_ns), "hint": FAILED_HINT}


def state_of(volume: Volume) -> str:
    """Return what ``status`` calls a volume: read-only, copying, resyncing, protected or imported."""
    if volume.failure:
        return "read-only"
    if not volume.pointers.now.copied:
        return "copying"
    if volume.info.tap == "none":
        return "imported"
    return "resyncing" if needs_resync(volume) else "protected"


def points_of(volumes: Mapping[str, Volume]) -> Points:
    """Return the recoverable points worth listing, by volume, and all snapshots."""
    return {
        "points": [
            {
                "volume": name,
                "kind": found.kind,
                "name": found.name,
                "pinned": found.pinned,
                "at": format_time(found.instant_ns),
                "consistency": consistency(volume, found.seq),
                "seq": found.seq,
                "time": format_rfc3339(found.time_ns),
            }
            for name, volume in volumes.items()
            for found in landmarks(volume)
        ],
        **snapshots_of(volumes),
    }


def snapshots_of(volumes: Mapping[str, Volume]) -> Snapshots:
    """Return all snapshots, oldest first."""
    return {
        "snapshots": [
            {
                "id": identifier,
                "time": format_rfc3339(instant(group)),
                "pinned": any(snapshot.pinned for snapshot in group.values()),
                # "crash", "exact", "frozen" sort by what they promise; a group promises what all of it does
                "consistency": min(consistency(volumes[name], snapshot.seq) for name, snapshot in group.items()),
                "volumes": {name: snapshot.seq for name, snapshot in group.items()},
            }
            for identifier, group in snapshot_groups(volumes).items()
        ],
    }


def clones_of(volumes: Mapping[str, Volume]) -> Clones:
    """Return all clones."""
    return {
        "clones": [
            {
                "name": name,
                "time": format_rfc3339(max(clone.time_ns for clone in group.values())),
                "stored_bytes": sum(clone.stored_bytes for clone in group.values()),
                "open": any(clone.opens for clone in group.values()),
                "failure": next((clone.failure for clone in group.values() if clone.failure), ""),
                "volumes": {volume: clone.seq for volume, clone in group.items()},
            }
            for name, group in clone_groups(volumes).items()
        ]
    }


def check_range(image: Image, offset: int, length: int) -> None:
    """Raise InputError unless a range of bytes is within an image."""
    if not 0 <= offset <= offset + length <= image.size:
        raise InputError(
            f"range {offset}+{length} is not within the {image.size} bytes of volume {image.volume.info.name}",
            hint="offset and length are bytes",
        )


def require_source(volume: Volume) -> None:
    """Raise TapError if a volume has no source that its newest image could be compared with."""
    if volume.info.tap == "none":
        raise TapError(
            f"volume {volume.info.name} was imported: it has no source to compare with",
            hint="only volumes with a tap are verified and resynced",
        )


def require_copied(volume: Volume) -> None:
    """Raise NoSuchPointError if a volume has no image yet."""
    if not volume.pointers.now.copied:
        raise NoSuchPointError(
            f"volume {volume.info.name} can't be scrubbed: the initial copy isn't complete",
            hint="wait until dmafs status says protected",
        )


def volume_of(volumes: Mapping[str, Volume], name: str) -> Volume:
    """Return the volume of that name, or raise NoSuchVolumeError."""
    if name not in volumes:
        raise NoSuchVolumeError(f"there is no volume {name}", hint=f"there are: {', '.join(volumes)}")
    return volumes[name]


def seq_of(volumes: Mapping[str, Volume], volume: str, text: str) -> int:
    """Return a volume's seq at the moment that a spelling means."""
    volume_of(volumes, volume)
    time_ns = resolve(volumes, text)
    seqs = seqs_at(volumes, time_ns)
    if volume not in seqs:
        raise NoSuchPointError(
            f"volume {volume} has no recoverable point at {text}", hint="list them with: dmafs ls STORE"
        )
    return seqs[volume]


def image_at(volumes: Mapping[str, Volume], volume: str, text: str) -> Image:
    """Return a volume's image at the moment that a spelling means."""
    seq = seq_of(volumes, volume, text)
    return volumes[volume].image(seq)


def diff_of(volumes: Mapping[str, Volume], name: str, a: str, b: str) -> Work[Difference]:
    """Return what was written to a volume between two moments; its extents are pairs of offset and length."""
    first, last = seq_of(volumes, name, a), seq_of(volumes, name, b)
    volume = volumes[name]
    a_point, b_point = point(first, volume.time_of(first)), point(last, volume.time_of(last))
    starts, stops = yield from diff(volume, first, last)
    lengths = stops - starts
    extents = np.column_stack([starts, lengths]) * SECTOR
    return {
        "volume": name,
        "a": a_point,
        "b": b_point,
        "extents": extents.tolist(),
        "bytes": int(lengths.sum()) * SECTOR,
    }


def differences_of(name: str, found: verify.Differences) -> Differences:
    """Return what a verify or resync of a volume has found; its extents are pairs of offset and length."""
    return {
        "volume": name,
        "extents": [[start * SECTOR, (stop - start) * SECTOR] for start, stop in found.extents],
        "count": found.count,
        "bytes": found.sectors * SECTOR,
        "busy_bytes": found.busy_sectors * SECTOR,
        "compared_bytes": found.compared_sectors * SECTOR,
    }


def scrubbed_of(name: str, found: scrub.Scrubbed) -> Scrubbed:
    """Return what a scrub of a volume has found."""
    return {
        "volume": name,
        "begun": format_rfc3339(found.begun_ns),
        "ended": format_rfc3339(found.ended_ns) if found.ended_ns else None,
        "read_bytes": found.read_bytes,
        "count": found.count,
        "repaired": found.repaired,
        "damage": [
            {
                "place": one.place,
                "file": one.file,
                "offset": one.start * SECTOR,
                "length": (one.stop - one.start) * SECTOR,
                "first": _moment(one.first),
                "last": _moment(one.last),
                "newest": one.newest,
                "repaired": one.repaired,
            }
            for one in found.damage
        ],
    }


def _moment(moment: scrub.Moment | None) -> Place | None:
    return None if moment is None else point(*moment)


def scrub_told(found: scrub.Scrubbed | None) -> LastScrub | None:
    """Return what status says of the last scrub."""
    if found is None:
        return None
    return {
        "time": format_rfc3339(found.ended_ns or found.begun_ns),
        "ended": bool(found.ended_ns),
        "count": found.count,
        "repaired": found.repaired,
    }
