"""Random damage to small stores: ``check`` finds whatever keeps a store from being opened, and changes nothing.

DMAFS_TEST_SEED chooses the damage, DMAFS_TEST_EXAMPLES how many stores are damaged in each way of being left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import pytest

from dmafs.core.inspection import inspect
from dmafs.core.store import Store
from dmafs.core.work import run
from dmafs.errors import DmafsError
from tests.unit.broken import ENDS, everything, make_store
from tests.unit.tools import TINY, Ticking

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EXAMPLES: Final = int(os.environ.get("DMAFS_TEST_EXAMPLES", "150"))
NAMES: Final = (
    "notes.txt", "mirror.img", "00000000000000000009.ext", "00000000000000000009.dat", "00000000000000000003.new",
    "00000000000000000003.pin", "00000000000000000004-1.ext", "1.ext", "x.gone", "-.ext", "²-².ext", ".half.new",
    "00000000000000000000.gone", "99999999999999999999.ext", "overlay.ext", "a" * 200, ".x.gone", "scratch",
)  # fmt: skip

Damage = Callable[[Random, Path], str]


def some(random: Random, store: Path, *, suffix: str = "") -> Path:
    """Return one of the store's files."""
    files = [path for path in sorted(store.rglob("*" + suffix)) if path.is_file() and not path.is_symlink()]
    return random.choice(files)


def delete(random: Random, store: Path) -> str:
    """Remove a file."""
    path = some(random, store)
    path.unlink()
    return f"delete {path}"


def delete_directory(random: Random, store: Path) -> str:
    """Remove a directory."""
    path = random.choice([path for path in sorted(store.glob("*/*")) if path.is_dir()])
    shutil.rmtree(path)
    return f"delete {path}"


def truncate(random: Random, store: Path) -> str:
    """Cut off the end of a file, by units that are likely to matter or not."""
    path = some(random, store)
    size, unit = path.stat().st_size, random.choice((1, 64, 512))
    left = random.choice((0, random.randrange(size + 1), max(0, size - unit * random.randrange(1, 5))))
    os.truncate(path, left)
    return f"truncate {path} from {size} to {left}"


def extend(random: Random, store: Path) -> str:
    """Add bytes to a file."""
    path = some(random, store)
    more = random.choice((bytes(512), random.randbytes(64), random.randbytes(7)))
    with path.open("ab") as file:
        file.write(more)
    return f"extend {path} by {len(more)}"


def flip(random: Random, store: Path) -> str:
    """Flip a bit, more often than not in what isn't data."""
    path = some(random, store, suffix=random.choice((".ext", ".ext", "pointers", "digests", "volume.json", "")))
    content = bytearray(path.read_bytes())
    if not content:
        return f"nothing to flip in {path}"
    at = random.randrange(min(random.choice((16, 512, len(content))), len(content)))
    content[at] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"flip {path} at {at}"


def zero(random: Random, store: Path) -> str:
    """Make a range zeros."""
    path = some(random, store)
    content = bytearray(path.read_bytes())
    begin, end = sorted((random.randrange(len(content) + 1), random.randrange(len(content) + 1)))
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    return f"zeros in {path} from {begin} to {end}"


def add(random: Random, store: Path) -> str:
    """Add a file, a directory, a link or a pipe."""
    directory = random.choice([store, *(path for path in sorted(store.rglob("*")) if path.is_dir())])
    path = directory / random.choice(NAMES)
    if os.path.lexists(path):
        return f"there is {path}"
    kind = random.choice(("file", "file", "header", "directory", "link", "pipe"))
    match kind:
        case "file":
            path.write_bytes(random.randbytes(random.choice((0, 100, 700))))
        case "header":
            shutil.copy(some(random, store, suffix=".ext"), path)
        case "directory":
            path.mkdir(0o700)
        case "link":
            path.symlink_to(some(random, store))
        case _:
            os.mkfifo(path, 0o600)
    return f"add {kind} {path}"


