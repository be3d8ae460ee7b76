"""A volume behind a real daemon, what is expected of it, and how its tree is asked."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from dmafs.units import format_time, parse_canonical
from tests.model.oracle import SECTOR
from tests.mount.expected import Expected, Rules
from tests.mount.harness import REDONE, Rig, spelled

KIB: Final = 1024
CONFIGURATION: Final = 'segment_size = "1MiB"\nsegment_records = 1024\nreserve = 0\ntick_s = 0.05\nidle_images = 2\n'


@dataclass(frozen=True)
class Hold:
    """A past image that is open: as a file, or, with *device*, as the one behind a loop device."""

    seq: int
    fd: int
    device: str = ""


def whole(fd: int, size: int) -> bytes:
    """Read all of a file or device; what the kernel has of it in its cache is forgotten first."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, size, 0)


class MountModel(RuleBasedStateMachine):
    """One volume behind a daemon, and what is expected of it."""

    steps = 0
    counts: ClassVar[Counter[str]] = Counter()
    log = ""  # of the last daemons

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.rng = random.Random(0)
        self.holds: list[Hold] = []
        self.ever_held: set[int] = set()
        self.since_end = 0

    @initialize(
        size=st.sampled_from([256 * KIB, 300 * KIB + SECTOR, 1024 * KIB]),
        empty=st.booleans(),
        rules=st.builds(Rules, st.integers(0, 3), st.booleans()),
    )
    def create(self, size: int, empty: bool, rules: Rules) -> None:  # noqa: FBT001
        content = bytes(size) if empty else self.rng.randbytes(size)
        self.size = size
        self.rig = self.stack.enter_context(Rig())
        self.stack.callback(self._keep_log)
        self.rig.allow(REDONE)
        self.rig.create(size=size, content=content)
        self.retention = rules
        self.rig.configure(CONFIGURATION + rules.table())
        self.tap = -1
        self.stack.callback(self._let_go)
        self._start()
        self.expected = Expected(content, self._time_of(0))

    def _start(self) -> None:
        """Start a daemon; it thins at once, and then once a minute."""
        self.rig.start()
        self.started = time.monotonic()
        self.tap = os.open(self.rig.tap(), os.O_RDWR)
        self.since_end = 0

    def teardown(self) -> None:
        self.stack.close()

    def _keep_log(self) -> None:
        type(self).log = self.rig.log()

    def _let_go(self) -> None:
        """Close everything; of a daemon that was killed that says it is gone."""
        for hold in self.holds:
            self._close(hold)
        self.holds = []
        with contextlib.suppress(OSError):
            os.close(self.tap)

    # -- the tree ---------------------------------------------------------------------------------------------------

    def _time_of(self, seq: int) -> int:
        """Return the time that a seq's canonical name tells."""
        time_ns = parse_canonical(os.readlink(self.rig.mnt / "at" / f"seq:{seq}"))
        assert time_ns is not None
        return time_ns

    def _spellings(self, seq: int) -> list[Path]:
        """Return paths of the image at a reachable seq."""
        time_ns = self.expected.times[seq]
        times = (f"seq:{seq}", format_time(time_ns), spelled(time_ns), f"{spelled(time_ns + 7)}~7ns")
        ids = [name for name, found in self.expected.snapshots.items() if found == seq]
        return [self.rig.at(time) for time in times] + [self.rig.snapshot(name) for name in ids]

    def _seq_of(self, path: Path) -> int:
        return int(os.getxattr(path, "user.dmafs.seq"))

    def _any(self, number: int) -> int:
        """Return a reachable seq: often the mirror's, which a sync takes away first, or one of the newest."""
        seqs = self.expected.reachable()
        if number % 4 == 0:
            return self.expected.mirror_seq
        return seqs[-1 - number // 4 % min(len(seqs), 3)] if number % 4 == 1 else seqs[number % len(seqs)]

    # -- holding ---------------------------------------------------------------------------------------------------

    def _close(self, hold: Hold) -> None:
        with contextlib.suppress(OSError):
            os.close(hold.fd)
        if hold.device:
            self.rig.detach(hold.device)
