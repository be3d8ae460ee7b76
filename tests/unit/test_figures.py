"""The worked examples of the original description, with the numbers that its text gives.

The drawings are not to be had. Where the text leaves a number out, all that fit are tried. Its ranges are closed.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dmafs.core.extent import Ints, join, net_change
from dmafs.core.sync import movelists, sync
from dmafs.core.vbm import BlockMap, Vbmj, Vbmm
from dmafs.core.volume import Volume
from dmafs.core.vrmo import split_reference
from dmafs.core.work import run
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill, image_bytes


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


def empty(kind: type[BlockMap], size: int) -> BlockMap:
    return kind(0, size, ints(), ints(), ints())


def lists(*columns: Ints) -> list[list[int]]:
    return [column.tolist() for column in columns]


def sectors(text: bytes) -> bytes:
    return b"".join(fill(byte) for byte in text)


def text_of(content: bytes | memoryview) -> bytes:
    return bytes(content[::SECTOR])


def written(path: Path, *writes: tuple[int, bytes], size: int = 8) -> Volume:
    """Return a volume that began with ``.12345..`` and got writes, flushed."""
    volume = copied_volume(path, sectors(b".12345".ljust(size, b".")))
    for start, text in writes:
        volume.write(start, sectors(text))
    run(volume.flush())
    return volume


def test_figure_4_net_change_and_its_inverse(tmp_path: Path) -> None:
    """ABCDE at 1-5, then ZXC at 2-4: the net change is AZXCE, its inverse 12345."""
    volume = written(tmp_path / "volume", (1, b"ABCDE"), (2, b"ZXC"))
    run(sync(volume))
    assert text_of((tmp_path / "volume" / "mirror.img").read_bytes()) == b".AZXCE.."
    (snapshot,) = volume.snapshots
    segment = volume.snapshots.segment(snapshot)
    assert lists(*segment.extents()) == [[1], [6]]
    assert text_of(bytes(segment.verify(0))) == b"12345"
    assert text_of(image_bytes(volume, 0)) == b".12345.."
    volume.close()


def test_figure_4_moves_name_the_event_that_wins() -> None:
    """A move has a logical address, a length, and where in the forward journal the newest data is."""
    change = net_change(ints(1, 2), ints(6, 5))
    assert lists(*change) == [[1, 2, 5], [2, 5, 6], [0, 1, 0]]


@pytest.mark.parametrize("start", range(1, 8))
def test_figure_11_generating_a_vbmm(start: int) -> None:
    """Node 1100 is split by move 1102; move 1118 shortens 1110, goes on as (8:13), and shortens 1111, (12:100)."""
    vbmm = empty(Vbmm, 101)
    assert vbmm.nodes() == [(0, 101)]
    assert vbmm.absorb(8, 12, 1) == [(8, 12)]
    assert vbmm.nodes() == [(0, 8), (12, 101)]
    assert vbmm.absorb(start, 14, 2) == [(start, 8), (12, 14)]
    assert vbmm.nodes() == [(0, start), (14, 101)]


def test_figure_12_sorted_and_joined() -> None:
    """A physical extent list, sorted by its starts; entries that are contiguous become one."""
    starts, stops = ints(40, 8, 12, 20), ints(44, 12, 20, 24)
    order = np.argsort(starts, kind="stable")
    assert lists(*join(starts[order], stops[order])) == [[8, 40], [24, 44]]
    save, _ = movelists(starts, stops, (ints(), ints()))
    assert lists(*save) == [[8, 40], [24, 44]]


def test_figure_13_backward_movelist_in_the_journal(tmp_path: Path) -> None:
    """Each move becomes a descriptor and data in the two queues; what belongs to one sync is sealed by a marker."""
    volume = written(tmp_path / "volume", (4, b"x"), (1, b"a"), (2, b"b"))
    run(sync(volume))
    (snapshot,) = volume.snapshots
    segment = volume.snapshots.segment(snapshot)
    assert (list(segment.starts), list(segment.lengths), list(segment.physicals)) == ([1, 4], [2, 1], [0, 2])
    assert [text_of(bytes(segment.verify(index))) for index in (0, 1)] == [b"12", b"4"]
    assert list(segment.indicator_seqs) == [2]
    assert not segment.unsealed
    volume.close()


def test_figure_14_moves_in_the_new_vbmm() -> None:
    """The moves of the backward movelist are physical extent nodes, found between the nodes of the mirror."""
    vbmm = empty(Vbmm, 100)
    for place, (start, stop) in enumerate([(10, 20), (50, 60)], 1):
        vbmm.absorb(start, stop, place)
    assert vbmm.nodes() == [(0, 10), (20, 50), (60, 100)]
    pieces: list[tuple[int, int, int]] = []
    vbmm.resolve(15, 55, pieces)
    assert pieces == [(15, 20, 1), (20, 50, -1), (50, 55, 2)]


def test_figure_16_an_older_vbmm_is_updated(tmp_path: Path) -> None:
    """What a later sync takes off the mirror is added to an older image's map in memory, next to what it had."""
    volume = written(tmp_path / "volume", (2, b"B"))
    image = volume.image(0)
    image.pins += 1
    run(sync(volume))
    assert text_of(image.read(0, image.size)) == b".12345.."
    (page,) = image.vrmo.pages()
    assert [column.tolist() for column in page.arrays()[:2]] == [[2], [3]]
    volume.write(1, sectors(b"acd"))
    run(volume.flush())
    run(sync(volume, open_snapshot=False))
    (page_after,) = image.vrmo.pages()
    assert page_after is page or isinstance(page_after, Vbmj)
    assert [column.tolist() for column in page_after.arrays()[:2]] == [[1, 2, 3], [2, 3, 4]]
    assert text_of(image.read(0, image.size)) == b".12345.."
    image.check()
    image.pins -= 1
    volume.close()


