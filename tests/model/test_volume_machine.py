"""A volume under random histories, measured against an oracle that keeps every moment's full image.

Claims, after every step, also while a sync, a snapshot, a drop, a thinning, a flush, a pin, the making or the drop of a
clone, the initial copy or any number of these together are under way:

1. The live image is the newest moment, and every recoverable seq shows its moment bit for bit.
2. Recoverable is exactly: from floor or origin to the head, visible snapshots, what is held, what clones are of.
3. A held image is one object and never changes, whatever syncs and drops do. Whoever reads step by step meanwhile sees
   no wrong byte, of an image that nobody holds either; only of that may be said that it is gone.
4. A stop at any file operation loses nothing but the unflushed end; what is left is a prefix of history.
5. All structures agree with their descriptors, and no file in the store is unreferenced.
6. A diff of two moments lists each sector whose bytes differ, and none that wasn't written since the older one.
7. A pinned snapshot is neither dropped nor thinned, over stops too; of the others a thinning leaves what its rules
   keep, and goes from the oldest on.
8. A clone shows its moment, changed by exactly the writes to it; flushed ones outlive a stop.
9. A mark is found by its name as long as the mirror hasn't passed it.

``DMAFS_TEST_SEED`` chooses the histories and ``DMAFS_TEST_EXAMPLES`` how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from dmafs.core.ondisk import Flag
from dmafs.core.retention import KeepRules
from tests.model.counting import run_machine
from tests.model.stepping import Running
from tests.model.volume_claims import Claims
from tests.model.volume_clones import Cloning
from tests.model.volume_keeping import Keeping
from tests.model.volume_model import ALL, named
from tests.model.volume_readers import KINDS, READERS_MAX
from tests.unit.tools import segments_of

EXAMPLES = 300
STEPS = 60


class VolumeMachine(Keeping, Cloning, Claims):
    """All that can be done to a volume, and its ends."""

    @precondition(lambda self: self.copied)
    @rule(
        script=st.lists(
            st.tuples(
                st.sampled_from(["work", "advance", "advance", "read", "read", "read on", "read on", "unload"]),
                st.integers(0, 1000),
            ),
            min_size=5,
            max_size=40,
        )
    )
    def interleave(self, script: list[tuple[str, int]]) -> None:
        """Have work and readers go on by turns, in many more ways than single rules would."""
        for what, number in script:
            if what == "work" and self.idle:
                self._begin_work(number)
            elif what == "advance" and not self.idle:
                self.advance(calls=1 if number % 3 else ALL)
            elif what == "read" and len(self.readers) < READERS_MAX:
                place = number * 37, 1 + number * 11
                self.begin_to_read(KINDS[number % len(KINDS)], number, place, held=number % 3 == 0, steps=number % 2)
            elif what == "read on" and self.readers:
                self.read_on(number, steps=1)
            elif what == "unload":
                self.unload()
        self.counts["interleaved"] = self.counts.get("interleaved", 0) + len(script)

    def _begin_work(self, number: int) -> None:
        if number % 3 == 0:
            self.sync(open_snapshot=number % 2 == 0, calls=0)
        elif number % 3 == 1 and self.least:
            self.drop_snapshot(number, calls=0)
        elif len(self.least) > 1:
            self.thin(KeepRules(0, number % 4, 0, 0, 0, 0, number % 2, number % 5 == 0), calls=0)

    @precondition(lambda self: self.idle and self.copied)
    @rule()
    def reopen(self) -> None:
        if self.pinning:
            self.finish_pinning()
        if self.cloning:
            self.finish_cloning()
        for clone in self.volume.clones:
            self.flush_clone(clone)
        if self.flushing:
            self.finish_flush()
        self.flush(Flag.FLUSH, "", wait=False)
        self.volume.mark_clean()
        self._restart()
        assert self.was_clean is True
        assert self.volume.journal.durable == self.durable == self.oracle.head

    @rule(changes=st.integers(0, 12), flushed=st.booleans(), torn=st.booleans())
    def crash(self, changes: int, flushed: bool, torn: bool) -> None:  # noqa: FBT001
        """Stop at a file operation; with *torn* what isn't durable is lost or damaged in part."""
        durable, head = self.volume.journal.durable, self.oracle.head
        assert durable == self.durable if self.idle else durable >= self.durable
        running, flushing, self.running, self.flushing = self.running, self.flushing, None, None
        pinning, cloning, self.pinning, self.cloning = self.pinning, self.cloning, None, None
        # A process that ends cleans nothing up: its work is never closed, not even by the garbage collector.
        self.dead += [work for work in (running, flushing, pinning, cloning, *self.readers) if work]
        self.readers = []
        if flushing and flushed:
            flushing.execute()
        for work in (running, pinning, cloning):
            if work:
                with self.disk.fused(changes):
                    work.execute()
        self._primary_catches_up()
        self._restart(torn=torn)
        now = self.volume.journal
        assert self.was_clean is False
        assert durable <= now.head <= head if torn else now.head == head, "what was flushed is there"
        assert now.durable <= max(durable, self.volume.pointers.now.durable)
        self.durable = now.durable
        self.oracle.cut(now.head)
        self.tried_marks = {mark for mark in self.tried_marks if mark[0] <= now.head}
        self._adopt_pins(pinning)
        self.adopt_clones(cloning)
        if now.head < head:
            self.primary.write([self.oracle.image_at(now.head)], 0)
        kept = {seq for segment in segments_of(now) for seq in segment.indicator_seqs}
        assert {mark for mark in self.marks if mark[0] > self.volume.floor} <= {(m.seq, m.name) for m in now.marks()}
        self.indicated = {seq for seq in self.indicated if seq in kept}
        self._adopt_origin()
        if not self.copied:
            self._copy()

    def _adopt_pins(self, pinning: Running | None) -> None:
        """Take in which snapshots are pinned after a stop: as before, but for the one of a change under way."""
        found = {named(snapshot) for snapshot in self.volume.snapshots if snapshot.pinned}
        assert len(found ^ (self.pinned & set(self.visible()))) <= (pinning is not None)
        assert found <= self.pinned
        self.pinned = found

    def _restart(self, *, torn: bool = False) -> None:
        """Close and open; adopt which of the allowed states an interrupted work has left."""
        self.readers = []
        self.volume.close()
        self.held = {}
        self.unhold_later = False
        if torn:
            for path in sorted((self.store / "forward").iterdir()) + sorted((self.store / "backward").iterdir()):
                if self.rng.random() < 0.6 and self.disk.tear(path, self.rng):
                    self.counts["torn"] = self.counts.get("torn", 0) + 1
        if torn:
            self.tear_clones()
        self.volume = self._open()
        self.least = self.most = self.visible()
        self.thinned, self.spared = [], set()
        self.floors = self.floor, self.floor
        hidden = {snapshot.seq for snapshot in self.volume.snapshots.all() if snapshot.hidden}
        assert hidden <= {*self.clone_seqs(), *(self.volume.clones.holds(seq) and seq for seq in hidden)}
        assert self.volume.pointers.now.sync_target == 0
        self._settle()

    def teardown(self) -> None:
        for one in (*self.dead, *self.readers, self.running, self.flushing, self.pinning, self.cloning):
            if one is not None:
                self.disk.die(one.work)  # now, since its directory goes
        self.readers = []
        try:
            if hasattr(self, "volume"):
                self.volume.close()
        finally:
            self.patches.close()


