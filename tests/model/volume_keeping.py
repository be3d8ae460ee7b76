"""What decides how long snapshots stay, and journals in memory: pins, thinning, and journals let go of."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from dmafs.core.moments import rename, snapshot_groups
from dmafs.core.retention import KeepRules, plan_thinning
from dmafs.core.snapshot import Snapshot
from dmafs.core.work import Work, run
from dmafs.service.thinning import drops_of, held_of
from tests.model.stepping import Running
from tests.model.volume_model import ALL, Model, named


class Keeping(Model):
    """Pins and their ends come at any time, also while a thinning would drop what they are of."""

    @precondition(lambda self: self.copied and self.pinning is None)
    @rule(number=st.integers(0, 100), wait=st.booleans())
    def pin_or_unpin(self, number: int, wait: bool) -> None:  # noqa: FBT001
        shown = list(self.volume.snapshots)
        if not shown:
            return
        snapshot = shown[number % len(shown)]
        one = named(snapshot)
        if snapshot.pinned:
            self._pinning("unpin", self.volume.unpin(snapshot), lambda _: self._unpinned(one))
        else:
            self._pinning("pin", self.volume.pin(snapshot), lambda _: None)
            self.pinned.add(one)
            if one in self.thinned:
                self.spared.add(one)
                self.least = [*self.least, one]
        if not wait:
            self.finish_pinning()

    def _pinning(self, kind: str, work: Work[Any], done: Any) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.pinning = Running(kind, work, done)

    def _unpinned(self, one: tuple[int, str]) -> None:
        self.pinned.discard(one)
        if one in self.thinned and one in self.least:
            self.least = [*self.least]
            self.least.remove(one)

    @precondition(lambda self: self.pinning is None and (self.idle or self.running.kind == "sync"))
    @rule(number=st.integers(0, 100))
    def rename(self, number: int) -> None:
        """A snapshot gets another name, also while a sync feeds it."""
        shown = [one for one in self.volume.snapshots if not one.busy]
        if not shown:
            return
        snapshot = shown[number % len(shown)]
        old = named(snapshot)
        self.counts["rename"] = self.counts.get("rename", 0) + 1
        run(rename(self.volume, snapshot, f"renamed{self.counts['rename']}"))
        new = named(snapshot)
        self.least, self.most = ([new if one == old else one for one in names] for names in (self.least, self.most))
        self.pinned = {new if one == old else one for one in self.pinned}

    @precondition(lambda self: self.pinning is not None)
    @rule()
    def finish_pinning(self) -> None:
        assert self.pinning is not None
        assert self.pinning.advance()
        self.pinning = None

    @precondition(lambda self: self.idle and self.copied and len(self.least) > 1)
    @rule(
        rules=st.builds(
            KeepRules,
            within_s=st.sampled_from([0.0, 0.0, 60.0]),
            hourly=st.integers(0, 3),
            daily=st.integers(0, 1),
            weekly=st.just(0),
            monthly=st.just(0),
            yearly=st.just(0),
            minimum=st.integers(0, 2),
            named=st.booleans(),
            quota=st.sampled_from([0, 0, 1000, 10_000]),
        ),
        calls=st.sampled_from([0, 1, 2, 3, 5, 8, ALL, ALL]),
    )
    def thin(self, rules: KeepRules, calls: int) -> None:
        """Drop what the rules don't keep, oldest first, as the daemon does: what is pinned meanwhile is passed over."""
        volumes = {"disk": self.volume}
        groups = snapshot_groups(volumes)
        plan = plan_thinning(groups, rules, self.now, held=held_of(volumes, groups), timezone="UTC")
        shown = list(self.volume.snapshots)
        dropped = drops_of(groups, [verdict for verdict in plan if not verdict.kept]).get("disk", [])
        assert not [one for one in dropped if one.pinned or (rules.named and one.name)]
        assert len(shown) - len(dropped) >= min(rules.minimum, len(shown))
        self.thinned = [named(snapshot) for snapshot in dropped]
        self.least = [one for one in self.least if one not in self.thinned]
        self.counts["thinned"] = self.counts.get("thinned", 0) + len(dropped)

        def done(_: None) -> None:
            found = self.visible()
            assert set(found) & set(self.thinned) <= self.spared, "what the rules don't keep is gone"
            self.least = self.most = found
            self.thinned, self.spared = [], set()

        self._begin("thinning", self._drops(dropped), done)
        self.advance(calls=calls)

    def _drops(self, snapshots: list[Snapshot]) -> Work[None]:
        for snapshot in snapshots:
            if not snapshot.hidden and not snapshot.pinned:
                yield from self.volume.drop_snapshot(snapshot)
                self.sweep()

    @rule()
    def unload(self) -> None:
        """Let go of all journals of snapshots that no work needs, as the daemon does when there are too many."""
        snapshots = self.volume.snapshots
        opened = None if self.idle else snapshots.open_at(self.volume.pointers.now.mirror_seq)
        released = snapshots.unload(keep=opened, everything=True)
        self.drain()
        for segment in released:
            segment.close()
        self.counts["unload"] = self.counts.get("unload", 0) + len(released)
