"""Claims about dmafs.core.mounts: what mountinfo says is understood, whatever filesystem and name."""

from __future__ import annotations

import os
from pathlib import Path

from dmafs.core.mounts import Mount, devices_below, mounts

EXT4 = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext4 /dev/root rw,errors=continue\n"
BTRFS = "43 27 0:39 / /mnt ro,relatime - btrfs /dev/no-such-device rw,space_cache=v2,subvolid=5,subvol=/\n"
ODD = r"44 27 0:40 / /a\040b\134c\011d\012e rw shared:1 master:2 - tmpfs  ro" + "\n"


def test_lines_are_understood() -> None:
    """With and without optional fields, with an empty source, names as they are; the filesystem's options count."""
    assert mounts(EXT4 + BTRFS + ODD) == [
        Mount(36, os.makedev(98, 0), "/mnt2", "ext4", "/dev/root", writable=True),
        Mount(43, os.makedev(0, 39), "/mnt", "btrfs", "/dev/no-such-device", writable=True),
        Mount(44, os.makedev(0, 40), "/a b\\c\td\ne", "tmpfs", "", writable=False),
    ]


def test_devices_are_those_of_number_and_source(tmp_path: Path) -> None:
    """A number of major 0 is no device's; a source counts if it is a block device's path, which most aren't."""
    one, two, three = mounts(EXT4 + BTRFS + ODD)
    assert one.devices() == [os.makedev(98, 0)]
    assert two.devices() == three.devices() == []
    device, other = tmp_path / "device", tmp_path / "other"
    device.write_bytes(b"")
    assert two._replace(source=str(device)).devices() == []
    os.mkfifo(other)
    assert two._replace(source=str(other)).devices() == []


def test_devices_below_a_path(tmp_path: Path) -> None:
    """The device number of a path is always among what is below it, through links too; its mount is found."""
    (tmp_path / "link").symlink_to(tmp_path)
    assert tmp_path.stat().st_dev in devices_below(tmp_path)
    assert devices_below(tmp_path / "link") == devices_below(tmp_path)
