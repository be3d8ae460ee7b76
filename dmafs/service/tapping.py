"""Which engine a volume has, by its tap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import trio

from dmafs import answers
from dmafs.core.policy import VolumeFacts
from dmafs.core.storage import open_source
from dmafs.core.sync import Stops
from dmafs.core.volume import Volume
from dmafs.service.configuration import Configuration
from dmafs.service.devices import mapped_volumes
from dmafs.service.engine import Engine
from dmafs.service.following import FollowingEngine
from dmafs.service.passing import PassThroughEngine
from dmafs.taps.dm import DmTap
from dmafs.taps.follower import LogTap
from dmafs.taps.passthrough import PassThroughTap
from dmafs.taps.recorded import NoTap


class PastEngine(Engine):
    """The engine of a volume that was imported: all of its history is there."""

    def facts(self) -> VolumeFacts:
        """See ``Engine``. No sync is ever due by itself: it would take moments away, however old they are already."""
        nowhere = Stops(*(np.empty(0, np.int64) for _ in Stops._fields))
        return replace(super().facts(), oldest_ns=0, stops=lambda: nowhere)


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
            through = PassThroughTap(volume, open_source(source, writable=True))
            return PassThroughEngine(volume, through, goes_on=configuration.when_full == "gap", **settings)
        case _:
            return PastEngine(volume, NoTap(volume), **settings)


def adjust_engine(engine: Engine, configuration: Configuration) -> None:
    """Have a running engine go by another configuration, as far as that can be; see ``reloading``."""
    engine.tick_s = configuration.tick_s
    engine.checking.bytes_per_s = configuration.resync.rate
    engine.volume.clones.allowance.quota = configuration.clone_quota
    if isinstance(engine, PassThroughEngine):
        engine.goes_on = configuration.when_full == "gap"
    if isinstance(engine.tap, LogTap):
        engine.tap.settle_s = configuration.tick_s


async def tap_reports(engines: Mapping[str, Engine], action: str, volume: str | None) -> answers.Taps:
    """Attach or detach the mapped devices of all volumes that have one, or of the one named, or only report them."""
    reports = []
    for name in mapped_volumes({each: engine.volume for each, engine in engines.items()}, volume):
        engine = engines[name]
        assert isinstance(engine, FollowingEngine)
        reports.append(await engine.tap_report(action))
    return {"volumes": reports}
