"""The kernel's log-writes target and the disk under it, as far as a reader of the log can tell.

A write reaches the disk, sector by sector, at any time between its submission and its completion. Then:

- a plain write or a discard waits in ``unflushed``; a FUA write goes to ``logging``;
- a flush takes ``unflushed`` along when it is submitted; when it completes these, then itself, go to ``logging``;
- a mark goes to ``logging`` at once; the kernel's thread writes that list to the log, in order;
- the end of a target puts ``unflushed`` *before* what still is in ``logging`` (``log_writes_dtr``), then its mark.

``Truth`` knows of each sector what an image may show of it. Data is unique in each write of each sector, but for
discards. A write's ``order`` is the number of its entry in the log; its ``safe`` that of the entry from which on no
power cut takes it back: its own of a FUA write, else a flush that was submitted after it had completed.
"""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dmafs.taps.logformat import END_MARK, LogFlag, Super
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, mark

Kind = Literal["plain", "fua", "discard", "flush"]
Discards = Literal["zero", "kept", "unknown"]
"""What the primary has where something was discarded: zeros, what it had (and the tap knows it, or doesn't)."""
FLAGS = {"plain": 0, "fua": int(LogFlag.FUA), "discard": int(LogFlag.DISCARD), "flush": int(LogFlag.FLUSH)}
END = mark(END_MARK)


