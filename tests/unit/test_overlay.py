"""Claims about dmafs.core.overlay: what was flushed is found again, what wasn't is forgotten, damage is seen."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dmafs.core import overlay as module
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Flag, Header, Kind, encode_record
from dmafs.core.overlay import BLOCK, BLOCK_SECTORS, DAT, EXT, Overlay
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.work import run
from dmafs.errors import CorruptionError, VersionError
from dmafs.units import SECTOR
from tests.unit.tools import FOREIGN, OURS, flip

SECTORS = 20 * BLOCK_SECTORS + 3  # twenty blocks and a short one
SALT = 0x5A17


class Bench:
    """An overlay in a folder of its own."""

    def __init__(self, path: Path, *, sectors: int = SECTORS) -> None:
        self.sectors = sectors
        self.path = path / "one"
        self.path.mkdir()
        self.storage = RealStorage(path)
        Overlay.create(self.storage, "one", Header(Kind.CLONE, OURS, SALT, 1, 7, 70, name="one"), sectors)
        self.overlay = self.open()

    def open(self) -> Overlay:
        return Overlay.open(self.storage, "one", OURS, self.sectors)

    def reopen(self) -> Overlay:
        self.overlay.close()
        self.overlay = self.open()
        self.overlay.check()
        return self.overlay

    def write(self, first: int, stop: int, value: int = 1) -> None:
        end = min(stop * BLOCK, self.sectors * SECTOR)
        self.overlay.write([bytes([value]) * (end - first * BLOCK)], first * BLOCK)
        self.overlay.check()

    def flush(self) -> None:
        run(self.overlay.flush(5))
        self.overlay.check()

    def held(self) -> list[int]:
        return [block for block, flag in enumerate(self.overlay.held(0, -(-self.sectors // BLOCK_SECTORS))) if flag]

    def records(self) -> int:
        return ((self.path / EXT).stat().st_size - HEADER_SIZE) // RECORD_SIZE


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.overlay.close()


def test_a_new_overlay_holds_nothing(bench: Bench) -> None:
    """It is one hole of the volume's size, and its header says what it belongs to."""
    assert bench.held() == []
    assert bench.overlay.blocks == 0
    assert bench.overlay.runs(0, 21) == [(0, 21, False)]
    assert (bench.path / DAT).stat().st_blocks == 0
    assert (bench.path / DAT).stat().st_size == SECTORS * SECTOR
    header = bench.overlay.header
    assert (header.kind, header.snapshot_seq, header.snapshot_time_ns, header.name) == (Kind.CLONE, 7, 70, "one")
    assert {path.stat().st_mode & 0o777 for path in bench.path.iterdir()} == {0o600}


def test_what_was_flushed_is_found_again(bench: Bench) -> None:
    """After opening anew, blocks and bytes are those of the last flush; what was written later is forgotten."""
    bench.write(2, 5, 1)
    bench.write(20, 21, 2)
    bench.flush()
    bench.write(9, 10, 3)
    assert bench.held() == [2, 3, 4, 9, 20]
    bench.reopen()
    assert bench.held() == [2, 3, 4, 20]
    assert bench.overlay.blocks == 4
    assert bench.overlay.runs(0, 6) == [(0, 2, False), (2, 5, True), (5, 6, False)]
    buffer = bytearray(3 * SECTOR)
    bench.overlay.read_into(memoryview(buffer), 20 * BLOCK)
    assert buffer == bytes([2]) * len(buffer)


def test_runs_that_touch_are_one_record(bench: Bench) -> None:
    """Blocks that come in between two flushes are named by as few records as there are runs, in whatever order."""
    for first in (4, 6, 5, 3, 11):
        bench.write(first, first + 1)
    bench.flush()
    assert bench.records() == 2
    bench.write(4, 7, 9)  # overwritten in place
    bench.flush()
    assert bench.records() == 2
    bench.write(7, 9)
    bench.flush()
    assert bench.records() == 3
    bench.reopen()
    assert bench.held() == [3, 4, 5, 6, 7, 8, 11]


def test_long_runs_are_cut(tmp_path: Path) -> None:
    """No record is longer than an extent may be."""
    bench = Bench(tmp_path, sectors=1000 * BLOCK_SECTORS)
    bench.overlay.write([bytes(600 * BLOCK)], 100 * BLOCK)
    bench.flush()
    assert bench.records() == 3
    bench.reopen()
    assert bench.overlay.blocks == 600
    bench.overlay.close()


def test_many_records_are_read_in_parts(bench: Bench) -> None:
    """Recovery finds all records whatever amount is read at once."""
    for first in range(0, 20, 2):
        bench.write(first, first + 1)
    bench.flush()
    assert bench.records() == 10
    with mock.patch.object(module, "SCAN_BYTES", 3 * RECORD_SIZE):
        bench.reopen()
    assert bench.held() == list(range(0, 20, 2))


