"""What commands say as JSON, where that isn't an answer of the control interface as it is."""

from __future__ import annotations

from typing import Any, TypedDict

from dmafs.answers import Consistency, Count, Place, Scrubbed, Settings, Time
from dmafs.service.openapi import schema_of

Schema = dict[str, Any]


class NamedExtent(TypedDict):
    """An extent in bytes."""

    offset: Count
    length: Count


class Diff(TypedDict):
    """Of ``diff``."""

    volume: str
    a: Place
    b: Place
    extents: list[NamedExtent]
    bytes: Count
    count: Count


class ComparedVolume(TypedDict):
    """A volume of ``verify`` and ``resync``."""

    volume: str
    extents: list[NamedExtent]
    count: Count
    bytes: Count
    busy_bytes: Count
    compared_bytes: Count


class Compared(TypedDict):
    """Of ``verify`` and ``resync``."""

    volumes: list[ComparedVolume]


class ScrubbedVolumes(TypedDict):
    """Of ``scrub``."""

    volumes: list[Scrubbed]


class MomentWithPath(TypedDict):
    """A volume of ``at``, with where the tree shows it: answers.MomentOfVolume is final."""

    volume: str
    size_bytes: Count
    kind: str
    name: str
    seq: Count
    time: Time
    consistency: Consistency
    earlier_ns: int
    why: str
    path: str | None


class NoMomentWithPath(TypedDict):
    """Likewise, of a volume that has nothing there."""

    volume: str
    problem: str
    hint: str
    path: None


class At(TypedDict):
    """Of ``at``."""

    asked: Time
    at: str
    volumes: list[MomentWithPath | NoMomentWithPath]


class Copied(TypedDict):
    """Of ``cp``."""

    volume: str
    at: str
    time: Time
    file: str
    offset: Count
    bytes: Count
    data_bytes: Count


class Mounted(TypedDict):
    """Of ``mount``."""

    volume: str
    at: str
    time: Time
    partition: int | None
    type: str
    options: str
    device: str
    clone: str | None
    directory: str


class Made(TypedDict):
    """Of ``create``."""

    store: str
    volume: str
    device: str | None
    warnings: list[str]


class Imported(TypedDict):
    """Of ``import``."""

    store: str
    volume: str
    events: Count
    marks: Count
    windows: Count
    doubtful_sectors: Count
    other_marks: Count


class Unmounted(TypedDict):
    """Of ``umount``."""

    directory: str
    clone: str | None
    left: bool


class ConfigurationError(TypedDict):
    """A line of a configuration that is wrong."""

    line: int | None
    message: str
    hint: str


class Configuration(TypedDict):
    """Of ``config check``."""

    file: str
    errors: list[ConfigurationError]


class SettingsInEffect(Settings):
    """Of ``config show``."""

    daemon: int | None


class Finding(TypedDict):
    """Something wrong with a store."""

    severity: str
    file: str
    problem: str
    remedy: str


class Inspection(TypedDict):
    """Of ``check``."""

    volumes: list[str]
    errors: Count
    findings: list[Finding]


def schema(kind: type[Any]) -> Schema:
    """Return the schema of an answer, with those that it refers to."""
    schemas: dict[str, Schema] = {}
    return {**schema_of(kind, schemas), "components": {"schemas": schemas}}
