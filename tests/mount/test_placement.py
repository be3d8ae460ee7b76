"""Claims about where a store may lie, with real loop devices, filesystems and mounts; needs root."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dmafs.core.storage import open_source
from dmafs.core.store import create_volume, lies_on, mounted_writable, volume_names
from dmafs.errors import DmafsError, ExistsError, PlacementError, SourceBusyError

pytestmark = pytest.mark.mount

SIZE = 16 << 20


def command(*arguments: str | Path) -> str:
    """Run a program that has to succeed; return what it prints."""
    done = subprocess.run([str(one) for one in arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Disks:
    """Makes disk images, loop devices and mounts, and takes all of them away again."""

    def __init__(self, path: Path, undo: ExitStack) -> None:
        self.path = path
        self.undo = undo

    def image(self, name: str, *, at: Path | None = None, size: int = SIZE, kind: str = "ext4") -> Path:
        """Return a file with a filesystem, ext4 if none is said."""
        path = (at or self.path) / name
        with path.open("wb") as file:
            file.truncate(size)
        command(f"mkfs.{kind}", *{"ext4": ["-q", "-F", "-m", "0"], "btrfs": ["-q"]}[kind], path)
        return path

    def loop(self, image: Path, *options: str) -> Path:
        """Return a loop device over a file."""
        device = command("losetup", "--find", "--show", *options, image)
        self.undo.callback(command, "losetup", "--detach", device)
        return Path(device)

    def mount(self, device: Path, name: str, options: str = "rw") -> Path:
        """Mount a device and return the mount point."""
        place = self.path / name
        place.mkdir()
        command("mount", "-o", options, device, place)
        self.undo.callback(command, "umount", place)
        return place


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with ExitStack() as undo:
        yield Disks(tmp_path, undo)


def create(store: Path, source: Path, *, force: bool = False) -> list[str]:
    return create_volume(store, "disk", source=source, tap="fuse", force=force)


def refuse(kind: type[DmafsError], match: str, store: Path, source: Path, *, force: bool = False) -> None:
    """Assert that no volume is made there, and that nothing is left of the attempt."""
    with pytest.raises(kind, match=match):
        create(store, source, force=force)
    assert not store.exists()


def test_store_on_its_own_source_is_refused(disks: Disks) -> None:
    """A store on the filesystem that the source holds is refused, also with force."""
    device = disks.loop(disks.image("a.img"))
    place = disks.mount(device, "mnt")
    for force in (False, True):
        refuse(PlacementError, f"is on its own source {device}", place / "store", device, force=force)
        refuse(PlacementError, "is on its own source", place / "deep" / "store", device, force=force)


def test_store_on_a_loop_device_over_its_source_is_refused(disks: Disks) -> None:
    """A source that is the file behind the loop device which the store is on is refused."""
    image = disks.image("a.img")
    place = disks.mount(disks.loop(image), "mnt")
    refuse(PlacementError, f"is on its own source {image}", place / "store", image)
    (disks.path / "link").symlink_to(image)
    refuse(PlacementError, "is on its own source", place / "store", disks.path / "link")


def test_store_on_a_file_on_its_source_is_refused(disks: Disks) -> None:
    """Through two layers: a filesystem in a file on a filesystem on the source."""
    image = disks.image("outer.img", size=4 * SIZE)
    device = disks.loop(image)
    outer = disks.mount(device, "outer")
    inner = disks.mount(disks.loop(disks.image("inner.img", at=outer)), "inner")
    for source in (device, image):
        refuse(PlacementError, "is on its own source", inner / "store", source, force=True)


def test_store_on_a_partition_of_its_source_is_refused(disks: Disks) -> None:
    """A source that is the whole disk holds its partitions; a partition doesn't hold its sibling."""
    disk = disks.path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(4 * SIZE)
    device = disks.loop(disk, "--partscan")
    for number, start in ((1, 2048), (2, 34816)):  # told to the kernel, which may not read partition tables itself
        command("addpart", device, str(number), str(start), "32768")
    one, two = (device.with_name(f"{device.name}p{number}") for number in (1, 2))
    command("mkfs.ext4", "-q", "-F", one)
    place = disks.mount(one, "mnt")
    on = place.stat().st_dev
    assert [lies_on(on, source) for source in (device, one, disk)] == [True] * 3
    assert not lies_on(on, two)
    refuse(PlacementError, "is on its own source", place / "store", device)
    assert create(place / "store", two) == []
    assert list(mounted_writable(device)) == [str(place)], "a disk is in use if a partition of it is"
    assert list(mounted_writable(two)) == []


