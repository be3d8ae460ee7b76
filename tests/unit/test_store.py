"""Claims about dmafs.core.store: a volume is made wholly or not at all, and one process at a time works on a store."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dmafs.core import store as module
from dmafs.core.limits import VolumeLimits
from dmafs.core.names import CONFIGURATION_NAME, SOCKET_NAME
from dmafs.core.storage import lock_directory
from dmafs.core.store import (
    VOLUMES_MAX,
    Store,
    create_volume,
    is_inside,
    mounted_writable,
    open_volume,
    volume_names,
)
from dmafs.core.volume import INFO_NAME
from dmafs.core.work import run
from dmafs.errors import (
    CorruptionError,
    DmafsError,
    ExistsError,
    InputError,
    NoStoreError,
    PlacementError,
    SourceBusyError,
    SourceError,
    StoreBusyError,
)
from dmafs.units import SECTOR
from tests.unit.tools import Clock, files, fill, flip, tree


class Bench:
    """A source and the place of a store that isn't there yet."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.source = path / "disk.raw"
        self.source.write_bytes(fill(1, 8))
        self.second = path / "second.raw"
        self.second.write_bytes(fill(2, 8))
        self.third = path / "third.raw"
        self.third.write_bytes(fill(3, 8))
        self.store = path / "store"

    def create(self, name: str = "disk", **changes: Any) -> list[str]:
        arguments: dict[str, Any] = {"source": self.source, "tap": "fuse", **changes}
        return create_volume(arguments.pop("store", self.store), name, **arguments)

    def refuse(self, kind: type[DmafsError], match: str, name: str = "disk", **changes: Any) -> None:
        """Assert that creating a volume fails in this way and changes nothing at all."""
        before = tree(self.root)
        with pytest.raises(kind, match=match) as caught:
            self.create(name, **changes)
        assert type(caught.value) is kind
        assert caught.value.hint
        assert tree(self.root) == before


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- making a volume


def test_created_volume_can_be_opened(bench: Bench) -> None:
    """A new store is private and has one volume of the source's size, which a store can open."""
    assert bench.create(clock=lambda: 77) == []
    assert files(bench.store) == ["disk"]
    assert mode(bench.store) == mode(bench.store / "disk") == 0o700
    assert all(mode(path) in {0o600, 0o700} for path in bench.store.rglob("*"))
    store = Store(bench.store)
    info = store.volumes["disk"].info
    assert (info.name, info.size_sectors, info.source, info.tap, info.created_ns) == (
        "disk",
        8,
        str(bench.source),
        "fuse",
        77,
    )
    store.volumes["disk"].check()
    store.close()


def test_missing_parents_are_made(bench: Bench) -> None:
    """The store's directory is made with its parents."""
    bench.create(store=bench.root / "a" / "b" / "store")
    assert volume_names(bench.root / "a" / "b" / "store") == ["disk"]


def test_empty_directory_becomes_a_store(bench: Bench) -> None:
    """An empty directory is taken and made private; so is one that only has what a new filesystem has."""
    bench.store.mkdir(mode=0o755)
    (bench.store / "lost+found").mkdir()
    bench.create()
    assert mode(bench.store) == 0o700


def test_second_volume_joins_the_store(bench: Bench) -> None:
    """A store takes more volumes, also beside the daemon's own files."""
    bench.create("a")
    for name in (SOCKET_NAME, CONFIGURATION_NAME):
        (bench.store / name).write_bytes(b"")
    bench.create("b", source=bench.second)
    store = Store(bench.store)
    assert sorted(store.volumes) == ["a", "b"]
    assert store.volumes["a"].info.uuid != store.volumes["b"].info.uuid
    store.close()