def test_data_is_durable_before_its_record_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush syncs the data, then appends the records, then syncs them; without new blocks only the first."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(RealFile, name)

        def watched(file: RealFile, *arguments: object) -> None:
            calls.append(f"{name} {Path(file.name).name}")
            original(file, *arguments)

        monkeypatch.setattr(RealFile, name, watched)

    watch("write")
    watch("datasync")
    bench.write(1, 2)
    calls.clear()
    bench.flush()
    assert calls == [f"datasync {DAT}", f"write {EXT}", f"datasync {EXT}"]
    calls.clear()
    bench.write(1, 2)
    bench.flush()
    assert calls == [f"write {DAT}", f"datasync {DAT}"]


def test_a_failed_append_can_be_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After records couldn't be written the blocks still wait for them."""
    bench.write(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "write", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            run(bench.overlay.flush(5))
    assert bench.overlay.dirty
    bench.flush()
    bench.reopen()
    assert bench.held() == [1]


def test_a_torn_end_is_cut_off(bench: Bench) -> None:
    """Bytes behind the last record, and records of a batch that was torn, are truncated for good."""
    bench.write(1, 2)
    bench.flush()
    durable = (bench.path / EXT).stat().st_size
    for first in (4, 6, 8):
        bench.write(first, first + 1)
    bench.flush()
    flip(bench.path / EXT, durable + 5)
    with (bench.path / EXT).open("ab") as file:
        file.write(b"torn")
    bench.reopen()
    assert bench.held() == [1]
    assert (bench.path / EXT).stat().st_size == durable
    bench.write(6, 7)
    bench.flush()
    bench.reopen()
    assert bench.held() == [1, 6]


def test_a_lost_durable_record_is_damage(bench: Bench) -> None:
    """An invalid record before one that calls it durable isn't cut off silently: what it named would turn old."""
    for first in (1, 3, 5):
        bench.write(first, first + 1)
        bench.flush()
    content = (bench.path / EXT).read_bytes()
    flip(bench.path / EXT, HEADER_SIZE + RECORD_SIZE + 16)
    damaged = (bench.path / EXT).read_bytes()
    with pytest.raises(CorruptionError, match="ends at record 1, but 2 had been made durable"):
        bench.open()
    assert (bench.path / EXT).read_bytes() == damaged, "nothing was truncated"
    (bench.path / EXT).write_bytes(content)
    bench.reopen()


@pytest.mark.parametrize(
    "change",
    [
        {"start": 1},
        {"length": 5},
        {"start": SECTORS + 5},
        {"start": 2**64 - 8},
        {"start": 20 * BLOCK_SECTORS, "length": BLOCK_SECTORS},
        {"flags": int(Flag.ZERO)},
        {"flags": int(Flag.TICK)},
        {"physical": 8},
        {"seq": 2},
    ],
)
def test_records_that_name_no_blocks_end_the_queue(bench: Bench, change: dict[str, int]) -> None:
    """A record with a right checksum that names anything but blocks of the overlay isn't taken."""
    fields = {"seq": 1, "time_ns": 1, "start": 0, "length": BLOCK_SECTORS, "flags": int(Flag.DATA)} | change
    fields = {"physical": fields["start"], "data_checksum": 0, "durable": 0} | fields
    with (bench.path / EXT).open("ab") as file:
        file.write(encode_record(SALT, **fields))
    bench.reopen()
    assert bench.held() == []
    assert bench.records() == 0


def test_foreign_and_truncated_files_are_refused(bench: Bench) -> None:
    """A header of another volume or another clone, and data of another size, are damage."""
    with pytest.raises(CorruptionError, match="belongs to volume"):
        Overlay.open(bench.storage, "one", FOREIGN, SECTORS)
    with pytest.raises(CorruptionError, match=rf"has {SECTORS * SECTOR} bytes instead of {(SECTORS + 1) * SECTOR}"):
        Overlay.open(bench.storage, "one", OURS, SECTORS + 1)
    bench.path.rename(bench.path.with_name("two"))
    with pytest.raises(CorruptionError, match="belongs to clone one"):
        Overlay.open(bench.storage, "two", OURS, SECTORS)


def test_any_damage_to_the_records_gives_a_prefix_or_an_error(bench: Bench) -> None:
    """Random bytes anywhere in the record file never give blocks that were not flushed."""
    rng = random.Random(3)
    for first in (1, 3, 5, 9):
        bench.write(first, first + 1)
        bench.flush()
    content = (bench.path / EXT).read_bytes()
    bench.overlay.close()
    errors = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        (bench.path / EXT).write_bytes(damaged)
        try:
            bench.overlay = bench.open()
        except (CorruptionError, VersionError):
            errors += 1
            continue
        assert bench.held() in ([], [1], [1, 3], [1, 3, 5], [1, 3, 5, 9])
        bench.overlay.close()
    assert errors > 150
