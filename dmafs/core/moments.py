"""Moments: one instant across all volumes of a store, and what a spelling of it means.

The canonical time of a moment is the greatest of its volumes' canonical times. Nothing happened on any volume between a
volume's own time and that, so the canonical time resolves to the same seqs, and equal states have equal names. That
holds since all volumes of a store share one clock that never goes back.

A *group* is what was taken at one instant: the snapshots, or the marks, of all volumes. Each of its snapshots knows the
instant's canonical time, so they are found again as one group, and ``at/<that time>`` shows what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

from dmafs.core.clone import CLONES_MAX, Clone
from dmafs.core.points import landmarks, point_named, seq_at
from dmafs.core.resync import needs_resync
from dmafs.core.snapshot import Snapshot, require_unpinned
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import (
    DmafsError,
    InputError,
    NoSuchCloneError,
    NoSuchPointError,
    NoSuchSnapshotError,
    StoreFullError,
)
from dmafs.units import AtSeq, AtTime, TimeNs, format_time, parse_canonical, parse_spelling

LATEST: Final = "latest"

Volumes = Mapping[str, Volume]


def seqs_at(volumes: Volumes, time_ns: int) -> dict[str, int]:
    """Return the seq of each volume at *time_ns*; volumes without a point there are left out.

    NoSuchPointError if that leaves none.
    """
    seqs, problem = {}, None
    for name, volume in volumes.items():
        try:
            seqs[name] = seq_at(volume, time_ns)
        except NoSuchPointError as error:
            problem = error
    if not seqs:
        assert problem is not None
        raise problem
    return seqs


def canonical(volumes: Volumes, time_ns: int) -> TimeNs:
    """Return the canonical time of the moment that *time_ns* means."""
    return TimeNs(max(volumes[name].time_of(seq) for name, seq in seqs_at(volumes, time_ns).items()))


def instant_of(volumes: Volumes, seqs: Mapping[str, int]) -> TimeNs:
    """Return the canonical time of a moment that is known by the newest seq of each volume."""
    return TimeNs(max(volumes[name].time_of(seq) for name, seq in seqs.items()))


def resolve(volumes: Volumes, text: str) -> TimeNs:
    """Return the canonical time of the moment that a spelling means; NoSuchPointError if there is none."""
    return canonical(volumes, time_meant(volumes, text))


def time_meant(volumes: Volumes, text: str) -> int:
    """Return the time that a spelling says; NoSuchPointError if it isn't understood, or names what isn't there."""
    if text == LATEST:
        return instant(latest(volumes))
    clock = next(iter(volumes.values())).clock
    try:
        spelling = parse_spelling(text, now=TimeNs(clock()))
    except InputError as error:
        raise NoSuchPointError(error.message, hint=error.hint) from error
    if isinstance(spelling, AtTime):
        return spelling.time
    if isinstance(spelling, AtSeq):
        return _time_of_seq(volumes, spelling.seq, text) - spelling.offset_ns
    return _time_of_name(volumes, spelling.name) - spelling.offset_ns


def _time_of_seq(volumes: Volumes, seq: int, text: str) -> int:
    if len(volumes) > 1:
        raise NoSuchPointError(
            f"{text} means another moment in each of {len(volumes)} volumes", hint="give a time or a snapshot's name"
        )
    (volume,) = volumes.values()
    if not volume.recoverable(seq):
        raise NoSuchPointError(
            f"volume {volume.info.name} has no recoverable point at seq {seq}", hint="list them: dmafs ls STORE"
        )
    return volume.time_of(seq)


def _time_of_name(volumes: Volumes, name: str) -> int:
    points = [point for volume in volumes.values() if (point := point_named(volume, name))]
    if not points:
        raise NoSuchPointError(f"no snapshot or mark named {name}", hint="list them with: dmafs ls STORE")
    return max(point.instant_ns for point in points)


def snapshot_groups(volumes: Volumes) -> dict[str, dict[str, Snapshot]]:
    """Return all snapshots by id (name or canonical time), then by volume; oldest first."""
    found: list[tuple[int, str, str, Snapshot]] = []
    for name, volume in volumes.items():
        found += [(snap.instant_ns, snapshot_id(snap), name, snap) for snap in volume.snapshots]
    groups: dict[str, dict[str, Snapshot]] = {}
    for _, identifier, name, snapshot in sorted(found, key=lambda entry: entry[:3]):
        groups.setdefault(identifier, {})[name] = snapshot
    return groups


def snapshot_id(snapshot: Snapshot) -> str:
    """Return what a snapshot is called: its name or the canonical time of the instant it was taken at."""
    return snapshot.name or format_time(snapshot.instant_ns)


def instant(group: Mapping[str, Snapshot]) -> TimeNs:
    """Return the canonical time of what was taken together."""
    return TimeNs(max(snapshot.instant_ns for snapshot in group.values()))


def snapshot_group(volumes: Volumes, identifier: str) -> dict[str, Snapshot]:
    """Return the snapshots called *identifier* by volume; NoSuchSnapshotError if there is none."""
    group = {}
    time_ns = parse_canonical(identifier)
    for name, volume in volumes.items():
        snapshot = volume.snapshots.find(identifier) if time_ns is None else volume.snapshots.taken_at(time_ns)
        if snapshot is not None:
            group[name] = snapshot
    if not group:
        raise NoSuchSnapshotError(f"no snapshot named {identifier}", hint="list them with: dmafs ls STORE")
    return group


def group_to_drop(volumes: Volumes, identifier: str) -> dict[str, Snapshot]:
    """Return the snapshots called *identifier* by volume, as ``snapshot_group``; PinnedError if one is pinned."""
    group = snapshot_group(volumes, identifier)
    for snapshot in group.values():
        require_unpinned(snapshot)
    return group


def _all_or_none(steps: Iterable[tuple[Callable[[], Work[None]], Callable[[], Work[None]]]]) -> Work[None]:
    """Do one thing after the other; if one can't be done, undo those before it, and raise why."""
    done: list[Callable[[], Work[None]]] = []
    try:
        for do, undo in steps:
            yield from do()
            done.append(undo)
    except DmafsError:
        for undo in done:
            yield from undo()
        raise