def test_relative_paths_are_kept_absolute(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's path is kept absolute, since the daemon runs elsewhere."""
    monkeypatch.chdir(bench.root)
    bench.create(store=Path("store"), source=Path("disk.raw"))
    store = Store(Path("store"))
    assert store.volumes["disk"].info.source == str(bench.source)
    store.close()


# --- what is refused, with nothing changed


def test_missing_source_is_refused(bench: Bench) -> None:
    """A source that isn't there is named."""
    bench.refuse(SourceError, "source .*/nothing can't be opened: no such file", source=bench.root / "nothing")


def test_source_of_another_kind_is_refused(bench: Bench) -> None:
    """A directory or a character device is no source."""
    bench.refuse(SourceError, "neither a block device nor a regular file", source=bench.root)
    bench.refuse(SourceError, "neither a block device nor a regular file", source=Path("/dev/zero"))


@pytest.mark.parametrize("size", [0, 1, 511, 513, 8 * 512 + 1])
def test_odd_size_is_refused(bench: Bench, size: int) -> None:
    """An empty source or one of partial sectors is refused with its size."""
    bench.source.write_bytes(b"x" * size)
    bench.refuse(SourceError, f"has {size} bytes")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", ".hidden", "-x", "a" * 65, "latest", "2026-07-28", "x.img", "ä"]
)
def test_bad_name_is_refused(bench: Bench, name: str) -> None:
    """What can't name a folder and a file of the tree can't name a volume."""
    bench.refuse(InputError, "volume name", name)


@pytest.mark.parametrize("name", [SOCKET_NAME, CONFIGURATION_NAME])
def test_name_of_the_stores_own_file_is_refused(bench: Bench, name: str) -> None:
    """A volume can't take the place of the daemon's own files."""
    bench.refuse(InputError, f"volume name {name} is taken", name)


def test_existing_volume_is_refused(bench: Bench) -> None:
    """A volume is never replaced."""
    bench.create()
    bench.refuse(ExistsError, "volume disk already exists")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"mine")], ids=["directory", "file"])
def test_store_that_is_not_empty_is_refused(bench: Bench, make: Any) -> None:
    """A directory with somebody else's files isn't made a store, and its mode stays."""
    bench.store.mkdir(mode=0o755)
    make(bench.store / "notes")
    bench.refuse(ExistsError, "is not empty: it has notes")
    make(bench.store / "disk")
    bench.refuse(ExistsError, "volume disk already exists")


def test_store_that_is_a_file_is_refused(bench: Bench) -> None:
    """A store is a directory, and so is what it is in."""
    bench.store.write_bytes(b"")
    bench.refuse(InputError, "is not a directory")
    bench.refuse(InputError, "can't be made: not a directory", store=bench.store / "below")


@pytest.mark.parametrize("through", ["path", "link"])
def test_source_inside_the_store_is_refused(bench: Bench, through: str) -> None:
    """A source in the store would be overwritten by its own history, however the store is spelled."""
    bench.store.mkdir()
    inside = bench.store / "disk.raw"
    inside.write_bytes(fill(1))
    place = bench.store
    if through == "link":
        place = bench.root / "link"
        place.symlink_to(bench.store)
    bench.refuse(PlacementError, "is inside the store", source=inside, store=place)


def test_too_many_volumes_are_refused(bench: Bench) -> None:
    """The number of volumes has a limit."""
    for number in range(VOLUMES_MAX):
        (bench.store / f"v{number}").mkdir(parents=True)
        (bench.store / f"v{number}" / INFO_NAME).write_bytes(b"{}")
    bench.refuse(InputError, f"has {VOLUMES_MAX} volumes")


def test_store_in_use_is_refused(bench: Bench) -> None:
    """While a daemon has the store no volume is made in it."""
    bench.create("a")
    lock = lock_directory(bench.store)
    bench.refuse(StoreBusyError, "in use by another process", "b", source=bench.second)
    os.close(lock)
    bench.create("b", source=bench.second)


@pytest.mark.parametrize("existing", ["nothing", "parent", "directory", "store"])
def test_failure_in_the_middle_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, existing: str) -> None:
    """When a file can't be written everything made so far is removed, made parents too, and modes stay."""
    store = bench.root / "a" / "store"
    if existing == "parent":
        store.parent.mkdir()
    elif existing == "directory":
        store.mkdir(mode=0o755, parents=True)
    elif existing == "store":
        bench.create("other", store=store, source=bench.second)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmafs.core.volume.write_whole", fail)
    bench.refuse(InputError, "volume disk can't be made in .*: no space left", store=store)


