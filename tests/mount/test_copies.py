"""``dmafs at`` and ``dmafs cp`` as a person uses them: what a time means, and the bytes of it as a file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dmafs.cli.main import main
from tests.mount.harness import (
    DMAFS,
    MIB,
    REDONE,
    Rig,
    moment,
    opened,
    pread,
    pwrite,
    run,
    spelled,
    wait_until,
)

pytestmark = pytest.mark.mount

SIZE = 24 * MIB
SEED = 20260728


class History:
    """A disk that is written to at random, and what it held at some moments: the oracle."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._random = random.Random(SEED)
        self._now = bytearray(SIZE)
        self.moments: dict[int, bytes] = {}
        rig.create(size=SIZE)
        rig.start()

    def write(self, count: int) -> None:
        """Write here and there, zeros too; not beyond the middle but for one place."""
        with opened(self._rig.tap(), os.O_WRONLY) as fd:
            for _ in range(count):
                length, offset = self._random.randrange(1, 200) * 512, self._random.randrange(SIZE // 1024) * 512
                data = bytes(length) if self._random.random() < 0.2 else self._random.randbytes(length)
                os.pwrite(fd, data, offset)
                self._now[offset : offset + length] = data
            os.pwrite(fd, b"end!", SIZE - 4)
            self._now[-4:] = b"end!"
            os.fsync(fd)

    def note(self) -> int:
        when = moment()
        self.moments[when] = bytes(self._now)
        return when


@contextmanager
def coarsening(rig: Rig) -> Iterator[list[int]]:
    """Have syncs go on, and snapshots be dropped, all the time; yields a list whose length is how often."""
    ended, rounds = threading.Event(), [0]

    def work() -> None:
        while not ended.is_set():
            pwrite(rig.tap(), os.urandom(4096), SIZE // 2 + 4096 * len(rounds), sync=True)
            rig.dmafs("sync", rig.store)
            for name in sorted(os.listdir(rig.mnt / "snapshots")):
                if name != "latest":
                    os.rmdir(rig.mnt / "snapshots" / name)
            rounds.append(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rounds
    finally:
        ended.set()
        thread.join()


def goes_on(rounds: list[int], before: int) -> None:
    wait_until(lambda: len(rounds) > before, "a sync")


def data_in(expected: bytes) -> int:
    """Return the bytes of the blocks that aren't zeros."""
    return int(np.frombuffer(expected, np.uint8).reshape(-1, 4096).any(axis=1).sum()) * 4096


def parts_of(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part")]


def test_cp_is_the_oracles_bytes_by_every_way(rig: Rig) -> None:
    """Through the tree, through the socket where the tree isn't to be seen, and without a daemon; with holes."""
    history = History(rig)
    for _ in range(2):
        history.write(40)
        history.note()
    out = rig.root / "out.img"
    for when, expected in history.moments.items():
        said = rig.dmafs("cp", rig.store, f"disk@{spelled(when)}", out, "--force").stdout
        assert "copied to" in said
        assert out.read_bytes() == expected
        assert out.stat().st_mode & 0o7777 == 0o600
        data = data_in(expected)
        assert out.stat().st_blocks * 512 <= data + MIB < SIZE
        hidden = ["unshare", "-m", "sh", "-c", 'umount -l "$0" && exec "$@"', str(rig.mnt)]
        out.unlink()
        run(*hidden, DMAFS, "cp", rig.store, f"@{spelled(when)}", out)
        assert out.read_bytes() == expected
        piped = subprocess.run(
            [DMAFS, "cp", rig.store, f"@{spelled(when)}", "-", "--offset", "4K", "--length", "1234567"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert piped.stdout == expected[4096 : 4096 + 1234567]
    rig.stop()
    for when, expected in history.moments.items():
        report = json.loads(rig.dmafs("cp", rig.store, f"@{spelled(when)}", out, "--force", "--json").stdout)
        assert out.read_bytes() == expected
        assert (report["bytes"], report["offset"]) == (SIZE, 0)
        assert report["data_bytes"] == data_in(expected)
    rig.dmafs("cp", rig.store, f"@{spelled(when)}", out, "--force", "--offset", "1000", "--length", "9001")
    assert out.read_bytes() == expected[1000:10001]
    assert parts_of(rig.root) == []


def test_cp_while_syncs_and_drops_go_on(rig: Rig) -> None:
    """What is copied is all of one moment, the one that is told, whatever is synced and dropped meanwhile."""
    history = History(rig)
    history.write(60)
    when = history.note()
    rig.dmafs("snapshot", "create", rig.store, "kept")
    held = rig.at(when).open("rb")
    expected = history.moments[when]
    with held, coarsening(rig) as rounds:
        for number in range(3):
            before = len(rounds)
            out = rig.root / f"out.{number}"
            report = json.loads(rig.dmafs("cp", rig.store, "@0s ago", out, "--json").stdout)
            copied = out.read_bytes()
            assert copied[: SIZE // 2] == expected[: SIZE // 2]
            rest = copied[SIZE // 2 + 4096 :]
            written = [at for at in range(0, len(rest) - 4096, 4096) if any(rest[at : at + 4096])]
            assert written == list(range(0, 4096 * len(written), 4096)), "a prefix of what was written"
            assert report["at"] == report["time"].replace(":", "")
            goes_on(rounds, before)
        held.seek(0)
        assert held.read() == expected


def test_cp_to_a_device(rig: Rig) -> None:
    """Only with --force, only onto one that is large enough and that nobody uses; zeros overwrite what was there."""
    history = History(rig)
    history.write(40)
    when = f"@{spelled(history.note())}"
    target, small = rig.root / "target", rig.root / "small"
    target.write_bytes(b"\xff" * (SIZE + MIB))
    small.write_bytes(bytes(MIB))
    device, little = rig.attach(target), rig.attach(small)
    assert "--force" in rig.dmafs("cp", rig.store, when, device, code=7).stderr
    assert "less than" in rig.dmafs("cp", rig.store, when, little, "--force", code=3).stderr
    rig.dmafs("cp", rig.store, when, device, "--force")
    assert pread(Path(device), SIZE, 0) == history.moments[max(history.moments)]
    assert pread(Path(device), MIB, SIZE) == b"\xff" * MIB
    with opened(Path(device), os.O_RDONLY | os.O_EXCL):
        assert "in use" in rig.dmafs("cp", rig.store, when, device, "--force", code=2).stderr


def test_cp_refuses_what_it_can_not_do(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with a reason and a status of its own; nothing is left behind and nothing is harmed."""
    history = History(rig)
    history.write(5)
    out, before = rig.root / "out", rig.primary().read_bytes()
    out.write_text("mine")
    for what, target, options, code, said in (
        ("@0s ago", out, (), 7, "--force replaces it"),
        ("@0s ago", rig.root, (), 3, "is a directory"),
        ("@0s ago", "/dev/null", ("--force",), 3, "neither a file nor a block device"),
        ("@0s ago", rig.root / "none" / "out", (), 2, "no such file or directory"),
        ("@0s ago", rig.primary(), ("--force",), 6, "is a source of this store"),
        ("@0s ago", rig.store / "out", (), 6, "is inside the store"),
        ("disk", rig.root / "new", (), 3, "is not VOLUME@TIME"),
        ("nope@0s ago", rig.root / "new", (), 22, "there is no volume nope"),
        ("@2020-01-01 00:00", rig.root / "new", (), 21, "before the first recoverable point"),
        ("@0s ago", rig.root / "new", ("--offset", "1T"), 3, "is not within"),
        ("@0s ago", rig.root / "new", ("--length", "many"), 3, "not understood"),
        ("@0s ago", "-", ("--json",), 3, "no place"),
    ):
        assert main(["cp", str(rig.store), what, str(target), *options]) == code
        assert said in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert rig.primary().read_bytes() == before
    assert not (rig.root / "new").exists()
    assert parts_of(rig.root) == []


def test_cp_that_can_not_be_finished_leaves_nothing(rig: Rig) -> None:
    """A full disk, and a daemon that is killed meanwhile: an error, the old file stays, nothing of the new one."""
    rig.allow(REDONE)
    history = History(rig)
    history.write(200)
    small = rig.root / "small.disk"
    with small.open("wb") as file:
        file.truncate(4 * MIB)
    place = rig.folder("place")
    device = rig.attach(small)
    rig.mkfs(device, "-m", "0", "-O", "^has_journal")
    rig.mount(device, place)
    (place / "out").write_text("mine")
    assert "no space left" in rig.dmafs("cp", rig.store, "@0s ago", place / "out", "--force", code=2).stderr
    assert (place / "out").read_text() == "mine"
    assert parts_of(place) == []
    with subprocess.Popen(
        [DMAFS, "cp", rig.store, "@0s ago", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as cp:
        assert cp.stdout is not None
        assert cp.stderr is not None
        cp.stdout.read(MIB)
        rig.kill()
        cp.stdout.read()
        assert b"dmafs: error:" in cp.stderr.read()
    assert cp.returncode not in {0, 1}


def test_at_explains_a_time(rig: Rig) -> None:
    """Each kind of moment: a write, a mark, the mirror, a snapshot before it; and what isn't there."""
    rig.create()
    rig.start()
    first = json.loads(rig.dmafs("at", rig.store, "0s ago", "--json").stdout)["volumes"][0]
    assert (first["kind"], first["seq"], first["consistency"]) == ("origin", 0, "exact")
    pwrite(rig.tap(), b"one", 0)
    pwrite(rig.tap(), b"two", 0, sync=True)
    rig.dmafs("mark", rig.store, "here")
    when = spelled(moment())
    pwrite(rig.tap(), b"three", 0, sync=True)
    text = rig.dmafs("at", rig.store, when).stdout
    assert "volume disk: mark here, seq 2" in text
    assert "the last write at or before that time is" in text
    assert "the next write is" in text
    [found] = json.loads(rig.dmafs("at", rig.store, "seq:1", "--json").stdout)["volumes"]
    assert (found["kind"], found["consistency"], found["earlier_ns"]) == ("write", "crash", 0)
    assert found["path"] == str(rig.mnt / "at" / os.readlink(rig.mnt / "at" / "seq:1") / "disk.img")
    assert pread(Path(found["path"]), 3, 0) == b"one"
    rig.dmafs("snapshot", "create", rig.store, "kept")
    pwrite(rig.tap(), b"four", 0, sync=True)
    rig.dmafs("sync", rig.store)
    assert "volume disk: snapshot kept, seq 3" in rig.dmafs("at", rig.store, "kept").stdout
    text = rig.dmafs("at", rig.store, when).stdout
    assert "there are only snapshots" in text
    assert f"seq {first['seq']}" in text
    assert "volume disk: mirror, seq 4" in rig.dmafs("at", rig.store, "0s ago").stdout
    for time, said in (
        ("2020-01-01 00:00", "history begins at"),
        ("2100-01-01 00:00", "is in the future"),
        ("sometime", "no snapshot or mark named sometime"),
        ("10m ago", "not understood"),
    ):
        assert said in rig.dmafs("at", rig.store, time, code=21).stderr
    assert "no volume nope" in rig.dmafs("at", rig.store, "kept", "--volume", "nope", code=22).stderr
    rig.stop()
    text = rig.dmafs("at", rig.store, "kept").stdout
    assert "snapshot kept" in text
    assert "path" not in text
