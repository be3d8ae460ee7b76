"""Maps under random moves: both kinds against each other, Tables I and II, and a list of one reference per sector.

``DMAFS_TEST_SEED`` chooses the moves and ``DMAFS_TEST_EXAMPLES`` how many runs there are.
"""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dmafs.core import layers
from dmafs.core.extent import Ints, join, subtract
from dmafs.core.layers import Layer, LayerTree, net_layer, stacked
from dmafs.core.vbm import MIRROR, ZERO, BlockMap, Vbmj, Vbmm, block_map, pays
from dmafs.core.vrmo import BACKWARD, Stack, Vrmo, backward_reference, split_reference
from dmafs.core.work import Work, run
from tests.model.counting import run_machine
from tests.model.tables import closed, table_1, table_2

SIZE = 80
FIRST = 1000
EXAMPLES = 300

moves = st.integers(0, SIZE - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 1, SIZE)))


def ints(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def columns(entries: list[tuple[int, int, int]]) -> tuple[Ints, Ints, Ints]:
    return ints([one[0] for one in entries]), ints([one[1] for one in entries]), ints([one[2] for one in entries])


class PageMachine(RuleBasedStateMachine):
    """One page as a Vbmm and as a Vbmj, both never converted, and as whatever pays."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        nothing = columns([])
        self.vbmm: BlockMap = Vbmm(FIRST, SIZE, *nothing)
        self.vbmj: BlockMap = Vbmj(FIRST, SIZE, *nothing)
        self.paying = block_map(FIRST, SIZE, *nothing)
        self.sectors = [MIRROR] * SIZE
        self.moved = 0

    def _maps(self) -> list[BlockMap]:
        return [self.vbmm, self.vbmj, self.paying]

    def _convert(self) -> None:
        if isinstance(self.paying, Vbmm) and pays(SIZE, self.paying.on_mirror):
            self.paying = self.paying.converted()

    @rule(move=moves)
    def absorb(self, move: tuple[int, int]) -> None:
        """Only what is on the mirror is mapped; nodes and emissions are those of the tables."""
        start, stop = FIRST + move[0], FIRST + move[1]
        self.moved += 1
        nodes, emitted = table_1(closed(self.vbmm.nodes()), (start, stop - 1))
        merged, candidates = table_2(closed(self.vbmj.nodes()), (start, stop - 1))
        held = self.vbmj.arrays()
        found = [each.absorb(start, stop, self.moved) for each in self._maps()]
        assert closed(self.vbmm.nodes()) == nodes
        assert closed(self.vbmj.nodes()) == merged
        assert closed(found[0]) == emitted == candidates
        assert found[0] == found[1] == found[2]
        wanted = subtract(ints([start]), ints([stop]), held[0], held[1])
        assert found[0] == list(zip(*(column.tolist() for column in wanted), strict=True)), (
            "a sync's plan says the same"
        )
        for sector in range(*move):
            if self.sectors[sector] == MIRROR:
                self.sectors[sector] = self.moved
        self._convert()

    @rule(move=moves)
    def overwrite(self, move: tuple[int, int]) -> None:
        self.moved += 1
        for each in self._maps():
            each.overwrite(FIRST + move[0], FIRST + move[1], self.moved)
        self.sectors[move[0] : move[1]] = [self.moved] * (move[1] - move[0])
        self._convert()

    @rule()
    def build_again(self) -> None:
        """A map made from another one's entries is the same."""
        for kind, each in ((Vbmm, self.vbmm), (Vbmj, self.vbmj)):
            again = kind(FIRST, SIZE, *each.arrays())
            assert again.nodes() == each.nodes()
            assert again.on_mirror == each.on_mirror
        self.paying = block_map(FIRST, SIZE, *self.vbmm.arrays())

    @rule()
    def start_again(self) -> None:
        self.vbmm, self.vbmj = Vbmm(FIRST, SIZE, *columns([])), Vbmj(FIRST, SIZE, *columns([]))
        self.paying = block_map(FIRST, SIZE, *columns([]))
        self.sectors = [MIRROR] * SIZE

    @rule(move=moves)
    def resolve(self, move: tuple[int, int]) -> None:
        """Pieces together are the range asked for, each with its sectors' reference; all kinds say the same."""
        answers = []
        for each in self._maps():
            pieces: list[tuple[int, int, int]] = []
            each.resolve(FIRST + move[0], FIRST + move[1], pieces)
            answers.append(pieces)
        at = FIRST + move[0]
        for begin, end, reference in answers[0]:
            assert begin == at < end
            assert self.sectors[begin - FIRST : end - FIRST] == [reference] * (end - begin)
            at = end
        assert at == FIRST + move[1]
        assert answers[0] == answers[1] == answers[2]

    @invariant()
    def maps_are_the_list(self) -> None:
        PageMachine.steps += 1
        for each in self._maps():
            each.check()
            sectors = [MIRROR] * SIZE
            for start, stop, reference in zip(*(column.tolist() for column in each.arrays()), strict=True):
                sectors[start - FIRST : stop - FIRST] = [reference] * (stop - start)
            assert sectors == self.sectors
        assert isinstance(self.paying, Vbmj) == pays(SIZE, self.paying.on_mirror) or isinstance(self.paying, Vbmj)
        begins, ends = join(*self.vbmm.arrays()[:2])
        runs = list(zip(begins.tolist(), ends.tolist(), strict=True))
        assert self.vbmj.nodes() == runs, "nodes of one kind are the gaps of the other"


class StackMachine(RuleBasedStateMachine):
    """Runs of history in a tree of layers, and maps over them, in both orders of precedence."""

    steps = 0

    @initialize(
        later=st.booleans(),
        fan_out=st.integers(2, 4),
        limit=st.sampled_from([0, 300, 1 << 20]),
        stack_max=st.integers(1, 4),
    )
    def begin(self, later: bool, fan_out: int, limit: int, stack_max: int) -> None:  # noqa: FBT001
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(layers, "FAN_OUT", fan_out)
        self.patch.setattr(layers, "STACK_MAX", stack_max)
        self.later = later
        self.runs: dict[int, list[tuple[int, int, int]]] = {}
        self.next_slot = self.moved = self.released = 0
        self.tree = LayerTree(self._leaf, later_wins=later, limit_bytes=limit)

    def _leaf(self, slot: int) -> Work[Layer]:
        layer: Layer = yield lambda: net_layer(*columns(self.runs.get(slot, [])))
        return layer

    @rule(entries=st.lists(moves, min_size=1, max_size=6), jump=st.integers(1, 3))
    def add(self, entries: list[tuple[int, int]], jump: int) -> None:
        self.next_slot += jump
        self.runs[self.next_slot] = self._entries(entries)
        self.tree.add(self.next_slot)

    def _entries(self, entries: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        found = []
        for start, stop in entries:
            self.moved += 1
            found.append((start, stop, self.moved))
        return found

    @rule(number=st.integers(0, 100), entries=st.lists(moves, min_size=1, max_size=3))
    def grow(self, number: int, entries: list[tuple[int, int]]) -> None:
        """Entries are added to a slot, as when a dropped snapshot is merged into an older one."""
        if self.runs:
            slot = sorted(self.runs)[number % len(self.runs)]
            self.runs[slot] += self._entries(entries)
            self.tree.changed(slot)

    @rule(number=st.integers(0, 100))
    def remove(self, number: int) -> None:
        if self.runs and not self.later:
            slot = sorted(self.runs)[number % len(self.runs)]
            del self.runs[slot]
            self.tree.remove(slot)

    @rule(number=st.integers(0, 100))
    def release(self, number: int) -> None:
        """The oldest runs go to the mirror, as forward segments do; their references are left out from then on."""
        if self.runs and self.later:
            slot = sorted(self.runs)[number % min(3, len(self.runs))]
            for old in [one for one in self.runs if one <= slot]:
                self.released = max(self.released, *(entry[2] for entry in self.runs.pop(old)))
            self.tree.release(slot)

    @rule(low=st.integers(0, 100), high=st.integers(0, 100), growing_between=st.booleans(), move=moves)
    def look(self, low: int, high: int, growing_between: bool, move: tuple[int, int]) -> None:  # noqa: FBT001
        """The layers of a run of slots are what it amounts to, also when the tree changes while they are made."""
        first = 0 if self.later else low % (self.next_slot + 1)
        stop = max(first, high % (self.next_slot + 2))
        work = self.tree.prepare(first, stop)
        try:
            call = next(work)
            if growing_between and self.runs and not self.later:
                self.grow(low, [move])
            while True:
                call = work.send(call())
        except StopIteration:
            pass
        found = self.tree.layers_nowait(first, stop)
        assert found is not None
        self._compare(first, stop, Stack([*found], self.released))

    def _compare(self, first: int, stop: int, stack: Stack) -> None:
        slots = [slot for slot in sorted(self.runs, reverse=not self.later) if first <= slot < stop]
        sectors = [MIRROR] * SIZE
        for slot in slots:
            for start, end, reference in self.runs[slot]:
                sectors[start:end] = [reference] * (end - start)
        vrmo = Vrmo(SIZE)
        vrmo.page_sectors = 16
        vrmo.make_pages(0, SIZE, stack)
        vrmo.check()
        found: list[int] = []
        for start, end, reference in vrmo.resolve_nowait(0, SIZE) or ():
            found += [reference] * (end - start)
        if self.later:  # a run that grows in the middle of a slot keeps its own order; only the tree's is under test
            assert [one if one > self.released else MIRROR for one in sectors] == found
        else:
            assert sectors == found

    @invariant()
    def tree_is_right(self) -> None:
        if hasattr(self, "tree"):
            StackMachine.steps += 1
            self.tree.check()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()


@pytest.mark.parametrize("machine", [PageMachine, StackMachine])
def test_maps_are_lists_of_references(
    machine: type[PageMachine | StackMachine], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is done to maps and layers does to them what it does to a list with one reference per sector."""
    with capsys.disabled():
        run_machine(machine, examples=EXAMPLES, steps=50)


def test_an_image_nobody_grows_needs_no_layers() -> None:
    """An empty stack is the mirror."""
    vrmo = Vrmo(SIZE)
    vrmo.make_pages(0, SIZE, Stack([net_layer(*stacked([]))], 0))
    assert vrmo.resolve_nowait(3, 9) == [(3, 9, MIRROR)]
    tree = LayerTree(lambda _: iter(()), later_wins=True, limit_bytes=0)  # type: ignore[arg-type,return-value]
    run(tree.prepare(0, 10))
    assert tree.layers_nowait(0, 10) == []


@hypothesis.given(st.integers(0, 2**29 - 1), st.integers(0, 2**32 - 1), st.booleans())
def test_a_backward_reference_names_its_entry(serial: int, index: int, zero: bool) -> None:  # noqa: FBT001
    """Serial and index come back, with or without data, and no forward seq can be taken for a backward reference."""
    reference = backward_reference(serial, index) | (ZERO if zero else 0)
    assert split_reference(reference) == (serial, index)
    assert BACKWARD <= reference < 2**63
