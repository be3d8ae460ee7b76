"""Claims about dmafs.service.privileges: the list is right, and it is what the manuals say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmafs.service.privileges import ALWAYS, HOOKS, NEEDS, needed

ROOT = Path(__file__).parents[2]
LINUX = Path("/usr/include/linux/capability.h")


def names(mask: int) -> set[str]:
    return {need.name for need in NEEDS if mask >> need.number & 1}


def test_the_numbers_are_the_kernels() -> None:
    """Each capability has the number that Linux gives it, and a reason."""
    numbers = dict(re.findall(r"#define (CAP_\w+)\s+(\d+)", LINUX.read_text()))
    for need in NEEDS:
        assert int(numbers[need.name]) == need.number
        assert need.reason
        assert need.when in {ALWAYS, HOOKS, "fuse", "dm", "log", "none"}
    assert len({need.number for need in NEEDS}) == len(NEEDS)


def test_only_what_there_is_needs_something() -> None:
    """What a tap or a hook needs is kept only where there is one."""
    always = {"CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"}
    assert names(needed({"fuse"}, hooks=False)) == names(needed({"log"}, hooks=False)) == always
    assert names(needed({"fuse", "dm"}, hooks=False)) == always | {"CAP_MKNOD", "CAP_SYSLOG"}
    assert names(needed({"fuse"}, hooks=True)) == always | {"CAP_SETUID", "CAP_SETGID", "CAP_KILL"}
    assert needed({"fuse"}, hooks=False).bit_count() == 2


@pytest.mark.parametrize("manual", ["README.md", "man/dmafs.1"])
def test_the_manuals_name_all_of_them(manual: str) -> None:
    """Neither more nor fewer."""
    assert set(re.findall(r"CAP_[A-Z_]+", (ROOT / manual).read_text())) == {need.name for need in NEEDS}


def test_nothing_begins_a_thread_before_rights_are_dropped() -> None:
    """They are a thread's own: one that begins before keeps what it has. Whatever the daemon imports begins none."""
    program = "import os, dmafs.service.daemon; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
