"""Claims about dmafs.core.vbm: every row of Tables I and II, and what packed maps keep."""

from __future__ import annotations

import numpy as np
import pytest

from dmafs.core.extent import Ints
from dmafs.core.vbm import MIRROR, BlockMap, Extents, Vbmj, Vbmm, block_map, pays

PAGE = 40
LEFT, NODE, RIGHT = (0, 6), (10, 20), (24, 40)
NEW = 99


def columns(*entries: tuple[int, int, int]) -> tuple[Ints, Ints, Ints]:
    starts, stops, references = (np.array([entry[place] for entry in entries], np.int64) for place in range(3))
    return starts, stops, references


def common(one: tuple[int, int] | None, other: tuple[int, int]) -> Extents:
    if one is None:
        return []
    begin, end = max(one[0], other[0]), min(one[1], other[1])
    return [(begin, end)] if begin < end else []


def without(node: tuple[int, int], move: tuple[int, int] | None) -> Extents:
    if move is None or not common(move, node):
        return [node]
    return [part for part in ((node[0], move[0]), (move[1], node[1])) if part[0] < part[1]]


@pytest.mark.parametrize(
    ("move", "left", "right", "node", "entry"),
    [
        pytest.param((2, 8), (2, 8), None, [(10, 20)], [], id="I.1"),
        pytest.param((2, 10), (2, 10), None, [(10, 20)], [], id="I.1-up-to-the-node"),
        pytest.param((21, 30), None, (21, 30), [(10, 20)], [], id="I.2"),
        pytest.param((20, 30), None, (20, 30), [(10, 20)], [], id="I.2-from-the-node-on"),
        pytest.param((10, 20), None, None, [], [(10, 20)], id="I.3"),
        pytest.param((10, 26), None, (20, 26), [], [(10, 20)], id="I.4"),
        pytest.param((10, 15), None, None, [(15, 20)], [(10, 15)], id="I.5"),
        pytest.param((13, 20), None, None, [(10, 13)], [(13, 20)], id="I.6"),
        pytest.param((13, 30), None, (20, 30), [(10, 13)], [(13, 20)], id="I.7"),
        pytest.param((12, 15), None, None, [(10, 12), (15, 20)], [(12, 15)], id="I.8"),
        pytest.param((3, 20), (3, 10), None, [], [(10, 20)], id="I.9"),
        pytest.param((3, 30), (3, 10), (20, 30), [], [(10, 20)], id="I.10"),
        pytest.param((3, 17), (3, 10), None, [(17, 20)], [(10, 17)], id="I.11"),
    ],
)
def test_rows_of_table_1(
    move: tuple[int, int], left: tuple[int, int] | None, right: tuple[int, int] | None, node: Extents, entry: Extents
) -> None:
    """The node in the middle becomes what the row says, emits what it says, and its neighbours get the recursions."""
    vbmm = Vbmm(0, PAGE, *columns((6, 10, 1), (20, 24, 2)))
    assert vbmm.nodes() == [LEFT, NODE, RIGHT]
    emitted = vbmm.absorb(*move, NEW)
    assert emitted == common(left, LEFT) + entry + common(right, RIGHT)
    assert vbmm.nodes() == without(LEFT, left) + node + without(RIGHT, right)
    vbmm.check()
    mapped = zip(*(column.tolist() for column in vbmm.arrays()), strict=True)
    assert [(start, stop) for start, stop, reference in mapped if reference == NEW] == emitted


