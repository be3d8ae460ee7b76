"""A rig: a scratch folder with primaries, a store, a daemon in a process of its own, loop devices and mounts on top.

Nothing here can hang for ever. Commands have timeouts, and a watchdog kills a daemon that is still there after its
time: then whatever waits for its mount, in this process or in the kernel, gets an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import pytest

from dmafs.client import connect
from dmafs.core.mounts import mounts
from dmafs.core.names import CONFIGURATION_NAME

DMAFS: Final = Path(sys.executable).with_name("dmafs")
MIB: Final = 1 << 20
COMMAND_S: Final = 120
STOP_S: Final = 30
WAIT_S: Final = 60
UNMOUNT_S: Final = 20
WATCHDOG_S: Final = 300

_TROUBLE: Final = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|Error:|Exception")

REDONE: Final = r"not closed in order; \d+ events written to its source again"
"""What a daemon says when the one before it was killed after writes that nobody had flushed."""


def run(
    *command: str | Path, code: int | None = 0, seconds: float = COMMAND_S, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, which has to end with *code* (None: with any) in time; its output is text."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        check=False,
        env={**os.environ, **(env or {})},
    )
    shown = " ".join(str(word) for word in command)
    assert code is None or done.returncode == code, f"{shown} -> {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def wait_until(holds: Callable[[], Any], what: str, *, seconds: float = WAIT_S, every: float = 0.02) -> Any:
    """Poll until something holds, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for: {what}"
        time.sleep(every)
    return found


def is_mounted(point: Path) -> bool:
    return any(mount.point == str(point) for mount in mounts())


def spelled(time_ns: int) -> str:
    """Return the exact spelling of a time that needs no calendar."""
    return f"@{time_ns // 10**9}.{time_ns % 10**9:09}"


def moment() -> int:
    """Return a time after all that has happened and before all that will."""
    time.sleep(0.002)
    now = time.time_ns()
    time.sleep(0.002)
    return now


def pwrite(path: Path, data: bytes, offset: int, *, sync: bool = False) -> None:
    """Write through a descriptor of its own, all of it."""
    with opened(path, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)
        if sync:
            os.fsync(fd)


