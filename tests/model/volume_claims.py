"""What holds of a volume after every step, whatever is under way."""

from __future__ import annotations

import pytest
from hypothesis.stateful import invariant, precondition

from dmafs.core import points
from dmafs.core.diff import diff
from dmafs.core.image import ZEROS, Image
from dmafs.core.moments import resolve
from dmafs.core.overlay import DAT, EXT
from dmafs.core.vbm import MIRROR
from dmafs.core.work import run
from dmafs.errors import NoSuchPointError
from tests.model.oracle import SECTOR, nonzero_sectors
from tests.model.volume_model import Model, named


class Claims(Model):
    """The claims of ``test_volume_machine``, as invariants."""

    @invariant()
    def live_is_the_newest(self) -> None:
        type(self).steps += 1
        assert self.volume.live.seq == self.oracle.head == self.volume.journal.head
        if self.copied:
            self.compare(self.volume.live, self.oracle.head)

    @invariant()
    def held_images_never_change(self) -> None:
        for seq, (image, pins) in self.held.items():
            assert image.pins == pins + self.clone_seqs().count(seq)
            self.compare(image, seq)

    @invariant()
    def recoverable_is_exact(self) -> None:
        expected = set(self.recoverable())
        for seq in range(-1, self.oracle.head + 3):
            assert self.volume.recoverable(seq) is (seq in expected), f"recoverable({seq})"

    @precondition(lambda self: self.nosy)
    @invariant()
    def past_images_are_history(self) -> None:
        for seq in self.sample():
            image = self.volume.image(seq)
            self.compare(image, seq)
            assert nonzero_sectors(self.oracle.image_at(seq)) <= image.allocated_sectors() <= self.oracle.size_sectors

    @precondition(lambda self: self.copied)
    @invariant()
    def diffs_miss_nothing(self) -> None:
        seqs = self.sample()
        for a, b in zip(seqs, self.rng.sample(seqs, len(seqs)), strict=True):
            self.check_diff(a, b, run(diff(self.volume, a, b)))

    @precondition(lambda self: self.copied)
    @invariant()
    def nothing_else_can_be_had(self) -> None:
        recoverable = set(self.recoverable())
        for seq in {0, self.oracle.head + 1, self.rng.randrange(self.oracle.head + 1)} - recoverable:
            with pytest.raises(NoSuchPointError):
                self.volume.image(seq)

    @precondition(lambda self: self.copied)
    @invariant()
    def times_lead_to_their_moments(self) -> None:
        volume, times = self.volume, self.oracle.times
        first = max(self.floor, self.origin)
        shown = sorted({seq for seq, _ in self.visible() if seq < first})
        for seq in self.sample():
            assert volume.time_of(seq) == times[seq], f"time of {seq}"
            if seq >= first or seq in shown:
                assert points.seq_at(volume, times[seq]) == seq
            if seq > first:
                assert points.seq_at(volume, times[seq] - 1) == seq - 1
        before = [seq for seq in shown if times[seq] < times[first]]
        if before:
            assert points.seq_at(volume, times[first] - 1) == before[-1]
        else:
            with pytest.raises(NoSuchPointError):
                points.seq_at(volume, times[first] - 1)
        with pytest.raises(NoSuchPointError):
            points.seq_at(volume, max(self.now, volume.journal.head_time_ns) + 1)

    @precondition(lambda self: self.copied)
    @invariant()
    def landmarks_can_be_had(self) -> None:
        found = points.landmarks(self.volume)
        recoverable = set(self.recoverable())
        assert {point.seq for point in found} <= recoverable
        assert all(point.time_ns == self.oracle.times[point.seq] for point in found)
        assert {(point.seq, point.name) for point in found if point.kind == "mark"} >= {
            mark for mark in self.marks if mark[0] > self.floor
        }
        assert points.oldest_point(self.volume).seq == min(
            {seq for seq, _ in self.visible()} | {max(self.floor, self.origin)}
        )

    @precondition(lambda self: self.copied)
    @invariant()
    def marks_are_found_by_name(self) -> None:
        """A name means its newest mark; one that the mirror has passed may be known or not."""
        for name in "abc":
            point = points.point_named(self.volume, name)
            newest = max((seq for seq, one in self.marks if one == name and seq > self.floor), default=-1)
            assert newest < 0 or point is not None, f"mark {name} at {newest} was lost"
            if point is not None:
                assert point.seq >= newest
                assert (point.seq, name) in self.tried_marks
                assert resolve({"disk": self.volume}, name) == self.oracle.times[point.seq]

    @precondition(lambda self: self.copied)
    @invariant()
    def snapshots_are_found_by_name(self) -> None:
        names = {name: seq for seq, name in self.visible() if name}
        for name in ("one", "two"):
            point = points.point_named(self.volume, name)
            assert (point and point.seq) == names.get(name)

    @invariant()
    def pins_are_known(self) -> None:
        """A pinned snapshot is there, and no other one says that it is pinned."""
        assert sorted(named(one) for one in self.volume.snapshots.all() if one.pinned) == sorted(self.pinned)
        assert self.pinned <= set(self.visible())

    @invariant()
    def clones_show_what_was_written(self) -> None:
        assert [clone.name for clone in self.volume.clones] == sorted(self.clones)
        for clone in self.volume.clones:
            expected, base = self.clones[clone.name], clone.parts()[1]
            assert run(clone.read(0, base.size)) == expected.shown
            assert clone.seq == base.seq == expected.seq
            self.compare(base, expected.seq)
            assert expected.base == self.oracle.image_at(expected.seq)

    @precondition(lambda self: self.idle and self.pinning is None)
    @invariant()
    def structures_agree(self) -> None:
        assert self.floors[0] == self.floors[1] == self.volume.pointers.now.mirror_seq
        assert self.volume.journal.durable == self.durable
        self.volume.check()
        for image in [self.volume.live, *(image for image, _ in self.held.values())]:
            image._allocated = None  # counted once, and the file system rounds what syncs write up to its blocks
            assert image.allocated_sectors() == self._count_allocated(image)

    def _count_allocated(self, image: Image) -> int:
        """Count sector by sector what ``allocated_sectors`` counts by arithmetic."""
        data = {
            sector
            for start, stop in self.volume.mirror.file.data_ranges(0, image.size)
            for sector in range(start // SECTOR, -(-stop // SECTOR))
        }
        count = 0
        for piece in image.resolve(0, image.size):
            if piece.entry == MIRROR:
                count += len(data & set(range(piece.start, piece.stop)))
            elif piece.entry != ZEROS:
                count += piece.stop - piece.start
        return count

    @precondition(lambda self: self.idle and self.pinning is None and self.cloning is None)
    @invariant()
    def no_file_is_unreferenced(self) -> None:
        forward = {f"{part.stem}{suffix}" for part in self.volume.journal.parts for suffix in (".ext", ".dat")}
        backward = {
            f"{snapshot.stem}{suffix}"
            for snapshot in self.volume.snapshots.all()
            for suffix in (".gone" if snapshot.gone else ".ext", ".dat")
        }
        pins = {one.pin for one in self.volume.snapshots if named(one) in self.pinned}
        there = {f"{path.parent.name}/{path.name}" for path in self.store.glob("*ward/*")}
        indexes = {name.rpartition(".")[0] + ".idx" for name in forward | backward}
        assert there - indexes == forward | backward | pins
        clones = {f"clones/{name}{file}" for name in self.clones for file in ("", f"/{EXT}", f"/{DAT}")}
        assert {str(path.relative_to(self.store)) for path in self.store.glob("clones/**/*")} == clones
        hidden = {snapshot.seq for snapshot in self.volume.snapshots.all() if snapshot.hidden}
        assert hidden <= {*self.held, *self.clone_seqs()}
