"""Loading the configuration again while the daemon runs: on SIGHUP, wholly or not at all.

``LIVE`` and ``RESTART`` have every key between them. All that is live is set between two steps of the tasks that look
at it, so none of them ever sees half of it. What can't be changed stays as it was when the daemon started, and the log
says so. A file that isn't right changes nothing: an alarm tells of it until one is loaded that is.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from dmafs import answers
from dmafs.errors import DmafsError
from dmafs.service.appliance import Appliance
from dmafs.service.configuration import Configuration
from dmafs.service.engine import Engine
from dmafs.service.loading import Loaded, load, setting_keys
from dmafs.service.scheduler import Scheduler
from dmafs.service.tapping import adjust_engine
from dmafs.service.watching import Watch

log = logging.getLogger(__name__)

CONFIGURATION_ALARM: Final = "configuration"

LIVE: Final = ("when_full", "clone_quota", "tick_s", "sync", "snapshots", "retention", "resync", "alarms")
"""What is changed while the daemon runs: keys of the top level, and tables as a whole."""
RESTART: Final = (
    "segment_size",
    "segment_records",
    "idle_images",
    "index_size",
    "open_journals",
    "open_records",
    "reserve",
    "log_size",
    "threads",
    "allow_other",
    "metrics",
)
"""What the next daemon takes up, likewise."""
OF_THE_MACHINE: Final = ("mount", "volume")
"""Likewise, of a store in the machine's file."""


class Reloading:
    """What a daemon knows of its configuration; ``wanted`` asks for a newer one."""

    def __init__(self, store: Path, loaded: Loaded) -> None:
        """Begin with what was *loaded* for *store*."""
        self._store = store
        self._first = self._newest = loaded
        self._problem = ""
        self._wanted = trio.Event()

    @property
    def started(self) -> Configuration:
        """Return what the daemon was started with."""
        return self._first.configuration

    def want(self) -> None:
        """Have it loaded again, now or as soon as the daemon has started."""
        self._wanted.set()

    async def run(
        self, appliance: Appliance, engines: Mapping[str, Engine], scheduler: Scheduler, watch: Watch
    ) -> None:
        """Load it whenever that is wanted, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                loaded = await trio.to_thread.run_sync(load, self._store)
                effective = self._effective(loaded)
                rules = effective.retention.rules(self._store)
            except (DmafsError, OSError) as error:
                self._problem = str(error)
                alarm = f"{error}; {self._newest.source} as it was stays in effect"
                appliance.alarms.clear(CONFIGURATION_ALARM)  # the message may be another one
                appliance.alarms.set(CONFIGURATION_ALARM, alarm)
                continue
            appliance.rules = rules
            scheduler.adjust(effective.sync.policy(), effective.snapshots.schedule())
            watch.adjust(effective.alarms)
            for engine in engines.values():
                adjust_engine(engine, effective)
            self._tell(loaded)
            self._newest, self._problem = loaded, ""
            appliance.alarms.clear(CONFIGURATION_ALARM)

    def _effective(self, loaded: Loaded) -> Configuration:
        """Return what holds from now on: of what needs a restart, that of the start."""
        return replace(loaded.configuration, **{key: getattr(self.started, key) for key in RESTART})

    def _tell(self, loaded: Loaded) -> None:
        before, after = self._newest.settings(), loaded.settings()
        changed = [key for key in after if key in before and after[key]["value"] != before[key]["value"]]
        log.info("%s loaded again; changed: %s", loaded.source, ", ".join(changed) or "nothing")
        if waiting := self._waiting(loaded):
            log.warning("%s: needs a restart of the daemon: %s", loaded.source, ", ".join(waiting))
        if loaded.configuration.has_hooks and not self.started.has_hooks and os.geteuid() == 0:
            log.warning("%s: hooks that become another user need a restart of the daemon", loaded.source)

    def _waiting(self, loaded: Loaded) -> list[str]:
        """Return what is set otherwise than at the start and needs a restart."""
        old, new = self.started, loaded.configuration
        of_stores = [key for key in OF_THE_MACHINE if getattr(old, key, None) != getattr(new, key, None)]
        return [key for key in _restart_keys() if _of(old, key) != _of(new, key)] + of_stores

    def report(self) -> answers.Settings:
        """Return file, time and settings in effect; of what waits for a restart, with the value then."""
        report = self._newest.report()
        settings, started = report["settings"], self._first.settings()
        waiting = self._waiting(self._newest)
        for key in waiting:
            if key in settings:
                settings[key] = {**started[key], "after_restart": settings[key]["value"]}
        return {**report, "problem": self._problem, "after_restart": waiting}


def _restart_keys() -> list[str]:
    return [".".join(key) for key in setting_keys() if key[0] in RESTART]


def _of(configuration: Configuration, key: str) -> object:
    return operator.attrgetter(key)(configuration)
