"""The history that the benchmarks of the whole program read: made as a person would, through a mounted tap.

A file system with many files is made in the primary, then protected. Rounds of work on the files end with a snapshot
each, and one sync puts all of these into the backward journal. Then blocks of one file are overwritten, each by one
event, which stay in the forward journal. Everything is random by fixed seeds, and does not compress.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dmafs.core.ondisk import FORMAT_VERSION
from tests.bench import report
from tests.bench.report import progress
from tests.bench.stores import BLOCK
from tests.bench.system import attached, dmafs, mounted, run, served, status

FORMAT: Final = 2
"""To be raised when what is made here changes."""
VOLUME: Final = "disk"
CONFIGURATION: Final = """\
[sync]
age = "0s"
free = "0%"

[snapshots]
every = 0

[retention]
within = "520w"
"""
"""Nothing happens by itself, however old a kept history is."""

_FILES_A_FOLDER: Final = 100
_MEDIAN_BYTES: Final = 6 << 10
_SIGMA: Final = 1.0
_MOST_BYTES: Final = 1 << 20
_KINDS: Final = ("overwrite",) * 12 + ("replace",) * 10 + ("append",) * 8 + ("delete",) * 5 + ("create",) * 5
_BUFFER: Final = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    image_mib: int
    files: int
    snapshots: int
    events: int
    overwritten_mib: int
    """Size of the file that the events write to."""


FULL: Final = Sizes(image_mib=1024, files=60_000, snapshots=200, events=100_000, overwritten_mib=64)
QUICK: Final = Sizes(image_mib=128, files=6_000, snapshots=20, events=10_000, overwritten_mib=8)


@dataclass(frozen=True)
class History:
    """A history in a folder: what there is in it, and where."""

    folder: Path
    snapshots: list[tuple[str, int]]
    """Names and seqs, oldest first; the first has no name, it is called by its seq."""
    mirror_seq: int
    newest_seq: int

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def primary(self) -> Path:
        return self.folder / "primary.img"

    @property
    def backward(self) -> tuple[str, int]:
        """Name and seq of the snapshot in the middle of the backward journal."""
        return self.snapshots[len(self.snapshots) // 2]

    @property
    def forward_seq(self) -> int:
        """Seq of the event in the middle of the forward journal."""
        return (self.mirror_seq + self.newest_seq) // 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks on a history have in common."""
    report.add_options(parser)
    parser.add_argument("--fixture", metavar="DIR", type=Path, help="keep the history in this folder, and use it again")


@contextlib.contextmanager
def prepared(fixture: Path | None, sizes: Sizes) -> Iterator[History]:
    """Yield a history: the one in the folder *fixture*, made if it isn't there; else one that is removed at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is mounted is unmounted
    if fixture is None:
        with tempfile.TemporaryDirectory(prefix="dmafs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:  # noqa: S108
            yield _made(Path(name).resolve() / "history", sizes)
        return
    # What a store or a history of another kind is in has another name, so all of them can be in one fixture.
    folder = fixture.resolve() / f"history.{sizes.image_mib}.{FORMAT}.{FORMAT_VERSION}"
    found = _read(folder, sizes)
    if found is None:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was never finished
        found = _made(folder, sizes)
    yield found


def _read(folder: Path, sizes: Sizes) -> History | None:
    try:
        found = json.loads((folder / "history.json").read_text())
    except FileNotFoundError:
        return None
    if found.pop("sizes") != dataclasses.asdict(sizes):
        return None
    found["snapshots"] = [tuple(snapshot) for snapshot in found["snapshots"]]
    return History(folder, **found)


def _made(folder: Path, sizes: Sizes) -> History:
    """Make a history; what is in it is written last, so that one without it isn't complete."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)
    primary, store = folder / "primary.img", folder / "store"
    progress(f"making a file system of {sizes.image_mib} MiB with {sizes.files} files")
    paths = _make_primary(primary, sizes, rng)
    dmafs("create", store, VOLUME, "--source", primary)
    (store / "dmafs.conf").write_text(CONFIGURATION)
    mnt = folder / "mnt"
    with served(store, mnt):
        with attached(mnt / "tap" / f"{VOLUME}.img") as device, mounted(device, folder / "files") as files:
            progress(f"changing files, {sizes.snapshots} snapshots")
            target = _make_target(files / "overwritten", sizes, rng)
            for number in range(sizes.snapshots):
                _change(files, paths, rng, number)
                # What is frozen can be mounted read-only with all that is in it, without its journal.
                run("fsfreeze", "--freeze", files)
                try:
                    (mnt / "snapshots" / f"s{number + 1:03}").mkdir()
                finally:
                    run("fsfreeze", "--unfreeze", files)
            dmafs("sync", store)
            (mirror_seq,) = (volume["mirror"]["seq"] for volume in status(store))
            progress(f"writing {sizes.events} events")
            _overwrite(target, sizes, rng)
        (state,) = status(store)
        snapshots = _snapshots(store)
    if state["mirror"]["seq"] != mirror_seq or state["forward"]["events"] < sizes.events:
        sys.exit(f"bench: not {sizes.events} events in the journal behind seq {mirror_seq}: {state}")
    if len(snapshots) != sizes.snapshots + 1:
        sys.exit(f"bench: not {sizes.snapshots} snapshots and the initial copy, but {len(snapshots)}")
    made = History(folder, snapshots, mirror_seq, state["newest"]["seq"])
    told = {**dataclasses.asdict(made), "sizes": dataclasses.asdict(sizes)}
    del told["folder"]
    (folder / "history.json").write_text(json.dumps(told, indent=2))
    return made


