"""What benchmarks of the whole program stand on: commands, a daemon from this tree, loop devices and mounts.

Whatever is begun here ends with its context manager. A command that fails ends the benchmark, with what it said.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from dmafs.client import connect
from tests.mount import harness
from tests.mount.harness import is_mounted

ROOT: Final = Path(__file__).parents[2]
DMAFS: Final = (sys.executable, "-c", "from dmafs.cli.main import entry; entry()")
WAIT_S: Final = 120

wait_until: Final = partial(harness.wait_until, seconds=WAIT_S)


def run(*command: str | Path, env: Mapping[str, str] | None = None, statuses: tuple[int, ...] = (0,)) -> str:
    """Run a command, which has to end with one of *statuses*; return its output."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, **(env or {})},
    )
    if done.returncode not in statuses:
        sys.exit(f"bench: {shlex.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def dmafs(*arguments: str | Path) -> str:
    """Run a command of dmafs, as it is in this tree."""
    return run(*DMAFS, *arguments)


@contextlib.contextmanager
def process(*command: str | Path, log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process that is told to end at the end, and is waited for; what it says goes to *log*."""
    with log.open("wb") as output:
        begun = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # an interrupt from the terminal is for the benchmark, which ends all in order
        )
    try:
        yield begun
    finally:
        begun.terminate()
        try:
            begun.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            begun.kill()
            begun.wait()


@contextlib.contextmanager
def serving(
    point: Path, *command: str | Path, log: Path, folder: bool = False, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Have a process that mounts a file or a folder at *point*; yield its id once that is there."""
    _unmount(point)
    if folder:
        point.mkdir(exist_ok=True)
    else:
        point.touch()
    with contextlib.ExitStack() as stack:
        stack.callback(_unmount, point)
        begun = stack.enter_context(process(*command, log=log, env=env))

        def is_ready() -> bool:
            if begun.poll() is not None:
                sys.exit(f"bench: {command[0]} ended with {begun.returncode}:\n{log.read_text()}")
            return is_mounted(point)

        wait_until(is_ready, f"a mount at {point}")
        yield begun.pid


def _unmount(point: Path) -> None:
    """Take away what a process that has ended may have left mounted: borg does, and who is killed."""
    if is_mounted(point):
        run("umount", point)


@contextlib.contextmanager
def served(store: Path, point: Path) -> Iterator[int]:
    """Have a daemon of a store, whose volumes are protected; yield its process id."""
    log = point.with_name(point.name + ".log")
    with serving(point, *DMAFS, "serve", store, point, log=log, folder=True) as pid:
        wait_until(lambda: all(volume["state"] == "protected" for volume in status(store)), "the initial copy")
        yield pid


def status(store: Path) -> Any:
    """Ask the daemon of a store for the state of its volumes."""
    with connect(store) as asked:
        return asked.status()["volumes"]


@contextlib.contextmanager
def attached(path: Path, *options: str) -> Iterator[str]:
    """Have a loop device over a file; yield its name."""
    device = run("losetup", "--find", "--show", *options, path).strip()
    backing = Path("/sys/block") / Path(device).name / "loop" / "backing_file"
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        # Who else looks at the device, such as udev, keeps it for a moment.
        wait_until(lambda: not _reads(backing).startswith(str(path)), f"{device} to be detached")


def _reads(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def mounted(device: str, folder: Path, options: str = "defaults") -> Iterator[Path]:
    """Have a file system mounted; yield where."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", options, device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
