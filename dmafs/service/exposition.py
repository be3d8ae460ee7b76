"""What is asked for metrics: their text, made when it is asked for.

The library that writes it takes a tenth of a second to import, so that is done at the first question, in a thread; a
daemon whose metrics nobody reads never has it in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import trio

from dmafs.service.appliance import Appliance
from dmafs.service.engine import Engine

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """The metrics of one daemon."""

    def __init__(self, appliance: Appliance, engines: Mapping[str, Engine]) -> None:
        """Tell of *appliance* and its *engines*."""
        self._appliance = appliance
        self._engines = engines
        self._importing = trio.Lock()
        self._make: Callable[[], bytes] | None = None

    async def text(self) -> bytes:
        """Return all metrics as they are now, in Prometheus' text format. The state is read on trio's thread."""
        async with self._importing:
            if self._make is None:
                self._make = await trio.to_thread.run_sync(self._import)
        return self._make()

    def _import(self) -> Callable[[], bytes]:
        from dmafs.service.metrics import metrics_of  # noqa: PLC0415 - see the module

        return metrics_of(self._appliance, self._engines)
