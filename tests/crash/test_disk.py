"""The simulated disk loses what it may lose, and nothing else; seeded bugs of dmafs are found with it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from dmafs.core import backward
from dmafs.core.journal import ForwardJournal
from dmafs.core.mirror import Mirror
from dmafs.core.overlay import Overlay
from dmafs.core.pointers import PointerFile
from dmafs.core.segment import Segment
from dmafs.errors import DmafsError
from dmafs.units import SECTOR
from tests.crash.crash import crash
from tests.crash.cutting import cut, killed
from tests.crash.disk import SimulatedDisk, SimulatedStorage
from tests.crash.harm import faults, flips

TRIES = 300


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def left(disk: SimulatedDisk) -> set[tuple[tuple[str, bytes], ...]]:
    """Return all that cuts may leave."""
    moment = disk.moment()
    return {tuple(sorted(cut(moment, random.Random(seed)).contents().items())) for seed in range(TRIES)}


def test_what_is_synced_is_kept(disk: SimulatedDisk) -> None:
    """Of a synced file with a synced name nothing is ever lost, and a kill loses nothing at all."""
    storage = SimulatedStorage(disk)
    file = storage.create("f")
    file.write([b"old"], 0)
    file.datasync()
    assert left(disk) == {(), (("f", b"old"),)}, "the name isn't durable by that"
    storage.sync_directory("")
    assert left(disk) == {(("f", b"old"),)}
    file.write([b"new"], 0)
    assert left(disk) == {(("f", b"old"),), (("f", b"new"),)}
    assert killed(disk.moment()).contents() == {"f": b"new"}
    assert killed(killed(disk.moment()).moment()).contents() == {"f": b"new"}
    assert cut(killed(disk.moment()).moment(), random.Random(1), keep=False).contents() == {"f": b"old"}


def test_each_sector_has_a_version_of_its_own(disk: SimulatedDisk) -> None:
    """Writes are torn at sectors, not within one, and a later one may be there without the one before."""
    storage = SimulatedStorage(disk)
    file = storage.create("f")
    file.write([bytes(2 * SECTOR)], 0)
    file.datasync()
    storage.sync_directory("")
    file.write([b"a" * 2 * SECTOR], 0)
    file.write([b"b" * SECTOR], SECTOR // 2)
    found = {content for ((_, content),) in left(disk)}
    first = {bytes(SECTOR), b"a" * SECTOR, b"a" * 256 + b"b" * 256}
    second = {bytes(SECTOR), b"a" * SECTOR, b"b" * 256 + b"a" * 256}
    assert found == {one + other for one in first for other in second}


def test_sizes_have_versions_too(disk: SimulatedDisk) -> None:
    """What a file was truncated from may come back, with its bytes or with zeros."""
    storage = SimulatedStorage(disk)
    file = storage.create("f")
    file.write([b"x" * SECTOR], 0)
    file.datasync()
    storage.sync_directory("")
    file.truncate(0)
    assert {content for ((_, content),) in left(disk)} == {b"", bytes(SECTOR), b"x" * SECTOR}


def test_names_are_left_in_order(disk: SimulatedDisk) -> None:
    """In one directory a later change isn't there without an earlier one; two directories don't wait for each other."""
    storage = SimulatedStorage(disk)
    for directory in ("d", "e"):
        storage.make_directory(directory)
    storage.sync_directory("")
    storage.create("d/a").close()
    storage.rename("d/a", "d/b")
    storage.create("e/c").close()
    names = {tuple(path for path, _ in found if path[-1] != "/") for found in left(disk)}
    assert names == {(), ("d/a",), ("d/b",), ("e/c",), ("d/a", "e/c"), ("d/b", "e/c")}
    storage.sync_directory("d")
    names = {tuple(path for path, _ in found if path[-1] != "/") for found in left(disk)}
    assert names == {("d/b",), ("d/b", "e/c")}


# --- the suite tested


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def nothing(*_: Any, **__: Any) -> None:
    """Stand for what a bug has left out."""


def without_directory(real: Callable[..., Any]) -> Callable[..., Any]:
    def take_dirty(self: ForwardJournal, *others: Any) -> Any:
        self._new_names = False
        return real(self, *others)

    return take_dirty


DATALESS = property(lambda segment: (segment.ext,))


def unsynced(self: PointerFile, pointers: Any) -> None:
    self._file.write([pointers.encode()], (0, 4096)[pointers.generation % 2])


NAMELESS = without_directory(ForwardJournal.take_dirty)
Suite = Callable[[str, int], Any]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("where", "name", "bug", "suite", "workload"),
    [
        pytest.param(Segment, "files", DATALESS, crash, "journal", id="data isn't synced"),
        pytest.param(Segment, "files", (), crash, "journal", id="nothing is synced"),
        pytest.param(PointerFile, "_put", unsynced, crash, "syncs", id="pointers aren't synced"),
        pytest.param(Mirror, "datasync", nothing, crash, "syncs", id="the mirror isn't synced"),
        pytest.param(ForwardJournal, "take_dirty", NAMELESS, crash, "roll", id="new names aren't synced"),
        pytest.param(backward, "entries_case", lambda **_: "R40", flips, "snapshots", id="entries aren't sealed"),
        pytest.param(Segment, "_compare", nothing, flips, "syncs", id="data isn't compared"),
        pytest.param(Mirror, "_bad", lambda *_, **__: [], flips, "syncs", id="the mirror isn't compared"),
        pytest.param(Overlay, "_valid", lambda _, records: records[:0], crash, "clones", id="blocks are forgotten"),
        pytest.param(ForwardJournal, "abandon", nothing, faults, "windows", id="abandoned windows stay"),
    ],
)
def test_seeded_bugs_are_found(where: Any, name: str, bug: Any, suite: Suite, workload: str) -> None:
    """A bug put in on purpose makes the suite fail."""
    with mock.patch.object(where, name, bug), pytest.raises((AssertionError, DmafsError, OSError)):
        suite(workload, 1)
