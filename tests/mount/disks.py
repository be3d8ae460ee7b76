"""A disk for the store that fails, or is slow, when it is told to."""

from __future__ import annotations

import subprocess
import sys

from tests.mount import faulty_disk
from tests.mount.harness import MIB, Rig, is_mounted, wait_until


class Disk:
    """A disk for the store, with a file system; its writes fail or are slow when that is said, until it is mended."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        below = rig.folder("below")
        backing = rig.root / "backing"
        with backing.open("wb") as file:
            file.truncate(256 * MIB)
        self._fault = rig.root / "fault"
        self._process = subprocess.Popen([sys.executable, faulty_disk.__file__, below, backing, self._fault])
        rig._mounts.append(below)
        wait_until(lambda: is_mounted(below), "the faulty disk")
        self.below = below
        self.device = rig.attach(below / "disk")
        rig.mkfs(self.device, "-m", "0")
        self.place = rig.folder("place")
        rig.mount(self.device, self.place)
        rig.store = self.place / "store"

    def fail(self) -> None:
        self._fault.touch()

    def slow_down(self, seconds: float) -> None:
        """Have each write take so long."""
        self._fault.write_text(str(seconds))

    def mend(self) -> None:
        self._fault.unlink(missing_ok=True)

    def end(self) -> None:
        """Take it away; the daemon has ended."""
        self._rig.umount(self.place)
        self._rig.detach(self.device)
        self._rig.umount(self.below)
        assert self._process.wait(30) == 0
