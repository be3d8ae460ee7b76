"""A service manager's end of sd_notify(3), which checks the protocol."""

from __future__ import annotations

import re
import socket
from typing import Final

ASSIGNMENT: Final = re.compile(r"(READY|STOPPING|WATCHDOG)=1|STATUS=[^\n]*")


class FakeManager:
    """Takes datagrams as systemd does; whatever isn't an assignment is an error."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address[0] == "@" else address)

    def take(self, *, seconds: float = 10) -> list[str]:
        """Return the assignments of the next message; TimeoutError if there is none in time."""
        self.socket.settimeout(seconds)
        lines = self.socket.recv(4096).decode().split("\n")
        assert all(ASSIGNMENT.fullmatch(line) for line in lines), lines
        return lines

    def take_all(self) -> list[list[str]]:
        """Return the messages that are waiting."""
        found = []
        try:
            while True:
                found.append(self.take(seconds=0))
        except BlockingIOError:
            return found

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()
