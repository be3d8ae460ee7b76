"""What starts a daemon in the background, with one that is none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest

from tests.journald import FakeJournal

BEFORE = """\
import logging, os, pathlib, signal, sys
from dmafs.service import background, logs
folder = pathlib.Path(sys.argv[1])
background.JOURNAL_STDOUT = folder / "stdout"
logs.JOURNAL_SOCKET = folder / "socket"
logs.set_up(logging.INFO, os.environ)
def daemon(starter):
"""
AFTER = """
sys.exit(background.start(daemon, folder / "log"))
"""


def started(folder: Path, body: str) -> subprocess.Popen[str]:
    code = BEFORE + "".join(f"    {line}\n" for line in body.splitlines()) + AFTER
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True)


def errors(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stderr is not None
    return process.stderr


@pytest.mark.parametrize(
    ("end", "status"), [("return 0", 0), ("return 7", 7), ("raise ValueError", 1), ("os.kill(os.getpid(), 9)", 137)]
)
def test_what_ends_before_it_is_ready_has_its_own_status(tmp_path: Path, end: str, status: int) -> None:
    """And all of its words are on stderr."""
    with started(tmp_path, f"logging.error('said')\n{end}") as process:
        assert process.wait(20) == status
        assert errors(process).readline() == "dmafs: ERROR: said\n"
    assert not (tmp_path / "log").exists()


def test_what_is_ready_has_let_go_of_everything(tmp_path: Path) -> None:
    """Input, output, errors, session and folder are its own; what it says is in the file then."""
    body = """\
starter.tell("STATUS=beginning")
logging.info("before")
starter.tell("READY=1", "WATCHDOG=1")
starter.tell("READY=1", "STATUS=well")
logging.info("after")
logging.info("%s %s %s", os.getsid(0) == os.getpid(), os.getcwd(), [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1)])
return 0"""
    with started(tmp_path, body) as process:
        assert process.wait(20) == 0
        assert errors(process).read() == "dmafs: INFO: before\n"  # its end: nobody has it open any more
    assert (tmp_path / "log").read_text() == "dmafs: INFO: after\ndmafs: INFO: True / ['/dev/null', '/dev/null']\n"


def test_a_log_file_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    """On the stderr that is still there."""
    (tmp_path / "log").mkdir()
    with started(tmp_path, "starter.tell('READY=1')\nlogging.error('lost')\nreturn 0") as process:
        assert process.wait(20) == 0
        assert errors(process).read() == f"dmafs: WARNING: no more messages: {tmp_path}/log: is a directory\n"


def test_a_journal_has_all_that_comes_after_the_start(tmp_path: Path) -> None:
    """As entries, and what else is on stderr, such as a traceback, as lines, of the same identifier."""
    with closing(FakeJournal(tmp_path / "socket")) as journal, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "stdout"))
        listening.listen()
        listening.settimeout(20)
        body = "starter.tell('READY=1')\nlogging.warning('volume %s: x', 'disk')\nraise ValueError('on purpose')"
        with started(tmp_path, body) as process:
            assert process.wait(20) == 0
            assert errors(process).read() == ""
        stream, _ = listening.accept()
        with stream, stream.makefile() as lines:
            assert [lines.readline() for _ in range(7)] == ["dmafs\n", "\n", "6\n", "1\n", "0\n", "0\n", "0\n"]
            assert lines.read().endswith("ValueError: on purpose\n")
        entry = journal.take()
        assert (entry["MESSAGE"], entry["DMAFS_VOLUME"]) == ("volume disk: x", "disk")
    assert not (tmp_path / "log").exists()


def test_an_interrupt_ends_what_is_not_ready(tmp_path: Path) -> None:
    """Its end is waited for."""
    body = """\
signal.signal(signal.SIGTERM, lambda *_: (print("ended", file=sys.stderr, flush=True), os._exit(0)))
print("begun", file=sys.stderr, flush=True)
while True:
    signal.pause()"""
    with started(tmp_path, body) as process:
        assert errors(process).readline() == "begun\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) != 0
        text = errors(process).read()
    assert text.startswith("ended\nTraceback")
    assert text.endswith("KeyboardInterrupt\n")