@pytest.mark.parametrize("place", ["a" * 256, "a/b/" + "c" * 256, "a/../" + "b" * 256], ids=["name", "parents", "dots"])
def test_store_that_cannot_be_made_leaves_no_parents(bench: Bench, place: str) -> None:
    """When the last folder of a path can't be made, those before it are taken away again."""
    bench.refuse(InputError, "can't be made: file name too long", store=bench.root / place)


@pytest.mark.parametrize("through", ["path", "link", "hard link"])
def test_source_of_another_volume_is_refused(bench: Bench, through: str) -> None:
    """A source is in one volume of a store, by whatever name; one whose file is away stands in nobody's way."""
    bench.create("a")
    again = bench.root / "again"
    if through == "path":
        again = bench.source
    elif through == "link":
        again.symlink_to(bench.source)
    else:
        again.hardlink_to(bench.source)
    bench.refuse(ExistsError, f"source {again} is already the source of volume a in {bench.store}", "b", source=again)
    bench.create("b", source=bench.second)
    bench.second.unlink()
    bench.create("c", source=bench.third)


def test_damaged_volume_is_named_when_another_joins(bench: Bench) -> None:
    """A volume whose source can't be told hinders others, with an error that names the file."""
    bench.create("a")
    info = bench.store / "a" / INFO_NAME
    info.write_bytes(b"{}")
    bench.refuse(CorruptionError, str(info), "b", source=bench.second)
    info.unlink()
    info.symlink_to(bench.source)
    bench.refuse(CorruptionError, str(info), "b", source=bench.second)


def test_interrupted_creation_is_not_a_volume(bench: Bench) -> None:
    """What a creation that was cut off left is no volume, and doesn't hinder making that one or another."""
    bench.create("a")
    left = bench.store / ".b.new"
    (bench.store / "a").rename(left)  # cut right before the rename
    assert volume_names(bench.store) == []
    with pytest.raises(NoStoreError, match="has no volume"):
        Store(bench.store)
    bench.create("c", source=bench.second)
    assert volume_names(bench.store) == ["c"]
    bench.create("b")
    assert files(bench.store) == ["b", "c"]


# --- mounted sources; real mounts are in tests/mount


