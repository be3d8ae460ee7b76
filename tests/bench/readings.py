"""What is done with an image, as a person would, and how long it takes or how fast it goes.

Before each of these the image is cold: no loop device has it, nothing of it is in the page cache, and what it is made
from is (see ``Peer.make_cold``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.bench.peers import Peer
from tests.bench.report import timed
from tests.bench.system import attached, mounted, run

FIO_S: Final = 4
E2FSCK_STATUSES: Final = (0, 4)
"""In order, or with errors that were left: the image of a file system in use has a journal that wants a replay."""

Samples = dict[str, float]
"""Seconds, bytes a second or reads a second, by what was measured."""
Reading = Callable[[Peer, Path, int], Samples]
"""Is given a peer, a folder to mount at, and a number that is another one each time."""


@contextlib.contextmanager
def _files(peer: Peer, folder: Path) -> Iterator[Path]:
    """Have a cold image's file system mounted, by a buffered loop device."""
    peer.make_cold()
    with attached(peer.path, "--read-only") as device, mounted(device, folder, "ro,noload") as files:
        yield files


def tar(peer: Peer, folder: Path, _number: int) -> Samples:
    """Read all files; tar itself would leave out the data if it saw that nobody wants it."""
    with _files(peer, folder) as files:
        script = 'set -o pipefail; tar -cf - -C "$1" . | cat >/dev/null'
        return {"tar": timed(lambda: run("bash", "-c", script, "tar", files))[0]}


def find(peer: Peer, folder: Path, _number: int) -> Samples:
    """Look at all files."""
    with _files(peer, folder) as files:
        return {"find": timed(lambda: run("sh", "-c", 'find "$1" -printf "%s\\n" >/dev/null', "find", files))[0]}


def e2fsck(peer: Peer, _folder: Path, _number: int) -> Samples:
    """Check the file system, in the image file itself."""
    peer.make_cold()
    return {"e2fsck": timed(lambda: run("e2fsck", "-fn", peer.path, statuses=E2FSCK_STATUSES))[0]}


def dd(peer: Peer, _folder: Path, _number: int) -> Samples:
    """Read the image from end to end; then once more, and once more by its other name."""
    peer.make_cold()
    rates = {"dd": _read_through(peer.path), "dd again": _read_through(peer.path)}
    return rates if peer.other is None else {**rates, "dd by its other name": _read_through(peer.other)}


def _read_through(path: Path) -> float:
    size = path.stat().st_size
    return size / timed(lambda: run("dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"))[0] / (1 << 20)


def fio(peer: Peer, _folder: Path, number: int) -> Samples:
    """Read blocks of 4 KiB at random places, in one process and in eight."""
    return {f"fio, {jobs} jobs": _random_reads(peer, jobs, number) for jobs in (1, 8)}


def _random_reads(peer: Peer, jobs: int, number: int) -> float:
    peer.make_cold()
    name = str(peer.path).replace(":", "\\:")
    output = run(
        *("fio", "--name=read", f"--filename={name}", "--readonly", "--rw=randread", "--bs=4k", "--ioengine=psync"),
        # The page cache is as it was left: fio would drop a raw file's, which is all that there is of that.
        *("--direct=0", "--invalidate=0", f"--numjobs={jobs}", "--group_reporting", f"--randseed={number}"),
        *("--time_based", f"--runtime={FIO_S}", "--output-format=json"),
    )
    (group,) = json.loads(output)["jobs"]
    iops: float = group["read"]["iops"]
    return iops


READINGS: Final[dict[str, Reading]] = {"tar": tar, "find": find, "e2fsck": e2fsck, "dd": dd, "fio": fio}
