"""Clones of a volume's moments: made, written, flushed and dropped while the volume goes on."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from dmafs.core.clone import DIRECTORY, Clone
from dmafs.core.ondisk import Flag
from dmafs.core.overlay import BLOCK, DAT, EXT
from dmafs.core.work import Work, run
from tests.model.oracle import SECTOR, Expected, expected_clone
from tests.model.stepping import Running
from tests.model.volume_readers import Readers

NAMES = ("here", "there")


class Cloning(Readers):
    """A clone's moment can be had as long as the clone is there, whatever happens to it and the volume."""

    @precondition(lambda self: self.copied and self.cloning is None and len(self.clones) < len(NAMES))
    @rule(number=st.integers(0, 1000), wait=st.booleans())
    def make_clone(self, number: int, wait: bool) -> None:  # noqa: FBT001
        seqs = self.recoverable()
        seq = seqs[number % len(seqs)]
        if seq > self.volume.journal.durable:
            if not self._may_flush():
                return
            self.flush(Flag.FLUSH, "", wait=False)
        name = next(name for name in NAMES if name not in self.clones)

        def done(clone: Clone) -> None:
            assert clone.seq == seq
            self.clones[name] = expected_clone(seq, self.oracle.image_at(seq))
            self.clone_at = -1

        self._cloning("make a clone", self.volume.clones.create(self.volume.image(seq), name), done)
        self.clone_at = seq
        if not wait:
            self.finish_cloning()

    @precondition(lambda self: self.cloning is None and self.clones)
    @rule(number=st.integers(0, 1), wait=st.booleans())
    def drop_clone(self, number: int, wait: bool) -> None:  # noqa: FBT001
        clone, expected = self._clone(number)
        self.finish_readers(clone.name)

        def done(_: None) -> None:
            self.clone_at = -1

        self._cloning("drop a clone", self.volume.clones.drop(clone), done)
        self.clone_at = expected.seq
        self.dropping = clone.name, self.clones.pop(clone.name)
        if not wait:
            self.finish_cloning()

    def _cloning(self, kind: str, work: Work[Any], done: Any) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.cloning = Running(kind, work, done)

    @precondition(lambda self: self.cloning is not None)
    @rule()
    def finish_cloning(self) -> None:
        """A drop has two calls; the base is let go of after the first."""
        assert self.cloning is not None
        while not self.cloning.advance():
            self.clone_at = -1
        dropped = self.cloning.kind == "drop a clone"
        self.cloning = None
        if dropped:
            self.drop_unheld()

    def _clone(self, number: int) -> tuple[Clone, Expected]:
        name = sorted(self.clones)[number % len(self.clones)]
        clone = self.volume.clones.find(name)
        assert clone is not None
        return clone, self.clones[name]

    @precondition(lambda self: self.clones)
    @rule(
        number=st.integers(0, 1),
        extents=st.lists(st.tuples(st.integers(0, 64 * SECTOR), st.integers(1, 2 * BLOCK)), min_size=1, max_size=3),
        then=st.sampled_from(["", "flush"]),
    )
    def write_clone(self, number: int, extents: list[tuple[int, int]], then: str) -> None:
        clone, expected = self._clone(number)
        self.finish_readers(clone.name)
        for place, length in extents:
            offset = place % len(expected.shown)
            data = self.rng.randbytes(min(length, len(expected.shown) - offset))
            run(clone.write(offset, data))
            expected.write(offset, data)
        if then:
            self.flush_clone(clone)
        self.counts["write a clone"] = self.counts.get("write a clone", 0) + 1

    def flush_clone(self, clone: Clone) -> None:
        run(clone.flush())
        self.clones[clone.name].flushed()

    # -- stops --------------------------------------------------------------------------------------------------

    def tear_clones(self) -> None:
        for path in sorted((self.store / DIRECTORY).rglob("*")):
            if path.name == EXT:
                self.disk.tear(path, self.rng)
                self.disk.synced[path.stat().st_ino] = path.stat().st_size
            elif path.name == DAT:
                self.disk.tear_overlay(path, self.rng)

    def adopt_clones(self, cloning: Running | None) -> None:
        """Take in which clones a stop has left: all, but one that was being made or dropped may be there or not."""
        found = {clone.name: clone for clone in self.volume.clones}
        if cloning is not None and cloning.kind == "drop a clone" and self.dropping[0] in found:
            self.clones[self.dropping[0]] = self.dropping[1]
        new = found.keys() - self.clones.keys()
        assert self.clones.keys() <= found.keys()
        assert not new or (len(new) == 1 and cloning is not None and cloning.kind == "make a clone")
        for name, clone in found.items():
            assert not clone.failure, clone.failure
            if name in new:
                assert clone.seq == self.clone_at
                self.clones[name] = expected_clone(clone.seq, self.oracle.image_at(clone.seq))
            self.clones[name].settle(bytes(run(clone.read(0, len(self.clones[name].shown)))))
        self.clone_at = -1
