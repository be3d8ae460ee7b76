"""Tells of alarms: runs the administrator's command for each one that is raised or cleared, one after the other.

Nobody waits for that. What a slow command hasn't been told of yet waits, up to a limit; a command that fails is logged
once, until it has succeeded again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from dmafs.service.alarms import Told
from dmafs.service.hooks import run_hook

log = logging.getLogger(__name__)

WAITING_MAX: Final = 64
"""What waits to be told; of more nothing is told but in the log, where all alarms are."""


class Teller:
    """Runs one command."""

    def __init__(self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str]) -> None:
        """Run *command*, if there is one, with *environment* besides what the alarm says."""
        self._command = command
        self._timeout_s = timeout_s
        self._environment = environment
        self._send, self._receive = trio.open_memory_channel[Told](WAITING_MAX)
        self._failing = self._full = False

    def adjust(self, command: Sequence[str], timeout_s: float) -> None:
        """Run another command from the next alarm on that is told; without one, none of those that wait."""
        self._command, self._timeout_s = command, timeout_s
        self._failing = False

    def tell(self, told: Told) -> None:
        """Have the command run soon."""
        if not self._command:
            return
        try:
            self._send.send_nowait(told)
        except trio.WouldBlock:
            if not self._full:
                log.warning("%d alarms wait for %s already: it isn't run for more", WAITING_MAX, self._command[0])
            self._full = True
        else:
            self._full = False

    async def run(self) -> None:
        """Run the command for each alarm until cancelled."""
        async for told in self._receive:
            if not self._command:
                continue
            environment = {
                **self._environment,
                "DMAFS_ALARM": told.kind,
                "DMAFS_STATE": "raised" if told.raised else "cleared",
                "DMAFS_MESSAGE": told.message,
                "DMAFS_VOLUME": told.volume,
            }
            succeeded = await run_hook(
                self._command, timeout_s=self._timeout_s, environment=environment, quiet=self._failing
            )
            self._failing = not succeeded
