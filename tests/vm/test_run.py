"""Claims about contrib/uml/run, which every other test of guests rests on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.harness import wait_until
from tests.vm.harness import DIED, LATE, RUN, WRONG, Guest

MIB = 1 << 20


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the work directories of guests made in a folder of the test."""
    works = tmp_path / "works"
    works.mkdir()
    monkeypatch.setenv("TMPDIR", str(works))
    return works


def processes(works: Path) -> list[str]:
    """Return the command lines of the processes that know a work directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if str(works) in line:
            found.append(line)
    return found


def assert_nothing_is_left(works: Path) -> None:
    wait_until(lambda: not processes(works), "the guest's processes to be gone", seconds=10)
    wait_until(lambda: not list(works.iterdir()), "the work directory to be gone", seconds=10)


def test_a_command_runs_as_root_and_its_status_is_the_runners(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, arguments with blanks, current directory, environment and exit status come through; nothing is left."""
    monkeypatch.setenv("DMAFS_TEST_WORD", "one  'word")
    program = (
        "import os, sys; print(os.getuid(), sys.argv[1], os.getcwd(), os.environ['DMAFS_TEST_WORD']); sys.exit(17)"
    )
    with Guest(tmp_path / "rig", sys.executable, "-c", program, "two  words'") as guest:
        said = guest.wait(code=17)
    assert said == f"0 two  words' {Path.cwd()} one  'word\n"
    assert_nothing_is_left(places)


def test_the_guest_has_what_the_tests_need(tmp_path: Path) -> None:
    """Device-mapper, loop devices, FUSE and an ext4 at /var/tmp are there."""
    program = "ls /dev/mapper/control /dev/loop-control /dev/fuse && stat -f -c %T /var/tmp && modprobe dm-flakey"
    with Guest(tmp_path / "rig", "bash", "-c", program) as guest:
        said = guest.wait()
    assert said.split() == ["/dev/fuse", "/dev/loop-control", "/dev/mapper/control", "ext2/ext3"]


def test_only_bound_folders_are_written_to(tmp_path: Path) -> None:
    """What the guest writes to a bound folder stays; what it writes elsewhere, or to a folder to see, doesn't."""
    seen, elsewhere = tmp_path / "seen", tmp_path.parent / f"{tmp_path.name}-elsewhere"
    seen.mkdir()
    (seen / "old").write_text("old")
    program = f"cat {seen}/old && echo new >{seen}/old && echo x >{tmp_path}/rig/stays && echo x >{elsewhere}; ls /"
    with Guest(tmp_path / "rig", "bash", "-c", program, options=("--see", seen)) as guest:
        guest.wait()
    assert (tmp_path / "rig" / "stays").read_text() == "x\n"
    assert (seen / "old").read_text() == "old"
    assert not elsewhere.exists()


def test_a_power_cut_keeps_what_the_disk_has_got(tmp_path: Path, places: Path) -> None:
    """What was synced is in the image after a cut, what the guest had only in memory isn't. A new guest starts."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    before = f"""
import os
fd = os.open("/dev/ubda", os.O_RDWR)
os.pwrite(fd, b"synced!!" * 512, 0)
os.fsync(fd)
os.pwrite(fd, b"unsynced" * 512, {MIB})
print("written", flush=True)
import time
time.sleep(1000)
"""
    after = f"import os; fd = os.open('/dev/ubda', os.O_RDWR); print(os.pread(fd, 8, 0), os.pread(fd, 8, {MIB}))"
    with Guest(tmp_path / "rig", sys.executable, "-c", before, options=("--disk", image)) as guest:
        guest.wait_for("written")
        guest.cut_power()
    assert_nothing_is_left(places)
    with Guest(tmp_path / "rig", sys.executable, "-c", after, options=("--disk", image)) as guest:
        assert guest.wait() == f"{b'synced!!'!r} {bytes(8)!r}\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_whatever_ends_the_runner_ends_the_guest(
    tmp_path: Path, places: Path, number: signal.Signals, code: int
) -> None:
    """After a signal to the runner, even one that it can't see, neither processes nor files are left."""
    with Guest(tmp_path / "rig", "bash", "-c", "echo ready; exec sleep 1000") as guest:
        guest.wait_for("ready")
        guest.signal(number)
        guest.wait(code=code)
    assert_nothing_is_left(places)


def test_a_guest_that_dies_is_told_from_a_command_that_fails(tmp_path: Path, places: Path) -> None:
    """A reset without an exit status has a status of its own, and shows what the kernel said."""
    with Guest(tmp_path / "rig", "bash", "-c", "echo b >/proc/sysrq-trigger; sleep 1000") as guest:
        said = guest.wait(code=DIED)
    assert "the guest died" in said
    assert "Resetting" in said
    assert_nothing_is_left(places)


def test_the_time_limit_holds(tmp_path: Path, places: Path) -> None:
    """A guest that takes longer is killed, with a status of its own."""
    with Guest(tmp_path / "rig", "sleep", "1000", options=("--seconds", "4")) as guest:
        assert "killed after 4 s" in guest.wait(code=LATE)
    assert_nothing_is_left(places)


@pytest.mark.parametrize(
    "words",
    [[], ["--disk", "/nowhere", "true"], ["--memory", "lots", "true"], ["--bind", "/etc/passwd", "true"], ["--x"]],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_wrong_usage_is_refused_before_anything_is_made(words: list[str], places: Path) -> None:
    """Wrong usage has a status of its own, a message and a hint where there is one."""
    done = subprocess.run([RUN, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == WRONG
    assert done.stderr.startswith("contrib/uml/run: error: ")
    assert not list(places.iterdir())
