"""QEMU's storage daemon: a disk as of a virtual machine, most often one whose writes ``blklogwrites`` logs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from dmafs.core.extent import MAX_EXTENT_SECTORS
from dmafs.taps.logformat import ENTRY, HEADER_BYTES, SUPER, LogFlag
from dmafs.units import SECTOR
from tests.mount.harness import STOP_S, is_mounted, wait_until


class Qemu:
    """The daemon, from ``with`` to its end; ``disk`` is the disk as a file. Without a log it logs nothing."""

    def __init__(self, primary: Path, log: Path | None, disk: Path, *, append: bool = False) -> None:
        disk.touch()
        self.disk = disk
        node, logging = "f", []
        if log is not None:
            log.touch()
            node, options = "w", ",log-append=on" if append else ""
            logging = [
                *("--blockdev", f"driver=file,filename={log},node-name=l"),
                *("--blockdev", f"driver=blklogwrites,file=f,log=l,node-name=w,discard=unmap{options}"),
            ]
        self._command = [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,filename={primary},node-name=f,discard=unmap"),
            *logging,
            *("--export", f"type=fuse,id=e,node-name={node},mountpoint={disk},writable=on"),
        ]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

        def is_ready() -> bool:
            assert self._process.poll() is None, "qemu-storage-daemon has ended"
            return is_mounted(self.disk)

        wait_until(is_ready, "qemu-storage-daemon")
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(STOP_S)


class Flush(NamedTuple):
    """A flush in a log: after how many entries it stands, and after how many events of a journal."""

    entries: int
    events: int


class Replay:
    """A naive reader of a log, independent of the real one: a disk image after so many entries."""

    def __init__(self, log: Path, image: Path) -> None:
        """Replay *log* onto *image*, which holds what the disk did before."""
        self._log, self._image = log, image
        self._data = self._count = 0

    def flushes(self) -> list[Flush]:
        """Return all flushes that the super block counts, but for those without a write since the one before."""
        found = [Flush(0, 0)]
        events = 0
        for number, (_, sectors, flags) in enumerate(self._headers(), 1):
            if flags == LogFlag.FLUSH and events > found[-1].events:
                found.append(Flush(number, events))
            events += bool(sectors) if flags & LogFlag.DISCARD else -(-sectors // MAX_EXTENT_SECTORS)
        return found[1:]

    def _headers(self) -> Iterator[tuple[int, int, int]]:
        """Yield sector, sectors and flags of each entry; its data is at ``_data`` of the file."""
        with self._log.open("rb") as log:
            _, _, count, sector_bytes = SUPER.unpack(log.read(SUPER.size))
            assert sector_bytes == SECTOR
            at = SECTOR
            for _ in range(count):
                log.seek(at)
                sector, sectors, flags, _ = ENTRY.unpack(log.read(HEADER_BYTES))
                self._data = at + SECTOR
                at = self._data + (0 if flags & LogFlag.DISCARD else sectors * SECTOR)
                yield sector, sectors, flags

    def to(self, flush: Flush) -> None:
        """Replay up to and with a flush: further than before."""
        with self._log.open("rb") as log, self._image.open("r+b") as image:
            for number, (sector, sectors, flags) in enumerate(self._headers()):
                if number < self._count or not sectors:
                    continue
                if number >= flush.entries:
                    break
                log.seek(self._data)
                image.seek(sector * SECTOR)
                length = sectors * SECTOR
                image.write(bytes(length) if flags & LogFlag.DISCARD else log.read(length))
        self._count = flush.entries