def _snapshots(store: Path) -> list[tuple[str, int]]:
    points = json.loads(dmafs("ls", "--json", store))["points"]
    found = [(point["name"], point["seq"]) for point in points if point["kind"] == "snapshot"]
    return [(name or f"seq:{seq}", seq) for name, seq in found]


def _make_primary(primary: Path, sizes: Sizes, rng: np.random.Generator) -> list[str]:
    """Make the file system with all its files at once; return their paths in it."""
    tree = primary.with_name("tree")
    lengths = np.minimum(rng.lognormal(np.log(_MEDIAN_BYTES), _SIGMA, sizes.files), _MOST_BYTES).astype(int).tolist()
    paths = []
    for number, length in enumerate(lengths):
        folder = tree / f"d{number // _FILES_A_FOLDER:03}"
        if number % _FILES_A_FOLDER == 0:
            folder.mkdir(parents=True)
        path = folder / f"f{number:05}"
        path.write_bytes(rng.bytes(length))
        paths.append(str(path.relative_to(tree)))
    with primary.open("wb") as file:
        file.truncate(sizes.image_mib << 20)
    # Nothing is left to be written by the kernel in its own time.
    options = f"-q -b {BLOCK} -m 0 -N {sizes.files * 5 // 4} -E lazy_itable_init=0,lazy_journal_init=0"
    run("mkfs.ext4", *options.split(), "-d", tree, primary)
    shutil.rmtree(tree)
    return paths


def _make_target(path: Path, sizes: Sizes, rng: np.random.Generator) -> Path:
    """Make the file that events overwrite: all of its blocks have data, so none is allocated later."""
    path.write_bytes(rng.bytes(sizes.overwritten_mib << 20))
    return path


def _change(files: Path, paths: list[str], rng: np.random.Generator, number: int) -> None:
    """Do a round of work on some files all over the file system; *paths* are what files there are."""
    for turn, kind in enumerate(_KINDS):
        place = int(rng.integers(len(paths)))
        path = files / paths[place]
        data = rng.bytes(int(rng.integers(1 << 10, 16 << 10)))
        if kind == "overwrite":
            with path.open("r+b") as file:
                file.seek(int(rng.integers(path.stat().st_size + 1)))
                file.write(data)
        elif kind == "replace":
            new = path.with_name(path.name + ".new")
            new.write_bytes(data)
            new.rename(path)
        elif kind == "append":
            with path.open("ab") as file:
                file.write(data)
        elif kind == "delete":
            path.unlink()
            paths[place] = paths[-1]
            paths.pop()
        else:
            new = path.with_name(f"n{number:03}.{turn:02}")
            new.write_bytes(data)
            paths.append(str(new.relative_to(files)))


def _overwrite(target: Path, sizes: Sizes, rng: np.random.Generator) -> None:
    """Overwrite random blocks, each past the page cache, so that it is an event of its own."""
    with mmap.mmap(-1, _BUFFER) as buffer:
        buffer.write(rng.bytes(_BUFFER))
        pieces = [memoryview(buffer)[at : at + BLOCK] for at in range(0, _BUFFER, BLOCK)]
        blocks = rng.integers((sizes.overwritten_mib << 20) // BLOCK, size=sizes.events).tolist()
        which = rng.integers(len(pieces), size=sizes.events).tolist()
        file = os.open(target, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            for block, piece in zip(blocks, which, strict=True):
                os.pwrite(file, pieces[piece], block * BLOCK)
        finally:
            os.close(file)
            for piece_view in pieces:
                piece_view.release()


def main() -> None:
    """Make a history to be kept, for other uses than the benchmarks': ``python -m tests.bench.history DIR [quick]``."""
    with prepared(Path(sys.argv[1]), QUICK if "quick" in sys.argv[2:] else FULL) as history:
        print(json.dumps(dataclasses.asdict(history) | {"forward_seq": history.forward_seq}, default=str))


if __name__ == "__main__":
    main()