def test_figure_18_older_vbmjs_point_to_the_same_data(tmp_path: Path) -> None:
    """A sync copies what the mirror loses once; maps of older images, journal-centric too, are made to point to it."""
    volume = written(tmp_path / "volume", (0, b"ABCDEF"))
    oldest = volume.image(0)
    oldest.pins += 1
    run(sync(volume))
    older = volume.image(1)
    older.pins += 1
    assert text_of(oldest.read(0, oldest.size)) == b".12345.."
    assert text_of(older.read(0, older.size)) == b"ABCDEF.."
    (page,) = oldest.vrmo.pages()
    assert isinstance(page, Vbmj)
    volume.write(4, sectors(b"xyz"))
    run(volume.flush())
    run(sync(volume))
    assert page.nodes() == [(0, 7)], "the node has grown by what was still on the mirror, sector 6"
    opened = volume.snapshots.at(1)
    assert opened is not None
    assert lists(*volume.snapshots.segment(opened).extents()) == [[4], [7]]
    (last,) = (reference for start, _, reference in zip(*lists(*page.arrays()), strict=True) if start == 6)
    assert split_reference(last) == (opened.serial, 0)
    assert text_of(oldest.read(0, oldest.size)) == b".12345.."
    assert text_of(older.read(0, older.size)) == b"ABCDEF.."
    for image in (oldest, older):
        image.check()
        image.pins -= 1
    volume.close()


@pytest.mark.parametrize("before", [(0, 10), (20, 30), (5, 38)])
def test_figure_17_updating_a_vbmj(before: tuple[int, int]) -> None:
    """Move (42, 48) misses node 1711, meets 1720 and is cut to (46, 48); R(C) is [39, 48] with both in its list."""
    vbmj = empty(Vbmj, 100)
    vbmj.absorb(*before, 1)
    vbmj.absorb(39, 46, 2)
    assert vbmj.nodes() == [before, (39, 46)]
    assert vbmj.absorb(42, 49, 3) == [(46, 49)]
    assert vbmj.nodes() == [before, (39, 49)]
    assert lists(*vbmj.arrays()) == [[before[0], 39, 46], [before[1], 46, 49], [1, 2, 3]]


def test_figure_19_one_node_many_subranges() -> None:
    """A node for 40 to 860 has a list of its subranges 40-66, 67-79, 80-300 and 301-859, each at a place of its own."""
    bounds = [40, 67, 80, 301, 860]
    vbmj = empty(Vbmj, 1000)
    for place, (start, stop) in enumerate(itertools.pairwise(bounds), 1):
        vbmj.absorb(start, stop, place)
    assert vbmj.nodes() == [(40, 860)]
    pieces: list[tuple[int, int, int]] = []
    vbmj.resolve(60, 310, pieces)
    assert pieces == [(60, 67, 1), (67, 80, 2), (80, 301, 3), (301, 310, 4)]