def pread(path: Path, length: int, offset: int) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def cached_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache."""
    return int(run("fincore", "--noheadings", "--bytes", "--output", "RES", path).stdout.strip() or 0)


def forget(path: Path) -> None:
    """Have the kernel drop its cached pages of a file, so that whoever serves the file has to answer."""

    def none_cached() -> bool:
        with opened(path, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_bytes(path) == 0

    wait_until(none_cached, f"the kernel to forget {path}", seconds=10)


def assert_same(one: Path, other: Path) -> None:
    """Compare two files byte for byte."""
    assert one.stat().st_size > 0
    run("cmp", one, other)


class Rig:
    """See the module. Used as a context manager, which takes everything away at its end."""

    def __init__(self) -> None:
        """Make the scratch folder: not in tmpfs, since source and store have to be real files of some size."""
        self.root = Path(tempfile.mkdtemp(prefix="dmafs-test.", dir=os.environ.get("TMPDIR", "/var/tmp"))).resolve()  # noqa: S108
        self.store = self.root / "store"
        self.mnt = self.root / "mnt"
        self.mnt.mkdir()
        self.daemon: subprocess.Popen[bytes] | None = None
        self._allowed: list[str] = []
        self._logs: list[Path] = []
        self._loops: list[str] = []
        self._mounts: list[Path] = []
        self._watchdog: threading.Timer | None = None

    # -- names ------------------------------------------------------------------------------------------------------

    def primary(self, volume: str = "disk") -> Path:
        return self.root / f"{volume}.primary"

    def tap(self, volume: str = "disk") -> Path:
        return self.mnt / "tap" / f"{volume}.img"

    def live(self, volume: str = "disk") -> Path:
        return self.mnt / "live" / f"{volume}.img"

    def at(self, when: int | str, volume: str = "disk") -> Path:
        return self.mnt / "at" / (when if isinstance(when, str) else spelled(when)) / f"{volume}.img"

    def snapshot(self, name: str, volume: str = "disk") -> Path:
        return self.mnt / "snapshots" / name / f"{volume}.img"

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    # -- commands ---------------------------------------------------------------------------------------------------

    def dmafs(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command line; a traceback is a failure whatever the exit code."""
        done = run(DMAFS, *arguments, code=code)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def create(self, volume: str = "disk", *, size: int = 16 * MIB, content: bytes = b"") -> Path:
        """Make a primary that begins with *content*, and a volume for it."""
        primary = self.primary(volume)
        with primary.open("wb") as file:
            file.write(content)
            file.truncate(size)
        self.dmafs("create", self.store, volume, "--source", primary)
        if not (self.store / CONFIGURATION_NAME).exists():
            self.configure("")
        return primary

    def configure(self, text: str) -> None:
        """Write dmafs.conf. Unless *text* has the table, nothing happens by itself: neither a full hour nor a full disk
        of the machine's makes a difference.
        """
        off = {"[snapshots]": "every = 0", "[sync]": 'age = "0s"\nfree = "0%"', "[alarms]": 'free = "0%"'}
        quiet = "".join(f"{table}\n{keys}\n" for table, keys in off.items() if table not in text)
        (self.store / CONFIGURATION_NAME).write_text(f"{text}\n{quiet}")

    def put_store_on_disk(self, size: int) -> Path:
        """Put the store, before it is made, on a file system of its own; return where that is mounted."""
        image = self.root / "store.disk"
        with image.open("wb") as file:
            file.truncate(size)
        device = self.attach(image)
        self.mkfs(device, "-m", "0", "-O", "^has_journal")
        place = self.folder("small")
        self.mount(device, place)
        self.store = place / "store"
        return place

    def status(self, volume: str = "disk") -> dict[str, Any]:
        """Ask the running daemon, without the start-up time of a command."""
        assert self.daemon is not None
        assert self.daemon.poll() is None, "the daemon has ended"
        with connect(self.store) as asked:
            reports: Any = asked.status()["volumes"]
        return next(report for report in reports if report["name"] == volume)

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def program(self) -> list[str]:
        """Return the words with which the daemon is called."""
        return [str(DMAFS)]

    def start(self, *, protected: bool = True, seconds: float = WATCHDOG_S) -> None:
        """Start the daemon, wait for its mount and, unless told otherwise, for the end of the initial copy."""
        assert self.daemon is None
        log = self.root / f"daemon.{len(self._logs)}.log"
        self._logs.append(log)
        with log.open("wb") as output:
            self.daemon = daemon = subprocess.Popen(
                [*self.program(), "serve", str(self.store), str(self.mnt)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._watchdog = threading.Timer(seconds, daemon.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

        def is_serving() -> bool:
            assert daemon.poll() is None, "the daemon has ended"
            return "dmafs: serving" in log.read_text() and is_mounted(self.mnt)

        wait_until(is_serving, "the mount")
        if protected:
            self.wait_protected()

    def wait_protected(self) -> None:
        def all_protected() -> bool:
            assert self.daemon is None or self.daemon.poll() is None, "the daemon has ended"
            with connect(self.store) as asked:
                return all(report["state"] == "protected" for report in asked.status()["volumes"])

        wait_until(all_protected, "the initial copy")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell the daemon to end; it has to do so in time, with exit code 0 and unmounted."""
        daemon = self._daemon_to_end()
        daemon.send_signal(number)
        code = daemon.wait(STOP_S)
        self._ended()
        assert code == 0, f"the daemon ended with {code} after {number.name}"
        assert not is_mounted(self.mnt), "the daemon left its mount behind"
        assert os.listdir(self.mnt) == []

    def kill(self) -> None:
        """Kill the daemon as hard as can be."""
        daemon = self._daemon_to_end()
        daemon.kill()
        assert daemon.wait(STOP_S) == -signal.SIGKILL
        self._ended()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _daemon_to_end(self) -> subprocess.Popen[bytes]:
        assert self.daemon is not None
        assert self.daemon.poll() is None, "the daemon had ended before it was told to"
        return self.daemon

    def _ended(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = self.daemon = None

    # -- what stands on the tree ---------------------------------------------------------------------------------------

    def attach(self, path: Path, *options: str) -> str:
        """Return a loop device over a file. Others on the machine take free ones too: try again."""
        for _ in range(10):
            done = run("losetup", "-f", "--show", *options, path, code=None)
            if done.returncode == 0:
                self._loops.append(device := done.stdout.strip())
                return device
            time.sleep(0.1)
        raise AssertionError(f"losetup: {done.stderr}")

    def detach(self, device: str) -> None:
        run("losetup", "-d", device)
        wait_until(lambda: not self._is_ours(device), f"{device} to be detached", seconds=10)
        self._loops.remove(device)

    def _is_ours(self, device: str) -> bool:
        backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
        try:
            return backing.read_text().startswith(str(self.root))
        except OSError:
            return False

    def mkfs(self, device: str, *options: str) -> None:
        run("mkfs.ext4", "-q", *options, device)

    def mount(self, device: str, folder: Path, options: str = "defaults") -> None:
        run("mount", "-o", options, device, folder)
        self._mounts.append(folder)

    def umount(self, folder: Path, *options: str) -> None:
        """Unmount. Others on the machine may be looking at it: try again."""
        wait_until(lambda: run("umount", *options, folder, code=None).returncode == 0, f"umount {folder}", seconds=10)
        self._mounts.remove(folder)

    # -- the daemon's log ----------------------------------------------------------------------------------------------

    def allow(self, *patterns: str) -> None:
        """Say which trouble in the daemon's log this test brings about."""
        self._allowed += patterns

    def log(self) -> str:
        """Return the logs of all daemons so far."""
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self._logs)

    def trouble(self) -> list[str]:
        """Return the lines of the log that no test allowed."""
        lines = [line for line in self.log().splitlines() if _TROUBLE.search(line)]
        return [line for line in lines if not any(re.search(pattern, line) for pattern in self._allowed)]

    # -- the end -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._take_down()
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
        left = [mount.point for mount in mounts() if mount.point.startswith(f"{self.root}/")]
        assert not left, f"mounts are left: {left}"
        trouble = self.trouble()
        shutil.rmtree(self.root)
        assert not trouble, "unexpected in the daemon's log:\n" + "\n".join(trouble)

    def _take_down(self) -> None:
        """Undo all in reverse order, by force where it doesn't go otherwise."""
        for folder in reversed(self._mounts):
            self._patiently("fsfreeze", "-u", folder)
            if is_mounted(folder) and not self._patiently("umount", folder):
                self._kill_now()  # what hangs on it gets an error instead
                self._patiently("umount", "-l", folder)
        for device in reversed(self._loops):
            if self._is_ours(device) and not self._patiently("losetup", "-d", device):
                self._kill_now()
                self._patiently("losetup", "-d", device)
        if self.daemon is not None:
            self.daemon.terminate()
            try:
                self.daemon.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._kill_now()
        for mount in mounts():
            if mount.point.startswith(f"{self.root}/"):
                self._patiently("fusermount3", "-u", "-z", mount.point)
        # A detached loop device holds its file until the last user, such as udev, is gone.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(map(self._is_ours, self._loops)), "the loop devices", seconds=10)

    def _kill_now(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(STOP_S)

    def _patiently(self, *command: str | Path) -> bool:
        """Run a command but don't wait for ever, nor for one that hangs in the kernel; say whether it succeeded."""
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return process.wait(UNMOUNT_S) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False


def fails(code: int, function: Callable[..., object], *arguments: object) -> None:
    """Assert that the kernel answers a call with errno *code*."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what matters
        function(*arguments)
    assert caught.value.errno == code, caught.value
