"""A mounted volume under random histories, measured against an oracle that keeps every moment's full image.

The model test of the volume, one level up: a real daemon, the kernel's page cache, loop devices, and ends of the daemon
in order or by SIGKILL. Claims, after every step:

1. ``live`` is the newest moment, and each write that the kernel passes on is one more of them.
2. Every moment that can be had is history bit for bit, by any of its spellings; a time means what it should.
3. A held image, by a descriptor or a read-only loop device, never changes, whatever is synced or dropped meanwhile.
4. The snapshots listed are those taken by hand and by syncs and not dropped.
5. An end of the daemon, in order or not, loses no write that had returned, flushed or not.
6. A diff of two moments lists each sector whose bytes differ, and none that wasn't written in between.
7. A pinned snapshot is neither dropped nor thinned; of the others a thinning leaves exactly what the configured rules
   keep.
8. A clone is its moment with the writes to it, and what was flushed of these outlives the daemon.
9. A mark is found by its name until the mirror has passed it.

``DMAFS_TEST_SEED`` chooses the histories, ``DMAFS_TEST_MOUNT_EXAMPLES`` how many of ``STEPS`` steps there are. To add
an operation: what it does to the moments that can be had is a method of ``Expected``, the operation itself is a rule of
``MountMachine``.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from typing import Final

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dmafs.client import connect
from tests.model.oracle import SECTOR
from tests.mount.harness import fails, wait_until
from tests.mount.mount_keeping import Keeping
from tests.mount.mount_model import KIB, Hold, whole

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES: Final = int(os.environ.get("DMAFS_TEST_MOUNT_EXAMPLES", "18"))
STEPS: Final = 60
WRITE_MAX: Final = 64 * KIB
"""What the kernel passes on in one piece, but for a part of a page that it hasn't cached."""
PAGE: Final = 4096
NAMES: Final = "abcdef"
DAEMON_S: Final = 40.0
"""How long a daemon runs at most: a minute after its start it thins by itself."""
HOLDS_MAX: Final = 4
DEVICES_MAX: Final = 2
STEPS_BETWEEN_ENDS: Final = 15
"""An end of the daemon and the start of the next one take a second, a step else some milliseconds."""


