"""The keeper: the daemon's task that thins snapshots by the rules and makes room before the store is full.

Once in a while it thins, then looks at the store's free space. Where that is hardly more than the reserve that capture
leaves for syncs, it has the oldest snapshots dropped that the floor of retention allows. Writes that find the store
full in between ask for the same themselves (``Appliance.make_room``). The alarm that tells of it lasts until there is
twice the reserve, and long enough to be seen: what was dropped is history that its owner had counted on.
"""

from __future__ import annotations

from typing import Final

import trio

from dmafs.service.alarms import RETENTION_ALARM, SPACE_ALARM
from dmafs.service.appliance import Appliance
from dmafs.service.tasks import TROUBLE

CHECK_S: Final = 60.0
"""How often snapshots are thinned and the free space is looked at."""
ALARM_S: Final = 3600.0
"""How long the alarm lasts at least after the last time that space was short."""


class Keeper:
    """Keeps the store of an appliance within its rules."""

    def __init__(self, appliance: Appliance) -> None:
        """Look after *appliance*."""
        self._appliance = appliance

    async def run(self) -> None:
        """Check at once and then every CHECK_S until cancelled."""
        while True:
            await self.check()
            await trio.sleep(CHECK_S)

    async def check(self) -> None:
        """Thin, and make room if need be."""
        alarms = self._appliance.alarms
        self._appliance.clear_gaps()
        try:
            await self._appliance.thin(measured=False)
        except TROUBLE as error:
            alarms.set(RETENTION_ALARM, f"snapshots can't be thinned: {error}")
        else:
            alarms.clear(RETENTION_ALARM)
        reserve = self._appliance.reserve
        await self._appliance.make_room(reserve // 4)
        seen = trio.current_time() - self._appliance.short_at >= ALARM_S
        if seen and self._appliance.space().available >= 2 * reserve:
            alarms.clear(SPACE_ALARM)
