"""Configuration: ``dmafs.conf`` in the store, TOML, all keys optional; see dmafs.conf(5).

Every limit of the program has a name here (promise 7). Unknown keys and values out of range are errors.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from dmafs.core.journal import SegmentLimits
from dmafs.core.store import CONFIGURATION_NAME
from dmafs.core.volume import VolumeLimits
from dmafs.errors import InputError
from dmafs.units import SECTOR, parse_bytes

_SIZE_KEYS: Final = ("segment_size", "reserve", "clone_quota")


@dataclass(frozen=True, slots=True)
class Configuration:
    """What an administrator may set. Sizes in bytes (``"64MiB"`` in the file), times in seconds."""

    segment_size: int = 64 << 20
    """Data of one segment of the forward journal."""
    segment_records: int = 65536
    """Records of one segment of the forward journal."""
    idle_images: int = 8
    """Maps of past images kept in memory although nobody has them open."""
    reserve: int = 64 << 20
    """Space of the store's filesystem that capture leaves for syncs."""
    clone_quota: int = 10 << 30
    """What one clone of one volume may take of the store's space."""
    tick_s: float = 1.0
    """Longest time between a write and a sync indicator after it."""
    threads: int = 8
    """Threads that reads, flushes and copies wait in."""
    allow_other: bool = False
    """Let other users than the daemon's into the tree, as far as the modes allow."""

    def volume_limits(self) -> VolumeLimits:
        """Return what the core needs of it."""
        return VolumeLimits(
            segments=SegmentLimits(self.segment_size // SECTOR, self.segment_records),
            images=self.idle_images,
            reserve_bytes=self.reserve,
            clone_bytes=self.clone_quota,
        )


_MINIMA: Final[dict[str, float]] = {
    "segment_size": 1 << 20,
    "segment_records": 1024,
    "idle_images": 1,
    "reserve": 0,
    "clone_quota": 0,
    "tick_s": 0.01,
    "threads": 2,
}


def load_configuration(store: Path) -> Configuration:
    """Return the configuration in a store, or the defaults where there is none; InputError for anything not right."""
    path = store / CONFIGURATION_NAME
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):  # the store itself says what is wrong with its path
        return Configuration()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"configuration {path} can't be read: {error}", hint="see dmafs.conf(5)") from error
    known: dict[str, Any] = {entry.name: entry.default for entry in fields(Configuration)}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"configuration {path} has an unknown key {key}", hint=f"keys: {', '.join(known)}")
        values[key] = _checked(path, key, value, known[key])
    return Configuration(**values)


def _checked(path: Path, key: str, value: Any, default: Any) -> Any:  # noqa: ANN401 - of the default's type
    if key in _SIZE_KEYS and isinstance(value, str):
        try:
            value = parse_bytes(value)
        except InputError as error:
            raise InputError(f"configuration {path}: {key}: {error.message}", hint=error.hint) from error
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 63 else math.inf
    if type(value) is not type(default) or (key in _MINIMA and not _MINIMA[key] <= value < math.inf):
        least = f", at least {_MINIMA[key]:g}" if key in _MINIMA else ""
        raise InputError(
            f"configuration {path}: {key} = {value!r} is not right", hint=f"a {type(default).__name__}{least}"
        )
    return value
