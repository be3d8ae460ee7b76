"""Which engine a volume has, by its tap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from dmafs.core.storage import open_source
from dmafs.core.volume import Volume
from dmafs.service.configuration import Configuration
from dmafs.service.engine import Engine
from dmafs.service.following import FollowingEngine
from dmafs.taps.dm import DmTap
from dmafs.taps.follower import LogTap
from dmafs.taps.passthrough import PassThroughTap
from dmafs.taps.recorded import NoTap


def open_engine(volume: Volume, directory: Path, configuration: Configuration, limiter: trio.CapacityLimiter) -> Engine:
    """Return the engine of a volume whose directory is given, with its tap open."""
    settings: dict[str, Any] = {
        "tick_s": configuration.tick_s,
        "limiter": limiter,
        "resync_rate": configuration.resync.rate,
    }
    source = Path(volume.info.source)
    match volume.info.tap:
        case "dm":
            tap = DmTap(volume, directory, log_bytes=configuration.log_size)
            return FollowingEngine(volume, tap, **settings)
        case "log":
            follower = LogTap(volume, open_source(source, writable=False), settle_s=configuration.tick_s)
            return FollowingEngine(volume, follower, **settings)
        case "fuse":
            return Engine(volume, PassThroughTap(volume, open_source(source, writable=True)), **settings)
        case _:
            return Engine(volume, NoTap(volume), **settings)
