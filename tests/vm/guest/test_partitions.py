"""Claims about dmafs.core.partitions: real tables have the partitions that the kernel and the tools find in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dmafs.core.partitions import find_partitions
from tests.mount.harness import MIB, pwrite, run

SECTOR = 512
Found = list[tuple[int, int, int]]
"""Number, start and length, in bytes."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty disk of 64 MiB, a file."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


def write_table(path: Path | str, script: str) -> None:
    """Have sfdisk write a table."""
    run("sh", "-c", f"printf %s '{script}' | sfdisk -q --no-reread --no-tell-kernel {path}")


def attached(path: Path, *options: str) -> str:
    return run("losetup", "-f", "--show", *options, path).stdout.strip()


def found(path: Path) -> Found:
    with path.open("rb") as file:
        parts = find_partitions(lambda offset, length: os.pread(file.fileno(), length, offset), path.stat().st_size)
    return [part[:3] for part in parts]


def of_the_kernel(path: Path, *options: str) -> Found:
    """Return what the kernel finds, but for an extended partition, of which it shows two sectors."""
    device = attached(path, "-P", *options)
    parts = []
    for folder in Path("/sys/block", Path(device).name).glob("loop*p*"):
        number, start, length = (int((folder / name).read_text()) for name in ("partition", "start", "size"))
        if length > 2:
            parts.append((number, start * SECTOR, length * SECTOR))
    run("losetup", "-d", device)
    return sorted(parts)


def of_sfdisk(path: Path) -> Found:
    label: dict[str, Any] = json.loads(run("sfdisk", "--json", path).stdout)["partitiontable"]
    return sorted(
        (int(part["node"].removeprefix(str(path))), part["start"] * SECTOR, part["size"] * SECTOR)
        for part in label.get("partitions", [])
        if part["type"] not in {"5", "f", "85"}
    )


PRIMARY = "label: dos\n2048 4096 83\n8192 2048 7\n,, L\n"
LOGICAL = "label: dos\n2048 4096 L\n8192 90000 E\n- \n10240 2048 L\n14336 4096 S\n20480 4096 L\n100000 +1M L\n"
PLAIN = 'label: gpt\nstart=2048, size=4096, name="one"\nstart=8192, size=2048, type=U\ntype=L\n'
HOLES = "label: gpt\n3: start=2048, size=4096\n7: start=40960, size=8\n128: start=8192, size=64\n"
TABLES = {
    PRIMARY: [1, 2, 3],
    LOGICAL: [1, 3, 4, 5, 6, 7],
    PLAIN: [1, 2, 3],
    HOLES: [3, 7, 128],
    "label: dos\n": [],
    "label: gpt\n": [],
}


@pytest.mark.parametrize("script", TABLES)
def test_tables_of_sfdisk(disk: Path, script: str) -> None:
    write_table(disk, script)
    assert found(disk) == of_the_kernel(disk) == of_sfdisk(disk)
    assert [number for number, _, _ in found(disk)] == TABLES[script]


def test_a_table_of_parted(disk: Path) -> None:
    """With a logical partition that was removed: the one behind it has its number then."""
    words = "mklabel msdos mkpart primary 1MiB 8MiB mkpart extended 8MiB 60MiB mkpart logical 9MiB 20MiB"
    run("parted", "-s", disk, *words.split(), "mkpart", "logical", "21MiB", "30MiB", "rm", "5")
    assert found(disk) == of_the_kernel(disk) == of_sfdisk(disk)
    assert [number for number, _, _ in found(disk)] == [1, 5]


def test_a_partition_that_goes_on_behind_the_end(disk: Path) -> None:
    """It is cut, and what begins there isn't shown, where a disk has become smaller than its table says."""
    write_table(disk, "label: dos\n2048 4096 L\n8192 90000 L\n100000 2048 L\n")
    os.truncate(disk, 20 * MIB)
    assert found(disk) == of_the_kernel(disk) == [(1, MIB, 2 * MIB), (2, 4 * MIB, 16 * MIB)]


def test_sectors_of_4096_bytes(disk: Path) -> None:
    """A GPT made on a disk with large sectors, as the kernel finds it there."""
    device = attached(disk, "-b", "4096")
    write_table(device, "label: gpt\n256 1024 L\n4096 2048 L\n")
    run("losetup", "-d", device)
    assert found(disk) == of_the_kernel(disk, "-b", "4096") == [(1, MIB, 4 * MIB), (2, 16 * MIB, 8 * MIB)]


def test_a_damaged_header_has_a_backup(disk: Path) -> None:
    """The tools use it, the kernel doesn't; without the backup there is no table for anybody."""
    write_table(disk, HOLES)
    before = found(disk)
    pwrite(disk, bytes(SECTOR), SECTOR)
    assert found(disk) == of_sfdisk(disk) == before
    pwrite(disk, b"x", disk.stat().st_size - SECTOR + 60)
    assert found(disk) == of_the_kernel(disk) == []


@pytest.mark.parametrize("command", ["mkfs.ext4 -q", "mkfs.xfs -q", "mkfs.vfat", "mkfs.btrfs -q"])
def test_a_file_system_on_the_whole_disk(disk: Path, command: str) -> None:
    """None has partitions, though the first sector of some has the signature of a table."""
    os.truncate(disk, 320 * MIB)
    run(*command.split(), disk)
    assert found(disk) == []
