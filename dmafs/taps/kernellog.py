"""What the kernel says of failed writes, from ``/dev/kmsg``.

The log-writes target logs a write whatever becomes of it on the primary. That one failed only the kernel's own log
tells, as far as the driver below says it at all: request-based drivers (disks, loop devices) do, with the device and
the first sector, but not the length, and at most ten in five seconds. So a message is taken as a hint: what was
captured around its time is compared with the primary. A bio-based device below (another mapped one) may say nothing;
then a verify finds out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from dmafs.errors import TapError

KMSG: Final = Path("/dev/kmsg")
SUPPRESSED_S: Final = 5.0
"""How long the kernel may keep quiet about more errors of the same kind."""

_RECORD_BYTES: Final = 8192
_FAILED: Final = re.compile(r"error,? (?:on )?dev ([^\s,]+),(?! sector \d+ op 0x[0-9a-f]+:\((?!WRITE|DISCARD|FLUSH))")
_SYSFS: Final = Path("/sys/dev/block")


class KernelLog:
    """The kernel's messages from now on."""

    def __init__(self, path: Path = KMSG) -> None:
        """Open the log at its end; TapError if it can't be read."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise TapError(
                f"the kernel's log {path} can't be read: {error.strerror}",
                hint="failed writes of sources are found by dmafs verify only",
            ) from error

    def fileno(self) -> int:
        """Return the descriptor, which is readable when there are messages."""
        return self._fd

    def failed(self, devices: frozenset[str]) -> bool:
        """Take all messages that there are; say whether one of them tells of a failed write to one of *devices*.

        Also when messages were overwritten before they could be read.
        """
        found = False
        while True:
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return found
            except BrokenPipeError:
                found = True
                continue
            found |= is_failure(record.decode(errors="replace"), devices)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def is_failure(record: str, devices: frozenset[str]) -> bool:
    """Say whether a record of the kernel's log tells of a failed write to one of *devices*."""
    match = _FAILED.search(record.partition(";")[2])
    return match is not None and match[1] in devices


def devices_under(number: int) -> frozenset[str]:
    """Return the kernel's names of a block device, of the disk that it is a partition of, and of all below them."""
    names: set[str] = set()
    queue = [(_SYSFS / f"{os.major(number)}:{os.minor(number)}").resolve()]
    while queue:
        directory = queue.pop()
        if directory.name in names or not (directory / "dev").exists():
            continue
        names.add(directory.name)
        if (directory / "partition").exists():
            queue.append(directory.parent)
        slaves = directory / "slaves"
        queue += [slave.resolve() for slave in slaves.iterdir()] if slaves.is_dir() else []
    return frozenset(names)
