"""What a mounted volume has to show: its moments, snapshots, pins, marks and clones, after each operation on them."""

from __future__ import annotations

from dataclasses import dataclass

from dmafs.units import format_time
from tests.model.oracle import SECTOR, Oracle
from tests.model.oracle import Expected as ExpectedClone


@dataclass(frozen=True)
class Rules:
    """The rules of retention that are in the configuration: besides these no rule keeps anything."""

    minimum: int
    named: bool

    def table(self) -> str:
        counts = "".join(f"{period} = 0\n" for period in ("hourly", "daily", "weekly", "monthly", "yearly"))
        named = "true" if self.named else "false"
        return f'[retention]\nwithin = "0s"\n{counts}minimum = {self.minimum}\nnamed = {named}\n'


class Expected:
    """Which moments can be had, and what they look like."""

    def __init__(self, content: bytes, origin_ns: int) -> None:
        self.oracle = Oracle(content)
        self.oracle.times[0] = origin_ns
        self.mirror_seq = 0
        self.snapshots: dict[str, int] = {}  # seqs by id, in the order in which they were taken
        self.pinned: set[str] = set()
        self.marks: dict[str, int] = {}
        self.clones: dict[str, ExpectedClone] = {}

    @property
    def head(self) -> int:
        return self.oracle.head

    @property
    def times(self) -> list[int]:
        return self.oracle.times

    def image(self, seq: int) -> bytes:
        return self.oracle.image_at(seq)

    def written(self, offset: int, data: bytes, time_ns: int) -> None:
        """Take in a write of bytes, which is an event of the whole sectors around it."""
        start, stop = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        sectors = bytearray(self.image(self.head)[start * SECTOR : stop * SECTOR])
        sectors[offset - start * SECTOR : offset - start * SECTOR + len(data)] = data
        self.oracle.write(start, bytes(sectors), time_ns)

    def synced(self) -> None:
        """Take in a sync: the mirror is at the head, and where it was is a snapshot."""
        base = self.mirror_seq
        if base < self.head and base not in self.snapshots.values():
            self.snapshots[format_time(self.times[base])] = base
        self.mirror_seq = self.head

    def reachable(self) -> list[int]:
        """Return the seqs that can be looked up, ascending."""
        return sorted({*self.snapshots.values(), *range(self.mirror_seq, self.head + 1)})

    def seq_at(self, time_ns: int) -> int | None:
        """Return the seq that a time up to now means."""
        return max((seq for seq in self.reachable() if self.times[seq] <= time_ns), default=None)

    def latest(self) -> str:
        return max(self.snapshots, key=lambda name: (self.times[self.snapshots[name]], name))

    def thinned(self, rules: Rules) -> list[str]:
        """Take in a thinning; return the ids of what it drops, oldest first."""
        ordered = sorted(self.snapshots, key=lambda name: self.times[self.snapshots[name]])  # twins as they were taken
        kept = {*self.pinned, *ordered[len(ordered) - rules.minimum if rules.minimum < len(ordered) else 0 :]}
        if rules.named:
            kept |= {name for name in ordered if name != format_time(self.times[self.snapshots[name]])}
        dropped = [name for name in ordered if name not in kept]
        for name in dropped:
            del self.snapshots[name]
        return dropped

    def clone_seqs(self) -> set[int]:
        return {clone.seq for clone in self.clones.values()}
