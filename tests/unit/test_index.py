"""Claims about dmafs.core.index: an index is what descriptors amount to, or it isn't used; nothing depends on it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from dmafs.core import backward, forward
from dmafs.core.index import Owner, decode, encode, keep_index
from dmafs.core.layers import Layer, net_layer
from dmafs.core.limits import IndexLimits, VolumeLimits
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.vbm import ZERO
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from tests.unit.tools import FOREIGN, OURS, TINY, Ticking, copied_volume, fill, flip, image_bytes

SIZE: Final = 24
OWNER: Final = Owner(OURS, 7, 0xFEED)


def work(volume: Volume, count: int) -> None:
    """Write and discard, here and there."""
    for number in range(volume.journal.head, volume.journal.head + count):
        if number % 5 == 4:
            volume.discard(number * 7 % (SIZE - 4), 3)
        else:
            volume.write(number * 5 % (SIZE - 2), fill(number % 250 + 1, 2))
    run(volume.flush())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A volume with three snapshots that hold something, two of them closed, and sealed segments; no index yet."""
    with contextlib.closing(copied_volume(tmp_path / "disk", fill(9, SIZE), limits=TINY)) as volume:
        for _ in range(3):
            run(volume.take_snapshot())
            work(volume, 11)
            run(sync(volume, open_snapshot=False))
        work(volume, 31)
        run(volume.flush())
        volume.mark_clean()
    assert not indexes(tmp_path / "disk")
    return tmp_path / "disk"


@contextlib.contextmanager
def opened(path: Path, limits: VolumeLimits = TINY) -> Iterator[Volume]:
    with contextlib.closing(open_volume(path, limits=limits, clock=Ticking(10**6))) as volume:
        yield volume


def indexes(path: Path) -> list[Path]:
    return sorted(path.glob("*ward/*.idx"))


def warmed(path: Path) -> list[Path]:
    """Open a volume once, and return its indexes."""
    with opened(path) as volume:
        run(volume.warm())
    return indexes(path)


def shown(path: Path) -> dict[int, bytes]:
    """Return all images that there are, by their seqs, and check everything."""
    with opened(path) as volume:
        seqs = [*(one.seq for one in volume.snapshots), *range(volume.floor, volume.journal.head + 1)]
        found = {seq: bytes(image_bytes(volume, seq)) for seq in seqs if volume.recoverable(seq)}
        volume.check()
    return found


def leaves(path: Path) -> list[tuple[list[int], ...]]:
    """Return the layers of segments and snapshots."""
    with opened(path) as volume:
        run(volume.warm())
        trees = volume.journal._tree, volume.snapshots._tree
        layers = [tree._blocks[key] for tree in trees for key in sorted(tree._blocks) if not key[0]]
        return [tuple(map(np.ndarray.tolist, (one.starts, one.stops, one.references))) for one in layers]


def refuse(*_arguments: object) -> Any:
    raise AssertionError("no descriptors are read")


def test_there_is_one_of_all_that_is_finished(store: Path) -> None:
    """Sealed segments and closed snapshots have an index, for the store's owner only, and nothing else has."""
    made = warmed(store)
    with opened(store) as volume:
        sealed = [part.stem for part in volume.journal.parts if part.seal is not None]
        closed = [one.stem for one in volume.snapshots][:-1]
    assert len(sealed) > 3
    assert len(closed) == 2
    assert [str(path.relative_to(store).with_suffix("")) for path in made] == sorted(sealed + closed)
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}


