"""What a guest does whose power is cut: ``python -m tests.vm.guest.survivor FOLDER WORD...``.

The disks are /dev/ubda, the primary, and /dev/ubdb, which has a file system with the store. What has to be there after
the cut is noted in FOLDER, which is the host's: for each snapshot that has returned its name and the digest of what the
device held then, and the digest of the newest state that is known to be durable. The words:

    create    make the store; serve without waiting for the end of the initial copy
    resume    serve what an earlier guest has left, and check it against the notes
    gap       after a cut there has to be a gap, which has ended now
    whole     after an orderly end there is none
    load      write, and take a named snapshot now and then
    sync      likewise, while one sync follows the other
    detach    stop writing, detach the device, and end
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Final

import xxhash

from dmafs.answers import Status
from dmafs.client import connect
from tests.mount.harness import MIB, Rig, opened, run
from tests.vm.guest.loads import Blocks
from tests.vm.guest.rig import NODE

SIZE: Final = 48 * MIB
SOURCE: Final = Path("/dev/ubda")
STORE_DISK: Final = Path("/dev/ubdb")
DISK: Final = Path("/var/lib/dmafs-disk")
ALLOWED: Final = (
    "a gap is open",
    "gap ended, .* of the source differed",
    "its device was removed",  # as it was told
)


class Survivor(Rig):
    """A rig whose store and primary outlive the guest."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        DISK.mkdir(parents=True)
        self.store = DISK / "store"
        self.notes = folder / "notes"
        self.allow(*ALLOWED)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def note(self, kind: str, name: str, content: bytes) -> None:
        """Write down what has to be there from now on; the host's file has it when this returns."""
        with self.notes.open("a", encoding="ascii") as file:
            file.write(json.dumps([kind, name, xxhash.xxh3_128_hexdigest(content)]) + "\n")

    def noted(self) -> list[tuple[str, str, str]]:
        lines = self.notes.read_text("ascii").splitlines() if self.notes.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def all_status(self) -> Status:
        with connect(self.store) as asked:
            return asked.status()

    # -- words -----------------------------------------------------------------------------------------------------

    def do_create(self) -> None:
        run("mkfs.ext4", "-q", "-E", "nodiscard", STORE_DISK)
        run("mount", STORE_DISK, DISK)
        self.store.mkdir(mode=0o700)
        self.configure("tick_s = 0.2\n")
        self.dmafs("create", self.store, "--source", SOURCE, "--tap", "dm")
        self.start(protected=False)

    def do_resume(self) -> None:
        run("mount", STORE_DISK, DISK)
        self.dmafs("tap", "attach", self.store)
        self.start()
        with connect(self.store) as asked:
            found = asked.verify("disk", 0, lambda _done, _total: None)
        assert found["count"] == 0, found
        primary = read_past_cache(SOURCE)
        assert self.live().read_bytes() == primary, "the newest image isn't the primary"
        kept = [(name, digest) for kind, name, digest in self.noted() if kind == "snapshot"]
        for name, digest in kept:
            assert xxhash.xxh3_128_hexdigest(self.snapshot(name).read_bytes()) == digest, f"snapshot {name} has changed"
        self.say(f"checked {len(kept)} snapshots; {self.status()['gaps']}")

    def do_gap(self) -> None:
        assert self.status()["gaps"], "a power cut is no gap?"
        assert all(gap["end"] is not None for gap in self.status()["gaps"])

    def do_whole(self) -> None:
        assert not self.status()["gaps"]
        state = [digest for kind, _, digest in self.noted() if kind == "end"]
        assert xxhash.xxh3_128_hexdigest(self.live().read_bytes()) == state[-1]

    def do_load(self, *, snapshots: int = 1 << 30) -> bytes:
        """Write and take snapshots until the power is cut, or so many have been taken."""
        prefix = f"s{len(self.noted())}"
        with Blocks(NODE, read_past_cache(NODE), seed=int(os.environ.get("DMAFS_TEST_SEED", "1"))) as blocks:
            for number in range(snapshots):
                blocks.wait_for(30)
                with blocks.at_rest() as content, connect(self.store) as asked:
                    asked.take_snapshot(f"{prefix}-{number}")
                self.note("snapshot", f"{prefix}-{number}", content)
                self.say(f"noted {prefix}-{number}")
        return bytes(blocks.content)

    def do_sync(self) -> None:
        def syncs() -> None:
            while True:
                with connect(self.store) as asked:
                    asked.sync()
                self.say("synced")

        threading.Thread(target=syncs, daemon=True).start()
        self.do_load()

    def do_detach(self) -> None:
        content = self.do_load(snapshots=3)
        self.note("end", "", content)
        with connect(self.store) as asked:
            asked.tap("detach", None)
        assert not NODE.exists()
        self.stop()
        run("umount", DISK)
        self.say("ended in order")


def read_past_cache(device: Path) -> bytes:
    """Return what a device holds; the page cache of one doesn't know what is written through another."""
    content = mmap.mmap(-1, SIZE)
    with opened(device, os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.preadv(fd, [content], 0) == SIZE
    return content[:]


def main() -> None:
    folder, *words = sys.argv[1:]
    with Survivor(Path(folder)) as survivor:
        begun = time.monotonic()
        for word in words:
            survivor.say(f"begin {word} after {time.monotonic() - begun:.1f} s")
            getattr(survivor, f"do_{word}")()
        if survivor.daemon is not None:
            survivor.dmafs("tap", "detach", survivor.store)
            survivor.stop()


if __name__ == "__main__":
    main()
