"""Mounts: what is mounted where and from what, as the kernel lists it in mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final, NamedTuple

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_DESCRIPTORS: Final = Path("/proc/self/fdinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")  # how mountinfo writes blanks, newlines and backslashes


class Mount(NamedTuple):
    """A line of mountinfo."""

    identifier: int
    device: int
    """Number of the device, of major 0 if the filesystem has none or, as Btrfs, may have several."""
    point: str
    kind: str
    source: str
    writable: bool
    """Whether the filesystem is. A mount of it that is read-only, a bind mount say, doesn't make it so."""

    def devices(self) -> list[int]:
        """Return the numbers of the block devices that it is known to be on."""
        found = [self.device] if os.major(self.device) else []
        try:
            info = os.stat(self.source) if self.source.startswith("/") else None  # noqa: PTH116 - text, not a path
        except OSError:
            return found  # the source may be anything, also a name of long ago
        if info and stat.S_ISBLK(info.st_mode) and info.st_rdev not in found:
            found.append(info.st_rdev)
        return found


def mounts(text: str | None = None) -> list[Mount]:
    """Return all mounts, the topmost of a place last; *text* stands in for mountinfo."""
    if text is None:
        text = os.fsdecode(_MOUNTINFO.read_bytes())
    return [_parsed(line) for line in text.split("\n")[:-1]]  # names are any bytes but newlines


def _parsed(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    fields, (kind, source, options) = left.split(" "), right.split(" ")
    major, _, minor = fields[2].partition(":")
    device = os.makedev(int(major), int(minor))
    return Mount(int(fields[0]), device, _plain(fields[4]), kind, _plain(source), "rw" in options.split(","))


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def devices_below(path: Path) -> list[int]:
    """Return the numbers of the block devices that the filesystem of an existing *path* is known to be on."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        found = {os.fstat(fd).st_dev}
        fields = dict(line.split(":", 1) for line in (_DESCRIPTORS / str(fd)).read_text().splitlines())
    finally:
        os.close(fd)
    here = int(fields["mnt_id"])
    return sorted(found.union(*(mount.devices() for mount in mounts() if mount.identifier == here)))