def swap(random: Random, store: Path) -> str:
    """Swap two files, of one kind or any."""
    suffix = random.choice((".ext", ".dat", ""))
    one, other, aside = some(random, store, suffix=suffix), some(random, store, suffix=suffix), store / "aside"
    one.rename(aside)
    if one != other:
        other.rename(one)
    aside.rename(other)
    return f"swap {one} and {other}"


def copy_over(random: Random, store: Path) -> str:
    """Put a copy of another volume's file in the place of one, or of one of an earlier segment or snapshot."""
    path = some(random, store)
    other = "two" if path.is_relative_to(store / "one") else "one"
    source = store / other / path.relative_to(store).relative_to(path.relative_to(store).parts[0])
    if not source.exists() or random.random() < 0.3:
        source = some(random, store, suffix=path.suffix)
    if source != path:
        shutil.copy(source, path)
    return f"copy {source} to {path}"


def rename(random: Random, store: Path) -> str:
    """Give a file, or something like a clone or a volume, another name."""
    path = random.choice([path for path in sorted(store.rglob("*")) if path != store / "lost+found"])
    to = path.with_name(random.choice((*NAMES, "three", path.name + ".new")))
    if not os.path.lexists(to):
        path.rename(to)
    return f"rename {path} to {to}"


def spoil_mode(random: Random, store: Path) -> str:
    """Let others write."""
    path = random.choice([store, *sorted(store.rglob("*"))])
    if not path.is_symlink():
        path.chmod(path.stat().st_mode | random.choice((0o002, 0o020)))
    return f"mode of {path}"


def link(random: Random, store: Path) -> str:
    """Put a link in the place of a file."""
    path = some(random, store)
    aside = store.parent / f"aside-{random.getrandbits(32)}"
    path.rename(aside)
    path.symlink_to(aside)
    return f"link {path}"


DAMAGES: Final[tuple[Damage, ...]] = (
    delete, delete, delete_directory, truncate, truncate, extend, flip, flip, flip, zero, add, add, swap, copy_over,
    copy_over, rename, spoil_mode, link,
)  # fmt: skip


def failure(store: Path) -> str:
    """Open a store, and all its descriptors if nothing is wrong; return why that can't be done, or nothing."""
    try:
        opened = Store(store, limits=TINY, clock=Ticking(10**6))
    except DmafsError as error:
        return f"{type(error).__name__}: {error.message}"
    try:
        for volume in opened.volumes.values():
            run(volume.warm())
    except DmafsError as error:
        return f"warm: {error.message}"
    finally:
        opened.close()
    return ""


@pytest.mark.parametrize("tap", ["fuse", "dm"])
@pytest.mark.parametrize("end", ENDS)
def test_check_finds_what_keeps_a_store_from_being_opened(
    tmp_path: Path, end: str, tap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises nothing and changes nothing; if it finds no error, the store opens, descriptors and all."""
    (tmp_path / "whole").mkdir()
    whole = make_store(tmp_path / "whole", tap=tap, end=end)
    random = Random(f"{SEED} {end} {tap}")
    refused = errors = 0
    for number in range(EXAMPLES):
        store = tmp_path / str(number) / "store"
        shutil.copytree(whole, store)
        done = [random.choice(DAMAGES)(random, store) for _ in range(random.choice((1, 1, 1, 2, 3)))]
        before = everything(store)
        found = inspect(store)
        assert everything(store) == before, done
        why = failure(store)
        assert not why or found.count("error"), (done, why, found.findings)
        refused += bool(why)
        errors += bool(found.count("error"))
        shutil.rmtree(tmp_path / str(number))
    with capsys.disabled():
        print(
            f"\n{tap}, {end}: {EXAMPLES} damaged, {errors} with errors, {refused} can't be opened", end=" ", flush=True
        )
    assert refused
    assert errors < EXAMPLES
