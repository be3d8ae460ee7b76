"""Configuration: what a store's ``dmafs.conf``, and the machine's ``dmafs.toml``, may say; see dmafs.conf(5).

Every limit of the program has a name here (promise 7). One dataclass is one table; the top level of a store's file is
``Configuration``, that of the machine's ``Machine``, where each store has the same keys. A field says how its key is
written (its ``Kind``), its default as the file would have it, and its minimum; what reads files (``document``), what
finds them (``loading``), what is loaded again while the daemon runs (``reloading``) and the man page follow from that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple

from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.policy import SnapshotSchedule, SyncPolicy
from dmafs.core.retention import KeepRules
from dmafs.core.store import require_volume_name
from dmafs.errors import InputError
from dmafs.units import SECTOR, parse_bytes, parse_duration_s, parse_share, parse_time_of_day

ADDRESS_HINT: Final = 'such as "127.0.0.1:9110" or "[::1]:9110"; ports are 1 to 65535'
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


class Kind(NamedTuple):
    """A way to write a value: its name in dmafs.conf(5), what is allowed, and what turns it into the program's own."""

    name: str
    allowed: str
    read: Callable[[Any], Any]
    """Raises InputError or TypeError."""


def _number(value: Any) -> int:  # noqa: ANN401 - whatever TOML has
    if type(value) is not int:
        raise TypeError
    return value


def _seconds(value: Any) -> float:  # noqa: ANN401 - whatever TOML has
    if type(value) not in {int, float} or not abs(value) < 1 << 63:
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:  # noqa: ANN401 - whatever TOML has
    if type(value) is not bool:
        raise TypeError
    return value


def _text(value: Any) -> str:  # noqa: ANN401 - whatever TOML has
    if type(value) is not str or not value or "\0" in value:
        raise TypeError
    return value


