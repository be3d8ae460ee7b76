"""What decides how long moments stay behind a mount: pins, thinning, marks, and clones that are written to."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Final

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from dmafs.client import connect
from tests.model.oracle import expected_clone
from tests.mount.harness import fails, opened, spelled, wait_until
from tests.mount.mount_model import MountModel, whole

PAGE: Final = 4096
MARKS: Final = "mno"
CLONES: Final = "xy"


class Keeping(MountModel):
    """Done by commands and in the tree."""

    @precondition(lambda self: self.expected.snapshots)
    @rule(number=st.integers(0, 100))
    def pin_or_unpin(self, number: int) -> None:
        names = sorted(self.expected.snapshots)
        name = names[number % len(names)]
        with connect(self.rig.store) as asked:
            report = asked.unpin(name) if name in self.expected.pinned else asked.pin(name)
        self.expected.pinned ^= {name}
        assert report == {"id": name, "pinned": name in self.expected.pinned}
        self.counts["pin" if report["pinned"] else "unpin"] += 1

    @precondition(lambda self: len(self.expected.snapshots) > 1)
    @rule(dry_run=st.sampled_from([False, False, True]))
    def thin(self, dry_run: bool) -> None:  # noqa: FBT001
        """What is dropped, and what each one kept is kept for, is what the rules say; a dry run drops nothing."""
        before = dict(self.expected.snapshots)
        dropped = self.expected.thinned(self.retention)
        options = ["--dry-run"] if dry_run else []
        report = json.loads(self.rig.dmafs("thin", "--json", *options, self.rig.store).stdout)["snapshots"]
        assert {one["id"] for one in report} == set(before)
        assert {one["id"] for one in report if not one["kept"]} == set(dropped)
        assert {one["id"] for one in report if "pinned" in one["reasons"]} == self.expected.pinned
        if dry_run:
            self.expected.snapshots = before
        self.counts["thin"] += 1
        self.counts["thinned"] += len(dropped) * (not dry_run)

    @rule(name=st.sampled_from(MARKS))
    def mark(self, name: str) -> None:
        with connect(self.rig.store) as asked:
            asked.mark(name)
        self.expected.marks[name] = self.expected.head
        self.counts["mark"] += 1

    # -- clones -----------------------------------------------------------------------------------------------------

    def _clone(self, name: str) -> Path:
        return self.rig.mnt / "clones" / name / "disk.img"

    @rule(name=st.sampled_from(CLONES), number=st.integers(0, 1000), now=st.booleans())
    def make_clone(self, name: str, number: int, now: bool) -> None:  # noqa: FBT001
        seq = self.expected.head if now else self._any(number)
        folder = self.rig.mnt / "clones" / (name if now else f"{name}@{spelled(self.expected.times[seq])}")
        if name in self.expected.clones:
            fails(errno.EEXIST, os.mkdir, folder)
            return
        folder.mkdir()
        self.expected.clones[name] = expected_clone(seq, self.expected.image(seq))
        self.ever_held.add(seq)
        self.counts["clone"] += 1

    @precondition(lambda self: self.expected.clones)
    @rule(number=st.integers(0, 10))
    def drop_clone(self, number: int) -> None:
        name = sorted(self.expected.clones)[number % len(self.expected.clones)]
        # The kernel tells of the last close a little later.
        wait_until(lambda: self._try_to_drop(name), f"clone {name} to be idle", seconds=20)
        del self.expected.clones[name]
        self.counts["clone dropped"] += 1

    def _try_to_drop(self, name: str) -> bool:
        try:
            (self.rig.mnt / "clones" / name).rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    @precondition(lambda self: self.expected.clones)
    @rule(
        number=st.integers(0, 10),
        places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 3 * PAGE)), min_size=1, max_size=4),
        fsync=st.booleans(),
    )
    def write_clone(self, number: int, places: list[tuple[int, int]], fsync: bool) -> None:  # noqa: FBT001
        name = sorted(self.expected.clones)[number % len(self.expected.clones)]
        clone = self.expected.clones[name]
        with opened(self._clone(name), os.O_RDWR) as fd:
            for place, length in places:
                offset = place % self.size
                data = self.rng.randbytes(min(length, self.size - offset))
                assert os.pwrite(fd, data, offset) == len(data)
                clone.write(offset, data)
            if fsync:
                os.fsync(fd)
                clone.flushed()
        self.counts["clone written"] += 1

    # -- what holds after every step --------------------------------------------------------------------------------

    @invariant()
    def clones_show_what_was_written(self) -> None:
        assert sorted(os.listdir(self.rig.mnt / "clones")) == sorted(self.expected.clones)
        for name, clone in self.expected.clones.items():
            with opened(self._clone(name), os.O_RDONLY) as fd:
                assert whole(fd, self.size) == clone.shown, f"clone {name}"
            assert self._seq_of(self._clone(name)) == clone.seq
            assert clone.base == self.expected.image(clone.seq)
            if clone.seq in self.expected.reachable():  # one that only clones keep has no name under at/
                with opened(self.rig.at(f"seq:{clone.seq}"), os.O_RDONLY) as fd:
                    assert whole(fd, self.size) == clone.base

    @invariant()
    def marks_are_found(self) -> None:
        """Until the mirror has passed them."""
        for name, seq in self.expected.marks.items():
            if seq > self.expected.mirror_seq:
                assert self._seq_of(self.rig.at(name)) == seq
