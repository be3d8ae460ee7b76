"""Alarms: what somebody should look at, shown by status for as long as it lasts and logged when it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from dmafs.service.report import Report
from dmafs.units import format_rfc3339

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Alarm:
    """One thing that lasts; *worse* is whether it has got beyond what could still be mended."""

    since_ns: int
    message: str
    worse: bool


class Alarms:
    """All alarms by kind, each at most once."""

    def __init__(self, clock: Callable[[], int]) -> None:
        """Begin with none. *clock* returns UTC nanoseconds."""
        self._clock = clock
        self._alarms: dict[str, Alarm] = {}

    def set(self, kind: str, message: str, *, worse: bool = False) -> None:
        """Have an alarm on. Logged when it begins and when it gets worse, and not again before it has cleared."""
        known = self._alarms.get(kind)
        if known is None or (worse and not known.worse):
            log.error("%s", message)
        if known is None:
            self._alarms[kind] = Alarm(self._clock(), message, worse)
        else:
            known.message = message
            known.worse |= worse

    def clear(self, kind: str) -> None:
        """Have an alarm off."""
        known = self._alarms.pop(kind, None)
        if known is not None:
            log.info("alarm %s is over: %s", kind, known.message)

    def report(self) -> list[Report]:
        """Return what is on, oldest first."""
        return [
            {"kind": kind, "since": format_rfc3339(alarm.since_ns), "message": alarm.message}
            for kind, alarm in self._alarms.items()
        ]