def test_every_moment_of_a_volume_is_history(capsys: pytest.CaptureFixture[str]) -> None:
    """Claims 1 to 9 hold in every step of all histories, of which there are enough."""
    with capsys.disabled():
        run_machine(VolumeMachine, examples=EXAMPLES, steps=STEPS)
    work = {"copy", "drop", "snapshot", "sync", "thinning", "pin", "unpin", "make a clone", "drop a clone", "torn"}
    readers = {f"{kind} {how}" for kind in ("locate", "measure", "stack") for how in ("held", "unheld")}
    assert work | readers | {"diff", "warm", "clone", "unload", "rename", "write a clone"} <= set(VolumeMachine.counts)


@pytest.fixture
def machine() -> Iterator[VolumeMachine]:
    made = VolumeMachine()
    made.create(size=24, content="random", page_sectors=4, fan_out=2, index_bytes=200, stepwise=False, nosy=True)
    yield made
    made.teardown()


def write(machine: VolumeMachine, start: int, then: str) -> None:
    machine.write([(start, 4)], zeros=1, jump=1, late=False, then=then)


def test_an_image_of_the_mirror_opened_during_a_sync_never_changes(machine: VolumeMachine) -> None:
    """A sync that feeds an older snapshot stops for an image of the mirror's own moment, opened after its plan."""
    write(machine, 0, "sync")
    write(machine, 2, "flush")
    machine.sync(open_snapshot=False, calls=0)
    machine.hold_mirror()
    machine.advance(calls=ALL)
    assert machine.idle
    assert list(machine.held) == [1]
    machine.held_images_never_change()
    machine.structures_agree()


def test_reading_while_a_snapshot_is_merged_loses_nothing(machine: VolumeMachine) -> None:
    """The journals that a drop works on stay open, even when no image needs them and the others are let go."""
    for start in (0, 8, 16):
        write(machine, start, "sync")
    machine.drop_snapshot(number=1, calls=1)
    for segment in machine.volume.take_garbage():
        segment.close()
    machine.volume.image(0)
    machine.advance(calls=ALL)
    assert machine.idle
    assert [seq for seq, _ in machine.least] == [0, 2]
    machine.structures_agree()
    machine.look_at_everything()
    machine.reopen()
    machine.look_at_everything()
