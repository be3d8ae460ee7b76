"""The same history in other programs' forms, made once: raw images, a chain of qcow2 overlays, a repository of borg.

One overlay is made for each snapshot, by one storage daemon that takes snapshots as a virtual machine's host does:
what was written between two snapshots is written to the newest overlay, then the next one is put on it. One more has
what was written since the last snapshot up to the moment in the middle of the forward journal. So the image of a
snapshot is the chain up to its overlay, on a raw image of the initial copy.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmafs.client import connect
from tests.bench.history import VOLUME, History
from tests.bench.report import progress
from tests.bench.system import run, served, serving

FORMAT: Final = 1
"""To be raised when what is made here changes."""

_CHUNK: Final = 8 << 20


@dataclass(frozen=True)
class Chains:
    """Where it all is."""

    folder: Path
    count: int
    """Snapshots behind the initial copy; the chain of the forward journal's image has one more overlay."""

    def raw(self, moment: str) -> Path:
        """Return the raw image of a moment, backward or forward."""
        return self.folder / f"{moment}.img"

    def overlays(self, moment: str) -> list[Path]:
        """Return the overlays of a moment's chain, topmost last."""
        length = self.count // 2 if moment == "backward" else self.count + 1
        return [self.overlay(number) for number in range(1, length + 1)]

    def overlay(self, number: int) -> Path:
        return self.folder / f"{number:03}.qcow2"

    @property
    def base(self) -> Path:
        return self.folder / "base.img"

    @property
    def repository(self) -> Path:
        return self.folder / "borg"

    def borg_environment(self) -> dict[str, str]:
        """Return what borg has to know so as to ask nothing, and to write nowhere else."""
        base = self.folder / "borg.base"
        return {"BORG_BASE_DIR": str(base), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}


def prepared(history: History) -> Chains:
    """Return what a history has in other forms, made if it isn't there yet."""
    made = Chains(history.folder / f"chains.{FORMAT}", len(history.snapshots) - 1)
    done = made.folder / "done"
    if not done.exists():
        shutil.rmtree(made.folder, ignore_errors=True)
        made.folder.mkdir()
        mnt = history.folder / "mnt"
        with served(history.store, mnt):
            _copy_images(history, made, mnt)
            _write_overlays(history, made, mnt)
        progress("making a repository of borg")
        environment = made.borg_environment()
        run("borg", "init", "-e", "none", made.repository, env=environment)
        run("borg", "create", f"{made.repository}::backward", made.raw("backward"), env=environment)
        done.touch()
    return made


def image(mnt: Path, name: str) -> Path:
    """Return the image of a moment, by any of its names, in a mounted tree."""
    return mnt / "at" / name / f"{VOLUME}.img"


def _copy_images(history: History, made: Chains, mnt: Path) -> None:
    progress("copying raw images")
    for name, target in (
        (history.snapshots[0][0], made.base),
        (history.backward[0], made.raw("backward")),
        (f"seq:{history.forward_seq}", made.raw("forward")),
    ):
        run("cp", "--sparse=always", image(mnt, name), target)
        target.chmod(0o600)


def _write_overlays(history: History, made: Chains, mnt: Path) -> None:
    progress(f"making a chain of {made.count + 1} qcow2 overlays")
    names = [*(name for name, _ in history.snapshots), f"seq:{history.forward_seq}"]
    with connect(history.store) as asked:
        changes = [asked.diff(VOLUME, a, b)["extents"] for a, b in itertools.pairwise(names)]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", made.base, "-F", "raw", made.overlay(1))
    with _writable(made) as (monitor, disk):
        for number, extents in enumerate(changes, 1):
            _copy_extents(image(mnt, names[number]), disk, extents)
            if number < len(changes):
                following = {"snapshot-file": str(made.overlay(number + 1)), "snapshot-node-name": f"n{number + 1}"}
                monitor.ask("blockdev-snapshot-sync", {"node-name": f"n{number}", "format": "qcow2", **following})


def _copy_extents(source: Path, target: Path, extents: list[list[int]]) -> None:
    with source.open("rb", buffering=0) as read, target.open("r+b", buffering=0) as written:
        for offset, length in extents:
            for at in range(offset, offset + length, _CHUNK):
                data = os.pread(read.fileno(), min(_CHUNK, offset + length - at), at)
                os.pwrite(written.fileno(), data, at)
        os.fsync(written.fileno())


class Monitor:
    """A monitor of QEMU's."""

    def __init__(self, path: Path) -> None:
        """Connect to it."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._answer()
        self.ask("qmp_capabilities", {})

    def ask(self, command: str, arguments: dict[str, Any]) -> None:
        """Have a command done; RuntimeError with what QEMU says if it can't be."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "return" not in (answer := self._answer()):
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._lines.readline())
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def _writable(made: Chains) -> Iterator[tuple[Monitor, Path]]:
    """Have a storage daemon with the first overlay; yield its monitor, and the disk as a file."""
    disk, place = made.folder / "disk", made.folder / "monitor"
    with serving(
        disk,
        "qemu-storage-daemon",
        *("--blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={made.overlay(1)}"),
        *("--export", f"type=fuse,id=e,node-name=n1,mountpoint={disk},writable=on"),
        *("--chardev", f"socket,id=c,path={place},server=on,wait=off", "--monitor", "chardev=c"),
        log=made.folder / "storage-daemon.log",
    ):
        monitor = Monitor(place)
        try:
            yield monitor, disk
        finally:
            monitor.close()