def pin_group(volumes: Volumes, identifier: str) -> Work[None]:
    """Have the snapshots called *identifier* not be dropped: in all volumes or, if one can't do it, in none."""
    return _all_or_none(
        (partial(volumes[name].pin, snapshot), partial(volumes[name].unpin, snapshot))
        for name, snapshot in snapshot_group(volumes, identifier).items()
        if not snapshot.pinned
    )


def unpin_group(volumes: Volumes, identifier: str) -> Work[None]:
    """Let the snapshots called *identifier* be dropped again."""
    for name, snapshot in snapshot_group(volumes, identifier).items():
        yield from volumes[name].unpin(snapshot)


def rename_group(volumes: Volumes, identifier: str, name: str) -> Work[None]:
    """Give the snapshots called *identifier* another name: in all volumes or, if one can't do it, in none.

    ExistsError if a snapshot has that name. If it is one of the same instant of other volumes only, a renaming was cut
    off there, and this ends it.
    """
    group = snapshot_group(volumes, identifier)
    for volume, other in volumes.items():
        there = other.snapshots.find(name)
        if there is not None and (volume in group or there.instant_ns != instant(group)):
            other.snapshots.require_free(name)
    yield from _all_or_none(
        (partial(rename, volumes[volume], snapshot, name), partial(rename, volumes[volume], snapshot, snapshot.name))
        for volume, snapshot in group.items()
    )


def rename(volume: Volume, snapshot: Snapshot, name: str) -> Work[None]:
    """Give a snapshot of one volume another name, durably."""
    with volume.gate():
        yield from volume.snapshots.rename(snapshot, name)


def latest(volumes: Volumes) -> dict[str, Snapshot]:
    """Return the newest snapshot by volume; NoSuchSnapshotError if there is none."""
    groups = snapshot_groups(volumes)
    if not groups:
        raise NoSuchSnapshotError("there is no snapshot yet", hint="take one: dmafs snapshot create STORE NAME")
    return groups[list(groups)[-1]]


def require_mark(volume: Volume, name: str) -> None:
    """Raise what a mark of that name on a volume would raise, or fail to mean, before anything is done for it."""
    volume.require_snapshot(name)
    with volume.gate():
        if needs_resync(volume):
            raise NoSuchPointError(
                f"volume {volume.info.name} can't be marked: a gap lasts", hint="wait until dmafs status says protected"
            )


def clone_groups(volumes: Volumes) -> dict[str, dict[str, Clone]]:
    """Return all clones by name, then by volume; sorted."""
    groups: dict[str, dict[str, Clone]] = {}
    for name, volume in volumes.items():
        for clone in volume.clones:
            groups.setdefault(clone.name, {})[name] = clone
    return dict(sorted(groups.items()))


def clone_group(volumes: Volumes, name: str) -> dict[str, Clone]:
    """Return the clones called *name* by volume; NoSuchCloneError if there is none."""
    found = {volume.info.name: volume.clones.find(name) for volume in volumes.values()}
    group = {volume: clone for volume, clone in found.items() if clone is not None}
    if not group:
        raise NoSuchCloneError(f"no clone named {name}", hint="list them with: dmafs clone list STORE")
    return group


def seqs_to_clone(volumes: Volumes, at: str | None) -> dict[str, int]:
    """Return the seq of each volume at the moment that a spelling means; without one, the newest."""
    if at is not None:
        return seqs_at(volumes, resolve(volumes, at))
    return {name: volume.indicate().seq for name, volume in volumes.items()}


def require_clone(volumes: Volumes, name: str) -> None:
    """Raise what making a clone of that name would raise, before anything is done for it."""
    for volume in volumes.values():
        volume.clones.require_free(name)
    if len(clone_groups(volumes)) >= CLONES_MAX:
        raise StoreFullError(
            f"clone {name} can't be made: there are {CLONES_MAX}, which is the limit", hint="drop one that isn't needed"
        )


def landmark_times(volumes: Volumes) -> tuple[list[TimeNs], dict[str, TimeNs]]:
    """Return the canonical times worth listing, ascending, and the canonical times of named marks and snapshots.

    A mark is one moment of all volumes, whatever the times of their last writes before it.
    """
    times: set[TimeNs] = set()
    instants: dict[str, int] = {}
    for volume in volumes.values():
        newest: dict[str, int] = {}  # of a name: snapshots before marks, among these the last one
        for point in landmarks(volume):
            if point.kind != "mark":
                times.add(canonical(volumes, point.instant_ns))
            if point.name and not (point.kind == "mark" and volume.snapshots.find(point.name)):
                newest[point.name] = point.instant_ns
        for name, instant_ns in newest.items():
            instants[name] = max(instants.get(name, 0), instant_ns)
    names = {name: canonical(volumes, instant_ns) for name, instant_ns in instants.items()}
    return sorted(times | set(names.values())), names
