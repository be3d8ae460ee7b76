"""The journal's end of its native protocol, which checks it."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import socket
import struct
from pathlib import Path
from typing import Final

NAME: Final = re.compile(rb"[A-Z][A-Z0-9_]{0,63}")
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class FakeJournal:
    """Takes entries as journald does, as datagrams or as sealed files; whatever isn't an entry is an error."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.files = 0

    def take(self, *, seconds: float = 10) -> dict[str, str]:
        """Return the fields of the next entry; TimeoutError if there is none in time."""
        self.socket.settimeout(seconds)
        size = array.array("i").itemsize
        data, passed, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(size))
        for level, kind, descriptors in passed:
            assert (level, kind, len(descriptors), data) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, size, b"")
            with os.fdopen(struct.unpack("i", descriptors)[0], "rb") as file:
                assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == SEALS
                file.seek(0)
                data = file.read()
            self.files += 1
        return fields(data)

    def take_all(self) -> list[dict[str, str]]:
        """Return the entries that are waiting."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.take(seconds=0))
        return found

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


def fields(data: bytes) -> dict[str, str]:
    """Return the fields of an entry, each of which is there once."""
    found: dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, assigned, value = line.partition(b"=")
        if not assigned:
            (length,) = struct.unpack_from("<Q", rest)
            value, end, data = rest[8 : 8 + length], rest[8 + length : 9 + length], rest[9 + length :]
            assert (len(value), end) == (length, b"\n")
        else:
            data = rest
        assert NAME.fullmatch(name), name
        assert name.decode() not in found
        found[name.decode()] = value.decode()
    return found