@dataclass(eq=False)
class Bio:
    """A write, a discard or a flush, which may be a write, too: then the flush came first."""

    kind: Kind
    start: int = 0
    data: bytes = b""
    left: list[int] = field(default_factory=list)  # sectors that aren't on the primary yet
    carried: list[Bio] = field(default_factory=list)  # by a flush
    covered: list[Bio] = field(default_factory=list)  # complete when the flush was submitted
    mark: str = ""
    weak: bool = False  # a discard that may have changed nothing
    order: int | None = None
    safe: int | None = None

    @property
    def length(self) -> int:
        return len(self.data) // SECTOR

    @property
    def stop(self) -> int:
        return self.start + self.length

    def sector(self, sector: int) -> bytes:
        return self.data[(sector - self.start) * SECTOR :][:SECTOR]

    def logged(self, sector_bytes: int) -> Logged:
        if self.mark:
            return mark(self.mark)
        if self.kind == "flush" and not self.data:
            return FLUSH
        scale = sector_bytes // SECTOR
        data = b"" if self.kind == "discard" else self.data
        return Logged(self.start // scale, self.length // scale, FLAGS[self.kind], data)


class Truth:
    """What the writes until now let an image show."""

    def __init__(self, content: bytes) -> None:
        self.entries = 0  # of all logs together
        self.complete: list[Bio] = []  # and not safe
        self.begin(content)

    def begin(self, content: bytes) -> None:
        """Forget the past: this is what all images show that come now."""
        bases = [
            Bio("plain", at, content[at * SECTOR :][:SECTOR], order=-1, safe=-1) for at in range(len(content) // SECTOR)
        ]
        self.history = [[base] for base in bases]
        self.complete = []

    def submitted(self, bio: Bio) -> None:
        for sector in range(bio.start, bio.stop):
            self.history[sector].append(bio)
        if bio.kind == "flush":
            bio.covered = list(self.complete)

    def logged(self, bio: Bio) -> int:
        """Take in that an entry has its place in the log; return its number."""
        bio.order = self.entries
        self.entries += 1
        for one in [*bio.covered, *([bio] if bio.kind == "fua" else [])]:
            one.safe = bio.order if one.safe is None else one.safe
        self.complete = [one for one in self.complete if one.safe is None]
        return bio.order

    def allowed(self, sector: int, upto: int) -> set[bytes]:
        """Return what an image may show of a sector behind an entry of the log."""
        bios = self.history[sector]
        least = max(at for at, bio in enumerate(bios) if bio.safe is not None and bio.safe <= upto)
        while bios[least].weak:
            least -= 1
        rest = bios[least:]
        # Zeros may come from a discard that wasn't logged yet: the same bytes once more can't be told apart.
        logged = [bio.kind == "discard" or (bio.order is not None and bio.order <= upto) for bio in rest]
        return {bio.sector(sector) for bio, there in zip(rest, logged, strict=True) if there}

    def weak(self, sector: int) -> bool:
        return self.history[sector][-1].weak


class Target:
    """One table: a log, and what is on its way there."""

    def __init__(
        self, path: Path, first: int, sectors: int, *, sector_bytes: int, truth: Truth, rng: random.Random
    ) -> None:
        """Make a log of that many log sectors."""
        self.path, self.first = path, first
        self.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, sectors * sector_bytes)
        self.size_bytes, self.sector_bytes = sectors * sector_bytes, sector_bytes
        self._truth, self._rng = truth, rng
        self.unflushed: list[Bio] = []
        self.logging: list[Bio] = []
        self.pieces: deque[tuple[int, bytes]] = deque()
        self.ends: dict[int, int] = {}  # number of an entry by the place behind it
        self.disabled = False
        self.failing = False
        self.entries = 0
        self.at = sector_bytes

    # -- bios -----------------------------------------------------------------------------------------------------

    def submit(self, bio: Bio) -> None:
        if bio.kind == "flush":
            bio.carried, self.unflushed = self.unflushed, []

    def complete(self, bio: Bio) -> None:
        if bio.kind == "flush":
            self.logging += [*bio.carried, bio]
        elif bio.kind == "fua":
            self.logging.append(bio)
        else:
            self.unflushed.append(bio)

    def mark(self, text: str) -> None:
        """Return success always, as the kernel does."""
        self.logging.append(Bio("plain", mark=text))

    # -- the log --------------------------------------------------------------------------------------------------

    def write(self, pieces: int) -> None:
        """Have so many pieces of the log become visible."""
        for _ in range(pieces):
            if not self.pieces:
                self._next()
            if not self.pieces:
                return
            offset, data = self.pieces.popleft()
            os.pwrite(self.fd, data, offset)

    def drain(self) -> None:
        while self.pieces or self.logging:
            self.write(1)

    def _next(self) -> None:
        if self.disabled:
            self.logging.clear()
        if not self.logging:
            return
        bio = self.logging.pop(0)
        entry = bio.logged(self.sector_bytes).encode(self.sector_bytes)
        if self.at + len(entry) >= self.size_bytes:
            self.disabled = True
            return
        begin, self.at = self.at, self.at + len(entry)
        self.ends[self.first + self.at // SECTOR] = self._truth.logged(bio)
        self.entries += 1
        header, data = entry[: self.sector_bytes], entry[self.sector_bytes :]
        cut = self._rng.randrange(0, len(data) + 1, SECTOR)
        body = [(begin + self.sector_bytes, data[:cut]), (begin + self.sector_bytes + cut, data[cut:])]
        if self.failing and data:  # the data can't be written; the next header is on its way already
            self.disabled = True
            behind = self.logging[0].logged(self.sector_bytes).encode(self.sector_bytes) if self.logging else b""
            self.pieces += [(begin, header), (self.at, behind[: self.sector_bytes])]
            return
        self.pieces += [*body, (begin, header)] if self._rng.random() < 0.2 else [(begin, header), *body]
        if bio.kind == "fua" or bio.mark:
            self.pieces.append((0, Super(self.entries, self.sector_bytes).encode()))

    def end(self) -> None:
        """Be replaced or removed; no bio is under way.

        If data can't be written now, the end mark may be there all the same, and nobody can ask the target any more:
        left out here, since only the log's file itself (holes where data has to be) could tell.
        """
        self.logging = [*self.unflushed, *self.logging]
        self.mark(END_MARK)
        self.drain()
        os.close(self.fd)


class Device:
    """A primary, a target over it, the logs, and the bios under way."""

    def __init__(
        self,
        folder: Path,
        primary: Path,
        rng: random.Random,
        *,
        sector_bytes: int,
        discards: Discards,
        log_sectors: int,
    ) -> None:
        self.folder, self.rng = folder, rng
        folder.mkdir()
        self.fd = os.open(primary, os.O_RDWR | os.O_CLOEXEC)
        self.size_sectors = os.fstat(self.fd).st_size // SECTOR
        self.sector_bytes, self.discards, self.log_sectors = sector_bytes, discards, log_sectors
        self.truth = Truth(self.content())
        self.under_way: list[Bio] = []
        self.written = 0
        self.drains = True  # whether the log is whole before a target ends
        self.ordered = True  # whether flushes complete in the order in which they were submitted
        self.ends: dict[int, int] = {}
        self.lossy: set[int] = set()  # first places of logs that have ended and don't have all
        self.target: Target | None = None
        self.attach(0)

    def content(self) -> bytes:
        return os.pread(self.fd, self.size_sectors * SECTOR, 0)

    def attach(self, first: int) -> None:
        path = self.folder / f"{first:020d}.log"
        self.target = Target(
            path, first, self.log_sectors, sector_bytes=self.sector_bytes, truth=self.truth, rng=self.rng
        )
        self.target.ends = self.ends

    def suspend(self) -> None:
        """Have all that is under way complete, and the log be as far, unless nobody waits for that."""
        assert self.target is not None
        while self.under_way:
            self.complete(0)
        if self.drains:
            self.target.drain()

    def detach(self) -> None:
        """Remove the device, or replace its table."""
        self.suspend()
        assert self.target is not None
        self.target.end()
        if self.target.disabled:
            self.lossy.add(self.target.first)
        self.ends[self.target.first + self.target.size_bytes // SECTOR] = self.truth.entries - 1
        self.target = None

    # -- bios -----------------------------------------------------------------------------------------------------

    def submit(self, kind: Kind, start: int = 0, length: int = 0) -> Bio | None:
        """Submit a write, discard or flush; None if it overlaps one that is under way, which nobody does."""
        assert self.target is not None
        if kind == "flush" and not length:
            bio = Bio(kind)
        else:
            scale = self.sector_bytes // SECTOR
            start, length = start // scale * scale, max(length // scale, 1) * scale
            start %= self.size_sectors
            length = min(length, self.size_sectors - start)
            if any(bio.start < start + length and start < bio.stop for bio in self.under_way):
                return None
            self.written += 1
            data = b"".join(self._unique(sector) for sector in range(start, start + length))
            bio = Bio(kind, start, data)
            if kind == "discard":
                bio.data, bio.weak = bytes(len(data)), self.discards != "zero"
            bio.left = list(range(start, start + length))
            self.rng.shuffle(bio.left)
        if not (kind == "discard" and self.discards == "kept"):
            self.truth.submitted(bio)
        self.target.submit(bio)
        self.under_way.append(bio)
        return bio

    def _unique(self, sector: int) -> bytes:
        return f"write {self.written} sector {sector} ".encode().ljust(SECTOR, bytes([1 + self.written % 255]))

    def reach(self, number: int, sectors: int) -> None:
        """Have some sectors of a write get to the primary."""
        if self.under_way:
            bio = self.under_way[number % len(self.under_way)]
            for _ in range(min(sectors, len(bio.left))):
                at = bio.left.pop()
                if bio.kind != "discard" or self.discards == "zero":
                    os.pwrite(self.fd, bio.sector(at), at * SECTOR)

    def complete(self, number: int) -> Bio | None:
        """Have a bio complete; of flushes the one that was submitted first."""
        if not self.under_way or self.target is None:
            return None
        bio = self.under_way[number % len(self.under_way)]
        if bio.kind == "flush" and self.ordered:
            bio = next(one for one in self.under_way if one.kind == "flush")
        self.reach(self.under_way.index(bio), bio.length)
        self.under_way.remove(bio)
        if bio.data:
            self.truth.complete.append(bio)
        self.target.complete(bio)
        return bio

    def close(self) -> None:
        os.close(self.fd)
        if self.target is not None:
            os.close(self.target.fd)