class MountMachine(Keeping):
    """All that is done to a mounted volume, and its ends."""

    # -- capture ----------------------------------------------------------------------------------------------------

    @rule(
        places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, WRITE_MAX)), min_size=1, max_size=4),
        kind=st.sampled_from(["bytes", "sectors", "pages", "zeros", "the same"]),
        then=st.sampled_from(["", "flush", "hold", "sync", "snapshot and sync", "hold and sync"]),
        name=st.sampled_from(NAMES),
        number=st.integers(0, 1000),
    )
    def write(self, places: list[tuple[int, int]], kind: str, then: str, name: str, number: int) -> None:
        """Write some times, of any size and alignment or in whole sectors or pages; often go on, to get deep."""
        grain = {"sectors": SECTOR, "pages": PAGE}.get(kind, 1)
        for place, length in places:
            offset = place % self.size // grain * grain
            count = min(-(-length // grain) * grain, self.size - offset)
            data = {
                "zeros": bytes(count),
                "the same": self.expected.image(self.expected.head)[offset : offset + count],
            }.get(kind, self.rng.randbytes(count))
            self._write(offset, data)
        if then == "flush":
            self.flush()
        if "snapshot" in then:
            self.snapshot(name)
        if "hold" in then and len(self.holds) < HOLDS_MAX:
            self.hold(number, spelling=number, device=number % 2 == 0)
        if then.endswith("sync"):
            self.sync()

    def _write(self, offset: int, data: bytes) -> None:
        """Write, and take in what that was: two events if the kernel cut it behind a page that it had in part only."""
        assert os.pwrite(self.tap, data, offset) == len(data)
        count = self._seq_of(self.rig.live()) - self.expected.head
        first = PAGE - offset % PAGE
        assert count == 1 or (count == 2 and offset % PAGE and first < len(data)), f"{count} events"
        parts = [(offset, data)] if count == 1 else [(offset, data[:first]), (offset + first, data[first:])]
        for place, part in parts:
            self.expected.written(place, part, self._time_of(self.expected.head + 1))
            assert self.expected.times[-1] > self.expected.times[-2]

    @rule()
    def flush(self) -> None:
        os.fsync(self.tap)
        assert os.getxattr(self.rig.live(), "user.dmafs.consistency") == b"exact"

    # -- what changes which moments there are -----------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES))
    def snapshot(self, name: str) -> None:
        folder = self.rig.mnt / "snapshots" / name
        if name in self.expected.snapshots:
            fails(errno.EEXIST, os.mkdir, folder)
            return
        folder.mkdir()
        self.expected.snapshots[name] = self.expected.head
        self.counts["snapshot"] += 1

    @precondition(lambda self: self.expected.snapshots)
    @rule(number=st.integers(0, 100))
    def drop(self, number: int) -> None:
        """Drop a snapshot, mostly one that is not the oldest, so that the next older one has to take over."""
        names = sorted(self.expected.snapshots, key=lambda name: (self.expected.snapshots[name], name))
        name = names[number % len(names)] if number % 4 == 0 else (names[1:] or names)[number % max(len(names) - 1, 1)]
        if name in self.expected.pinned:
            fails(errno.EBUSY, os.rmdir, self.rig.mnt / "snapshots" / name)
            return
        (self.rig.mnt / "snapshots" / name).rmdir()
        del self.expected.snapshots[name]
        self.counts["drop"] += 1

    @rule()
    def sync(self) -> None:
        with connect(self.rig.store) as asked:
            (report,) = asked.sync()["volumes"]
        self.expected.synced()
        assert report["mirror_seq"] == self.expected.mirror_seq
        self.counts["sync"] += 1

    # -- holding ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.holds) < HOLDS_MAX)
    @rule(number=st.integers(0, 1000), spelling=st.integers(0, 100), device=st.booleans())
    def hold(self, number: int, spelling: int, device: bool) -> None:  # noqa: FBT001
        """Open a past image, by any of its names, or put a read-only loop device on it."""
        seq = self._any(number)
        paths = self._spellings(seq)
        path = paths[spelling % len(paths)]
        if device and sum(bool(hold.device) for hold in self.holds) < DEVICES_MAX:
            # Past the page cache of the image, so that the daemon has to answer; that of the device is dropped.
            loop = self.rig.attach(path, "--read-only", "--direct-io=on")
            self.holds.append(Hold(seq, os.open(loop, os.O_RDONLY), loop))
            self.counts["device"] += 1
        else:
            self.holds.append(Hold(seq, os.open(path, os.O_RDONLY)))
            self.counts["descriptor"] += 1
        self.ever_held.add(seq)

    @precondition(lambda self: self.holds)
    @rule(number=st.integers(0, 100))
    def close(self, number: int) -> None:
        self._close(self.holds.pop(number % len(self.holds)))

    # -- looking ----------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 1000), offset=st.integers(0, 1 << 20), length=st.integers(0, 1 << 17))
    def read_at(self, number: int, offset: int, length: int) -> None:
        """Read some bytes, past the end too, under each name of a moment; the command's way gives the same."""
        seq = self._any(number)
        expected = self.expected.image(seq)[offset : offset + length]
        for path in self._spellings(seq):
            assert self._seq_of(path) == seq, path
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(fd, length, offset) == expected, path
            finally:
                os.close(fd)
        if offset < self.size:
            with connect(self.rig.store) as asked:
                found = b"".join(asked.read("disk", at=f"seq:{seq}", offset=offset, length=len(expected)))
            assert found == expected
        self.ever_held.add(seq)

    @rule(number=st.integers(0, 1000), shift=st.sampled_from([-1, 0, 1]))
    def look_up_a_time(self, number: int, shift: int) -> None:
        """Any time of the past, also one that a sync has coarsened, means the newest moment up to it."""
        time_ns = self.expected.times[number % (self.expected.head + 1)] + shift
        seq = self.expected.seq_at(time_ns)
        if seq is None:
            fails(errno.ENOENT, os.stat, self.rig.at(time_ns))
        else:
            assert self._seq_of(self.rig.at(time_ns)) == seq
            assert self._time_of(seq) == self.expected.times[seq]

    @rule()
    def look_for_what_is_gone(self) -> None:
        """What a sync has passed and nobody holds can't be had, nor what is still to come."""
        gone = set(range(self.expected.mirror_seq)) - {*self.expected.reachable(), *self.ever_held}
        for seq in [*self.rng.sample(sorted(gone), min(len(gone), 3)), self.expected.head + 1]:
            fails(errno.ENOENT, os.stat, self.rig.at(f"seq:{seq}"))

    @rule(one=st.integers(0, 1000), other=st.integers(0, 1000))
    def diff(self, one: int, other: int) -> None:
        """One thing at a time is done here, so no sync is given up and the list is exact."""
        a, b = self._any(one), self._any(other)
        with connect(self.rig.store) as asked:
            report = asked.diff("disk", f"seq:{a}", f"seq:{b}")
        listed = {
            sector
            for offset, length in report["extents"]
            for sector in range(offset // SECTOR, (offset + length) // SECTOR)
        }
        assert self.expected.oracle.differing(a, b) <= listed <= self.expected.oracle.written(a, b)
        assert report["bytes"] == len(listed) * SECTOR
        self.counts["diff"] += a != b

    # -- ends of the daemon -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.since_end >= STEPS_BETWEEN_ENDS)
    @rule(killed=st.booleans())
    def end_and_start(self, killed: bool) -> None:  # noqa: FBT001
        """Nothing is held any more afterwards, and what was kept only for that is gone."""
        if killed:
            self.rig.kill()
            self._let_go()
        else:
            self._let_go()
            self.rig.stop()
        self._start()
        with connect(self.rig.store) as asked:
            asked.thin(dry_run=False)  # as the daemon does at its start, so that this is over now
        self.counts["thinned"] += len(self.expected.thinned(self.retention))
        self.ever_held = self.expected.clone_seqs()
        for name, clone in self.expected.clones.items():
            if not killed:
                clone.flushed()
            clone.settle(self._clone(name).read_bytes())
        assert self._seq_of(self.rig.live()) == self.expected.head, "what had been written is there"
        assert self.rig.primary().read_bytes() == self.expected.image(self.expected.head)
        self._assert_nothing_else_is_kept()
        self.counts["kill" if killed else "stop"] += 1

    def _assert_nothing_else_is_kept(self) -> None:
        """Each snapshot has its files, and besides there are only those that clones need."""
        backward, clones = self.rig.store / "disk" / "backward", self.expected.clone_seqs()
        kept = Counter(int(path.stem[:20]) for path in backward.glob("*.ext"))
        shown = Counter(self.expected.snapshots.values())
        assert kept >= shown
        assert {*(kept - shown), *(int(path.stem[:20]) for path in backward.glob("*.gone"))} <= clones
        assert len(list(backward.glob("*.pin"))) == len(self.expected.pinned)

    # -- what holds after every step --------------------------------------------------------------------------------

    @invariant()
    def the_daemon_has_not_thinned_by_itself(self) -> None:
        """It would do so at a time that no model could foresee to the step."""
        if time.monotonic() - self.started > DAEMON_S:
            self.end_and_start(killed=False)

    @invariant()
    def live_is_the_newest(self) -> None:
        MountMachine.steps += 1
        self.since_end += 1
        assert self.rig.live().read_bytes() == self.expected.image(self.expected.head)

    @invariant()
    def past_images_are_history(self) -> None:
        seqs = self.expected.reachable()
        for seq in {seqs[0], self.rng.choice(seqs)}:
            fd = os.open(self.rig.at(f"seq:{seq}"), os.O_RDONLY)
            try:
                assert whole(fd, self.size) == self.expected.image(seq), f"the image at {seq} isn't history's"
            finally:
                os.close(fd)
            self.ever_held.add(seq)

    @invariant()
    def held_images_never_change(self) -> None:
        for hold in self.holds:
            assert whole(hold.fd, self.size) == self.expected.image(hold.seq), hold

    @invariant()
    def snapshots_are_listed(self) -> None:
        snapshots = self.expected.snapshots
        links = ["latest"] if snapshots else []
        assert sorted(os.listdir(self.rig.mnt / "snapshots")) == sorted([*snapshots, *links])
        if snapshots:
            assert os.readlink(self.rig.mnt / "snapshots" / "latest") == self.expected.latest()

    @precondition(lambda self: not self.holds and self.since_end % 10 == 0)
    @invariant()
    def nothing_is_left_behind(self) -> None:
        """What was kept for a holder goes in the background once it has closed."""
        wait_until(self._nothing_else_is_kept, "the snapshots of closed images to go", seconds=10)

    def _nothing_else_is_kept(self) -> bool:
        try:
            self._assert_nothing_else_is_kept()
        except AssertionError:
            return False
        return True


def test_every_moment_of_a_mounted_volume_is_history(capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 9 hold in every step of all histories, of which there are enough."""
    MountMachine.steps = 0
    MountMachine.counts.clear()
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # times differ from run to run, and a shorter history would take minutes to find
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    with capsys.disabled():
        print(f"\nDMAFS_TEST_SEED={SEED} DMAFS_TEST_MOUNT_EXAMPLES={EXAMPLES}")
        try:
            run_state_machine_as_test(hypothesis.seed(SEED)(MountMachine), settings=profile)
        except BaseException as error:
            error.add_note(f"the daemon's log:\n{MountMachine.log}")
            raise
        print(f"{MountMachine.steps} steps, {dict(sorted(MountMachine.counts.items()))}")
    assert MountMachine.steps >= EXAMPLES * STEPS // 2
    wanted = {"snapshot", "drop", "sync", "device", "descriptor", "diff", "kill", "stop"}
    wanted |= {"pin", "unpin", "thin", "thinned", "mark", "clone", "clone written", "clone dropped"}
    assert wanted <= {what for what, count in MountMachine.counts.items() if count}
