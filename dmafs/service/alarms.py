"""Alarms: what somebody should look at, shown by status for as long as it lasts and told when it begins and ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from dmafs import answers
from dmafs.units import format_rfc3339

log = logging.getLogger(__name__)

GAP_ALARM: Final = "gap"
SPACE_ALARM: Final = "space"
RETENTION_ALARM: Final = "retention"
DAMAGE_ALARM: Final = "damage"
HISTORY_ALARM: Final = "history"
FREE_ALARM: Final = "free"
OF_VOLUMES: Final = (GAP_ALARM, DAMAGE_ALARM, HISTORY_ALARM)
OF_STORE: Final = (SPACE_ALARM, FREE_ALARM, RETENTION_ALARM)


@dataclass(slots=True)
class Alarm:
    """One thing that lasts; *worse* is whether it has got beyond what could still be mended."""

    since_ns: int
    message: str
    worse: bool


class Told(NamedTuple):
    """What is told of an alarm: its kind, the volume (empty: the store's), and whether it was raised or cleared."""

    kind: str
    volume: str
    raised: bool
    message: str


class Alarms:
    """All alarms by kind and volume, each at most once."""

    def __init__(self, clock: Callable[[], int]) -> None:
        """Begin with none. *clock* returns UTC nanoseconds."""
        self._clock = clock
        self._alarms: dict[tuple[str, str], Alarm] = {}
        self.raised = 0
        """How many have begun."""
        self.tell: Callable[[Told], None] = lambda _told: None
        """Is told of each beginning and end; set by who passes it on."""

    def set(self, kind: str, message: str, *, volume: str = "", worse: bool = False) -> None:
        """Have an alarm on. Logged when it begins and when it gets worse, and not again before it has cleared."""
        known = self._alarms.get((kind, volume))
        if known is None or (worse and not known.worse):
            log.error("%s", message, extra={"alarm": kind, "volume": volume})
        if known is None:
            self._alarms[kind, volume] = Alarm(self._clock(), message, worse)
            self.raised += 1
            self.tell(Told(kind, volume, raised=True, message=message))
        else:
            known.message = message
            known.worse |= worse

    def clear(self, kind: str, volume: str = "") -> None:
        """Have an alarm off; that is logged, too."""
        known = self._alarms.pop((kind, volume), None)
        if known is not None:
            log.warning("alarm %s is over: %s", kind, known.message, extra={"alarm": kind, "volume": volume})
            self.tell(Told(kind, volume, raised=False, message=known.message))

    def is_on(self, kind: str, volume: str = "") -> bool:
        """Say whether it lasts."""
        return (kind, volume) in self._alarms

    def report(self) -> list[answers.Alarm]:
        """Return what is on, oldest first; an alarm of the store has an empty volume."""
        return [
            {"kind": kind, "volume": volume, "since": format_rfc3339(alarm.since_ns), "message": alarm.message}
            for (kind, volume), alarm in self._alarms.items()
        ]