@pytest.mark.parametrize(
    ("move", "nodes", "moved"),
    [
        pytest.param((7, 9), [LEFT, (7, 9), NODE, RIGHT], [(7, 9)], id="II.1-and-II.3-to-a-leaf"),
        pytest.param((8, 10), [LEFT, (8, 20), RIGHT], [(8, 10)], id="II.2"),
        pytest.param((21, 23), [LEFT, NODE, (21, 23), RIGHT], [(21, 23)], id="II.3"),
        pytest.param((20, 22), [LEFT, (10, 22), RIGHT], [(20, 22)], id="II.4"),
        pytest.param((10, 20), [LEFT, NODE, RIGHT], [], id="II.5-all-of-the-node"),
        pytest.param((12, 15), [LEFT, NODE, RIGHT], [], id="II.5"),
        pytest.param((10, 22), [LEFT, (10, 22), RIGHT], [(20, 22)], id="II.6-from-its-start"),
        pytest.param((19, 22), [LEFT, (10, 22), RIGHT], [(20, 22)], id="II.6"),
        pytest.param((8, 11), [LEFT, (8, 20), RIGHT], [(8, 10)], id="II.7"),
        pytest.param((8, 20), [LEFT, (8, 20), RIGHT], [(8, 10)], id="II.7-to-its-end"),
        pytest.param((8, 22), [LEFT, (8, 22), RIGHT], [(8, 10), (20, 22)], id="II.8"),
        pytest.param((6, 10), [(0, 20), RIGHT], [(6, 10)], id="II.2-and-II.4"),
        pytest.param((3, 30), [(0, 40)], [(6, 10), (20, 24)], id="II.6-II.8-II.7"),
    ],
)
def test_rows_of_table_2(move: tuple[int, int], nodes: Extents, moved: Extents) -> None:
    """Nodes that the move meets or touches collapse into one; only what no node holds is moved to the journal."""
    vbmj = Vbmj(0, PAGE, *columns((0, 6, 1), (10, 15, 2), (15, 20, 3), (24, 40, 4)))
    assert vbmj.nodes() == [LEFT, NODE, RIGHT]
    assert vbmj.absorb(*move, NEW) == moved
    assert vbmj.nodes() == nodes
    vbmj.check()


@pytest.mark.parametrize("kind", [Vbmm, Vbmj])
def test_a_move_into_an_empty_map(kind: type[BlockMap]) -> None:
    """A leaf that has no child takes the whole move, by either table."""
    page = kind(100, PAGE, *columns())
    assert page.absorb(110, 120, 7) == [(110, 120)]
    assert page.nodes() == ([(100, 110), (120, 140)] if kind is Vbmm else [(110, 120)])
    pieces: list[tuple[int, int, int]] = []
    page.resolve(105, 125, pieces)
    assert pieces == [(105, 110, MIRROR), (110, 120, 7), (120, 125, MIRROR)]


@pytest.mark.parametrize("kind", [Vbmm, Vbmj])
def test_neighbours_with_different_places_are_not_combined(kind: type[BlockMap]) -> None:
    """New entries coexist with older ones next to them (fig. 16)."""
    page = kind(0, PAGE, *columns((10, 20, 1)))
    page.absorb(5, 25, 2)
    assert [column.tolist() for column in page.arrays()] == [[5, 10, 20], [10, 20, 25], [2, 1, 2]]


def test_conversion_when_it_pays() -> None:
    """A map is MIM-centric until more has left the mirror than stayed; the other kind then says the same."""
    assert not pays(40, 20)
    assert pays(40, 19)
    vbmm = block_map(0, PAGE, *columns((0, 10, 1), (10, 15, 2), (30, 35, 3)))
    assert isinstance(vbmm, Vbmm)
    vbmm.absorb(35, 36, 4)
    vbmj = vbmm.converted()
    assert vbmj.nodes() == [(0, 15), (30, 36)]
    assert all(np.array_equal(*pair) for pair in zip(vbmm.arrays(), vbmj.arrays(), strict=True))
    assert isinstance(block_map(0, PAGE, *vbmj.arrays()), Vbmj)


def test_a_newer_write_replaces_what_it_covers() -> None:
    """Overwriting cuts older entries and takes the rest off the mirror."""
    page = block_map(0, PAGE, *columns((5, 15, 1), (20, 30, 2)))
    page.overwrite(10, 25, 3)
    assert [column.tolist() for column in page.arrays()] == [[5, 10, 25], [10, 25, 30], [1, 3, 2]]
    page.overwrite(5, 30, 4)
    assert [column.tolist() for column in page.arrays()] == [[5], [30], [4]]
    page.check()
