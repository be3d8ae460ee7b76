"""A limit on how fast work reads: a token bucket.

It never waits itself, since work runs on a thread that others need: it says how long to pause, and who drives the work
knows how to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from dmafs.core.work import Work

BURST_S: Final = 0.25
"""What may be read at once after a rest: as much as the rate allows in this time."""


class Throttle:
    """A rate in bytes a second; 0 is no limit."""

    def __init__(self, bytes_per_s: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a full bucket; *clock* returns seconds."""
        assert bytes_per_s >= 0
        self._rate = bytes_per_s
        self._clock = clock
        self._tokens = bytes_per_s * BURST_S
        self._filled_at = clock()

    def take(self, count: int) -> float:
        """Take *count* bytes, that have been read; return for how many seconds nothing more may be."""
        if not self._rate:
            return 0.0
        now = self._clock()
        filled = self._tokens + (now - self._filled_at) * self._rate
        self._tokens = min(filled, self._rate * BURST_S) - count
        self._filled_at = now
        return max(0.0, -self._tokens / self._rate)


def pause(seconds: float) -> Work[object]:
    """Pause where nobody else needs the thread that the work's calls run on."""
    return (yield partial(time.sleep, seconds))
