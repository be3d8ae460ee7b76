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

import contextlib
import errno
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dmafs.service.client import session
from dmafs.units import format_time, parse_canonical
from tests.model.oracle import SECTOR, expected_clone
from tests.mount.expected import Expected, Rules
from tests.mount.harness import REDONE, Rig, fails, opened, spelled, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES: Final = int(os.environ.get("DMAFS_TEST_MOUNT_EXAMPLES", "13"))
STEPS: Final = 60
KIB: Final = 1024
WRITE_MAX: Final = 64 * KIB
"""What the kernel passes on in one piece, but for a part of a page that it hasn't cached."""
PAGE: Final = 4096
NAMES: Final = "abcdef"
MARKS: Final = "mno"
CLONES: Final = "xy"
DAEMON_S: Final = 40.0
HOLDS_MAX: Final = 4
DEVICES_MAX: Final = 2
STEPS_BETWEEN_ENDS: Final = 15
"""An end of the daemon and the start of the next one take a second, a step else some milliseconds."""
CONFIGURATION: Final = 'segment_size = "1MiB"\nsegment_records = 1024\nreserve = 0\ntick_s = 0.05\nidle_images = 2\n'


@dataclass(frozen=True)
class Hold:
    """A past image that is open: as a file, or, with *device*, as the one behind a loop device."""

    seq: int
    fd: int
    device: str = ""


def whole(fd: int, size: int) -> bytes:
    """Read all of a file or device; what the kernel has of it in its cache is forgotten first."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, size, 0)


class MountMachine(RuleBasedStateMachine):
    """One volume behind a daemon, and what is expected of it."""

    steps = 0
    counts: ClassVar[Counter[str]] = Counter()
    log = ""  # of the last daemons

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.rng = random.Random(0)
        self.holds: list[Hold] = []
        self.ever_held: set[int] = set()
        self.since_end = 0

    @initialize(
        size=st.sampled_from([256 * KIB, 300 * KIB + SECTOR, 1024 * KIB]),
        empty=st.booleans(),
        rules=st.builds(Rules, st.integers(0, 3), st.booleans()),
    )
    def create(self, size: int, empty: bool, rules: Rules) -> None:  # noqa: FBT001
        content = bytes(size) if empty else self.rng.randbytes(size)
        self.size = size
        self.rig = self.stack.enter_context(Rig())
        self.stack.callback(self._keep_log)
        self.rig.allow(REDONE)
        self.rig.create(size=size, content=content)
        self.retention = rules
        self.rig.configure(CONFIGURATION + rules.table())
        self.tap = -1
        self.stack.callback(self._let_go)
        self._start()
        self.expected = Expected(content, self._time_of(0))

    def _start(self) -> None:
        """Start a daemon; it thins at once, and then once a minute."""
        self.rig.start()
        self.started = time.monotonic()
        self.tap = os.open(self.rig.tap(), os.O_RDWR)
        self.since_end = 0

    def teardown(self) -> None:
        self.stack.close()

    def _keep_log(self) -> None:
        MountMachine.log = self.rig.log()

    def _let_go(self) -> None:
        """Close everything; of a daemon that was killed that says it is gone."""
        for hold in self.holds:
            self._close(hold)
        self.holds = []
        with contextlib.suppress(OSError):
            os.close(self.tap)

    # -- the tree ---------------------------------------------------------------------------------------------------

    def _time_of(self, seq: int) -> int:
        """Return the time that a seq's canonical name tells."""
        time_ns = parse_canonical(os.readlink(self.rig.mnt / "at" / f"seq:{seq}"))
        assert time_ns is not None
        return time_ns

    def _spellings(self, seq: int) -> list[Path]:
        """Return paths of the image at a reachable seq."""
        time_ns = self.expected.times[seq]
        times = (f"seq:{seq}", format_time(time_ns), spelled(time_ns), f"{spelled(time_ns + 7)}~7ns")
        ids = [name for name, found in self.expected.snapshots.items() if found == seq]
        return [self.rig.at(time) for time in times] + [self.rig.snapshot(name) for name in ids]

    def _seq_of(self, path: Path) -> int:
        return int(os.getxattr(path, "user.dmafs.seq"))

    def _any(self, number: int) -> int:
        """Return a reachable seq: often the mirror's, which a sync takes away first, or one of the newest."""
        seqs = self.expected.reachable()
        if number % 4 == 0:
            return self.expected.mirror_seq
        return seqs[-1 - number // 4 % min(len(seqs), 3)] if number % 4 == 1 else seqs[number % len(seqs)]

    # -- capture ----------------------------------------------------------------------------------------------------

    @rule(
        places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, WRITE_MAX)), min_size=1, max_size=4),
        kind=st.sampled_from(["bytes", "sectors", "pages", "zeros", "the same"]),
        then=st.sampled_from(["", "flush", "sync", "snapshot and sync"]),
        name=st.sampled_from(NAMES),
    )
    def write(self, places: list[tuple[int, int]], kind: str, then: str, name: str) -> None:
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
        if then == "snapshot and sync":
            self.snapshot(name)
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
        with session(self.rig.store) as asked:
            (report,) = asked.sync()["volumes"]
        self.expected.synced()
        assert report["mirror_seq"] == self.expected.mirror_seq
        self.counts["sync"] += 1

    @precondition(lambda self: self.expected.snapshots)
    @rule(number=st.integers(0, 100))
    def pin_or_unpin(self, number: int) -> None:
        names = sorted(self.expected.snapshots)
        name = names[number % len(names)]
        with session(self.rig.store) as asked:
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
        assert [one["id"] for one in report if not one["kept"]] == dropped
        assert {one["id"] for one in report if "pinned" in one["reasons"]} == self.expected.pinned
        if dry_run:
            self.expected.snapshots = before
        self.counts["thin"] += 1
        self.counts["thinned"] += len(dropped) * (not dry_run)

    @rule(name=st.sampled_from(MARKS))
    def mark(self, name: str) -> None:
        with session(self.rig.store) as asked:
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

    def _close(self, hold: Hold) -> None:
        with contextlib.suppress(OSError):
            os.close(hold.fd)
        if hold.device:
            self.rig.detach(hold.device)

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
            with session(self.rig.store) as asked:
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
        with session(self.rig.store) as asked:
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
        with session(self.rig.store) as asked:
            asked.thin(dry_run=False)  # as the daemon does at its start, so that this is over now
        self.expected.thinned(self.retention)
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
        """It would do so a minute after its start, which no model could foresee to the step."""
        if time.monotonic() - self.started > DAEMON_S:
            self.end_and_start(killed=False)

    @invariant()
    def clones_show_what_was_written(self) -> None:
        assert sorted(os.listdir(self.rig.mnt / "clones")) == sorted(self.expected.clones)
        for name, clone in self.expected.clones.items():
            with opened(self._clone(name), os.O_RDONLY) as fd:
                assert whole(fd, self.size) == clone.shown, f"clone {name}"
            assert self._seq_of(self._clone(name)) == clone.seq
            with opened(self.rig.at(f"seq:{clone.seq}"), os.O_RDONLY) as fd:
                assert whole(fd, self.size) == clone.base == self.expected.image(clone.seq)

    @invariant()
    def marks_are_found(self) -> None:
        """Until the mirror has passed them."""
        for name, seq in self.expected.marks.items():
            if seq > self.expected.mirror_seq:
                assert self._seq_of(self.rig.at(name)) == seq

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
    assert wanted <= set(MountMachine.counts)