def test_mounted_source_is_refused_or_warned_about(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is mounted read-write is refused; with force it is a warning for each mount point."""
    monkeypatch.setattr(module, "mounted_writable", lambda _: iter(["/mnt/a", "/mnt/b"]))
    bench.refuse(SourceBusyError, "is mounted read-write at /mnt/a")
    warnings = bench.create(force=True)
    assert [text.split(":")[0] for text in warnings] == [
        f"source {bench.source} is mounted read-write at /mnt/{place}" for place in "ab"
    ]


def test_plain_file_is_not_mounted(bench: Bench) -> None:
    """A file that nothing is mounted from has no mount points."""
    assert list(mounted_writable(bench.source)) == []


def test_inside_knows_links_and_names(bench: Bench) -> None:
    """Inside is a matter of folders, not of how paths begin."""
    (bench.root / "ab").mkdir()
    (bench.root / "a").mkdir()
    (bench.root / "link").symlink_to(bench.root / "a")
    assert is_inside(bench.root / "a" / "x", bench.root / "a")
    assert is_inside(bench.root / "a", bench.root / "a")
    assert is_inside(bench.root / "link" / "x", bench.root / "a")
    assert not is_inside(bench.root / "ab", bench.root / "a")
    assert not is_inside(bench.root, bench.root / "a")


# --- opening


def test_open_store_is_locked(bench: Bench) -> None:
    """A store is open once at a time; a closed one, also one that couldn't be opened, isn't locked."""
    bench.create()
    store = Store(bench.store)
    with pytest.raises(StoreBusyError):
        Store(bench.store)
    store.close()
    store.close()
    flip(bench.store / "disk" / "pointers", 40)
    flip(bench.store / "disk" / "pointers", 4096 + 40)
    for _ in range(2):
        with pytest.raises(CorruptionError, match="pointers"):
            Store(bench.store)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_store_is_refused(bench: Bench, kind: str) -> None:
    """A missing or empty directory, or a file, is no store."""
    if kind == "empty":
        bench.store.mkdir()
    elif kind == "file":
        bench.store.write_bytes(b"")
    with pytest.raises(NoStoreError, match="store"):
        Store(bench.store)


@pytest.mark.parametrize("name", [INFO_NAME, "pointers", "mirror.img", "forward", "backward", "clones"])
def test_missing_part_of_a_volume_is_named(bench: Bench, name: str) -> None:
    """A volume that lacks a file is a CorruptionError that names it, and nothing stays open."""
    bench.create()
    (bench.store / "disk" / name).rename(bench.root / "away")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted
    with pytest.raises(CorruptionError, match=f"{name}"):
        open_volume(bench.store / "disk")
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208 - counted


@pytest.mark.parametrize("size", [0, 7 * SECTOR, 9 * SECTOR])
def test_mirror_of_another_size_is_corruption(bench: Bench, size: int) -> None:
    """A mirror that was truncated or extended from outside is damage, not a bug."""
    bench.create()
    with (bench.store / "disk" / "mirror.img").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CorruptionError, match=f"mirror.img has {size} bytes instead of {8 * SECTOR}"):
        open_volume(bench.store / "disk")


@pytest.mark.parametrize("name", [INFO_NAME, "pointers", "mirror.img"])
def test_symbolic_link_in_a_volume_is_refused(bench: Bench, name: str) -> None:
    """A link in place of a file isn't followed, even if what it leads to is right."""
    bench.create()
    (bench.store / "disk" / name).rename(bench.root / "away")
    (bench.store / "disk" / name).symlink_to(bench.root / "away")
    with pytest.raises(CorruptionError, match=name):
        open_volume(bench.store / "disk")


def test_all_volumes_see_one_clock_that_never_goes_back(bench: Bench) -> None:
    """What happens on one volume is later than all that had happened on the others, also if the clock is set back."""
    for name, source in (("a", bench.source), ("b", bench.second)):
        bench.create(name, source=source)
    clock = Clock(5_000)
    times: list[int] = []
    for begin in (5_000, 100):
        clock.now = begin
        store = Store(bench.store, clock=clock, limits=VolumeLimits(reserve_bytes=0))
        a, b = store.volumes.values()
        for volume in (a, b, a, a, b):
            times.append(volume.time_of(volume.write(0, bytes(SECTOR))))
            clock.now -= 50
        for volume in (a, b):
            run(volume.flush())
        store.close()
    assert times == sorted(set(times))


def test_a_log_that_cannot_be_followed_is_refused(bench: Bench) -> None:
    """It has to be a regular file, there already, not the source, and not in the store; else nothing is made."""
    log = bench.source.with_name("a.log")
    for path, words in (
        (log, "can't be opened"),
        (bench.source.parent, "neither a block device nor a regular file"),
        (bench.source, "is the source itself"),
    ):
        with pytest.raises(InputError, match=words):
            create_volume(bench.store, "disk", source=bench.source, tap="log", log_path=path)
    assert not bench.store.exists()
    log.touch()
    create_volume(bench.store, "disk", source=bench.source, tap="log", log_path=log)
    store = Store(bench.store)
    assert store.volumes["disk"].info.log == str(log)
    store.close()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTCONN, errno.ESTALE, errno.ECONNABORTED])
def test_a_file_in_a_dead_mount_is_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Somebody's loop device over a file whose server is gone is in nobody's way."""
    dead, source = tmp_path / "dead", tmp_path / "source"
    source.touch()
    real = Path.stat

    def answer(path: Path, **options: bool) -> os.stat_result:
        if path == dead:
            raise OSError(number, os.strerror(number))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", answer)
    assert not module.is_same_file(dead, source)
    assert not module._exists(dead)
    assert module.is_same_file(source, source)
