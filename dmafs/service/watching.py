"""The watch: looks once a second whether something is the case that somebody should know.

=========  =======  ===============================================  ==========================================
alarm      of       is raised                                        is cleared
=========  =======  ===============================================  ==========================================
gap        volume   when a gap has begun                             when it has ended
damage     volume   when a read finds a wrong checksum, or a scrub   when a scrub that began later has left no
                    leaves damage that couldn't be repaired          damage unrepaired
history    volume   when its oldest moment isn't as old as           when it is older by a tenth
                    ``[alarms] history`` says, but the volume is
free       store    when less space is free than ``[alarms] free``   when there is a quarter more than that
=========  =======  ===============================================  ==========================================

Beside these the appliance has the alarm ``space`` (history was dropped for lack of space), the keeper ``retention``
(snapshots can't be thinned); see there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import trio

from dmafs.core.points import oldest_point
from dmafs.core.resync import needs_resync
from dmafs.core.volume import Volume
from dmafs.service.alarms import DAMAGE_ALARM, FREE_ALARM, GAP_ALARM, HISTORY_ALARM
from dmafs.service.appliance import Appliance
from dmafs.service.configuration import AlarmsTable
from dmafs.service.engine import Engine
from dmafs.service.telling import Teller
from dmafs.units import format_bytes, format_rfc3339

LOOK_S: Final = 1.0
MORE_HISTORY: Final = 10
"""By this part of what is promised there has to be more before the alarm is over."""
MORE_FREE: Final = 4
"""Likewise of the free space."""


class Watch:
    """Keeps the alarms of an appliance up to date."""

    def __init__(
        self, appliance: Appliance, engines: Mapping[str, Engine], table: AlarmsTable, environment: Mapping[str, str]
    ) -> None:
        """Look at *engines* with the thresholds of *table*, and run its command with *environment*."""
        self._appliance = appliance
        self._alarms = appliance.alarms
        self._engines = engines
        self._table = table
        self._teller = Teller(table.command, table.timeout, environment)
        self._damaged = dict.fromkeys(engines, 0)  # reads that failed when it was looked at last
        self._damaged_ns = dict.fromkeys(engines, 0)  # and when one more had

    def adjust(self, table: AlarmsTable) -> None:
        """Go by another table from now on."""
        self._table = table
        self._teller.adjust(table.command, table.timeout)
        if not table.history:
            for name in self._engines:
                self._alarms.clear(HISTORY_ALARM, name)

    async def run(self) -> None:
        """Look, and tell, until cancelled; whoever looks at the alarms of the appliance has them brought up to date."""
        self._alarms.tell = self._teller.tell
        self._appliance.look = self.look
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._teller.run)
            while True:
                self.look()
                await trio.sleep(LOOK_S)

    def look(self) -> None:
        """Raise and clear what is due; at once."""
        self._appliance.clear_gaps()
        for name, engine in self._engines.items():
            self._look_at_gap(name, engine.volume)
            self._look_at_damage(name, engine)
            if self._table.history:
                self._look_at_history(name, engine.volume)
        self._look_at_space()

    def _look_at_gap(self, name: str, volume: Volume) -> None:
        if needs_resync(volume) and not self._alarms.is_on(GAP_ALARM, name):
            begun = format_rfc3339(volume.journal.gaps[-1].begin_time_ns)
            self._alarms.set(GAP_ALARM, f"volume {name}: a gap is open, it has begun at {begun}", volume=name)

    def _look_at_damage(self, name: str, engine: Engine) -> None:
        scrubbed, count = engine.checking.last_scrub, engine.volume.statistics.damaged_reads
        has_failed = count > self._damaged[name]
        if has_failed:
            self._damaged[name], self._damaged_ns[name] = count, engine.volume.clock()
        if scrubbed is not None and scrubbed.left:
            text = f"volume {name}: damage that a scrub has found is not repaired; places: {scrubbed.left}"
            self._alarms.set(DAMAGE_ALARM, text, volume=name)
        elif has_failed:
            text = f"volume {name}: a read has found a wrong checksum; find what is damaged with: dmafs scrub"
            self._alarms.set(DAMAGE_ALARM, text, volume=name)
        elif scrubbed is not None and scrubbed.ended_ns and scrubbed.begun_ns > self._damaged_ns[name]:
            self._alarms.clear(DAMAGE_ALARM, name)

    def _look_at_history(self, name: str, volume: Volume) -> None:
        now_ns, promised_ns = volume.clock(), self._table.history * 10**9
        had_ns = now_ns - oldest_point(volume).time_ns if volume.pointers.now.copied else 0
        if now_ns - volume.info.created_ns < promised_ns or had_ns >= promised_ns + promised_ns // MORE_HISTORY:
            self._alarms.clear(HISTORY_ALARM, name)
        elif had_ns < promised_ns:
            begins = f"begins at {format_rfc3339(now_ns - had_ns)}" if had_ns else "hasn't begun"
            text = f"volume {name}: history {begins}: that is shorter than the {self._table.history} s promised"
            self._alarms.set(HISTORY_ALARM, text, volume=name)

    def _look_at_space(self) -> None:
        space, wanted = self._appliance.space(), self._table.free
        share = space.available / space.total
        if share >= wanted + wanted / MORE_FREE:
            self._alarms.clear(FREE_ALARM)
        elif share < wanted:
            free, total = format_bytes(space.available), format_bytes(space.total)
            text = f"the file system of the store is nearly full: {free} of {total} are free, {share:.1%}"
            self._alarms.set(FREE_ALARM, text)
