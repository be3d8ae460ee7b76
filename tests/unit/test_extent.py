"""Claims about dmafs.core.extent: what a run of writes amounts to, and arithmetic on disjoint lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmafs.core.extent import Ints, chop, join, lacking, net_change, subtract

SIZE = 40

Extents = list[tuple[int, int]]

extents = st.lists(
    st.integers(0, SIZE - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 1, SIZE))), max_size=25
)


def columns(pairs: Extents) -> tuple[Ints, Ints]:
    return np.array([start for start, _ in pairs], np.int64), np.array([stop for _, stop in pairs], np.int64)


def pairs(starts: Ints, stops: Ints) -> Extents:
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def painted(writes: Extents) -> list[int]:
    """Return for each sector the number of the last write to it, or -1."""
    sectors = [-1] * SIZE
    for number, (start, stop) in enumerate(writes):
        sectors[start:stop] = [number] * (stop - start)
    return sectors


def disjoint(writes: Extents) -> Extents:
    """Return an ascending list without overlaps in which neighbours may touch."""
    change = net_change(*columns(writes))
    return pairs(change.starts, change.stops)


def overwritten(image: str, moves: list[tuple[int, int, str]]) -> str:
    for start, stop, data in moves:
        image = image[:start] + data + image[stop:]
    return image


def test_the_example_of_the_design() -> None:
    """12345, then ABCDE, then ZXC at 2-4, amounts to AZXCE; saving its extents first gives 12345 back."""
    writes = [(0, 5, "ABCDE"), (1, 4, "ZXC")]
    change = net_change(*columns([(start, stop) for start, stop, _ in writes]))
    rows = zip(change.starts.tolist(), change.stops.tolist(), change.winner.tolist(), strict=True)
    moves = [(a, b, writes[w][2][a - writes[w][0] : b - writes[w][0]]) for a, b, w in rows]
    assert moves == [(0, 1, "A"), (1, 4, "ZXC"), (4, 5, "E")]
    saved = [(start, stop, "12345"[start:stop]) for start, stop in pairs(*join(change.starts, change.stops))]
    assert saved == [(0, 5, "12345")]
    assert overwritten("12345", moves) == "AZXCE"
    assert overwritten(overwritten("12345", moves), saved) == "12345"


@given(extents)
def test_the_last_writer_of_each_sector_wins(writes: Extents) -> None:
    """Net change paints every sector with the last write that covers it, and no other sector."""
    change = net_change(*columns(writes))
    sectors = [-1] * SIZE
    for start, stop, winner in zip(change.starts.tolist(), change.stops.tolist(), change.winner.tolist(), strict=True):
        assert sectors[start:stop] == [-1] * (stop - start), "moves do not overlap"
        sectors[start:stop] = [winner] * (stop - start)
    assert sectors == painted(writes)


@given(extents)
def test_moves_are_ascending_and_unbroken(writes: Extents) -> None:
    """Moves ascend, and two neighbours that touch come from different writes: none is cut without need."""
    change = net_change(*columns(writes))
    assert np.all(change.starts < change.stops)
    assert np.all(change.stops[:-1] <= change.starts[1:])
    touching = change.stops[:-1] == change.starts[1:]
    assert np.all(change.winner[:-1][touching] != change.winner[1:][touching])


@pytest.mark.parametrize("wrong", [(3, 3), (4, 3)])
def test_an_empty_extent_is_a_bug(wrong: tuple[int, int]) -> None:
    """Empty and reversed extents are refused, not painted."""
    with pytest.raises(AssertionError):
        net_change(*columns([(0, 5), wrong]))


@given(extents)
def test_join_leaves_no_neighbours_that_touch(writes: Extents) -> None:
    """Joining keeps the sectors that are covered and leaves a gap between any two extents."""
    joined = pairs(*join(*columns(disjoint(writes))))
    assert [number >= 0 for number in painted(joined)] == [number >= 0 for number in painted(writes)]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(joined))


@given(extents, extents)
def test_subtract_keeps_what_is_not_held(writes: Extents, held: Extents) -> None:
    """What is left is exactly the sectors of the writes that nothing held covers, disjoint and joined."""
    left = pairs(*subtract(*columns(writes), *columns(held)))
    covered, holding = painted(writes), painted(held)
    assert [n >= 0 for n in painted(left)] == [c >= 0 > h for c, h in zip(covered, holding, strict=True)]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(left))


@given(extents, st.integers(1, 7))
def test_chop_bounds_every_length(writes: Extents, limit: int) -> None:
    """Chopping keeps order and sectors, exceeds no limit, and cuts no more often than it has to."""
    whole = pairs(*join(*columns(disjoint(writes))))
    parts = pairs(*chop(*columns(whole), limit))
    assert all(0 < stop - start <= limit for start, stop in parts)
    assert pairs(*join(*columns(parts))) == whole
    assert len(parts) == sum(-(-(stop - start) // limit) for start, stop in whole)


@given(extents, extents)
def test_lacking_says_which_extent_each_piece_is_of(writes: Extents, held: Extents) -> None:
    """Joined, the pieces are what ``subtract`` leaves; each lies in the extent that it is said to be of."""
    change = lacking(*columns(writes), *columns(held))
    assert pairs(*join(change.starts, change.stops)) == pairs(*subtract(*columns(writes), *columns(held)))
    for (start, stop), winner in zip(pairs(change.starts, change.stops), change.winner.tolist(), strict=True):
        assert writes[winner][0] <= start < stop <= writes[winner][1]
