"""A VRMO under random moves, measured against a plain list of one reference per sector."""

from __future__ import annotations

import os
from unittest import mock

import hypothesis
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dmafs.core import vrmo
from dmafs.core.vrmo import MIRROR, Vrmo, backward_reference, split_reference

SIZE = 80
SEED = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES = int(os.environ.get("DMAFS_TEST_EXAMPLES", "60"))

moves = st.integers(0, SIZE - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 1, SIZE)))


class VrmoMachine(RuleBasedStateMachine):
    """One map of a few sectors, in nodes of a few entries."""

    def __init__(self) -> None:
        super().__init__()
        self.vrmo = Vrmo()
        self.sectors = [MIRROR] * SIZE
        self.seq = 0
        self.saved = 0
        self.patch = mock.patch.object(vrmo, "NODE_LIMIT", 4)

    @initialize(node_limit=st.integers(2, 6), built=st.lists(moves, max_size=30))
    def begin(self, node_limit: int, built: list[tuple[int, int]]) -> None:
        self.patch = mock.patch.object(vrmo, "NODE_LIMIT", node_limit)
        self.patch.start()
        self.vrmo = Vrmo.build(
            np.array([start for start, _ in built], np.int64),
            np.array([stop for _, stop in built], np.int64),
            np.arange(1, len(built) + 1, dtype=np.int64),
        )
        for start, stop in built:
            self.seq += 1
            self.sectors[start:stop] = [self.seq] * (stop - start)

    @rule(move=moves)
    def absorb(self, move: tuple[int, int]) -> None:
        self.seq += 1
        start, stop = move
        self.vrmo.absorb(start, stop, self.seq)
        self.sectors[start:stop] = [self.seq] * (stop - start)

    @rule(parts=st.lists(moves, max_size=5))
    def fill(self, parts: list[tuple[int, int]]) -> None:
        """Only what is still on the mirror is filled; the extents of one call are disjoint."""
        starts, stops, references, taken = [], [], [], set[int]()
        for start, stop in parts:
            if taken.isdisjoint(range(start, stop)):
                taken |= set(range(start, stop))
                self.saved += 1
                reference = backward_reference(7, self.saved)
                starts.append(start)
                stops.append(stop)
                references.append(reference)
                for sector in range(start, stop):
                    if self.sectors[sector] == MIRROR:
                        self.sectors[sector] = reference
        self.vrmo.fill(np.array(starts, np.int64), np.array(stops, np.int64), np.array(references, np.int64))

    @rule(back=st.integers(0, 12))
    def forget(self, back: int) -> None:
        seq = max(0, self.seq - back)
        self.vrmo.forget(seq)
        self.sectors = [MIRROR if reference <= seq else reference for reference in self.sectors]

    @rule(move=moves)
    def resolve(self, move: tuple[int, int]) -> None:
        """Pieces together are the range asked for, each with the reference of all its sectors."""
        at, stop = move
        for begin, end, reference in self.vrmo.resolve(at, stop):
            assert begin == at < end
            assert self.sectors[begin:end] == [reference] * (end - begin)
            at = end
        assert at == stop

    @invariant()
    def map_is_the_list(self) -> None:
        self.vrmo.check()
        sectors = [MIRROR] * SIZE
        for start, stop, reference in zip(*(column.tolist() for column in self.vrmo.arrays()), strict=True):
            sectors[start:stop] = [reference] * (stop - start)
        assert sectors == self.sectors
        assert len(self.vrmo) == len(self.vrmo.arrays()[0])

    def teardown(self) -> None:
        mock.patch.stopall()


def test_a_map_is_a_list_of_references() -> None:
    """Absorb, fill, forget and resolve do to the map what they do to a list with one reference per sector."""
    profile = settings(
        max_examples=EXAMPLES * 2,
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(hypothesis.seed(SEED)(VrmoMachine), settings=profile)


@hypothesis.given(st.integers(0, 2**30 - 1), st.integers(0, 2**32 - 1))
def test_a_backward_reference_names_its_entry(serial: int, index: int) -> None:
    """Serial and index come back, and no forward seq can be taken for a backward reference."""
    reference = backward_reference(serial, index)
    assert split_reference(reference) == (serial, index)
    assert vrmo.BACKWARD <= reference < 2**63