def test_an_index_is_what_its_descriptors_amount_to(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it no descriptors are read or sorted, and layers and images are the same."""
    before = shown(store)
    for path in indexes(store):
        path.unlink()
    fresh = leaves(store)
    assert indexes(store)
    with monkeypatch.context() as patch:
        for module in (forward, backward):
            patch.setattr(module, "net_layer", refuse)
        assert leaves(store) == fresh
    assert shown(store) == before


def test_layers_of_indexes_take_no_memory(store: Path) -> None:
    """They are mapped, also by who has made them, and no file is open for that."""
    for _ in range(2):
        with opened(store) as volume:
            files = len(list(Path("/proc/self/fd").iterdir()))
            run(volume.warm())
            assert len(list(Path("/proc/self/fd").iterdir())) <= files + 2, "those of the open snapshot"
            for tree in (volume.journal._tree, volume.snapshots._tree):
                assert {layer.bytes for layer in tree._blocks.values()} == {0}


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 4]) + (data[at + 1 :] if at != -1 else b"")


CHANGES: Final[dict[str, Callable[[bytes], bytes]]] = {
    **{f"byte {at}": flipped(at) for at in (*range(64), 200, 505, 512, -25, -9, -1)},
    "empty": lambda _: b"",
    "half a header": lambda data: data[:100],
    "header alone": lambda data: data[:512],
    "cut": lambda data: data[:-8],
    "longer": lambda data: data + bytes(24),
    "zeros": lambda data: bytes(len(data)),
    "zeros behind the header": lambda data: data[:512] + bytes(len(data) - 512),
    "foreign": lambda _: b"no index at all" * 100,
}
"""What may become of a file whose disk is failing, or whose power was cut before it was durable."""


def test_what_is_damaged_is_not_used(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever the damage is, images are right, it is told, and there is a new index."""
    before = shown(store)
    made = {path: path.read_bytes() for path in warmed(store)}
    for name, change in CHANGES.items():
        for path, content in made.items():
            path.write_bytes(change(content))
            assert path.read_bytes() != content, name
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dmafs.core.index"):
            warmed(store)
        assert sum("isn't used" in record.getMessage() for record in caplog.records) == len(made), name
        assert {path: path.read_bytes() for path in indexes(store)} == made, name
    assert shown(store) == before


def test_that_of_another_file_is_not_used(store: Path) -> None:
    """Also if it is whole: indexes that were mixed up, and one of another volume."""
    before = shown(store)
    made = warmed(store)
    contents = [path.read_bytes() for path in made]
    for path, content in zip(made, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(content)
    assert shown(store) == before
    assert [path.read_bytes() for path in warmed(store)] == contents


def test_that_of_an_earlier_state_is_not_used(store: Path) -> None:
    """A merge adds to a snapshot: the index of before means nothing then, if it is there still."""
    path = warmed(store)[0]
    assert path.parent.name == "backward"
    kept = path.read_bytes()
    with opened(store) as volume:
        oldest, second = list(volume.snapshots)[:2]
        run(volume.drop_snapshot(second))
        assert not path.exists()
        assert not path.with_name(f"{second.seq:020d}.idx").exists()
        assert oldest.seq == int(path.stem)
    before = shown(store)
    path.write_bytes(kept)
    assert shown(store) == before
    assert path.read_bytes() != kept


def test_that_of_an_earlier_life_is_not_used(store: Path, tmp_path: Path) -> None:
    """A segment of the same seqs in another history has another index."""
    made = {path: path.read_bytes() for path in warmed(store) if path.parent.name == "forward"}
    shutil.rmtree(store)
    (tmp_path / "disk.primary").unlink(missing_ok=True)
    with contextlib.closing(copied_volume(store, fill(1, SIZE), limits=TINY)) as volume:
        work(volume, 64)
        volume.mark_clean()
    before = shown(store)
    for path, content in made.items():
        path.write_bytes(content)
    assert shown(store) == before


def test_it_goes_with_its_owner(store: Path) -> None:
    """Syncs and drops leave no index behind."""
    warmed(store)
    with opened(store) as volume:
        run(sync(volume))
        for snapshot in list(volume.snapshots):
            run(volume.drop_snapshot(snapshot))
        for garbage in volume.take_garbage():
            garbage.close()
        assert [path.name for path in indexes(store)] == []
        run(volume.warm())
        volume.check()


FAILURES: Final = [
    ("create", errno.ENOSPC), ("create", errno.EROFS), ("write", errno.ENOSPC), ("write", errno.EIO),
    ("datasync", errno.ENOSPC), ("datasync", errno.EIO), ("map", errno.ENOMEM), ("unlink", errno.EIO),
]  # fmt: skip


@pytest.mark.parametrize(("what", "number"), FAILURES)
def test_nothing_else_fails_with_it(store: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """An index that can't be written or mapped is left out, and the volume goes on."""
    before = shown(store)
    made = indexes(store)
    assert made
    if what == "unlink":  # an index that is of no use and can't be replaced either
        for path in made:
            flip(path, -1)
    elif what != "map":
        for path in made:
            path.unlink()
    owner = RealStorage if what in {"create", "unlink"} else RealFile
    real = getattr(owner, what)

    def fail(self: Any, *arguments: Any) -> Any:
        if str(arguments[0] if owner is RealStorage else self.name).endswith(".idx"):
            raise OSError(number, os.strerror(number))
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, fail)
        assert shown(store) == before
        with opened(store) as volume:
            run(volume.warm())
            work(volume, 5)
            assert not volume.failure
    if what in {"create", "write", "datasync", "map"}:
        assert not indexes(store), "nothing half made is left"
    assert len(warmed(store)) >= len(made)


def test_space_for_syncs_is_left(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index is written where less than twice the reserve would be left; one that is there is used."""
    limits = VolumeLimits(segments=TINY.segments, index=TINY.index, reserve_bytes=1 << 20)
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _self: 2 << 20)
    with opened(store, limits) as volume:
        run(volume.warm())
    assert not indexes(store)


def test_few_entries_have_none(store: Path) -> None:
    """Reading so many descriptors takes no longer."""
    limits = VolumeLimits(segments=TINY.segments, index=IndexLimits(indexed=100), reserve_bytes=0)
    with opened(store, limits) as volume:
        run(volume.warm())
    assert not indexes(store)


# -- one of them


def layer(*entries: tuple[int, int, int]) -> Layer:
    return net_layer(*np.array(entries, np.int64).reshape(-1, 3).T)


@pytest.mark.parametrize("base", [0, 1, 1 << 62])
def test_what_was_encoded_is_decoded(base: int) -> None:
    """Also none at all, and references counted from anywhere."""
    for entries in ([], [(0, 1, 0)], [(3, 9, 6 | ZERO), (9, 2**40, 1)]):
        own = layer(*((start, stop, number + base) for start, stop, number in entries))
        found = decode(memoryview(encode(OWNER, own, base=base)), OWNER, "it", base=base)
        for mine, other in zip(
            (own.starts, own.stops, own.references), (found.starts, found.stops, found.references), strict=True
        ):
            assert mine.tolist() == other.tolist()
        assert all(map(np.array_equal, own.select(4, 10), found.select(4, 10)))


@pytest.mark.parametrize(
    "other", [OWNER._replace(uuid=FOREIGN), OWNER._replace(records=8), OWNER._replace(digest=1), OWNER]
)
def test_an_owner_is_all_that_tells_files_apart(other: Owner) -> None:
    """Volume, number of records, and their digest."""
    data = memoryview(encode(OWNER, layer((1, 2, 3)), base=0))
    with contextlib.nullcontext() if other == OWNER else pytest.raises(CorruptionError, match="it is of another file"):
        decode(data, other, "it", base=0)


@pytest.mark.parametrize(
    "columns",
    [
        ([2, 1], [3, 2], [1, 2]),
        ([1, 2], [4, 3], [1, 2]),
        ([1], [1], [1]),
        ([-1], [1], [1]),
        ([1], [2], [7]),
        ([1], [2], [-1]),
        ([1], [2], [1 << 62]),
    ],
)
def test_what_cannot_be_is_not_used(columns: tuple[list[int], ...]) -> None:
    """Not even with the right checksums: a read would go astray."""
    data = encode(OWNER, Layer(*(np.array(column, np.int64) for column in columns)), base=0)
    with pytest.raises(CorruptionError, match="entries that can't be"):
        decode(memoryview(data), OWNER, "it", base=0)


def test_who_comes_too_late_leaves_nothing_behind(tmp_path: Path) -> None:
    """A segment that is released while its index is written has none; an index that is there is replaced."""
    storage, own = RealStorage(tmp_path), layer((1, 2, 3))
    limits = IndexLimits(indexed=1)
    assert keep_index(storage, "s", OWNER, own, limits, base=0, beside=(".ext", ".gone")) is own
    assert not indexes(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s.idx").write_bytes(b"old")
    (tmp_path / "s.gone").touch()
    kept = keep_index(storage, "s", OWNER, own, limits, base=0, beside=(".ext", ".gone"))
    assert kept.bytes == 0
    (tmp_path / "s.idx").unlink()
    assert kept.references.tolist() == [3], "it stays mapped"
