"""A rig in a guest: a volume with the dm tap, its daemon, and what stands on its mapped device.

The primary is a loop device over a file of the rig's folder, unless the caller has another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmafs.client import connect
from dmafs.core.ondisk import HEADER_SIZE, RECORD_DTYPE, Flag
from dmafs.taps import loopdev
from dmafs.taps.devicemapper import DeviceMapper
from tests.mount.harness import Rig, run, spelled, wait_until

NODE: Final = Path("/dev/mapper/dmafs-disk")

_KEEPS_LOGS: Final = """
from dmafs.cli.main import entry
from dmafs.taps.dm import DmTap
DmTap.release = lambda *_: None
entry()
"""

GUEST_S: Final = 1200
"""No daemon of a guest lives longer."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: Path) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


class TapRig(Rig):
    """See the module."""

    def __init__(self, *, keeps_logs: bool = False) -> None:
        """Make the scratch folder. With *keeps_logs* the daemon does all that it does, but lets go of no log."""
        super().__init__()
        self.keeps_logs = keeps_logs
        self.source = Path("/nowhere")
        self.machine: Path | None = None
        """The machine's configuration, if it has one."""
        self._loop: loopdev.Loop | None = None

    def program(self) -> list[str]:
        """See ``Rig``."""
        words = [sys.executable, "-c", _KEEPS_LOGS] if self.keeps_logs else super().program()
        return words if self.machine is None else [*words, "--config", str(self.machine)]

    def make_source(self, size: int) -> Path:
        """Make a primary of zeros, and return it."""
        with self.primary().open("wb") as file:
            file.truncate(size)
        self._loop = loopdev.attach(self.primary())
        return self._loop.node

    def protect(
        self, size: int, *, source: Path | None = None, configuration: str = "", protected: bool = True
    ) -> None:
        """Make a volume of a primary of zeros, or of *source*, and start its daemon."""
        self.source = source = source or self.make_source(size)
        self.store.mkdir(mode=0o700, exist_ok=True)
        self.configure(configuration)  # before the first log is made
        self.dmafs("create", self.store, "--source", source, "--tap", "dm")
        self.start(protected=protected, seconds=GUEST_S)

    # -- what stands on the device -----------------------------------------------------------------------------

    def make(self, kind: str, *options: str) -> None:
        """Make a file system on the device."""
        command = {"ext4": ("mkfs.ext4", "-q", "-E", "nodiscard"), "xfs": ("mkfs.xfs", "-q", "-K")}[kind]
        run(*command, *options, NODE)

    @contextlib.contextmanager
    def mounted(self, name: str = "files", device: str | Path = NODE, options: str = "defaults") -> Iterator[Path]:
        """Have a file system be mounted in a folder of the rig."""
        folder = self.folder(name)
        self.mount(str(device), folder, options)
        yield folder
        self.umount(folder)

    @contextlib.contextmanager
    def clone(self, at: int | str, name: str = "clone") -> Iterator[Path]:
        """Have a clone of a moment; yield its loop device. Without commands: those take long to start in a guest."""
        made = self.mnt / "clones" / f"{name}@{at if isinstance(at, str) else spelled(at)}"
        made.mkdir()
        with loopdev.attach(self.mnt / "clones" / name / "disk.img") as loop:
            yield loop.node
        (self.mnt / "clones" / name).rmdir()

    @contextlib.contextmanager
    def replayed(self, kind: str, device: Path, name: str = "past") -> Iterator[Path]:
        """Have a file system be mounted that may have been cut off; the kernel replays its journal."""
        folder = self.folder(name)
        options = {"ext4": "", "xfs": "nouuid"}[kind]  # the one it is a clone of may be mounted, too
        _check(_libc.mount(bytes(device), bytes(folder), kind.encode(), 0, options.encode()), device)
        try:
            yield folder
        finally:
            _check(_libc.umount2(bytes(folder), 0), folder)

    def fsck(self, kind: str, device: Path) -> None:
        """Assert that a file system is clean."""
        run(*{"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-P")}[kind], device)

    @contextlib.contextmanager
    def frozen(self, folder: Path) -> Iterator[None]:
        """Have a file system be at rest."""
        run("fsfreeze", "-f", folder)
        try:
            yield
        finally:
            run("fsfreeze", "-u", folder)

    def copy_primary(self, name: str) -> Path:
        """Copy what the primary holds, past every cache above it."""
        path = self.root / name
        run("dd", f"if={self.source}", f"of={path}", "bs=1M", "iflag=direct", "conv=sparse", "status=none")
        return path

    # -- commands ----------------------------------------------------------------------------------------------

    # As the command does it, but in this process: a command takes seconds to start in a guest.

    def mark(self, name: str) -> None:
        """Set a mark; it has been read back from the log then."""
        with connect(self.store) as asked:
            asked.mark(name)

    def assert_verified(self) -> None:
        """Assert that the newest image is the primary."""
        with connect(self.store) as asked:
            found = asked.verify("disk", 0, lambda _done, _total: None)
        assert found["count"] == 0, found

    def tap_status(self) -> Any:
        """Return what there is to say of device and log."""
        with connect(self.store) as asked:
            return asked.tap("status", "disk")["volumes"][0]

    def detach_tap(self) -> None:
        with connect(self.store) as asked:
            asked.tap("detach", "disk")

    # -- what is in the store ----------------------------------------------------------------------------------

    def logs(self) -> list[Path]:
        """Return the log files that there are, in ascending order."""
        return sorted((self.store / "disk" / "log").glob("*.log"))

    def boundaries(self, flags: Flag = Flag.FLUSH) -> list[tuple[int, int]]:
        """Return the seq and the time of all that the journal's files have of such indicators, one for each seq."""
        found: dict[int, int] = {}
        for path in sorted((self.store / "disk" / "forward").glob("*.ext")):
            content = path.read_bytes()[HEADER_SIZE:]
            records = np.frombuffer(content, RECORD_DTYPE, count=len(content) // RECORD_DTYPE.itemsize)
            for record in records[(records["flags"] & int(flags)) > 0]:
                found[int(record["seq"])] = int(record["time_ns"])
        return sorted(found.items())

    # -- the end -----------------------------------------------------------------------------------------------

    def _take_down(self) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGCONT)
        super()._take_down()
        with DeviceMapper() as dm:
            for name, _ in dm.devices():
                dm.remove(name)
        if self._loop is not None:
            self._loop.close()
        wait_until(lambda: str(self.root) not in run("losetup", "--list", "-O", "BACK-FILE").stdout, "the loop devices")
