"""Where the log goes: to stderr or, where that is the journal's, to systemd's journal with fields.

By the journal's native protocol a message has a priority, the line of the program, and whose it is: ``DMAFS_STORE``,
``DMAFS_VOLUME`` and ``DMAFS_ALARM``, as far as they are known. A message that the journal doesn't take is written to
stderr, as without it.

The protocol is written here: libsystemd's bindings need a compiler and its headers, and logging-journald, which
doesn't, waits without limit for a journal that hangs, which may be one on the disk that the daemon serves.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

JOURNAL_STREAM: Final = "JOURNAL_STREAM"
"""Device and inode of what is the journal's, as systemd.exec(5) says."""
JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
IDENTIFIER: Final = "dmafs"
SEND_S: Final = 1.0
"""How long a message waits for a journal that takes none, before it goes to stderr."""
FORMAT: Final = "dmafs: %(levelname)s: %(message)s"

_of_process: dict[str, str] = {}
_VOLUME: Final = "volume %s"
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_TOO_LARGE: Final = {errno.EMSGSIZE, errno.ENOBUFS}


def set_up(level: int, environment: Mapping[str, str], *, again: bool = False) -> None:
    """Send all messages of *level* and above to the journal or stderr; *again* if that has changed."""
    handler = JournalHandler(JOURNAL_SOCKET) if is_journal(environment) and JOURNAL_SOCKET.exists() else _stderr()
    logging.basicConfig(level=level, handlers=[handler], force=again)


def is_journal(environment: Mapping[str, str]) -> bool:
    """Say whether stderr is the journal's."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return environment.get(JOURNAL_STREAM) == f"{found.st_dev}:{found.st_ino}"


def name_store(store: Path) -> None:
    """Say whose daemon this process is; messages to the journal have it from then on."""
    _of_process["DMAFS_STORE"] = str(store.absolute())


def has_fields() -> bool:
    """Say whether messages go to the journal."""
    return any(isinstance(handler, JournalHandler) for handler in logging.getLogger().handlers)


def _stderr() -> logging.Handler:
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(logging.Formatter(FORMAT))
    return made


class JournalHandler(logging.Handler):
    """Sends each message as one datagram or, where it is too large for that, as a sealed file in memory."""

    def __init__(self, path: Path) -> None:
        """Send to a socket, which needn't be there yet, nor stay the same."""
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._path = path
        self._stderr = _stderr()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message; one that can't be sent goes to stderr."""
        try:
            self.send(self._fields(record))
        except OSError:
            self._stderr.handle(record)
        except Exception:  # noqa: BLE001 - as each handler does: a bad record is told, and harms nobody else
            self.handleError(record)

    def send(self, fields: Mapping[str, str]) -> None:
        """Send one entry. OSError if the journal doesn't take it in time."""
        entry = b"".join(encode(name, value) for name, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_S)
            try:
                sender.sendto(entry, str(self._path))
            except OSError as error:
                if error.errno not in _TOO_LARGE:
                    raise
                self._send_file(sender, entry)

    def _send_file(self, sender: socket.socket, entry: bytes) -> None:
        fd = os.memfd_create("dmafs-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(fd, "wb") as file:
            file.write(entry)
            file.flush()
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            sender.sendmsg([], passed, 0, str(self._path))

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        """Return the fields of a message. Whose volume it is, is said by its first words or by who logs it."""
        told = record.__dict__
        volume = told.get("volume", "")
        if isinstance(record.msg, str) and record.msg.startswith(_VOLUME) and isinstance(record.args, tuple):
            volume = volume or str(record.args[0])
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(next((number for level, number in _PRIORITIES if record.levelno >= level), 7)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            "LOGGER": record.name,
            "DMAFS_VOLUME": volume,
            "DMAFS_ALARM": told.get("alarm", ""),
        }
        return {name: value for name, value in (fields | _of_process).items() if value}


def encode(name: str, value: str) -> bytes:
    """Return a field: with its length where it has more than one line."""
    data = value.encode(errors="surrogateescape")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)
