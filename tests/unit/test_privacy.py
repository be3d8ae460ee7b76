"""Claims about dmafs.core.privacy: what others can write to is refused, by name and with the remedy."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.client import connect
from dmafs.core.names import CONFIGURATION_NAME
from dmafs.core.privacy import require_private
from dmafs.core.store import Store, create_volume
from dmafs.errors import UnsafeError
from dmafs.service.loading import load_configuration


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with one volume."""
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    create_volume(tmp_path / "store", "disk", source=source, tap="fuse")
    return tmp_path / "store"


@pytest.fixture(params=[0, 0o002, 0o022, 0o077], ids="{:04o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a umask for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o722, 0o777, 0o1777])
@pytest.mark.parametrize("place", [".", "disk", "disk/forward", "disk/mirror.img", "disk/pointers", "disk/volume.json"])
def test_a_store_that_others_can_write_is_refused(store: Path, place: str, mode: int) -> None:
    """The store, a volume, or what is in one: neither daemon nor command works on it; the remedy that is told helps."""
    path = store / place
    good = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    with pytest.raises(UnsafeError) as caught:
        Store(store)
    assert str(path) in caught.value.message
    assert f"{mode:04o}" in caught.value.message
    assert f"chmod go-w {path}" in caught.value.hint
    with pytest.raises(UnsafeError), connect(store):
        pass
    path.chmod(mode & ~0o022)
    Store(store).close()
    path.chmod(good)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_configuration_that_others_can_write_is_refused(store: Path, mode: int) -> None:
    """It names programs that the daemon runs; a link is followed to what it leads to."""
    real = store.parent / "elsewhere.conf"
    for path in (real, store / CONFIGURATION_NAME):
        path.write_text("")
        path.chmod(mode)
    with pytest.raises(UnsafeError) as caught:
        load_configuration(store)
    assert f"chmod go-w {store / CONFIGURATION_NAME}" in caught.value.hint
    (store / CONFIGURATION_NAME).unlink()
    (store / CONFIGURATION_NAME).symlink_to(real)
    with pytest.raises(UnsafeError), connect(store):
        pass
    real.chmod(0o644)
    load_configuration(store)


def test_what_is_somebody_elses_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to another user but root is as good as writable by others."""
    owner = store.stat().st_uid
    if owner == 0:
        os.chown(store, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UnsafeError, match="belongs to user") as caught:
        Store(store)
    assert "chown" in caught.value.hint
    if owner == 0:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        require_private(store)
        os.chown(store, 0, -1)
        require_private(store)


def test_nothing_is_made_that_others_can_read(tmp_path: Path, umask: int) -> None:
    """Whatever the umask: the store and all in it are the owner's only, also where a directory was there before."""
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    there = tmp_path / "store"
    there.mkdir(0o777)
    create_volume(there, "disk", source=source, tap="fuse")
    Store(there).close()
    paths = [there, *there.rglob("*")]
    assert len(paths) > 5
    for path in paths:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, (path, f"{umask:04o}")
