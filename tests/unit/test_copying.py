"""Claims about what a time means, copies and partitions, without a daemon."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from dmafs.cli.copying import volume_and_time
from dmafs.cli.main import main
from dmafs.core.store import create_volume, open_volume
from dmafs.errors import InputError, MountError
from dmafs.service.extraction import BLOCK, _runs
from dmafs.service.moment import span
from dmafs.service.probing import find, needs_recovery, partitions
from tests.unit.tools import copy_all

SIZE = 1 << 20
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disk@1h ago", ("disk", "1h ago")),
        ("@yesterday 14:00", (None, "yesterday 14:00")),
        ("a@@1785249005", ("a", "@1785249005")),
        ("@@1785249005.5", (None, "@1785249005.5")),
    ],
)
def test_volume_and_time(text: str, expected: tuple[str | None, str]) -> None:
    """The first @ parts them; one that a time begins with follows it."""
    assert volume_and_time(text) == expected


@pytest.mark.parametrize("text", ["", "disk", "disk@", "@"])
def test_what_is_no_volume_and_time(text: str) -> None:
    """A time is always needed."""
    with pytest.raises(InputError):
        volume_and_time(text)


def test_runs_are_what_is_not_zero() -> None:
    """Whole blocks, joined where they touch; a part of a block at the end counts as one."""
    part = bytearray(5 * BLOCK + 100)
    assert _runs(bytes(part)) == []
    part[BLOCK] = part[3 * BLOCK - 1] = 1
    assert _runs(bytes(part)) == [(BLOCK, 3 * BLOCK)]
    part[-1] = 1
    assert _runs(bytes(part)) == [(BLOCK, 3 * BLOCK), (5 * BLOCK, 5 * BLOCK + 100)]
    assert _runs(b"x") == [(0, 1)]
    assert _runs(b"x" * BLOCK + b"y") == [(0, BLOCK + 1)]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (1_900_000, "1.9 ms"),
        (3_200_000_000, "3.2 s"),
        (303 * 10**9, "5 min 3 s"),
        (7200 * 10**9, "2 h"),
        (187_200 * 10**9, "2 d 4 h"),
    ],
)
def test_spans(ns: int, text: str) -> None:
    """Two units at most."""
    assert span(ns) == text


def test_a_store_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A time is explained, a range copied; before the initial copy is complete there is no moment; no mount is made."""
    source, store, out = tmp_path / "disk.raw", tmp_path / "store", tmp_path / "out"
    source.write_bytes(b"data".ljust(SIZE, b"\0"))
    create_volume(store, "disk", source=source, tap="fuse")
    assert main(["at", str(store), "0s ago"]) == 21
    assert main(["cp", str(store), "@0s ago", str(out)]) == 21
    assert "isn't complete" in capsys.readouterr().err
    volume = open_volume(store / "disk")
    copy_all(volume, source)
    volume.close()
    assert main(["at", str(store), "0s ago", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["volumes"]
    assert (found["kind"], found["seq"], found["path"]) == ("origin", 0, None)
    assert "nothing was written from the end of the initial copy, " in found["why"]
    assert main(["cp", str(store), "@0s ago", str(out)]) == 0
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_blocks * 512 < SIZE
    assert main(["cp", str(store), "disk@seq:0", str(out), "--force", "--offset", "2", "--length", "5"]) == 0
    assert out.read_bytes() == b"ta\0\0\0"
    assert main(["mount", str(store), "@0s ago", str(tmp_path)]) == 30
    assert "can't be reached from here" in capsys.readouterr().err
    assert main(["umount", str(tmp_path)]) == 30


def disk(path: Path, *entries: tuple[int, int, int]) -> Path:
    """Make a disk of 8 MiB with a DOS table of partitions: type, first sector, sectors."""
    table = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in entries)
    path.write_bytes(((bytes(446) + table).ljust(510, b"\0") + b"\x55\xaa").ljust(8 * MIB, b"\0"))
    return path


def test_partitions_are_found(tmp_path: Path) -> None:
    """In bytes; what only holds others is none."""
    path = disk(tmp_path / "disk", (0x83, 2048, 4096), (0x5, 8192, 4096), (0x83, 12288, 2048))
    assert [(one.number, one.start, one.length) for one in partitions(path, 8 * MIB)] == [
        (1, 2048 * 512, 4096 * 512),
        (3, 12288 * 512, 2048 * 512),
    ]
    with pytest.raises(InputError, match=r"several partitions: 1 \(unknown, 2 MiB\); 3 \(unknown, 1 MiB\)"):
        find(path, 8 * MIB, None)
    with pytest.raises(InputError, match="no partition 2"):
        find(path, 8 * MIB, 2)
    with pytest.raises(MountError, match="nothing that is known is on partition 3"):
        find(path, 8 * MIB, 3)


def test_nothing_is_found_on_zeros(tmp_path: Path) -> None:
    """An image without anything, and one whose superblock isn't ext4's."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with pytest.raises(MountError, match="nothing that is known is on the image"):
        find(path, MIB, None)
    with pytest.raises(MountError, match="no superblock"):
        needs_recovery(path, 0)
