"""What the control interface and ``dmafs.client`` answer, as JSON has it: one ``TypedDict`` for each object.

The OpenAPI document's schemas are made from these types. Sizes, offsets and lengths are bytes unless the name of the
field says otherwise; a seq is the number of a write event in its volume; times are RFC 3339 in UTC, to the nanosecond.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict, final

Time = Annotated[str, ("format", "date-time")]
Count = Annotated[int, ("minimum", 0)]
Fraction = Annotated[float, ("minimum", 0), ("maximum", 1)]
Extent = Annotated[list[Count], ("minItems", 2), ("maxItems", 2)]
"""Offset and length."""
Consistency = Annotated[str, ("enum", ("crash", "exact", "frozen"))]
"""Between two flushes; at one; at one for which a hook had brought the disk's users to rest."""


class Error(TypedDict):
    """Why a request wasn't answered: the class's name in the tree of errors, what is wrong, and what to do."""

    error: str
    message: str
    hint: str


# -- status ---------------------------------------------------------------------------------------------------------


class Place(TypedDict):
    """A place in a volume's history; its time is null where nobody knows it."""

    seq: Count
    time: Time | None


class Gap(TypedDict):
    """An interval in which capture was not complete; its end is null while it lasts."""

    begin: Place
    end: Place | None


class Failure(TypedDict):
    """Why a volume takes no more writes, and what to do."""

    what: str
    since: Time
    hint: str


class Forward(TypedDict):
    """The forward journal: events since the mirror, and what its segments hold."""

    events: Count
    segments: Count
    bytes: Count


class _Device(TypedDict):
    volume: str
    device: str
    attached: bool


class Device(_Device, total=False):
    """A mapped device, and its log, of which nothing is known if the device isn't attached."""

    logging: bool
    log: str
    log_bytes: Count
    log_limit_bytes: Count
    log_entries: Count
    open_count: Count


class Progress(TypedDict):
    """How far a verify, resync or scrub is."""

    kind: Annotated[str, ("enum", ("verify", "resync", "scrub"))]
    fraction: Fraction
    done_bytes: Count
    total_bytes: Count
    bytes_per_s: Count


class LastCheck(TypedDict):
    """What the last verify or resync has found."""

    kind: Annotated[str, ("enum", ("verify", "resync"))]
    time: Time
    bytes: Count
    count: Count
    busy_bytes: Count


class LastScrub(TypedDict):
    """What the last scrub has found; *ended* is false if it was given up."""

    time: Time
    ended: bool
    count: Count
    repaired: Count


State = Annotated[str, ("enum", ("read-only", "copying", "resyncing", "protected", "imported"))]


class VolumeStatus(TypedDict):
    """The state of a volume; null and 0 where it takes a daemon to know."""

    name: str
    uuid: str
    source: str
    tap: Annotated[str, ("enum", ("fuse", "dm", "log", "none"))]
    size_bytes: Count
    state: State
    failure: Failure | None
    copy_fraction: Fraction
    copy_bytes_per_s: Count
    origin: Place | None
    oldest: Place | None
    newest: Place
    durable_seq: Count
    gaps: list[Gap]
    mirror: Place
    mirror_bytes: Count
    forward: Forward
    snapshots: Count
    syncs: Count
    sync_saved_bytes: Count
    sync_applied_bytes: Count
    syncing: bool
    commits: Count
    device: Device | None
    loss: str
    check: Progress | None
    last_check: LastCheck | None
    last_scrub: LastScrub | None


class Alarm(TypedDict):
    """Something that somebody should look at; one of the whole store has an empty volume."""

    kind: str
    volume: str
    since: Time
    message: str


class Run(TypedDict):
    """What was done last by schedule."""

    time: Time
    reason: str
    result: str


class Plan(TypedDict):
    """What is done next by schedule, if that is known, and what was done last."""

    next: Time | None
    last: Run | None


class Schedule(TypedDict):
    """What is planned: snapshots of all volumes, and the syncs of each."""

    snapshots: Plan
    syncs: dict[str, Plan]


class _Setting(TypedDict):
    value: Any
    origin: str


class Setting(_Setting, total=False):
    """A setting in effect, where it is from, and the value it has after a restart if that is another one."""

    after_restart: Any


class _Settings(TypedDict):
    file: str | None
    loaded: Time
    settings: dict[str, Setting]


