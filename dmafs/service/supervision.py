"""What a service manager is told, by the protocol of sd_notify(3), and its watchdog.

1. The daemon is ready when a look-up in its tree has been answered, and not before.
2. The watchdog is fed after such a look-up only: by the kernel, the session and the engines. Where none is answered
   any more nothing is told, and the manager ends the daemon and starts another.
3. Hooks don't hear of the manager: the variables are taken out of the environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol, Self

import trio

log = logging.getLogger(__name__)

TOLD_S: Final = 10.0
"""How often it is told how things are, unless the watchdog wants more."""
NOTIFY_SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG_USEC: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"


class Listener(Protocol):
    """Who wants to hear how the daemon is."""

    @property
    def watchdog_s(self) -> float:
        """How long it may hear nothing; 0 for ever."""

    @property
    def quiet(self) -> bool:
        """Whether stderr needn't tell that the daemon is ready, too."""

    def tell(self, *assignments: str) -> None:
        """Take assignments such as ``READY=1``."""


@dataclass(frozen=True, slots=True)
class Manager:
    """What started the daemon and wants to hear of it; *watchdog_s* is 0 if it has no watchdog."""

    quiet: ClassVar[bool] = False
    address: str
    watchdog_s: float = 0

    @classmethod
    def of(cls, environment: MutableMapping[str, str], pid: int) -> Self | None:
        """Return what an environment says, which doesn't say it any more then; None if nobody wants to hear."""
        address = environment.pop(NOTIFY_SOCKET, "")
        microseconds = environment.pop(WATCHDOG_USEC, "")
        mine = environment.pop(WATCHDOG_PID, str(pid)) == str(pid)
        if address[:1] not in {"/", "@"}:
            return None
        watched = mine and microseconds.isascii() and microseconds.isdigit()
        return cls(address, int(microseconds) / 1e6 if watched else 0)

    def tell(self, *assignments: str) -> None:
        """Send assignments such as ``READY=1``; a manager that doesn't take them is no reason to fail."""
        name = f"\0{self.address[1:]}" if self.address[0] == "@" else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(0)
            try:
                sender.sendto("\n".join(assignments).encode(), name)
            except OSError as error:
                log.warning("the service manager at %s can't be told %s: %s", self.address, assignments[0], error)


async def supervise(manager: Listener, look: Callable[[], None], describe: Callable[[], str]) -> None:
    """Tell *manager* that the daemon is ready, and from then on that it lives and how things are.

    *look* runs in a thread of its own and returns when it was answered; OSError if that is no answer.
    """
    limiter, ready = trio.CapacityLimiter(1), False
    pause = min(TOLD_S, manager.watchdog_s / 3) if manager.watchdog_s else TOLD_S
    while True:
        try:
            await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=limiter)
        except OSError as error:
            log.error("a look-up in the tree failed: %s", error)
        else:
            news = ["WATCHDOG=1"] if ready else ["READY=1", "WATCHDOG=1"]
            manager.tell(*news, f"STATUS={describe()}")
            ready = True
        await trio.sleep(pause)


def look_up(mount_point: Path) -> None:
    """Look a moment up that nobody has asked for before, so that no cache answers. OSError if the tree doesn't."""
    with contextlib.suppress(FileNotFoundError):  # an answer, too: there may be no history yet
        os.lstat(mount_point / "at" / f"@{time.time_ns() / 1e9:.6f}")
