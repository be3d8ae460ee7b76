"""Thinning in the service: thinning and shrinking step by step.

``Thinning`` and ``Shrinking`` plan and say what is to be dropped next; who uses them drops it, the daemon through
engines and a command directly. Both ask the pure plans of ``core.retention`` again after each step, since what a drop
frees is known only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dmafs import answers
from dmafs.core.forecast import Forecast
from dmafs.core.moments import Volumes, snapshot_groups
from dmafs.core.retention import NOT_NEEDED, SPACE, Groups, KeepRules, Verdict, plan_shrink, plan_thinning
from dmafs.core.snapshot import Snapshot
from dmafs.units import format_rfc3339

Drops = dict[str, list[Snapshot]]
"""What is to be dropped, by volume."""


def held_of(volumes: Volumes, groups: Groups) -> dict[str, int]:
    """Return the bytes of the backward journal that each group holds."""
    return {
        identifier: sum(volumes[name].snapshots.held_bytes(snapshot) for name, snapshot in group.items())
        for identifier, group in groups.items()
    }


class Thinning:
    """One thinning: rounds of plans at one time, until a plan drops nothing more."""

    def __init__(self, volumes: Volumes, rules: KeepRules, *, measured: bool = True) -> None:
        """Plan for now. What snapshots hold is asked of the file system only if *measured*, or there is a quota."""
        self._volumes = volumes
        self._rules = rules
        self._measured = measured or bool(rules.quota)
        self._now_ns = next(iter(volumes.values())).clock()
        self._dropped: list[Verdict] = []
        self._plan: list[Verdict] = []
        self._groups: Groups = {}
        self._look()

    def _look(self) -> None:
        self._groups = snapshot_groups(self._volumes)
        held = held_of(self._volumes, self._groups) if self._measured else None
        self._plan = plan_thinning(self._groups, self._rules, self._now_ns, held=held)

    def rounds(self) -> Iterator[Drops]:
        """Yield what is to be dropped, oldest first, and look again once that is done."""
        while dropped := [verdict for verdict in self._plan if not verdict.kept]:
            groups = self._groups
            yield drops_of(groups, dropped)
            self._dropped += [verdict for verdict in dropped if _is_gone(groups[verdict.id])]
            self._look()

    def report(self, *, dry_run: bool) -> answers.Thinned:
        """Return what became of each snapshot, oldest first; of a dry run what the first round would do."""
        verdicts = sorted([*self._dropped, *self._plan], key=lambda verdict: (verdict.time_ns, verdict.id))
        return {
            "dry_run": dry_run,
            "snapshots": [
                {
                    "id": verdict.id,
                    "time": format_rfc3339(verdict.time_ns),
                    "kept": verdict.kept,
                    "reasons": list(verdict.reasons),
                    "held_bytes": verdict.held_bytes,
                }
                for verdict in verdicts
            ],
        }


def _is_gone(group: Mapping[str, Snapshot]) -> bool:
    return all(snapshot.hidden for snapshot in group.values())


def drops_of(groups: Groups, verdicts: list[Verdict]) -> Drops:
    """Return the snapshots of groups by volume, in each volume oldest first."""
    drops: Drops = {}
    for verdict in verdicts:
        for name, snapshot in groups[verdict.id].items():
            drops.setdefault(name, []).append(snapshot)
    return {name: sorted(snapshots, key=lambda snapshot: snapshot.key) for name, snapshots in drops.items()}


class Shrinking:
    """One shrinking: runs of groups that may go, oldest first, until enough is freed or the floor is reached.

    What a run frees is forecast as a whole, since its snapshots are merged into one. Of the last run only as much goes
    as is needed, and nothing of a run that frees nothing. Runs end at what has to stay: the floor, a snapshot whose
    image is held, since its files stay as long as that, and one whose merge would take more space than there is.
    """

    def __init__(self, volumes: Volumes, rules: KeepRules, missing: int) -> None:
        """Have *missing* bytes freed."""
        self._volumes = volumes
        self._rules = rules
        self._groups = snapshot_groups(volumes)
        self._asked: list[Verdict] = []
        self.missing = missing

    @property
    def dropped(self) -> int:
        """Return how many groups have been dropped as asked."""
        return sum(_is_gone(self._groups[verdict.id]) for verdict in self._asked)

    def steps(self, spare: int) -> Iterator[Drops]:
        """Yield one run to be dropped after the other; a merge may take *spare* bytes and what was freed before it."""
        held = held_of(self._volumes, self._groups)
        forecasts = {name: Forecast(volume.snapshots) for name, volume in self._volumes.items()}
        run: list[Verdict] = []
        freed, best, count = 0, 0, 0  # of the run; the most that a part of it frees, and how long that part is
        for verdict in [*plan_shrink(self._groups, self._rules, sum(held.values()), held=held), None]:
            gain = None if verdict is None or best >= self.missing else self._gain(verdict, forecasts, spare + freed)
            if gain is not None and verdict is not None:
                run.append(verdict)
                freed += gain
                if freed > best:
                    best, count = freed, len(run)
                continue
            if count:
                self._asked += run[:count]
                yield drops_of(self._groups, run[:count])
                self.missing -= best
                spare += best
            if self.missing <= 0:
                return
            for left in run[count:] + ([verdict] if verdict is not None else []):
                for name, snapshot in self._groups[left.id].items():
                    forecasts[name].keep(snapshot)
            run, freed, best, count = [], 0, 0, 0

    def _gain(self, verdict: Verdict, forecasts: Mapping[str, Forecast], spare: int) -> int | None:
        """Return the bytes that dropping a group frees, None if it has to stay."""
        group = self._groups[verdict.id]
        if not set(verdict.reasons) <= {SPACE, NOT_NEEDED}:
            return None
        if any(one.hidden or one.pinned or self._volumes[name].is_held(one.seq) for name, one in group.items()):
            return None
        total = 0
        for name, snapshot in group.items():
            copied, freed = forecasts[name].drop(snapshot)
            if copied > spare:
                return None
            total += freed
        return total