def _list_of(read: Callable[[str], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - whatever TOML has
        if type(value) is not list:
            raise TypeError
        return tuple(read(_text(entry)) for entry in value)

    return read_all


def _word(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:  # noqa: ANN401 - whatever TOML has
        if value not in words:
            raise TypeError
        return str(value)

    return read


def _path(value: Any) -> Path:  # noqa: ANN401 - whatever TOML has
    path = Path(_text(value))
    if not path.is_absolute():
        raise InputError(f"path {value!r} is not absolute", hint="begin it with a slash")
    return path


def _volume_name(value: Any) -> str:  # noqa: ANN401 - whatever TOML has
    require_volume_name(name := _text(value))
    return name


def _address(value: Any) -> tuple[str, int]:  # noqa: ANN401 - whatever TOML has
    if value == "":
        return "", 0
    host, _, port = _text(value).rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        found = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise InputError(f"{value!r} is no IP address with a port", hint=ADDRESS_HINT) from None
    is_port = _PORT.fullmatch(port) and 0 < int(port) < 1 << 16
    if bracketed != isinstance(found, IPv6Address) or not is_port:
        raise InputError(f"{value!r} is no IP address with a port", hint=ADDRESS_HINT)
    return str(found), int(port)


SIZE: Final = Kind(
    "size", "bytes, or a size", lambda value: parse_bytes(value) if type(value) is str else _number(value)
)
NUMBER: Final = Kind("number", "a whole number", _number)
SECONDS: Final = Kind("seconds", "a number of seconds", _seconds)
FLAG: Final = Kind("flag", "true or false", _flag)
DURATION: Final = Kind(
    "duration", "a duration", lambda value: 0 if value == 0 and value is not False else parse_duration_s(_text(value))
)
SHARE: Final = Kind("share", "a share of a whole", lambda value: parse_share(_text(value)))
SPACE: Final = Kind(
    "space",
    "a size, or a share of the file system",
    lambda value: parse_share(value) if type(value) is str and value.endswith("%") else SIZE.read(value),
)
TIMES: Final = Kind("times", "a list of times of day", _list_of(parse_time_of_day))
PATTERNS: Final = Kind("patterns", "a list of patterns", _list_of(str))
FULL: Final = Kind("policy", "refuse or gap", _word("refuse", "gap"))
COMMAND: Final = Kind("command", "a list of a program and its arguments", _list_of(str))
PATH: Final = Kind("path", "an absolute path", _path)
NAME: Final = Kind("name", "the name of a volume", _volume_name)
TAP: Final = Kind("tap", "fuse, dm or log", _word("fuse", "dm", "log"))
ADDRESS: Final = Kind("address", "an IP address and a port, or empty", _address)


def setting(
    kind: Kind,
    default: Any,  # noqa: ANN401 - whatever TOML has
    *,
    minimum: float | None = None,
    required: bool = False,
) -> Any:  # noqa: ANN401 - a field of any type
    """Return the field of a key; *default* is as in the file or None, *minimum* in the program's own unit."""
    metadata = {"kind": kind, "default": default, "minimum": minimum, "required": required}
    return field(default=None if default is None else kind.read(default), metadata=metadata)


@dataclass(frozen=True, slots=True)
class SyncTable:
    """``[sync]``: when volumes are synced without a command."""

    age: int = setting(DURATION, "24h")
    exact: int = setting(DURATION, "12h")
    journal: int = setting(SIZE, 0, minimum=0)
    free: float = setting(SHARE, "10%")
    at: tuple[int, ...] = setting(TIMES, [])
    marks: tuple[str, ...] = setting(PATTERNS, [])

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if self.age and self.exact >= self.age:
            raise InputError("exact is not less than age", hint='set both, such as age = "24h" and exact = "12h"')

    def policy(self) -> SyncPolicy:
        """Return what the core needs of it."""
        return SyncPolicy(self.age, self.exact, self.journal, self.free, self.at, self.marks)


@dataclass(frozen=True, slots=True)
class SnapshotsTable:
    """``[snapshots]``: when snapshots are taken without a command."""

    every: int = setting(DURATION, "1h")
    at: tuple[int, ...] = setting(TIMES, [])
    before: tuple[str, ...] = setting(COMMAND, [])
    after: tuple[str, ...] = setting(COMMAND, [])
    hook_timeout: int = setting(DURATION, "1min", minimum=1)

    def schedule(self) -> SnapshotSchedule:
        """Return what the core needs of it."""
        return SnapshotSchedule(self.every, self.at, self.before, self.after, self.hook_timeout)


@dataclass(frozen=True, slots=True)
class RetentionTable:
    """``[retention]``: which snapshots are kept."""

    within: int = setting(DURATION, "24h")
    hourly: int = setting(NUMBER, 24, minimum=0)
    daily: int = setting(NUMBER, 7, minimum=0)
    weekly: int = setting(NUMBER, 4, minimum=0)
    monthly: int = setting(NUMBER, 12, minimum=0)
    yearly: int = setting(NUMBER, 3, minimum=0)
    minimum: int = setting(NUMBER, 3, minimum=0)
    named: bool = setting(FLAG, default=True)
    quota: int | float = setting(SPACE, 0, minimum=0)

    def rules(self, store: Path) -> KeepRules:
        """Return what the core needs of it; a quota that is a share is one of the file system that *store* is on."""
        quota = self.quota
        if isinstance(quota, float):
            info = os.statvfs(store)
            quota = int(info.f_blocks * info.f_frsize * quota)
        counts = self.hourly, self.daily, self.weekly, self.monthly, self.yearly
        return KeepRules(self.within, *counts, minimum=self.minimum, named=self.named, quota=quota)


@dataclass(frozen=True, slots=True)
class ResyncTable:
    """``[resync]``: how source and newest image are compared."""

    rate: int = setting(SIZE, "128MiB", minimum=0)


@dataclass(frozen=True, slots=True)
class AlarmsTable:
    """``[alarms]``: what is an alarm, and who is told."""

    command: tuple[str, ...] = setting(COMMAND, [])
    timeout: int = setting(DURATION, "1min", minimum=1)
    free: float = setting(SHARE, "5%")
    history: int = setting(DURATION, 0)


@dataclass(frozen=True, slots=True)
class MetricsTable:
    """``[metrics]``: where metrics can be read besides the control socket."""

    listen: tuple[str, int] = setting(ADDRESS, "")
    """A numeric IP address and a port; port 0 is nowhere."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What an administrator may set. A new table is one more field here."""

    segment_size: int = setting(SIZE, "64MiB", minimum=1 << 20)
    """Data of one segment of the forward journal."""
    segment_records: int = setting(NUMBER, 65536, minimum=1024)
    """Records of one segment of the forward journal."""
    idle_images: int = setting(NUMBER, 8, minimum=1)
    """Maps of past images kept in memory although nobody has them open."""
    index_size: int = setting(SIZE, "128MiB", minimum=0)
    """Merged layers kept in memory, of the forward and of the backward journal of a volume each."""
    open_journals: int = setting(NUMBER, 1024, minimum=1)
    """Snapshots, and segments, of a volume whose files are kept open, with their descriptors in memory."""
    open_records: int = setting(NUMBER, 2097152, minimum=1)
    """Descriptors of all these together."""
    reserve: int = setting(SIZE, "64MiB", minimum=0)
    """Space of the store's filesystem that capture leaves for syncs."""
    when_full: str = setting(FULL, "refuse")
    """What becomes of writes through the tree for which the store has no space and none can be made."""
    clone_quota: int = setting(SIZE, "10GiB", minimum=0)
    """What one clone of one volume may take of the store's space."""
    tick_s: float = setting(SECONDS, 1, minimum=0.01)
    """Longest time between a write and a sync indicator after it."""
    log_size: int = setting(SIZE, "16GiB", minimum=1 << 20)
    """Size of the logs of dm taps: as much can be written while no daemon runs, before a gap begins."""
    threads: int = setting(NUMBER, 8, minimum=2)
    """Threads that reads, flushes and copies wait in."""
    allow_other: bool = setting(FLAG, default=False)
    """Let other users than the daemon's into the tree, as far as the modes allow."""
    sync: SyncTable = field(default_factory=SyncTable, metadata={"table": SyncTable})
    snapshots: SnapshotsTable = field(default_factory=SnapshotsTable, metadata={"table": SnapshotsTable})
    retention: RetentionTable = field(default_factory=RetentionTable, metadata={"table": RetentionTable})
    resync: ResyncTable = field(default_factory=ResyncTable, metadata={"table": ResyncTable})
    alarms: AlarmsTable = field(default_factory=AlarmsTable, metadata={"table": AlarmsTable})
    metrics: MetricsTable = field(default_factory=MetricsTable, metadata={"table": MetricsTable})

    @property
    def has_hooks(self) -> bool:
        """Whether the daemon runs programs of the administrator."""
        return bool(self.snapshots.before or self.snapshots.after or self.alarms.command)

    def volume_limits(self) -> VolumeLimits:
        """Return what the core needs of it."""
        return VolumeLimits(
            segments=SegmentLimits(self.segment_size // SECTOR, self.segment_records),
            index=IndexLimits(self.index_size, self.open_journals, self.open_records),
            images=self.idle_images,
            reserve_bytes=self.reserve,
            clone_bytes=self.clone_quota,
        )


@dataclass(frozen=True, slots=True)
class VolumeTable:
    """``[[store.volume]]``: a volume that the daemon makes if it isn't there."""

    name: str = setting(NAME, "disk")
    source: Path = setting(PATH, None, required=True)  # noqa: RUF009 - it is a field
    tap: str = setting(TAP, "fuse")
    log: Path | None = setting(PATH, None)  # noqa: RUF009 - it is a field

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if (self.log is not None) != (self.tap == "log"):
            raise InputError('tap = "log" and log belong together', hint="give both or none")


@dataclass(frozen=True, slots=True)
class StoreTable(Configuration):
    """``[[store]]``: a store of the machine, with all that ``dmafs.conf`` may say."""

    path: Path = setting(PATH, None, required=True)  # noqa: RUF009 - it is a field
    mount: Path | None = setting(PATH, None)  # noqa: RUF009 - it is a field
    volume: tuple[VolumeTable, ...] = field(default=(), metadata={"tables": VolumeTable})


@dataclass(frozen=True, slots=True)
class Machine:
    """The whole of ``dmafs.toml``."""

    store: tuple[StoreTable, ...] = field(default=(), metadata={"tables": StoreTable})
