"""Files with the bytes of one moment, each served in another way: what is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.cache import drop, require_cold, settle
from tests.bench.chains import Chains, image
from tests.bench.history import VOLUME, History
from tests.bench.system import run, served, serving

RAW: Final = "raw"
EXPORT: Final = "q-s-d raw"
CHAIN: Final = "q-s-d qcow2"
BORG: Final = "borg"
DMAFS: Final = "dmafs"


@dataclass(frozen=True)
class Peer:
    """A file with the bytes of a moment, and the files that it is made from."""

    name: str
    path: Path
    backing: list[Path]
    other: Path | None = None
    """Another name of it."""

    def make_cold(self) -> None:
        """Have nothing of it in the page cache, and all it is made from: of a raw file that is the file itself."""
        if self.name != RAW:
            drop(self.path)
        settle(self.backing)
        if self.name != RAW:
            require_cold(self.path)


@contextlib.contextmanager
def dmafs(history: History, moment: str) -> Iterator[Peer]:
    """Have the image that a fresh daemon shows."""
    mnt = history.folder / "mnt"
    with served(history.store, mnt):
        path = image(mnt, f"seq:{seq_of(history, moment)}")
        other = mnt / "snapshots" / history.backward[0] / path.name if moment == "backward" else _by_time(path)
        backing = [file for file in (history.store / VOLUME).rglob("*") if file.is_file() and file.stat().st_size]
        yield Peer(DMAFS, path, backing, other)


def seq_of(history: History, moment: str) -> int:
    return history.backward[1] if moment == "backward" else history.forward_seq


def _by_time(path: Path) -> Path:
    """Return the path of an image with the canonical name of its moment."""
    return path.parent.with_name(str(path.parent.readlink())) / path.name


def raw(chains: Chains, moment: str) -> Peer:
    """Return the raw file."""
    return Peer(RAW, chains.raw(moment), [chains.raw(moment)])


@contextlib.contextmanager
def export(chains: Chains, moment: str) -> Iterator[Peer]:
    """Have the raw file shown by QEMU's storage daemon."""
    with _exported(chains, f"{moment}.raw", f"driver=file,filename={chains.raw(moment)}") as path:
        yield Peer(EXPORT, path, [chains.raw(moment)])


@contextlib.contextmanager
def chain(chains: Chains, moment: str) -> Iterator[Peer]:
    """Have the chain of overlays shown by QEMU's storage daemon."""
    overlays = chains.overlays(moment)
    with _exported(chains, f"{moment}.qcow2", f"driver=qcow2,file.driver=file,file.filename={overlays[-1]}") as path:
        yield Peer(CHAIN, path, [chains.base, *overlays])


@contextlib.contextmanager
def _exported(chains: Chains, name: str, node: str) -> Iterator[Path]:
    path = chains.folder / f"{name}.shown"
    with serving(
        path,
        "qemu-storage-daemon",
        *("--blockdev", f"{node},node-name=n,read-only=on"),
        *("--export", f"type=fuse,id=e,node-name=n,mountpoint={path},writable=off"),
        log=chains.folder / f"{name}.log",
    ):
        yield path


@contextlib.contextmanager
def borg(chains: Chains) -> Iterator[Peer]:
    """Have borg's archive of the image in the backward journal mounted."""
    point = chains.folder / "borg.mnt"
    archive = f"{chains.repository}::backward"
    command = ("borg", "mount", "--foreground", archive, point)
    log, environment = chains.folder / "borg.log", chains.borg_environment()
    with serving(point, *command, log=log, folder=True, env=environment):
        backing = [file for file in chains.repository.rglob("*") if file.is_file()]
        path = point / chains.raw("backward").relative_to("/")
        yield Peer(BORG, path, backing)


def require_equal(peers: list[Peer]) -> None:
    """Error unless all have the same bytes."""
    for peer in peers[1:]:
        run("cmp", peers[0].path, peer.path)
    for peer in peers:
        if peer.other is not None:
            run("cmp", peer.path, peer.other)