def test_btrfs_is_known_by_its_source(disks: Disks) -> None:
    """The device numbers of Btrfs, one for each subvolume, are no device's; what it was mounted from is."""
    image = disks.image("a.img", size=8 * SIZE, kind="btrfs")
    device = disks.loop(image)
    place = disks.mount(device, "mnt")
    command("btrfs", "subvolume", "create", place / "sub")
    inner = disks.mount(disks.loop(disks.image("inner.img", at=place)), "inner")
    for source in (device, image):
        assert list(mounted_writable(source)) == [str(place)]
        for folder in (place, place / "sub", inner):
            refuse(PlacementError, "is on its own source", folder / "store", source, force=True)
        refuse(SourceBusyError, f"source {source} is mounted read-write at {place}", disks.path / "store", source)


def test_device_in_another_volume_is_refused(disks: Disks) -> None:
    """One device is one source, whichever of its nodes is named."""
    device = disks.loop(disks.image("a.img"))
    create(disks.path / "store", device)
    node = disks.path / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, device.stat().st_rdev)
    for source in (device, node):
        with pytest.raises(ExistsError, match=f"source {source} is already the source of volume disk"):
            create_volume(disks.path / "store", "other", source=source, tap="fuse")
    assert volume_names(disks.path / "store") == ["disk"]


def test_store_on_another_disk_is_fine(disks: Disks) -> None:
    """A store on another device, and a source that is a file on another or the same filesystem, are accepted."""
    device = disks.loop(disks.image("a.img"))
    place = disks.mount(disks.loop(disks.image("b.img")), "mnt")
    assert create(place / "store", device) == []
    assert create(place / "other", disks.image("c.img")) == []
    source = place / "d.img"
    source.write_bytes(bytes(4096))
    assert create(place / "third", source) == []
    assert volume_names(place / "store") == ["disk"]


@pytest.mark.parametrize("behind", ["device", "file"])
def test_mounted_source_is_refused_or_warned_about(disks: Disks, behind: str) -> None:
    """A source mounted read-write, itself or through a loop device, is refused; with force there is a warning."""
    image = disks.image("a.img")
    device = disks.loop(image)
    place = disks.mount(device, "mnt")
    source = device if behind == "device" else image
    assert list(mounted_writable(source)) == [str(place)]
    refuse(SourceBusyError, f"source {source} is mounted read-write at {place}", disks.path / "store", source)
    warnings = create(disks.path / "store", source, force=True)
    assert warnings == [
        f"source {source} is mounted read-write at {place}: writes that don't go through the tap are missed"
    ]


def test_source_mounted_read_only_is_fine(disks: Disks) -> None:
    """A filesystem that nobody can write is no danger."""
    device = disks.loop(disks.image("a.img"))
    disks.mount(device, "mnt", "ro")
    assert list(mounted_writable(device)) == []
    assert create(disks.path / "store", device) == []


def test_read_only_view_of_a_writable_mount_is_a_danger(disks: Disks) -> None:
    """A bind mount that is read-only doesn't make the filesystem read-only."""
    device = disks.loop(disks.image("a.img"))
    place = disks.mount(device, "mnt")
    view = disks.path / "view"
    view.mkdir()
    command("mount", "--bind", place, view)
    disks.undo.callback(command, "umount", view)
    command("mount", "-o", "remount,bind,ro", view)
    assert list(mounted_writable(device)) == [str(place), str(view)]


def test_mount_point_with_odd_characters_is_named_as_it_is(disks: Disks) -> None:
    """A mount point's name is printed as the user knows it."""
    device = disks.loop(disks.image("a.img"))
    place = disks.mount(device, "a b\\c")
    assert list(mounted_writable(device)) == [str(place)]


def test_mounted_device_cannot_be_opened_as_a_tap(disks: Disks) -> None:
    """A tap has its device alone: one that is mounted is busy, and one that it has can't be mounted."""
    device = disks.loop(disks.image("a.img"))
    source = open_source(device, writable=True)
    assert source.size() == SIZE
    assert source.allocated() == SIZE
    assert list(source.data_ranges(0, SIZE)) == [(0, SIZE)]
    place = disks.path / "mnt"
    place.mkdir()
    refused = subprocess.run(["mount", str(device), str(place)], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "busy" in refused.stderr or "already mounted" in refused.stderr
    source.close()
    place.rmdir()
    disks.mount(device, "mnt")
    with pytest.raises(SourceBusyError, match=f"source {device} can't be opened: device or resource busy"):
        open_source(device, writable=True)
    open_source(device, writable=False).close()
