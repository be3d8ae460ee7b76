"""Failed writes of a source, as far as the kernel tells of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import trio

from dmafs.errors import TapError
from dmafs.taps.kernellog import KernelLog

log = logging.getLogger(__name__)


async def watch_failures(volume: str, devices: frozenset[str], act: Callable[[], Awaitable[None]]) -> None:
    """Do *act* whenever the kernel tells of a failed write to one of *devices*; without any there is nothing to do."""
    if not devices:
        return
    try:
        messages = KernelLog()
    except TapError as error:
        log.warning("volume %s: %s; %s", volume, error.message, error.hint)
        return
    with contextlib.closing(messages):
        while True:
            await trio.lowlevel.wait_readable(messages.fileno())
            if messages.failed(devices):
                log.error("volume %s: a write to its source has failed; it is compared with the image", volume)
                await act()
