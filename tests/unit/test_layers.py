"""Claims about dmafs.core.layers: blocks are made once, in bounded memory, while history goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dmafs.core import layers
from dmafs.core.layers import FAN_OUT, Layer, LayerTree
from dmafs.core.work import Work, run


@pytest.fixture(autouse=True)
def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have blocks merged whenever they can be."""
    monkeypatch.setattr(layers, "STACK_MAX", 1)


class Bench:
    """A tree whose slots have one entry each, at an address of their own, and whatever happens at each yield."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self.made: list[int] = []
        self.mapped = False
        self.reference = 1
        self.tree = LayerTree(self.leaf, later_wins=True, limit_bytes=limit_bytes)

    def leaf(self, slot: int) -> Work[Layer]:
        self.made.append(slot)
        columns = [np.array([value]) for value in (slot, slot + 1, self.reference)]
        layer: Layer = yield lambda: Layer(*columns, mapped=self.mapped)
        return layer

    def add(self, *slots: int) -> None:
        for slot in slots:
            self.tree.add(slot)

    def found(self, low: int, high: int) -> dict[int, int]:
        """Return the references by address."""
        layers = self.tree.layers_nowait(low, high)
        assert layers is not None
        return {
            start: reference
            for layer in layers
            for start, reference in zip(layer.starts.tolist(), layer.references.tolist(), strict=True)
        }


def disturbed(work: Work[Any], disturb: Callable[[], Any]) -> int:
    """Do work, and something else after each of its calls, some hundred times at most; return how often."""
    times = 0
    try:
        call = next(work)
        while times < 500:
            answer = call()
            disturb()
            times += 1
            call = work.send(answer)
    except StopIteration:
        pass
    return times


def go_on(work: Work[Any], call: Callable[[], Any]) -> None:
    """Do the rest of work, of which *call* comes next."""
    with contextlib.suppress(StopIteration):
        while True:
            call = work.send(call())


def test_a_slot_that_goes_on_changing_holds_up_no_other() -> None:
    """A sync adds to the open snapshot all the time; opening an image waits for none of that."""
    bench = Bench()
    bench.add(*range(FAN_OUT + 1))
    assert disturbed(bench.tree.prepare(0, FAN_OUT), lambda: bench.tree.changed(FAN_OUT)) == FAN_OUT + 1
    assert bench.made == list(range(FAN_OUT))
    bench.tree.check()


@pytest.mark.parametrize("at", range(FAN_OUT + 1))
def test_a_block_is_made_again_if_a_slot_in_it_changes_meanwhile(at: int) -> None:
    """Whenever the change comes, layers have it."""
    bench = Bench()
    bench.add(*range(FAN_OUT))
    left = iter(range(FAN_OUT * 3))

    def disturb() -> None:
        if next(left) == at:
            bench.reference = 2
            bench.tree.changed(0)

    disturbed(bench.tree.prepare(0, FAN_OUT), disturb)
    assert bench.found(0, FAN_OUT)[0] == 2
    bench.tree.check()


def test_those_who_wait_take_nothing_from_each_other() -> None:
    """Else two whose layers don't fit into memory together could go on making them for ever."""
    bench = Bench(limit_bytes=0)
    bench.add(*range(2 * FAN_OUT))
    waiting = bench.tree.prepare(FAN_OUT + 1, 2 * FAN_OUT)
    call = next(waiting)
    for _ in range(3):
        call = waiting.send(call())
    run(bench.tree.prepare(1, FAN_OUT))
    assert list(bench.found(1, FAN_OUT)) == list(range(1, FAN_OUT))
    go_on(waiting, call)
    assert list(bench.found(FAN_OUT + 1, 2 * FAN_OUT)) == list(range(FAN_OUT + 1, 2 * FAN_OUT))
    assert len(bench.made) == len(set(bench.made))


def test_memory_is_bounded_when_blocks_have_few_slots() -> None:
    """After thinning most have one."""
    limit = 3 * 24
    bench = Bench(limit_bytes=limit)
    bench.add(*(number * FAN_OUT**2 + 1 for number in range(10)))
    for number in range(10):
        run(bench.tree.prepare(number * FAN_OUT**2, (number + 1) * FAN_OUT**2))
    assert sum(layer.bytes for layer in bench.tree._blocks.values()) == limit


def test_what_is_released_while_it_is_made_is_not_kept() -> None:
    """Nobody would ask for it again, or forget it."""
    bench = Bench()
    bench.add(*range(FAN_OUT))
    work = bench.tree.prepare(0, FAN_OUT)
    call = next(work)
    bench.tree.release(2)
    go_on(work, call)
    assert min(key[1] for key in bench.tree._blocks if key[0] == 0) == 3
    assert bench.found(0, FAN_OUT).keys() >= set(range(3, FAN_OUT))
    bench.tree.check()


def test_work_that_is_given_up_leaves_nothing_behind() -> None:
    """What it waited for may be forgotten then."""
    bench = Bench(limit_bytes=0)
    bench.add(*range(FAN_OUT * 2))
    work = bench.tree.prepare(0, FAN_OUT)
    next(work)
    work.close()
    run(bench.tree.prepare(FAN_OUT, FAN_OUT * 2))
    assert list(bench.tree._blocks) == [(0, slot) for slot in range(FAN_OUT, FAN_OUT * 2)]


@pytest.mark.parametrize(("most", "stack"), [(64, 64), (63, 57), (10, 8), (8, 8), (7, 1), (1, 1)])
def test_no_more_is_merged_than_pays(most: int, stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few layers are as good as one; of many the smallest blocks are merged, and no more of them than have to be."""
    monkeypatch.setattr(layers, "STACK_MAX", most)
    bench = Bench()
    bench.add(*range(FAN_OUT**2))
    run(bench.tree.prepare(0, FAN_OUT**2))
    found = bench.tree.layers_nowait(0, FAN_OUT**2)
    assert found is not None
    assert len(found) == stack
    assert bench.found(0, FAN_OUT**2) == dict.fromkeys(range(FAN_OUT**2), 1)


def test_what_there_is_no_memory_for_is_not_merged() -> None:
    """More layers take longer to look into; that is all. With leaves that are mapped only blocks take memory."""
    bench = Bench(limit_bytes=3 * FAN_OUT * 24 + 23)
    bench.mapped = True
    bench.add(*range(FAN_OUT**2))
    for _ in range(2):
        run(bench.tree.prepare(0, FAN_OUT**2))
        assert bench.found(0, FAN_OUT**2) == dict.fromkeys(range(FAN_OUT**2), 1)
        merged = [key for key in bench.tree._blocks if key[0]]
        assert merged == [(1, 0), (1, 1), (1, 2)]
    assert bench.made == list(range(FAN_OUT**2))


def test_a_leaf_that_is_made_again_replaces_nothing_else() -> None:
    """Since it is the same, what was merged of it stays."""
    bench = Bench()
    bench.add(*range(FAN_OUT))
    run(bench.tree.prepare(0, FAN_OUT))
    bench.tree.again(3)
    run(bench.tree.prepare(0, FAN_OUT))
    run(bench.tree.prepare(0, 4))
    assert bench.made == [*range(FAN_OUT), 3]