class Settings(_Settings, total=False):
    """A configuration: the file, when it was loaded, and all settings; of a daemon, also the file's problem."""

    problem: str
    after_restart: list[str]


class DaemonStatus(TypedDict):
    """The daemon that serves a store."""

    pid: Count
    schedule: Schedule | None
    configuration: Settings | None


class Status(TypedDict):
    """The state of everything; no daemon is null."""

    daemon: DaemonStatus | None
    alarms: list[Alarm]
    volumes: list[VolumeStatus]


# -- moments --------------------------------------------------------------------------------------------------------


class Point(TypedDict):
    """A recoverable moment of a volume, with the name of its folder in the tree."""

    volume: str
    kind: Annotated[str, ("enum", ("origin", "mirror", "snapshot", "mark", "grid", "newest"))]
    name: str
    pinned: bool
    at: str
    consistency: Consistency
    seq: Count
    time: Time


class Snapshot(TypedDict):
    """A snapshot of all volumes, or some: the seq in each."""

    id: str
    time: Time
    pinned: bool
    consistency: Consistency
    volumes: dict[str, Count]


class Snapshots(TypedDict):
    """All snapshots, oldest first."""

    snapshots: list[Snapshot]


class Points(Snapshots):
    """The moments worth listing, by volume, and all snapshots."""

    points: list[Point]


@final
class MomentOfVolume(TypedDict):
    """What a time means in a volume, and why."""

    volume: str
    size_bytes: Count
    kind: Annotated[str, ("enum", ("origin", "mirror", "snapshot", "mark", "write"))]
    name: str
    seq: Count
    time: Time
    consistency: Consistency
    earlier_ns: int
    why: str


@final
class NoMoment(TypedDict):
    """Why a volume has no moment at a time."""

    volume: str
    problem: str
    hint: str


class Moment(TypedDict):
    """What a time means; *at* is the name of the folder in the tree."""

    asked: Time
    at: str
    volumes: list[MomentOfVolume | NoMoment]


class Difference(TypedDict):
    """What was written to a volume between two moments."""

    volume: str
    a: Place
    b: Place
    extents: list[Extent]
    bytes: Count


# -- what is done ---------------------------------------------------------------------------------------------------


class Named(TypedDict):
    """The name of what was made, set or dropped."""

    name: str


class Pinned(TypedDict):
    """A snapshot, and whether it is pinned now."""

    id: str
    pinned: bool


class Renamed(TypedDict):
    """A snapshot's new name, and what it was called before."""

    id: str
    name: str


class Dropped(TypedDict):
    """A snapshot that was dropped."""

    id: str


class Synced(TypedDict):
    """A volume, and where its mirror is now."""

    name: str
    mirror_seq: Count


class Syncs(TypedDict):
    """What syncs have done, by volume."""

    volumes: list[Synced]


class Verdict(TypedDict):
    """What becomes of a snapshot: the rules that keep it, or why it goes; and what it holds."""

    id: str
    time: Time
    kept: bool
    reasons: list[str]
    held_bytes: Count


class Thinned(TypedDict):
    """What was dropped, or would be, and what is kept."""

    dry_run: bool
    snapshots: list[Verdict]


class Clone(TypedDict):
    """A writable clone: its moment, what its overlay takes, and the seq in each volume."""

    name: str
    time: Time
    stored_bytes: Count
    open: bool
    failure: str
    volumes: dict[str, Count]


class Clones(TypedDict):
    """All clones."""

    clones: list[Clone]


class Taps(TypedDict):
    """The mapped devices of volumes."""

    volumes: list[Device]


# -- checks ---------------------------------------------------------------------------------------------------------


class Differences(TypedDict):
    """Where source and newest image differed, as far as that is listed, and how much in all."""

    volume: str
    extents: list[Extent]
    count: Count
    bytes: Count
    busy_bytes: Count
    compared_bytes: Count


class Damage(TypedDict):
    """A damaged place, the moments that show it, and whether it was repaired."""

    place: str
    file: str
    offset: Count
    length: Count
    first: Place | None
    last: Place | None
    newest: bool
    repaired: bool


class Scrubbed(TypedDict):
    """What a scrub has found."""

    volume: str
    begun: Time
    ended: Time | None
    read_bytes: Count
    count: Count
    repaired: Count
    damage: list[Damage]
